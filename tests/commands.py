"""The project's commands in processes of their own, as a user runs them.

Most of a short command's time is the import of packages, and the tests run hundreds of commands.
So each pytest worker keeps one process that has imported the packages but nothing of this project
(multiprocessing's fork server). `command` runs in a fork of it, with its own memory, working
directory, environment, output, signals and exit code. `start` begins a new interpreter, for
commands that a test will disturb.
"""

import atexit
import gc
import multiprocessing
import os
import pickle
import resource
import runpy
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
# Packages read these when they are imported: a fork would see them too late.
READ_BY_IMPORTS = {"ATEN_CPU_CAPABILITY", "LD_PRELOAD", "OMP_NUM_THREADS", "TRITON_INTERPRET"}
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([
    "torch", "torch._dynamo", "torch.nn.attention.flex_attention", "pydantic.fields",
    "pydantic.types", "yaml", "filelock", "safetensors.torch", "tiktoken", "tqdm", "PIL.ImageDraw",
    "PIL.ImageFont", "matplotlib.backends.backend_agg", "matplotlib.figure"])
# The processes of `start`. Those that a test leaves behind are ended after it.
started: list[subprocess.Popen] = []


class Done(subprocess.CompletedProcess[str]):
    """How a command ended.

    `used` holds ru_utime, ru_stime and ru_maxrss if the command ran in a fork and was not killed.
    """

    used: resource.struct_rusage


def environment(**changes: str) -> dict[str, str]:
    """The environment of a command.

    This process's, without Triton's interpreter and with this repository on Python's path.
    """
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = [str(ROOT), variables.get("PYTHONPATH")]
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    return variables | changes


def python_arguments(script: str) -> list[str]:
    """What follows `python` for a script of the repository or for `-m module`."""
    return script.split() if script.startswith("-m ") else [str(ROOT / script)]


def command(script: str, *arguments: object, cwd: Path | None = None,
            env: dict[str, str] | None = None, input: str = "") -> Done:
    """Run a script of the repository (or `-m module`) to its end. `env` changes its environment."""
    words = list(map(str, arguments))
    variables = environment(**env or {})
    if READ_BY_IMPORTS & (env or {}).keys():
        done = subprocess.run([sys.executable, *python_arguments(script), *words], cwd=cwd,
                              env=variables, input=input, capture_output=True, text=True)
        return Done(done.args, done.returncode, done.stdout, done.stderr)
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder, name) for name in ("stdin", "stdout", "stderr")]
        used = Path(folder, "used")
        stdin, stdout, stderr = streams
        stdin.write_text(input)
        fork = SERVER.Process(
            target=_become, args=(script, words, cwd or Path.cwd(), variables, streams, used))
        fork.start()
        try:
            fork.join()
        finally:
            fork.kill()                         # it still runs if the test has timed out
        done = Done([script, *words], fork.exitcode, stdout.read_text(), stderr.read_text())
        if used.exists():
            done.used = pickle.loads(used.read_bytes())
        return done


def _become(script: str, words: list[str], cwd: Path, variables: dict[str, str],
            streams: list[Path], used: Path) -> None:
    """In the fork: turn into `python script words…`."""
    gc.freeze()                                 # or each collection copies everything imported
    os.environ.clear()
    os.environ.update(variables)
    sys.dont_write_bytecode = False             # the server has this process's flags
    for descriptor, path in enumerate(streams):
        flags = os.O_RDONLY if descriptor == 0 else os.O_WRONLY | os.O_CREAT
        os.dup2(os.open(path, flags), descriptor)
    sys.stdin = open(0)                                             # noqa: SIM115
    sys.stdout, sys.stderr = open(1, "w"), open(2, "w", buffering=1)            # noqa: SIM115
    os.chdir(cwd)
    others = [path for path in sys.path if Path(path) not in (ROOT, ROOT / "tests")]
    sys.path = [str(ROOT), *others]
    *module, target = python_arguments(script)
    sys.argv = [target, *words]
    sys.modules["__main__"] = sys.modules["__mp_main__"] = main = types.ModuleType("__main__")
    try:
        if module:
            runpy._run_module_as_main(target, alter_argv=False)
        else:
            main.__file__ = target
            exec(compile(Path(target).read_bytes(), target, "exec"), vars(main))
    finally:
        if not sys.stdout.closed:
            sys.stdout.flush()
        atexit._run_exitfuncs()                 # multiprocessing would not call them
        used.write_bytes(pickle.dumps(resource.getrusage(resource.RUSAGE_SELF)))


def start(
        *words: object, env: dict[str, str] | None = None, **options: Any,
        ) -> subprocess.Popen[str]:
    """Begin `python words…`; its `stdout` gives its output and its errors."""
    process = subprocess.Popen(
        [sys.executable, *map(str, words)], env=environment(**env or {}), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, **options)
    started.append(process)
    return process


def wait_until(condition: Callable[[], bool], *processes: subprocess.Popen) -> None:
    """Wait for as long as it takes, while all `processes` run."""
    while not condition():
        for process in processes:
            running = process.poll() is None
            assert running or condition(), (process.args, process.communicate()[0])
        time.sleep(0.01)


def succeeds(done: Done) -> Done:
    """Assert that a command ended with exit code 0 and no traceback; returns it."""
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def fails(done: subprocess.CompletedProcess, *words: str) -> None:
    """Assert that a command ended as it does on a user's mistake.

    Exit code 2, no traceback, one or two lines that contain each of `words`.
    """
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    message = done.stderr[done.stderr.index("error: "):]
    assert len(message.strip().splitlines()) <= 2, message
    for word in words:
        assert word in message, message
