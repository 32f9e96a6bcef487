"""Where measurements go: one line on the console, one in metrics.jsonl, the same keys in wandb."""

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

import numpy as np

from errors import UserError
from files import atomic_write
from training.config import LogConfig

WANDB_SECONDS = 15              # the longest that starting an online run may take
LINE_SECONDS = 5                # between two progress lines in a log file; a terminal's line is rewritten in place


class Metrics:
    """metrics.jsonl: a line per logged step, each written whole and flushed; continuing drops what lies ahead."""

    def __init__(self, path: Path, step: int):
        """`step`: the one the run continues from; later lines belong to updates that will be made again."""
        self.path = path
        with atomic_write(path) as file:
            file.writelines(line for line, record in _records(path) if record["step"] <= step)
        self.file = open(path, "ab", buffering=0)   # noqa: SIM115  one write a line, so that a kill cannot tear it

    def read(self) -> list[dict]:
        """All records so far, oldest first."""
        return read_metrics(self.path)

    def write(self, record: dict[str, float | list[float]]) -> None:
        line = (json.dumps({k: _finite(v) for k, v in record.items()}) + "\n").encode()
        if os.fstat(self.file.fileno()).st_nlink == 0:          # it would take every line and keep none
            raise FileNotFoundError(errno.ENOENT, "was deleted while it was written", str(self.path))
        written = self.file.write(line)
        if written != len(line):                    # a disk that is full takes a part: take that back
            self.file.truncate(self.file.seek(0, os.SEEK_END) - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        self.file.close()


def read_metrics(path: Path) -> list[dict]:
    """The records of a metrics.jsonl, oldest first."""
    return [record for _, record in _records(path)]


def _records(path: Path) -> Iterator[tuple[bytes, dict]]:
    """Whole lines and what they say; a line torn by a kill is left out."""
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        try:
            record = json.loads(line)
            record["step"] + 0
        except (ValueError, KeyError, TypeError):
            continue
        if line.endswith(b"\n"):
            yield line, record


class Console:
    """The progress line: rewritten on a terminal, now and then a line of its own in a log file."""

    def __init__(self, first: int, last: int, silent: bool = False):
        """Of steps `first` + 1 to `last`. `silent`: another process speaks for this one."""
        self.first, self.last, self.silent = first, last, silent
        self.started = self.printed = time.monotonic()
        self.terminal = sys.stdout.isatty()

    def progress(self, step: int, metrics: dict[str, float]) -> None:
        now = time.monotonic()
        if not self.terminal and now - self.printed < LINE_SECONDS and step < self.last:
            return
        self.printed = now
        left = (now - self.started) / max(1, step - self.first) * (self.last - step)
        parts = [f"step {step:>{len(str(self.last))}}/{self.last}", f"train/loss {metrics['train/loss']:.4f}",
                 f"train/tokens_per_second {short(metrics['train/tokens_per_second'])}"]
        if "train/mfu" in metrics:
            parts.append(f"train/mfu {metrics['train/mfu']:.2f}")
        parts.append(f"{_clock(left)} left")
        line = "  ".join(parts)
        self._print(line, "" if self.terminal else "\n")

    def say(self, text: str) -> None:
        """A line that stays."""
        self._print(text, "\n")

    def _print(self, text: str, end: str) -> None:
        if self.silent:
            return
        with contextlib.suppress(BrokenPipeError):              # nobody reads any more (`| head`): no reason to stop training
            print(f"\r\033[K{text}" if self.terminal else text, end=end, flush=True)


class Wandb:
    """A wandb run, or nothing: training never waits for it and never fails because of it."""

    def __init__(self, log: LogConfig, folder: Path, name: str, config: dict, say: Callable[[str], None]):
        self.run: Any = None                        # wandb.Run
        self.say, mode = say, log.wandb
        if mode == "disabled" or os.environ.get("WANDB_MODE") == "disabled":
            return
        if importlib.util.find_spec("wandb") is None:
            if mode != "auto":
                raise UserError(f"log.wandb={mode}, but wandb is not installed (pip install wandb, or log.wandb=disabled)")
            return
        online = mode == "online" or (mode == "auto" and os.environ.get("WANDB_MODE", "online") == "online" and _has_key())
        if online and not _reachable():
            say("wandb      its server cannot be reached: logging offline")
            online = False
        if not online:                              # both must be set before the import, or telemetry is posted even so
            os.environ |= {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false"}
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb
        id_file = folder / "wandb" / "id.json"
        id_file.parent.mkdir(exist_ok=True)
        if not id_file.exists():
            with atomic_write(id_file, "w") as file:
                json.dump({"id": f"{name}-{secrets.token_hex(4)}"}, file)
        options: dict[str, Any] = {"dir": str(folder), "project": log.project, "name": name, "config": config,
                   "id": json.loads(id_file.read_text())["id"], "resume": "allow"}
        ways: list[Literal["online", "offline"]] = ["online", "offline"] if online else ["offline"]
        for way in ways:
            settings = wandb.Settings(console="off", x_transaction_log_flush_interval=1.0)
            if way == "online":                     # offline only wandb's own process is waited for, which a busy machine makes slow
                settings.init_timeout = WANDB_SECONDS
            try:
                self.run = wandb.init(mode=way, settings=settings, **options)
                self.run.define_metric("*", step_metric="step")
                for group in ("heads", "repeat", "icl", "phase"):           # formation is a matter of tokens
                    self.run.define_metric(f"{group}/*", step_metric="tokens")
                return
            except Exception as error:              # a service that is down has many exceptions
                wandb.teardown()                    # or the next try finds the run in use
                say(f"wandb      {way}: {str(error).splitlines()[0][:150]}; metrics.jsonl has everything")

    @property
    def where(self) -> str:
        """Where a person finds it."""
        return self.run.url or f"wandb sync {Path(self.run.dir).parent}"

    def log(self, record: dict) -> None:
        """Numbers; lists of numbers over evenly spaced places; pictures (height, width, 3) uint8; (columns, rows) of tables; pages."""
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

    def _give_up(self, what: str) -> None:
        import wandb
        self.run = None
        self.say(f"wandb      {what}: metrics.jsonl has everything")
        with contextlib.suppress(Exception):        # or it tries again when Python ends, with a traceback
            wandb.teardown()


def _as_wandb(value):
    import wandb
    match value:
        case list():
            edges = np.arange(len(value) + 1) - len(value) / 2          # offsets around 0, a bin each
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
    return urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""


def _reachable() -> bool:
    """Whether something answers there. Asked first because wandb itself asks for over 20 s. A proxy answers for the host behind it."""
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy")):
        return True
    url = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    connect = http.client.HTTPConnection if url.scheme == "http" else http.client.HTTPSConnection
    try:
        connection = connect(_host(), url.port, timeout=3)
        connection.request("HEAD", "/")
        connection.getresponse()
        connection.close()
        return True
    except ssl.SSLError:                            # it is there; which certificates it needs, wandb knows better
        return True
    except (OSError, http.client.HTTPException):
        return False


def _finite(value: float | list[float]) -> float | list | None:
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return value if not isinstance(value, float) or math.isfinite(value) else None      # JSON has no nan


def short(n: float) -> str:
    return f"{n / 1e6:.2f}M" if n >= 1e6 else f"{n / 1e3:.1f}k" if n >= 1e3 else f"{n:.0f}"


def _clock(seconds: float) -> str:
    seconds = int(seconds)
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}" if seconds >= 3600 else f"{seconds // 60}:{seconds % 60:02d}"
