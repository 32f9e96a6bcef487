"""Files that appear whole or not at all."""

import contextlib
import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from errors import UserError

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM, errno.EIO,
               errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EEXIST)     # the last: a dangling link for a folder


@contextlib.contextmanager
def whole_file(path: Path, mode: str = "wb") -> Iterator:
    """Write `path` under a temporary name, flush it to the disk, then give it its name."""
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
    """Make renames in `folder` outlast a power cut."""
    with contextlib.suppress(PermissionError):      # a folder cannot be opened on some systems
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def only_one(lock: Path, message: str) -> Iterator[None]:
    """Hold `lock` while the block runs; a UserError with `message` if another process does. A killed holder's lock is free."""
    try:
        held = FileLock(lock).acquire(timeout=0)
    except Timeout:
        raise UserError(message) from None
    with held:
        yield


@contextlib.contextmanager
def explain_disk_errors(what: str, advice: str) -> Iterator[None]:
    """Turn a full disk or a missing permission while doing `what` into a UserError with `advice`."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise UserError(f"{what}: {error.strerror} ({error.filename or 'disk'})\n  {advice}") from None


def must_be_writable(path: str | Path | None, option: str) -> None:
    """Raise before the work rather than after it where nothing can be written there."""
    if path is not None and (Path(path).is_dir() or not os.access(Path(path).parent, os.W_OK)):
        raise UserError(f"{option} {path}: cannot be written\n  name a file in a folder that is there and yours")
