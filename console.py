"""Standard output and standard error that do not end a command: what cannot be printed is not a
reason to stop training."""

import codecs
import errno
import io
import os
import select
import sys
from typing import Any


class ConsoleBytes(io.RawIOBase):
    """The lowest layer of sys.stdout or sys.stderr. After the first write that fails (a full disk,
    a reader that has ended, a terminal that is gone) it takes everything and prints nothing.

    If stdout `is_result`, that write raises instead.
    """

    def __init__(self, stream: io.TextIOWrapper, error: OSError | None):
        self.stream = stream                # owns the descriptor
        self.raw: Any = getattr(stream.buffer, "raw", stream.buffer)    # with python -u, no raw
        self.error = error                  # the first one
        self.is_result = False

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.raw.fileno()

    def isatty(self) -> bool:
        return self.raw.isatty()

    def write(self, data: Any) -> int:
        if self.error is None:
            try:
                while (written := self.raw.write(data)) is None:    # non-blocking, and full
                    select.select([], [self.raw], [])
                return int(written)
            except OSError as error:
                self.error = error
                # A reader that has ended, as in `… | head`, has had what it wanted.
                if error.errno != errno.EPIPE and not self.is_result and self is not bytes_of(2):
                    print(f"note: standard output: {error.strerror}; the rest of it is lost",
                          file=sys.stderr)
        if self.is_result:
            self.is_result = False          # once: Python flushes again when it exits
            raise self.error
        return len(data)


def guard_console() -> None:
    """Replace sys.stdout and sys.stderr by streams that never raise. stdout writes a character that
    its encoding lacks as an escape, and bytes of the command line that are not text as they are."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:                     # closed, as by `>&-`: the next file would get its
            os.open(os.devnull, os.O_RDWR)  # number, and then what a library prints
    codecs.register_error("console", _as_bytes_or_escape)
    if sys.stdin is None:
        sys.stdin = open(0)                                         # noqa: SIM115
    sys.stdout = _guarded(sys.stdout, 1, "console")
    sys.stderr = _guarded(sys.stderr, 2, "backslashreplace")


def stdout_is_the_result() -> None:
    """From now on a write to stdout that fails ends the command, which has no other purpose."""
    stdout = bytes_of(1)
    if stdout is not None:
        stdout.is_result = True


def bytes_of(number: int) -> ConsoleBytes | None:
    """The lowest layer of a guarded stream, by its number: 1 or 2."""
    stream = sys.stdout if number == 1 else sys.stderr
    raw = getattr(getattr(stream, "buffer", None), "raw", None)
    return raw if isinstance(raw, ConsoleBytes) else None


def _guarded(stream: Any, number: int, errors: str) -> Any:
    error = None
    if stream is None:                      # it was closed before Python began
        stream = open(number, "w", closefd=False)                   # noqa: SIM115
        error = OSError(errno.EBADF, "it is closed")
    if bytes_of(number) or not isinstance(stream, io.TextIOWrapper):       # a notebook's
        return stream
    return io.TextIOWrapper(
        io.BufferedWriter(ConsoleBytes(stream, error)), stream.encoding, errors,
        line_buffering=stream.line_buffering or stream.write_through)


def _as_bytes_or_escape(error: UnicodeError) -> tuple[str | bytes, int]:
    assert isinstance(error, UnicodeEncodeError)
    character = error.object[error.start]
    if "\udc80" <= character <= "\udcff":   # a byte that Python could not decode
        return bytes([ord(character) - 0xDC00]), error.start + 1
    return character.encode("ascii", "backslashreplace").decode(), error.start + 1
