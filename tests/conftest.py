"""What the tests share: a small real corpus, small real runs, and a time limit for tests that hang.

On a rented GPU often only PyTorch, triton, numpy, pytest and hypothesis are installed. The tests of
the kernels need nothing else, so this file imports nothing else at its top.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from commands import command, started, succeeds
from hypothesis import settings

TRITON_TESTS = ("ahead_of_time", "decode", "flash", "gluon", "gpu_kernels", "head_statistics",
                "operators", "without_a_device")
KERNEL_TESTS = ("attention", *TRITON_TESTS)
OTHER_PACKAGES = ("pydantic", "yaml", "wandb", "datasets", "tokenizers", "playwright")
missing = [name for name in OTHER_PACKAGES if not find_spec(name)]
if not find_spec("triton"):                     # macOS, Windows: everything but the kernels
    collect_ignore = [f"test_{name}.py" for name in TRITON_TESTS]
elif not torch.cuda.is_available():
    import interpreter  # noqa: F401          so that the kernels run on the CPU
if missing:
    kernel_tests = {f"test_{name}.py" for name in KERNEL_TESTS}
    all_tests = {path.name for path in Path(__file__).parent.glob("test_*.py")}
    collect_ignore = ["faults", "clients", *(all_tests - kernel_tests)]

os.environ.setdefault("OMP_NUM_THREADS", "1")   # the workers share the cores
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
# As errors.py sets it; read when a worker imports PyTorch.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ |= {"WANDB_MODE": "disabled", "WANDB__SERVICE_WAIT": "600",
               "TOKENIZERS_PARALLELISM": "false"}
# With it, each of hundreds of processes would compile our modules again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# Under nohup the commands would ignore SIGHUP too. With a handler here they have the default.
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)
# model.compiled.keep_apart_by_cpu says why.
torch.compiler.config.cache_key_tag = torch.backends.cpu.get_cpu_capability()
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


def pytest_report_header() -> str:
    if missing:
        return f"only the kernels' tests: {', '.join(missing)} not installed"
    return ""


def slowness() -> float:
    """Time of a piece of work here and now, divided by that on an idle core of 2026; at least 1."""
    begun = time.perf_counter()
    sum(n * n % 7 for n in range(2_000_000))
    return max(1.0, (time.perf_counter() - begun) / 0.15)


# The only time limit: seconds after which pytest-timeout assumes that a test hangs. On two idle
# cores the longest takes a minute, fixtures included. The process that starts the workers sets it.
os.environ.setdefault("PYTEST_TIMEOUT", str(round(900 * slowness())))

TINY = {
    "run": "tiny", "seed": 1,
    "model": {"n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_model": 32, "n_ctx": 32},
    "data": {"corpus": "files", "files": ["texts/*.txt"],
             "tokenizer": {"kind": "bpe", "vocab_size": 300}, "val_fraction": 0.2},
    "train": {"steps": 12, "batch_tokens": 256},
    "optimizer": {"warmup_steps": 2},
    "eval": {"every": 6, "tokens": 1024},
    "checkpoint": {"every": 4, "keep": 2},
    "heads": {"every": 4},
    "log": {"every": 1, "wandb": "disabled"},
}


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Deal out the tests marked `long`, so that every worker begins with its part of them.

    pytest-xdist gives each worker an equal part of the list; later they take from each other's
    ends.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    long = [item for item in items if item.get_closest_marker("long")]
    others = [item for item in items if item not in long]
    total = len(items)
    items.clear()
    for worker in range(workers):
        share = (total - len(items)) // (workers - worker)      # as xdist divides the remainder
        own_long = long[worker::workers]
        n_others = max(0, share - len(own_long))
        items += own_long + others[:n_others]
        del others[:n_others]


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """The working directory: texts/*.txt, and tiny.yaml that trains on them."""
    make_workplace(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_workplace(folder: Path) -> None:
    """Write texts/*.txt (the beginnings of 24 files of Python's own library) and tiny.yaml."""
    import yaml  # noqa: PLC0415  the kernels' tests run without it
    (folder / "texts").mkdir()
    for source in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-c]*.py"))[:24]:
        (folder / "texts" / f"{source.stem}.txt").write_bytes(source.read_bytes()[:6000])
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))


@pytest.fixture(scope="session")
def made_once(tmp_path_factory) -> Callable[[str, Callable[[Path], None]], Path]:
    """`made_once("name", make)`: a workplace in which `make` has run, once for all workers."""
    from filelock import FileLock  # noqa: PLC0415  likewise
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent

    def folder_of(name: str, make: Callable[[Path], None]) -> Path:
        folder, ready = shared / name, shared / f"{name}.ready"
        with FileLock(shared / f"{name}.lock"):
            if not ready.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make_workplace(folder)
                make(folder)
                ready.touch()
        return folder

    return folder_of


@pytest.fixture(scope="session")
def trained(made_once) -> Path:
    """A finished run of tiny.yaml: the folder runs/tiny. Tests must not change it."""
    def train(folder: Path) -> None:
        succeeds(command("train.py", "tiny.yaml", cwd=folder))

    return made_once("trained", train) / "runs" / "tiny"


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of a finished run, to write into."""
    shutil.copytree(trained.parent.parent, tmp_path, dirs_exist_ok=True)
    return tmp_path / "runs" / "tiny"


@pytest.fixture(autouse=True)
def nothing_left_running():
    """End the processes that a failed test leaves behind: each would take a core from the rest."""
    yield
    for process in started:
        if process.poll() is None:
            process.terminate()                 # torchrun passes it on
            try:
                process.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
    started.clear()


def wandb_history(run: Path) -> list[dict]:
    """The records of the newest offline wandb run of `run`, read with wandb's own tool."""
    folder = max((run / "wandb").glob("offline-run-*"))
    done = subprocess.run(
        [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)],
        capture_output=True, text=True, env=os.environ | {"WANDB_ERROR_REPORTING": "false"})
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines() if line.strip()]
    return [record for record in records if record.get("type") == "history"]


def read_records(run: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


MEASURED_BY_THE_MACHINE = {"seconds", "train/tokens_per_second", "train/memory_gb", "train/mfu"}


def metrics(run: Path) -> dict[int, dict]:
    """The metrics of a finished run by step, without those of the clock and of memory.

    No step may be there twice.
    """
    records = read_records(run)
    by_step = {record["step"]: {key: value for key, value in record.items()
                                if key not in MEASURED_BY_THE_MACHINE} for record in records}
    assert len(by_step) == len(records)
    return by_step
