"""How every command reports an error: one or two lines, exit code 2."""

import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from console import bytes_of, guard_console

# Set here, at the first import of every command, because OpenMP reads it when PyTorch is loaded.
# By default its threads wait for each other by spinning, for so long that two commands on the same
# cores take 10 times as long as one after the other.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

OUR_MODULES = {"model", "kernels", "data", "training", "induction", "report", "settings", "files",
               "errors", "console"}


class UserError(Exception):
    """Something the user can fix. The message names the thing, its value and the fix."""


def first_line(error: BaseException, longest: int = 150) -> str:
    """The first line of another library's exception, cut to a length that fits a line."""
    lines = str(error).splitlines()
    return (lines[0] if lines else type(error).__name__)[:longest]


class ArgumentParser(argparse.ArgumentParser):
    """argparse without the usage dump: the mistake and where to read more, in two lines."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}\n  {self.prog} --help lists the arguments")


def run_command(main: Callable[[], int | None]) -> None:
    """Run a command's `main` and exit. The console cannot end it (console.py).

    Exit codes: 0 success, 2 an error the user can fix, 130 interrupted, 141 output pipe closed.
    Other exceptions are bugs and keep their traceback.
    """
    guard_console()
    try:
        code = main() or 0
        sys.stdout.flush()                  # a result raises here, not at interpreter exit
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:                 # the reader, as in `… | head`, has stopped
        code = 141                          # as SIGPIPE would
    except Exception as error:
        message = explain(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        code = 2
    sys.exit(code)


def explain(error: Exception) -> str | None:
    """The message for an error that the user can fix, None for a bug."""
    match error:
        case UserError():
            return str(error)
        case OSError() if (stdout := bytes_of(1)) and error is stdout.error:
            return f"standard output cannot be written ({error.strerror})"
        case OSError() if error.filename is not None:       # a name too long, no permission
            return f"{str(error.filename)[:200]}: {error.strerror}"
        case MemoryError() | RuntimeError() if is_out_of_memory(error):
            return (f"out of memory ({first_line(error)})\n"
                    "  make train.micro_batch or the model smaller; python -m training.plan CONFIG "
                    "shows the memory it needs")
        case ModuleNotFoundError() if str(error.name).split(".")[0] not in OUR_MODULES:
            return (f"{error.name} is not installed for {sys.executable}\n"
                    "  source .venv/bin/activate   (`make venv` creates that environment)")
    return None


def is_out_of_memory(error: Exception) -> bool:
    """PyTorch reports it as a RuntimeError, on the CPU as "can't allocate memory"."""
    return isinstance(error, MemoryError) or any(
        words in str(error) for words in ("out of memory", "can't allocate memory"))
