"""Run a script of this repository and break it at a moment: `python breaker.py MOMENT N DEED train.py tiny.yaml …`.

The n-th time that MOMENT comes, DEED is done, once. The script itself is as it is: what is wrapped here are the calls of the
operating system that it makes at that moment, or a function of its own that marks it.
"""

import contextlib
import os
import runpy
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


class Trap:
    """Called whenever the moment comes; the n-th call does the deed."""

    def __init__(self, n: int, deed: Callable[[], None], deadly: bool):
        self.left, self.deed, self.deadly = n, deed, deadly

    def __call__(self) -> None:
        self.left -= 1
        if self.left == 0:
            self.deed()


def around(owner, name: str, trap: Trap, here: Callable[..., bool] = lambda *a, **k: True, after: bool = True) -> None:
    """Spring `trap` before, and also after, each call of owner.name whose arguments are such that `here`."""
    function = getattr(owner, name)

    def trapped(*arguments, **options):
        if here(*arguments, **options):
            trap()
        result = function(*arguments, **options)
        if after and here(*arguments, **options):
            trap()
        return result

    setattr(owner, name, trapped)


def syncs(trap: Trap, part: str) -> None:
    """Just before a file or folder with `part` in its path is flushed to the disk: written in full, not yet safe, not yet in place."""
    around(os, "fsync", trap, lambda file: part in os.readlink(f"/proc/self/fd/{file}"), after=False)


def torn_lines(trap: Trap) -> None:
    """Just before a line of metrics.jsonl is written; where that is the end, half of the line is on the disk."""
    import training.logger
    real = open

    class Half:
        def __init__(self, file): self.file = file
        def __getattr__(self, name): return getattr(self.file, name)

        def write(self, line):
            if trap.left == 1 and trap.deadly:
                self.file.write(line[:len(line) // 2])
            trap()
            return self.file.write(line)

    def opened(path, *arguments, **options):
        file = real(path, *arguments, **options)
        return Half(file) if Path(path).name == "metrics.jsonl" and "a" in arguments[0] else file

    training.logger.open = opened


def prepares(trap: Trap) -> None:
    import data.prepare
    data.prepare.PART_BYTES = 20_000                        # several parts of a small text
    ours = ("train-", "val-", "tokenizer.json", "journal.json", "manifest.json")
    around(os, "replace", trap, lambda _, to: Path(to).name.startswith(ours) and "checkpoints" not in str(to))


def steps(trap: Trap) -> None:
    from training.optimizer import Optimizer
    around(Optimizer, "step", trap)


def wandb_logs(trap: Trap) -> None:
    import training.logger
    around(training.logger.Wandb, "log", trap)


def prunes(trap: Trap) -> None:
    """An old checkpoint has lost its name, or half of its files."""
    around(os, "rename", trap, lambda _, to: Path(to).name.startswith(".partial-") and ".partial" not in str(_))
    around(os, "rmdir", trap, lambda path, **_: path == "training_state", after=False)


MOMENTS: dict[str, Callable[[Trap], None]] = {
    "a step": steps,
    "preparing the data": prepares,
    "writing a checkpoint": lambda trap: syncs(trap, "checkpoints/.partial-"),
    "renaming a checkpoint": lambda trap: around(os, "rename", trap, lambda _, to: Path(to).name.isdigit()),
    "pointing latest at it": lambda trap: around(os, "replace", trap, lambda _, to: Path(to).name == "latest"),
    "deleting an old checkpoint": prunes,
    "a line of metrics.jsonl": torn_lines,
    "logging to wandb": wandb_logs,
    "a snapshot of the heads": lambda trap: syncs(trap, "/heads"),
    "writing the report": lambda trap: syncs(trap, ".report.html.partial"),
}


# --- what is done then ---------------------------------------------------------------------------------------------------

def send(number: int) -> Callable[[], None]:
    def deed() -> None:
        os.kill(os.getpid(), number)
        if number == signal.SIGKILL:
            time.sleep(60)
    return deed


def clock_back() -> None:
    """Ten years, also for every file of the run."""
    real, now = time.time, time.time() - 10 * 365 * 86400
    started = real()
    time.time = lambda: now + real() - started
    time.time_ns = lambda: int(time.time() * 1e9)
    for path in Path("runs").rglob("*"):
        with contextlib.suppress(OSError):
            os.utime(path, (now, now))


def fill(folder: str) -> None:
    """Take all the room that is left on that file system."""
    with contextlib.suppress(OSError), open(Path(folder) / "filler", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def kill_core() -> None:
    """wandb's own process, which the trainer talks to."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (folder / "cmdline").read_bytes().split(b"\0")
            if b"wandb-core" in command[0] and str(os.getpid()).encode() in command:
                os.kill(int(folder.name), signal.SIGKILL)


def deed_of(name: str) -> Callable[[], None]:
    kind, _, argument = name.partition(":")
    return {"signal": lambda: send(int(argument)), "delete": lambda: lambda: shutil.rmtree(argument),
            "fill": lambda: lambda: fill(argument), "clock": lambda: clock_back, "core": lambda: kill_core}[kind]()


if __name__ == "__main__":
    moment, n, deed, script, *arguments = sys.argv[1:]
    signal.signal(signal.SIGINT, signal.default_int_handler)        # a shell's background job would ignore it
    sys.path[0] = str(ROOT)
    sys.argv = [script, *arguments]
    MOMENTS[moment](Trap(int(n), deed_of(deed), deed == f"signal:{int(signal.SIGKILL)}"))
    runpy.run_path(str(ROOT / script), run_name="__main__")
