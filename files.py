"""Write files atomically, hold locks, explain disk errors."""

import contextlib
import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from errors import UserError

from filelock import FileLock, Timeout

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM, errno.EIO,
               errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG,
               errno.EEXIST)            # EEXIST: a dangling link in the place of a folder


@contextlib.contextmanager
def atomic_write(path: Path, mode: str = "wb") -> Iterator[Any]:
    """Open a file that appears at `path` complete, or not at all if the block fails.

    It is written under a temporary name, flushed to the disk, then renamed.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power cut."""
    with contextlib.suppress(PermissionError):      # some systems cannot open a folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def exclusive_lock(lock: Path, message: str) -> Iterator[None]:
    """Hold `lock` during the block. Raises UserError with `message` if another process holds it.

    The lock of a killed process is free again.
    """
    try:
        held = FileLock(lock).acquire(timeout=0)
    except Timeout:
        raise UserError(message) from None
    with held:
        yield


@contextlib.contextmanager
def explain_disk_errors(action: str, advice: str) -> Iterator[None]:
    """Turn a full disk or a missing permission during `action` into a UserError with `advice`."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        reason = f"{error.strerror} ({error.filename or 'disk'})"
        raise UserError(f"{action}: {reason}\n  {advice}") from None


def must_be_writable(path: str | Path | None, option: str) -> None:
    """Raise UserError before the work, not after it, if `path` cannot be written; None is fine."""
    if path is not None and (Path(path).is_dir() or not os.access(Path(path).parent, os.W_OK)):
        raise UserError(f"{option} {path}: cannot be written\n"
                        "  name a file in an existing folder that you may write to")
