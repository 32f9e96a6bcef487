"""`python tests/as_on_windows.py "train.py tiny.yaml" "sample.py runs/tiny" …`: run commands in a
process that lacks what Python lacks on Windows, and whose files behave as they do there.

Packages of others are imported before: they know both systems. What this cannot show is a Windows
build of PyTorch, its console, and paths with drives.
"""

import ctypes
import errno
import importlib
import os
import runpy
import shlex
import shutil
import signal
import stat
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
ONLY_POSIX = ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog", "posix",
              "triton")
# Some names that only POSIX has. Those that Python's own library calls at any time stay.
NAMES = {
    os: ("fork", "forkpty", "getuid", "geteuid", "getgid", "getpgid", "setsid", "killpg", "sysconf",
         "statvfs", "uname", "sched_getaffinity", "sched_setaffinity", "nice", "getloadavg",
         "mkfifo", "chown", "fchmod", "pread", "pwrite", "sync", "fdatasync", "posix_fadvise",
         "O_DIRECTORY", "O_NOFOLLOW", "O_CLOEXEC", "O_SYNC"),
    signal: ("SIGHUP", "SIGKILL", "SIGUSR1", "SIGUSR2", "SIGPIPE", "SIGALRM", "SIGCHLD", "alarm",
             "setitimer", "pthread_sigmask"),
}
# What our modules and their packages import, with this system's parts of them.
ALREADY_THERE = (
    "asyncio", "matplotlib.backends.backend_agg", "matplotlib.figure",
    "multiprocessing.popen_spawn_posix", "numpy", "PIL.ImageDraw", "PIL.ImageFont",
    "pydantic.types", "safetensors.torch", "scipy.stats", "subprocess", "tiktoken",
    "torch._dynamo", "torch.distributed.tensor", "torch.nn.attention.flex_attention", "tqdm",
    "yaml")
OURS = "data|errors|files|console|heads|induction|lab|model|report|sample|settings|train|training"


def hide() -> None:
    """Make this process one on Windows to all that is imported from now on."""
    for name in ONLY_POSIX:
        sys.modules[name] = None                                    # type: ignore[assignment]
    for module, names in NAMES.items():
        for name in names:
            vars(module).pop(name, None)
    sys.platform = "win32"
    load = ctypes.CDLL.__init__

    def only_with_a_name(self: ctypes.CDLL, name: Any, *rest: Any, **options: Any) -> None:
        if name is None:
            raise TypeError("bad argument type for built-in operation")
        load(self, name, *rest, **options)

    ctypes.CDLL.__init__ = only_with_a_name                         # type: ignore[method-assign]
    # The default encoding of a text file is the country's.
    warnings.filterwarnings("error", category=EncodingWarning, module=rf"({OURS})(\..*)?$")


# --- files ----------------------------------------------------------------------------------------

def in_use(path: Any) -> bool:
    """Whether this process has a file open, or mapped, that is `path` or inside it."""
    path = os.path.realpath(path)
    held = [os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
    held += [line.split(maxsplit=5)[5] for line in Path("/proc/self/maps").read_text().splitlines()
             if line.count(" ") >= 5 and "/" in line]
    return any(name == path or name.startswith(path + os.sep) for name in held)


def guarded(function: Callable, *, replaces: bool) -> Callable:
    """os.rename, os.replace, os.unlink …: not of a file that is open."""
    def call(path: Any, *rest: Any, **options: Any) -> Any:
        if "dir_fd" not in options and "src_dir_fd" not in options:
            for other in (path, *rest[:replaces]):
                if os.path.lexists(other) and in_use(other):
                    raise PermissionError(errno.EACCES, "it is used by another process", str(other))
            if function is rename and rest and os.path.lexists(rest[0]):
                raise FileExistsError(errno.EEXIST, "cannot create a file that exists",
                                      str(rest[0]))
        return function(path, *rest, **options)
    return call


def no_links(*_: Any, **__: Any) -> NoReturn:
    raise OSError(errno.EINVAL, "a required privilege is not held by the client")


def open_no_folder(path: Any, flags: int, *rest: Any, **options: Any) -> int:
    if not isinstance(path, int) and os.path.isdir(path):
        raise PermissionError(errno.EACCES, "permission denied", str(path))
    return os_open(path, flags, *rest, **options)


def sync_what_is_written(file: Any) -> None:
    descriptor = file if isinstance(file, int) else file.fileno()
    if posix_fcntl.fcntl(descriptor, posix_fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(errno.EBADF, "bad file descriptor")
    assert stat.S_ISREG(os.fstat(descriptor).st_mode)
    fsync(descriptor)


def change_files() -> None:
    os.symlink = os.link = no_links                                 # type: ignore[assignment]
    os.open, os.fsync = open_no_folder, sync_what_is_written        # type: ignore[assignment]
    os.rename = guarded(rename, replaces=True)                      # type: ignore[assignment]
    os.replace = guarded(os.replace, replaces=True)                 # type: ignore[assignment]
    os.unlink = os.remove = guarded(os.unlink, replaces=False)      # type: ignore[assignment]
    os.rmdir = guarded(os.rmdir, replaces=False)                    # type: ignore[assignment]
    tempfile.TemporaryFile = tempfile.NamedTemporaryFile            # type: ignore[assignment]
    shutil._use_fd_functions = False                                # type: ignore[attr-defined]


if __name__ == "__main__":
    for name in ALREADY_THERE:
        importlib.import_module(name)
    import fcntl as posix_fcntl

    from filelock import FileLock, SoftFileLock  # noqa: F401      which filelock imports lazily

    os_open, fsync, rename = os.open, os.fsync, os.rename
    change_files()
    hide()
    sys.path[0] = str(ROOT)
    for line in sys.argv[1:]:
        sys.argv = shlex.split(line)
        try:
            runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")
        except SystemExit as error:
            if error.code:
                raise
