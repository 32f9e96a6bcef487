"""The project's commands in processes of their own, as a user runs them.

Most of a short command's time is the import of packages, and the tests run hundreds of commands. So each pytest worker keeps one
process that has imported them and nothing of this project (multiprocessing's fork server), and `command` runs in a fork of it, with its own
memory, working directory, environment, output, signals and exit code. `start` begins a new interpreter, for what is to be disturbed.
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

ROOT = Path(__file__).parent.parent
READ_BY_IMPORTS = {"ATEN_CPU_CAPABILITY", "OMP_NUM_THREADS", "TRITON_INTERPRET"}       # a fork would see these too late
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch", "torch._dynamo", "torch.nn.attention.flex_attention", "pydantic.fields", "pydantic.types", "yaml",
                               "filelock", "safetensors.torch", "tiktoken", "tqdm", "PIL.ImageDraw", "PIL.ImageFont",
                               "matplotlib.backends.backend_agg", "matplotlib.figure"])
started: list[subprocess.Popen] = []            # by `start`; what a test leaves behind is ended after it


class Done(subprocess.CompletedProcess[str]):
    """How a command ended. `used` has what it took, if it is a fork and was not killed: its ru_utime, ru_stime and ru_maxrss."""

    used: resource.struct_rusage


def environment(**changes: str) -> dict[str, str]:
    """This process's environment as a command gets it: without Triton's interpreter, with this repository on Python's path."""
    found = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), found.get("PYTHONPATH"))))
    return found | changes


def arguments_of(script: str) -> list[str]:
    """Of Python, for a script of the repository or `-m module`."""
    return script.split() if script.startswith("-m ") else [str(ROOT / script)]


def command(script: str, *arguments: object, cwd: Path | None = None, env: dict[str, str] | None = None,
            input: str = "") -> Done:
    """Run a script of the repository (or `-m module`) to its end. `env` changes its environment."""
    words = list(map(str, arguments))
    if READ_BY_IMPORTS & (env or {}).keys():
        done = subprocess.run([sys.executable, *arguments_of(script), *words], cwd=cwd, env=environment(**env or {}), input=input,
                              capture_output=True, text=True)
        return Done(done.args, done.returncode, done.stdout, done.stderr)
    with tempfile.TemporaryDirectory() as folder:
        *streams, used = [Path(folder, name) for name in ("stdin", "stdout", "stderr", "used")]
        streams[0].write_text(input)
        fork = SERVER.Process(target=_become, args=(script, words, cwd or Path.cwd(), environment(**env or {}), streams, used))
        fork.start()
        try:
            fork.join()
        finally:
            fork.kill()                         # it still runs if the test has run out of time
        done = Done([script, *words], fork.exitcode, streams[1].read_text(), streams[2].read_text())
        if used.exists():
            done.used = pickle.loads(used.read_bytes())
        return done


def _become(script: str, words: list[str], cwd: Path, variables: dict[str, str], streams: list[Path], used: Path) -> None:
    """In the fork: turn into `python script words…`."""
    gc.freeze()                                 # or each collection copies all that was imported
    os.environ.clear()
    os.environ.update(variables)
    sys.dont_write_bytecode = False             # the server has this process's flags
    for number, (path, flags) in enumerate(zip(streams, (os.O_RDONLY, os.O_WRONLY | os.O_CREAT, os.O_WRONLY | os.O_CREAT))):
        os.dup2(os.open(path, flags), number)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)        # noqa: SIM115
    os.chdir(cwd)
    sys.path = [str(ROOT), *(path for path in sys.path if Path(path) not in (ROOT, ROOT / "tests"))]
    *module, target = arguments_of(script)
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
        atexit._run_exitfuncs()                 # multiprocessing would leave them out
        used.write_bytes(pickle.dumps(resource.getrusage(resource.RUSAGE_SELF)))


def start(*words: object, env: dict[str, str] | None = None, **options) -> subprocess.Popen[str]:
    """Begin `python words…`; its output and errors come through its `stdout`."""
    process = subprocess.Popen([sys.executable, *map(str, words)], env=environment(**env or {}), stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True, **options)
    started.append(process)
    return process


def wait_until(condition: Callable[[], bool], *processes: subprocess.Popen) -> None:
    """Wait, however busy the machine is, while all `processes` run."""
    while not condition():
        for process in processes:
            assert process.poll() is None or condition(), (process.args, process.communicate()[0])
        time.sleep(0.01)


def fails(done: subprocess.CompletedProcess, *words: str) -> None:
    """Assert that a command ended as user errors do: exit code 2, one or two lines a mistake, no traceback, `words` in them."""
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    message = done.stderr[done.stderr.index("error: "):]
    assert len(message.strip().splitlines()) <= 2, message
    for word in words:
        assert word in message, message
