"""Run a script of this repository and break it: `python breaker.py MOMENT N DEED train.py …`.

The n-th time that MOMENT comes, DEED is done, once. The script itself is unchanged: the wrapped
functions are calls of the operating system that it makes at that moment, or functions of its own
that mark it. The repository has to be on Python's path, as `command` and `start` of
tests/commands.py put it.
"""

import contextlib
import os
import runpy
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import data.prepare
import training.logger
import training.wandb_log
from training.optimizer import Optimizer

ROOT = Path(__file__).parent.parent.parent


class Trap:
    """Called whenever the moment comes; the n-th call does the deed."""

    def __init__(self, n: int, deed: Callable[[], None], kills: bool):
        self.remaining, self.deed, self.kills = n, deed, kills

    def __call__(self) -> None:
        self.remaining -= 1
        if self.remaining == 0:
            self.deed()


def every_call(*arguments, **options) -> bool:
    return True


def around(owner: Any, name: str, trap: Trap, matches: Callable[..., bool] = every_call,
           after: bool = True) -> None:
    """Call `trap` before, and with `after` also after, each call of owner.name that `matches`."""
    function = getattr(owner, name)

    def trapped(*arguments, **options):
        matching = matches(*arguments, **options)
        if matching:
            trap()
        result = function(*arguments, **options)
        if matching and after:
            trap()
        return result

    setattr(owner, name, trapped)


# --- moments ---------------------------------------------------------------------------------

def syncs(trap: Trap, part: str) -> None:
    """Just before a file or folder with `part` in its path is flushed to the disk.

    It is written in full, but not yet safe and not yet in place.
    """
    around(os, "fsync", trap, lambda file: part in os.readlink(f"/proc/self/fd/{file}"),
           after=False)


def renames(trap: Trap, function: str, matches: Callable[[Path], bool]) -> None:
    """Before and after os.rename or os.replace to a path that `matches`."""
    around(os, function, trap, lambda source, target: matches(Path(target)))


def torn_lines(trap: Trap) -> None:
    """Just before a line of metrics.jsonl is written; if the deed kills, half of it is written."""
    class TornFile:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, name: str):
            return getattr(self.file, name)

        def write(self, line: bytes) -> int:
            if trap.remaining == 1 and trap.kills:
                self.file.write(line[:len(line) // 2])
            trap()
            return self.file.write(line)

    def opened(path, mode="r", *arguments, **options):
        file = open(path, mode, *arguments, **options)          # noqa: SIM115  the caller closes it
        is_metrics = Path(path).name == "metrics.jsonl" and "a" in mode
        return TornFile(file) if is_metrics else file

    training.logger.open = opened


def prepares(trap: Trap) -> None:
    """A file of the prepared data gets its name."""
    data.prepare.PART_BYTES = 20_000                        # several parts of a small text
    files = ("train-", "val-", "tokenizer.json", "journal.json", "manifest.json")
    renames(trap, "replace",
            lambda path: path.name.startswith(files) and "checkpoints" not in str(path))


def prunes(trap: Trap) -> None:
    """An old checkpoint has lost its name, or half of its files."""
    around(os, "rename", trap, lambda source, target:
           Path(target).name.startswith(".partial-") and ".partial" not in str(source))
    around(os, "rmdir", trap, lambda path, **_: path == "training_state", after=False)


MOMENTS: dict[str, Callable[[Trap], None]] = {
    "a step": lambda trap: around(Optimizer, "step", trap),
    "preparing the data": prepares,
    "writing a checkpoint": lambda trap: syncs(trap, "checkpoints/.partial-"),
    "renaming a checkpoint": lambda trap: renames(
        trap, "rename", lambda path: path.name.isdigit()),
    "pointing latest at it": lambda trap: renames(
        trap, "replace", lambda path: path.name == "latest"),
    "deleting an old checkpoint": prunes,
    "a line of metrics.jsonl": torn_lines,
    "logging to wandb": lambda trap: around(training.wandb_log.Wandb, "log", trap),
    "a snapshot of the heads": lambda trap: syncs(trap, "/heads"),
    "writing the report": lambda trap: syncs(trap, ".report.html.partial"),
}


# --- deeds -----------------------------------------------------------------------------------

def send(number: int) -> None:
    """Send this process a signal."""
    os.kill(os.getpid(), number)
    if number == signal.SIGKILL:
        time.sleep(60)


def clock_back() -> None:
    """Set the clock back by ten years, and the times of every file of the run with it."""
    real_time, ten_years = time.time, 10 * 365 * 86400
    time.time = lambda: real_time() - ten_years
    time.time_ns = lambda: int(time.time() * 1e9)
    now = time.time()
    for path in Path("runs").rglob("*"):
        with contextlib.suppress(OSError):
            os.utime(path, (now, now))


def fill(folder: str) -> None:
    """Take all the room that is left on that file system."""
    with contextlib.suppress(OSError), open(Path(folder) / "filler", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def wandb_processes(trainer: int) -> list[int]:
    """Ids of wandb's own processes that serve the trainer with that process id."""
    processes = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            arguments = (folder / "cmdline").read_bytes().split(b"\0")
            if b"wandb-core" in arguments[0] and str(trainer).encode() in arguments:
                processes.append(int(folder.name))
    return processes


def kill_wandb() -> None:
    for process in wandb_processes(os.getpid()):
        with contextlib.suppress(OSError):
            os.kill(process, signal.SIGKILL)


def deed_of(name: str) -> Callable[[], None]:
    """The deed that a command line names: `signal:9`, `delete:FOLDER`, `fill:FOLDER`, …"""
    verb, _, argument = name.partition(":")
    match verb:
        case "signal":
            return partial(send, int(argument))
        case "delete":
            return partial(shutil.rmtree, argument)
        case "fill":
            return partial(fill, argument)
        case "clock":
            return clock_back
        case "core":
            return kill_wandb
    raise ValueError(name)


if __name__ == "__main__":
    moment, n, deed, script, *arguments = sys.argv[1:]
    signal.signal(signal.SIGINT, signal.default_int_handler)    # a background job would ignore it
    sys.path[0] = str(ROOT)
    sys.argv = [script, *arguments]
    kills = deed == f"signal:{int(signal.SIGKILL)}"
    MOMENTS[moment](Trap(int(n), deed_of(deed), kills))
    runpy.run_path(str(ROOT / script), run_name="__main__")
