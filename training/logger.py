"""Where metrics go: a line on the console and a line of metrics.jsonl. training/wandb_log.py gives
wandb the same."""

import errno
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from files import atomic_write

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
