"""Where metrics go: a line on the console, a line of metrics.jsonl, the same keys in wandb."""

import contextlib
import errno
import http.client
import importlib.util
import json
import math
import netrc
import os
import secrets
import ssl
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from errors import UserError

import numpy as np

from files import atomic_write
from training.config import LogConfig

WANDB_SECONDS = 15              # the longest that starting an online run may take
LINE_SECONDS = 5                # between two lines in a log file; a terminal's is rewritten
Record = dict[str, Any]         # a line of metrics.jsonl: step, tokens, seconds and metrics by name


# --- metrics.jsonl ----------------------------------------------------------------------------

class Metrics:
    """metrics.jsonl: a line per logged step. Each is written in one piece, unbuffered."""

    def __init__(self, path: Path, step: int):
        """Opens the file to go on from `step`: lines of later steps are dropped, since those
        updates will be made again."""
        self.path = path
        with atomic_write(path) as file:
            file.writelines(line for line, record in _records(path) if record["step"] <= step)
        # One write per line, so that a kill cannot tear it.
        self.file = open(path, "ab", buffering=0)               # noqa: SIM115

    def read(self) -> list[Record]:
        """All records so far, oldest first."""
        return read_metrics(self.path)

    def write(self, record: Record) -> None:
        values = {name: _finite(value) for name, value in record.items()}
        line = (json.dumps(values) + "\n").encode()
        if os.fstat(self.file.fileno()).st_nlink == 0:          # it would keep none of its lines
            raise FileNotFoundError(errno.ENOENT, "was deleted while it was written",
                                    str(self.path))
        written = self.file.write(line)
        if written != len(line):                # a full disk takes a part of it: take that back
            self.file.truncate(self.file.seek(0, os.SEEK_END) - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        self.file.close()


def read_metrics(path: Path) -> list[Record]:
    """The records of a metrics.jsonl, oldest first."""
    return [record for _, record in _records(path)]


def _records(path: Path) -> Iterator[tuple[bytes, Record]]:
    """Each line with its record. A line torn by a kill is left out."""
    if not path.exists():
        return
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            record = json.loads(line)
            step = record["step"]
        except (ValueError, KeyError, TypeError):
            continue
        if line.endswith(b"\n") and isinstance(step, int):
            yield line, record


def _finite(value: Any) -> Any:
    """A number, or a list of numbers, with None for what is not finite: JSON has no nan."""
    if isinstance(value, list):
        return [_finite(number) for number in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


# --- console ----------------------------------------------------------------------------------

class Console:
    """The progress line: rewritten on a terminal, a new line every few seconds in a log file."""

    def __init__(self, first: int, last: int, silent: bool = False):
        """For steps `first` + 1 to `last`. `silent`: another process prints for this one."""
        self.first, self.last, self.silent = first, last, silent
        self.started = self.printed = time.monotonic()
        self.terminal = sys.stdout.isatty()

    def progress(self, step: int, metrics: dict[str, float]) -> None:
        now = time.monotonic()
        if not self.terminal and now - self.printed < LINE_SECONDS and step < self.last:
            return
        self.printed = now
        seconds_a_step = (now - self.started) / max(1, step - self.first)
        parts = [f"step {step:>{len(str(self.last))}}/{self.last}",
                 f"train/loss {metrics['train/loss']:.4f}",
                 f"train/tokens_per_second {short(metrics['train/tokens_per_second'])}"]
        if "train/mfu" in metrics:
            parts.append(f"train/mfu {metrics['train/mfu']:.2f}")
        parts.append(f"{_clock(seconds_a_step * (self.last - step))} left")
        self._print("  ".join(parts), "" if self.terminal else "\n")

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self._print(text, "\n")

    def _print(self, text: str, end: str) -> None:
        if not self.silent:
            print(f"\r\033[K{text}" if self.terminal else text, end=end, flush=True)


def short(n: float) -> str:
    """A number with its unit: 12.3k, 4.56M."""
    if n >= 1e6:
        return f"{n / 1e6:.2f}M"
    return f"{n / 1e3:.1f}k" if n >= 1e3 else f"{n:.0f}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


# --- wandb ------------------------------------------------------------------------------------

class Wandb:
    """A wandb run, or none. Training never waits for it and never fails because of it."""

    def __init__(self, log: LogConfig, folder: Path, name: str, config: dict[str, Any],
                 say: Callable[[str], None]):
        self.run: Any = None                    # a wandb.Run
        self.say = say
        if log.wandb == "disabled" or os.environ.get("WANDB_MODE") == "disabled":
            return
        if importlib.util.find_spec("wandb") is None:
            if log.wandb != "auto":
                raise UserError(f"log.wandb={log.wandb}, but wandb is not installed "
                                "(pip install wandb, or log.wandb=disabled)")
            return
        online = log.wandb == "online"
        if log.wandb == "auto":
            online = os.environ.get("WANDB_MODE", "online") == "online" and _has_key()
        if online and not _reachable():
            say("wandb      its server cannot be reached: logging offline")
            online = False
        if not online:
            # Both must be set before the import, or telemetry is posted all the same.
            os.environ |= {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false"}
        os.environ.setdefault("WANDB_SILENT", "true")
        options: dict[str, Any] = {
            "dir": str(folder), "project": log.project, "name": name, "config": config,
            "id": _wandb_id(folder, name), "resume": "allow"}
        if online and self._init("online", options):
            return
        self._init("offline", options)

    def _init(self, mode: Literal["online", "offline"], options: dict[str, Any]) -> bool:
        """Start a wandb run; False, with a message, if that failed."""
        import wandb
        settings = wandb.Settings(console="off", x_transaction_log_flush_interval=1.0)
        if mode == "online":
            # Offline only wandb's own process is waited for, which a busy machine makes slow.
            settings.init_timeout = WANDB_SECONDS
        try:
            self.run = wandb.init(mode=mode, settings=settings, **options)
            self.run.define_metric("*", step_metric="step")
            for group in ("heads", "repeat", "icl", "phase"):       # they form as tokens go by
                self.run.define_metric(f"{group}/*", step_metric="tokens")
            return True
        except Exception as error:              # a service that is down raises many exceptions
            wandb.teardown()                    # or the next try finds the run in use
            reason = str(error).splitlines()[0][:150]
            self.say(f"wandb      {mode}: {reason}; metrics.jsonl has everything")
            return False

    @property
    def where(self) -> str:
        """The run's page, or the command that uploads it."""
        return self.run.url or f"wandb sync {Path(self.run.dir).parent}"

    def log(self, record: dict[str, Any]) -> None:
        """Log numbers; lists of numbers over evenly spaced places; pictures (height, width, 3)
        uint8; tables as (columns, rows); HTML pages by their path."""
        if self.run is not None:
            try:
                self.run.log({name: _as_wandb(value) for name, value in record.items()})
            except Exception as error:
                self._give_up(f"stopped ({error})")

    def finish(self, exit_code: int = 0) -> None:
        if self.run is not None:
            try:
                self.run.finish(exit_code=exit_code)
            except Exception as error:
                self._give_up(f"did not finish ({error})")

    def _give_up(self, problem: str) -> None:
        import wandb
        self.run = None
        self.say(f"wandb      {problem}: metrics.jsonl has everything")
        with contextlib.suppress(Exception):    # or it tries again at exit, with a traceback
            wandb.teardown()


def _wandb_id(folder: Path, name: str) -> str:
    """The id of the run in wandb: made once, so that a continued run stays one run."""
    id_file = folder / "wandb" / "id.json"
    id_file.parent.mkdir(exist_ok=True)
    if not id_file.exists():
        with atomic_write(id_file, "w") as file:
            json.dump({"id": f"{name}-{secrets.token_hex(4)}"}, file)
    return json.loads(id_file.read_text("utf-8"))["id"]


def _as_wandb(value: Any) -> Any:
    import wandb
    match value:
        case list():
            edges = np.arange(len(value) + 1) - len(value) / 2      # offsets around 0, a bin each
            return wandb.Histogram(np_histogram=(np.array(value), edges))
        case tuple():
            return wandb.Table(columns=value[0], data=value[1])
        case Path():
            return wandb.Html(value.read_text("utf-8"), inject=False)
        case _ if hasattr(value, "shape"):
            return wandb.Image(value)
    return value


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators(_host()) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _host() -> str:
    url = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    return urlparse(url).hostname or ""


def _reachable() -> bool:
    """Whether wandb's server answers. wandb itself would try for over 20 s.

    Behind a proxy the answer is yes: the proxy answers for the host.
    """
    proxies = ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy")
    if any(os.environ.get(name) for name in proxies):
        return True
    url = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    plain = url.scheme == "http"
    connect = http.client.HTTPConnection if plain else http.client.HTTPSConnection
    try:
        connection = connect(_host(), url.port, timeout=3)
        connection.request("HEAD", "/")
        connection.getresponse()
        connection.close()
        return True
    except ssl.SSLError:            # it is there; wandb knows better which certificates it needs
        return True
    except (OSError, http.client.HTTPException):
        return False
