"""How every command reports an error: one or two lines, exit code 2."""

import argparse
import difflib
import os
import re
import shlex
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

from own_modules import OUR_MODULES, ROOT

from console import bytes_of, guard_console

# Set here, at the first import of every command, because OpenMP reads it when PyTorch is loaded.
# By default its threads wait for each other by spinning, for so long that two commands on the same
# cores take 10 times as long as one after the other.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")


class UserError(Exception):
    """Something the user can fix. The message names the thing, its value and the fix."""

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows instead of a traceback through our code."""
        return [f"error: {self}"]


def path_of(ours: str) -> str:
    """The path of one of our files from the working directory: train.py if that is our folder."""
    if in_our_folder():
        return ours
    path = str(ROOT / ours)
    with suppress(OSError, ValueError):         # the folder is deleted; it is on another drive
        path = min(os.path.relpath(path), path, key=len)
    return path


def in_our_folder() -> bool:
    with suppress(OSError):
        return os.path.samefile("train.py", ROOT / "train.py")
    return False


def command(script: str) -> str:
    """How to start train.py, or -m training.plan, from the working directory."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    started_with_m = spec is not None and spec.name.split(".")[0] in OUR_MODULES
    if script.startswith("-m "):
        installed = str(ROOT) in sys.path[1:]           # sys.path[0] is the folder of a script
        here = in_our_folder() or started_with_m or installed
        if here or sys.platform == "win32":
            return f"python {script}"
        return f"PYTHONPATH={shlex.quote(str(ROOT))} python {script}"
    if started_with_m and not in_our_folder():
        return f"python -m {script.removesuffix('.py')}"
    return f"python {shlex.quote(path_of(script))}"


def first_line(error: BaseException, longest: int = 150) -> str:
    """The first line of another library's exception, cut to a length that fits a line."""
    lines = str(error).splitlines()
    return (lines[0] if lines else type(error).__name__)[:longest]


class ArgumentParser(argparse.ArgumentParser):
    """argparse without the usage dump: the mistake and where to read more, in two lines.

    A command with `overrides` understands --key.path=value as key.path=value: the agents of sweeps,
    such as wandb's, write it so.
    """

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args([self._as_override(word) for word in words], namespace)

    def error(self, message: str) -> NoReturn:
        _, unrecognized, words = message.partition("unrecognized arguments: ")
        if unrecognized:
            message += self._suggestion(*words.split(" ")[:2])
        raise UserError(f"{message}\n  {self.prog} --help lists the arguments")

    @property
    def _positional_names(self) -> list[str]:
        return [action.dest for action in self._actions if not action.option_strings]

    def _as_override(self, word: str) -> str:
        option, equals, _ = word.partition("=")
        is_key = re.fullmatch(r"--[A-Za-z]\w*(\.\w+)*", option)      # no option has dots or _
        is_option = (any(known.startswith(option) for known in self._option_string_actions)
                     or difflib.get_close_matches(option, self._option_string_actions, 1, 0.8))
        if "overrides" in self._positional_names and is_key and equals and not is_option:
            return word[2:]
        return word

    def _suggestion(self, option: str, value: str = "VALUE") -> str:
        """What an unknown option may have been meant for."""
        option, key = option.partition("=")[0], option.lstrip("-")
        if close := difflib.get_close_matches(option, self._option_string_actions, 1):
            return f"; did you mean {close[0]}?"
        if key in self._positional_names:
            return f"; write it without {option}"
        if "overrides" in self._positional_names and option.startswith("--") and key:
            return f"; a key of the config is set by {key}={value}"
        return ""


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
                    "  make train.micro_batch or the model smaller; "
                    f"{command('-m training.plan')} CONFIG shows the memory it needs")
        case ModuleNotFoundError() if str(error.name).split(".")[0] not in OUR_MODULES:
            return (f"{error.name} is not installed for {sys.executable}\n"
                    f"  source {path_of('.venv/bin/activate')}   (`make venv` creates that "
                    "environment)")
    return None


def is_out_of_memory(error: Exception) -> bool:
    """PyTorch reports it as a RuntimeError, on the CPU as "can't allocate memory"."""
    return isinstance(error, MemoryError) or any(
        words in str(error) for words in ("out of memory", "can't allocate memory"))
