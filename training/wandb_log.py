"""The metrics in wandb, under the keys of metrics.jsonl. Training never waits for wandb and never
fails because of it.

docs/wandb.md says what a user sees there, and how the parts of a continued run are joined.
"""

import contextlib
import http.client
import importlib.util
import json
import netrc
import os
import re
import secrets
import shlex
import ssl
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple
from urllib.parse import urlparse

from errors import UserError, first_line

import numpy as np

from files import atomic_write
from training.config import LogConfig
from training.logger import Record

WANDB_SECONDS = 15              # the longest that starting an online run may take
APPENDS_ITSELF = (0, 30)        # since this version `wandb sync` joins the parts of a run unasked


# --- what its workspace shows -----------------------------------------------------------------

class Panel(NamedTuple):
    """How wandb draws a metric: the arguments of `define_metric`."""

    name: str                   # the metric's, or PREFIX/* for all that begin so
    step_metric: str | None     # the metric on its x axis
    hidden: bool                # drawn only if the user asks for it


ONE_HEAD = re.compile(r"/L\d+H\d+$")            # heads/SCORE/L1H3: thousands in a large model
OVER_STEPS = ("train/", "val/")                 # all else forms as tokens go by
OVER_LAYERS = "heads/layers/"
# Bookkeeping, and what another panel shows in other units or in other words.
NOT_SHOWN = {
    "step", "tokens", "seconds", "train/mfu", "train/memory_gb", "repeat/loss_first",
    "repeat/loss_second", "aperiodic/loss_known", "heads/strongest/2", "heads/strongest/3"}


def panel_of(metric: str, value: Any) -> Panel:
    """The panel of a metric with such values.

    No two names that this gives match the same metric: wandb would take any of them for its axis.
    The numbers of single heads share a name, because defining each takes wandb over a second; wandb
    before 0.30 finds no histogram by such a name.
    """
    if metric in ("step", "tokens"):
        return Panel(metric, None, hidden=True)
    axis = "step" if metric.startswith(OVER_STEPS) else "tokens"
    if ONE_HEAD.search(metric):
        name = metric if isinstance(value, list) else ONE_HEAD.sub("/*", metric)
        return Panel(name, axis, hidden=True)
    return Panel(metric, axis, metric in NOT_SHOWN or metric.startswith("verdict/"))


def as_wandb(name: str, value: Any) -> Any:
    """A value of Wandb.log as wandb's own type."""
    if isinstance(value, float):                # nearly all of them
        return value
    import wandb
    match value:
        case list():
            first = -0.5 if name.startswith(OVER_LAYERS) else -len(value) / 2
            heights = np.fmax(value, 0)         # no negative bar; fmax makes nan a 0 too
            return wandb.Histogram(np_histogram=(heights, _edges(first, len(value))))
        case tuple():
            return wandb.Table(columns=value[0], data=value[1])
        case Path():
            return wandb.Html(value.read_text("utf-8"), inject=False)
        case _ if hasattr(value, "shape"):
            return wandb.Image(value)
    return value


@cache
def _edges(first: float, bars: int) -> np.ndarray:
    """The edges of a histogram's bars, each of width 1. A look has over a hundred of them."""
    return first + np.arange(bars + 1)


# --- a run ------------------------------------------------------------------------------------

class Wandb:
    """A wandb run, or none."""

    def __init__(self, log: LogConfig, folder: Path, name: str, config: dict[str, Any],
                 say: Callable[[str], None]):
        """Starts a wandb run, or continues the one that this run directory began."""
        self.run: Any = None                    # a wandb.Run
        self.folder, self.say = folder, say
        self.known: set[str] = set()            # metrics logged so far
        self.panels: set[Panel] = set()         # defined so far
        self.next_step = 0                      # the first that wandb still takes rows of
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
            "dir": str(folder), "project": log.project, "name": name, "group": log.group,
            "config": config, "id": _wandb_id(folder, name), "resume": "allow"}
        if online and self._init("online", options):
            return
        self._init("offline", options)

    def _init(self, mode: Literal["online", "offline"], options: dict[str, Any]) -> bool:
        """Start a wandb run; False, with a message, if that failed."""
        try:
            import wandb
            self.run = wandb.init(mode=mode, settings=_settings(wandb, mode), **options)
            self.where = self.run.url or _sync_command(wandb.__version__, self.folder)
            return True
        except Exception as error:              # a service that is down raises many exceptions
            self._give_up(f"{mode}: {first_line(error)}")
            return False

    def log(self, record: Record, *, more: bool = False) -> None:
        """Log what belongs to record["step"]: numbers; text; lists of numbers, over layers or over
        offsets around 0; pictures (height, width, 3) uint8; tables as (columns, rows); HTML pages
        by their path. `more`: further calls will add to the same step."""
        if self.run is None:
            return
        # wandb's own step is ours, so that a run that continues from an earlier checkpoint does not
        # log a step twice: wandb refuses steps that it has. Also, pictures have a slider over it.
        step = max(record["step"], self.next_step)
        try:
            self._define({name: record[name] for name in record.keys() - self.known})
            self.run.log({name: as_wandb(name, value) for name, value in record.items()},
                         step=step, commit=not more)
            self.next_step = step if more else step + 1
        except Exception as error:
            self._give_up(f"stopped ({first_line(error)})")

    def _define(self, new: Record) -> None:
        """Tell wandb how to draw metrics that are logged for the first time."""
        for panel in {panel_of(metric, value) for metric, value in new.items()} - self.panels:
            self.run.define_metric(**panel._asdict())
            self.panels.add(panel)
        self.known.update(new)

    def finish(self, exit_code: int = 0) -> None:
        if self.run is not None:
            try:
                self.run.finish(exit_code=exit_code)
            except Exception as error:
                self._give_up(f"did not finish ({first_line(error)})")

    def _give_up(self, problem: str) -> None:
        self.run = None
        self.say(f"wandb      {problem}; metrics.jsonl has everything")
        # Or it tries again at exit, with a traceback; and a next try would find the run in use.
        with contextlib.suppress(Exception):
            import wandb
            wandb.teardown()


def _settings(wandb: ModuleType, mode: Literal["online", "offline"]) -> Any:
    """wandb's settings, as far as the installed version knows them: it refuses unknown ones."""
    values: dict[str, Any] = {"console": "off", "x_transaction_log_flush_interval": 1.0}
    if mode == "online":
        # Offline only wandb's own process is waited for, which a busy machine makes slow.
        values["init_timeout"] = WANDB_SECONDS
    known = wandb.Settings.model_fields
    return wandb.Settings(**{name: value for name, value in values.items() if name in known})


def _sync_command(version: str, folder: Path) -> str:
    """The command that uploads an offline run: all its parts, one for each time it was started, in
    their order. Several are uploaded one by one: after a part that ends in the middle of a row, as
    kill -9 leaves it, `wandb sync` leaves out those that follow."""
    numbers = tuple(int(digits) for digits in re.findall(r"\d+", version)[:2])
    append = "" if numbers >= APPENDS_ITSELF else "--append "       # else the last part replaces
    parts = f"{shlex.quote(str(folder / 'wandb'))}/offline-run-*"
    if len(list(folder.glob("wandb/offline-run-*"))) > 1:
        return f'for part in {parts}; do wandb sync {append}"$part"; done'
    return f"wandb sync {append}{parts}"


def _wandb_id(folder: Path, name: str) -> str:
    """The id of the run in wandb: made once, so that a continued run stays one run. In a sweep the
    agent gives it."""
    id_file = folder / "wandb" / "id.json"
    id_file.parent.mkdir(exist_ok=True)
    if not id_file.exists():
        with atomic_write(id_file, "w") as file:
            json.dump({"id": sweep_run() or f"{name}-{secrets.token_hex(4)}"}, file)
    return json.loads(id_file.read_text("utf-8"))["id"]


def sweep_run() -> str | None:
    """The id that wandb's agent gives to the run of a sweep; None outside a sweep."""
    return os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None


# --- its server -------------------------------------------------------------------------------

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
