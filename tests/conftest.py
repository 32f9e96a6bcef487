"""What the tests share: a small real corpus, small real runs, and a limit that only a test that hangs meets."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from commands import command, started
from hypothesis import settings

TRITON_TESTS = ("ahead_of_time", "decode", "flash", "gluon", "gpu_kernels", "head_statistics", "operators", "without_a_device")
KERNEL_TESTS = ("attention", *TRITON_TESTS)     # they need torch, triton, numpy, pytest and hypothesis, and nothing else
missing = [name for name in ("pydantic", "yaml", "wandb", "datasets", "tokenizers", "playwright") if not find_spec(name)]
if not find_spec("triton"):                     # macOS, Windows: everything but the kernels
    collect_ignore = [f"test_{name}.py" for name in TRITON_TESTS]
elif not torch.cuda.is_available():
    import interpreter  # noqa: F401          so that the kernels run on the CPU
if missing:                                     # a rented GPU often has PyTorch and little more
    kept = {f"test_{name}.py" for name in KERNEL_TESTS}
    collect_ignore = ["faults", *(path.name for path in Path(__file__).parent.glob("test_*.py") if path.name not in kept)]

os.environ.setdefault("OMP_NUM_THREADS", "1")   # the workers share the cores
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
os.environ.setdefault("GOMP_SPINCOUNT", "1000")             # as errors.py sets it; read when a worker imports PyTorch
os.environ |= {"WANDB_MODE": "disabled", "WANDB__SERVICE_WAIT": "600", "TOKENIZERS_PARALLELISM": "false"}
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)             # or each of hundreds of processes compiles our modules anew
torch.compiler.config.cache_key_tag = torch.backends.cpu.get_cpu_capability()       # model.compiled.keep_apart_by_cpu says why
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


def pytest_report_header() -> str:
    return f"only the kernels' tests: {', '.join(missing)} not installed" if missing else ""


def slowness() -> float:
    """How much longer a piece of work takes here and now than on an idle core of 2026; at least 1."""
    began = time.perf_counter()
    sum(n * n % 7 for n in range(2_000_000))
    return max(1.0, (time.perf_counter() - began) / 0.15)


# The one limit on time: seconds after which pytest-timeout takes a test to hang. On two idle cores the longest takes a minute with what it
# needs. It is set once, by the process that starts the workers.
os.environ.setdefault("PYTEST_TIMEOUT", str(round(900 * slowness())))

TINY = {
    "run": "tiny", "seed": 1,
    "model": {"n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_model": 32, "n_ctx": 32},
    "data": {"corpus": "files", "files": ["texts/*.txt"], "tokenizer": {"kind": "bpe", "vocab_size": 300}, "val_fraction": 0.2},
    "train": {"steps": 12, "batch_tokens": 256},
    "optimizer": {"warmup_steps": 2},
    "eval": {"every": 6, "tokens": 1024},
    "checkpoint": {"every": 4, "keep": 2},
    "heads": {"every": 4},
    "log": {"every": 1, "wandb": "disabled"},
}


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Deal out the tests marked `long`: pytest's workers begin with equal parts of the list, and take from each other's ends."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    long = [item for item in items if item.get_closest_marker("long")]
    others, total = [item for item in items if item not in long], len(items)
    items.clear()
    for worker in range(workers):
        share, first = (total - len(items)) // (workers - worker), long[worker::workers]    # as xdist divides what is left
        rest = max(0, share - len(first))
        items += first + others[:rest]
        del others[:rest]


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """An empty folder to work in, with texts/*.txt (24 files of Python's own library) and tiny.yaml that trains on them."""
    make_workplace(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_workplace(folder: Path) -> None:
    import yaml  # here and below: the kernels' tests do without these packages
    (folder / "texts").mkdir()
    for source in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-c]*.py"))[:24]:
        (folder / "texts" / f"{source.stem}.txt").write_bytes(source.read_bytes()[:6000])
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))


@pytest.fixture(scope="session")
def made_once(tmp_path_factory) -> Callable[[str, Callable[[Path], None]], Path]:
    """`made_once("name", make)`: a workplace in which `make` has run, in one of pytest's workers for all of them."""
    from filelock import FileLock
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared

    def made(name: str, make: Callable[[Path], None]) -> Path:
        folder, ready = shared / name, shared / f"{name}.ready"
        with FileLock(shared / f"{name}.lock"):
            if not ready.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make_workplace(folder)
                make(folder)
                ready.touch()
        return folder

    return made


@pytest.fixture(scope="session")
def trained(made_once) -> Path:
    """A finished run of tiny.yaml: the folder runs/tiny. Tests must not change it."""
    def train(folder: Path) -> None:
        done = command("train.py", "tiny.yaml", cwd=folder)
        assert done.returncode == 0, done.stderr

    return made_once("trained", train) / "runs" / "tiny"


@pytest.fixture(autouse=True)
def nothing_left_running():
    """A process that a failed test leaves behind would take a core from those that follow."""
    yield
    for process in started:
        if process.poll() is None:
            process.terminate()                 # which torchrun passes on
            try:
                process.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
    started.clear()


def wandb_history(run: Path) -> list[dict]:
    """What was logged in the newest offline wandb run of a run, read with wandb's own tool."""
    folder = max((run / "wandb").glob("offline-run-*"))
    done = subprocess.run([sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)], capture_output=True, text=True,
                          env=os.environ | {"WANDB_ERROR_REPORTING": "false"})
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines() if line.strip()]
    return [record for record in records if record.get("type") == "history"]


def metrics(run: Path) -> dict[int, dict]:
    """The metrics.jsonl of a run that has ended, by step, without what a clock or a memory gauge says. No step is there twice."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    by_step = {r["step"]: {k: v for k, v in r.items() if k not in
                           ("seconds", "train/tokens_per_second", "train/memory_gb", "train/mfu")} for r in records}
    assert len(by_step) == len(records)
    return by_step
