"""Write files atomically, hold locks, explain disk errors."""

import contextlib
import errno
import hashlib
import os
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from errors import UserError

if sys.platform != "win32":
    import fcntl

from filelock import FileLock, SoftFileLock, Timeout

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM, errno.EIO,
               errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EFBIG,
               errno.EEXIST)            # EEXIST: a dangling link in the place of a folder

# What file systems answer if they lack an operation: symbolic links, locks, flushing a folder. FAT,
# network drives, mounted object stores and FUSE each lack some.
MISSING = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EPERM, errno.EINVAL, errno.EACCES,
           errno.ENOLCK)
POINTERS = ("latest", "best")           # names that `point` is called with
HOST = socket.gethostname()


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
            sync(file.fileno())
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
            sync(descriptor)
        finally:
            os.close(descriptor)


def sync(descriptor: int) -> None:
    """Flush a file or folder to the disk, on file systems that can."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in MISSING:
            raise


def point(link: Path, target: Path) -> None:
    """Make `link` point at `target`, which is beside it, in one step: as a symbolic link, or as a
    text file that holds its name if the file system has no links. So it is on Windows, which asks
    for a privilege, and replaces no link to a folder."""
    temporary = link.with_name(f".{link.name}.partial")
    temporary.unlink(missing_ok=True)
    if sys.platform == "win32" or not _link(temporary, target.name):
        temporary.write_text(target.name, "utf-8")
    os.replace(temporary, link)
    sync_folder(link.parent)


def _link(link: Path, name: str) -> bool:
    """Whether `link` could be made, as a symbolic link to `name`."""
    try:
        link.symlink_to(name)
    except OSError as error:
        if error.errno not in MISSING:
            raise
        return False
    return True


def pointed_at(link: Path) -> Path | None:
    """What `point` made `link` point at, there or not; None if it is no such link."""
    if link.is_symlink():
        return link.parent / os.readlink(link)
    if link.name in POINTERS and link.is_file():
        return link.parent / Path(link.read_text("utf-8", "replace")[:100].strip()).name
    return None


def sha256(path: Path) -> str:
    """The SHA-256 of a file, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def exclusive_lock(lock: Path, busy: str, advice: str) -> Iterator[None]:
    """Hold `lock` during the block. Raises UserError if another process holds it: `busy`, who holds
    it, `advice`.

    The lock of a killed process is free again. On a file system without locks, the file itself is
    the lock; that of another machine's killed process must be deleted by hand.
    """
    native = _has_locks(lock.parent)
    if not native:
        _remove_empty(lock)
    held = FileLock(lock) if native else SoftFileLock(lock)
    try:
        held.acquire(timeout=0)
    except Timeout:
        raise UserError(f"{busy} by another process{_holder(lock)}\n  {advice}") from None
    try:
        if native:                                  # the other kind writes the same lines itself
            _write_holder(lock, f"{os.getpid()}\n{HOST}\n")
        yield
    finally:
        if native:
            _write_holder(lock, "")
        held.release()


def _has_locks(folder: Path) -> bool:
    """Whether the file system of a folder has locks that end with their process."""
    if sys.platform == "win32":
        return True
    with tempfile.TemporaryFile(prefix=".lock-", suffix=".partial", dir=folder) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in MISSING:
                raise
            return False
    return True


def _remove_empty(lock: Path) -> None:
    """Remove the empty file that a real lock leaves, if the run comes from another file system. A
    process that takes the lock now fills its file at once."""
    for seconds in (1, 0):
        if not lock.exists() or lock.stat().st_size:
            return
        time.sleep(seconds)
    lock.unlink(missing_ok=True)


def _write_holder(lock: Path, text: str) -> None:
    with contextlib.suppress(OSError):              # only a help for the message
        lock.write_text(text, "utf-8")


def _holder(lock: Path) -> str:
    """Who holds a lock, and what to do if that machine is gone; nothing if nobody wrote it."""
    with contextlib.suppress(OSError, ValueError):
        process, host = lock.read_text("utf-8").split("\n")[:2]
        if host == HOST:
            return f" (process {process} on this machine holds {lock})"
        if host:
            return (f" (process {process} on {host} holds {lock}; delete that file if the process "
                    "has ended)")
    return f" (it holds {lock})"


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
