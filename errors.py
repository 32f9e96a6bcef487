"""How every command speaks to its user when something is wrong: one or two lines, exit code 2."""

import argparse
import os
import sys
from collections.abc import Callable

LOCAL = {"model", "kernels", "data", "training", "induction", "report", "settings", "files", "errors"}


class UserError(Exception):
    """Something the user can mend. The message names the thing, its value and the fix."""


def first_line(error: Exception, longest: int = 150) -> str:
    """What an exception of someone else's says, in a length that fits a line."""
    return next(iter(str(error).splitlines()), type(error).__name__)[:longest]


class ArgumentParser(argparse.ArgumentParser):
    """argparse without the usage dump: the mistake and where to read more, in two lines."""

    def error(self, message: str):
        raise UserError(f"{message}\n  {self.prog} --help lists what it takes")


def run_command(main: Callable[[], int | None]) -> None:
    """Run a command's `main` and exit: 0 done, 2 the user can mend it, 130 interrupted, 141 nobody reads on."""
    # Before PyTorch is loaded: its threads wait for each other by spinning, so long that two commands on the same cores take 10 times as
    # long as one after the other.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        code = main() or 0
        sys.stdout.flush()                          # a closed pipe shows itself here, not at interpreter exit
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:                         # `… | head` has read enough: end as SIGPIPE would
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except OSError as error:                        # a name too long, a folder that may not be read: about some file
        if error.filename is None:
            raise
        print(f"error: {str(error.filename)[:200]}: {error.strerror}", file=sys.stderr)
        code = 2
    except (MemoryError, RuntimeError) as error:            # torch's are RuntimeErrors
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in ("out of memory", "t allocate memory")):
            raise
        print(f"error: out of memory ({first_line(error)})\n"
              "  make train.micro_batch or the model smaller; python -m training.plan CONFIG says what it takes", file=sys.stderr)
        code = 2
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in LOCAL:
            raise
        print(f"error: {error.name} is not installed for {sys.executable}\n"
              "  source .venv/bin/activate   (`make venv` makes that environment)", file=sys.stderr)
        code = 2
    sys.exit(code)
