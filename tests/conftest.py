"""What the tests share: a small real corpus, small real runs, and commands run as a user would."""

import json
import os
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml

if not find_spec("triton"):                     # macOS, Windows: everything but the kernels
    collect_ignore = [f"test_{name}.py" for name in ("ahead_of_time", "decode", "flash", "gpu", "head_statistics", "operators")]
elif not torch.cuda.is_available():
    import interpreter  # noqa: F401          so that the kernels run on the CPU

ROOT = Path(__file__).parent.parent
torch.set_num_threads(1)                        # the same bits on every machine
os.environ |= {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", "TOKENIZERS_PARALLELISM": "false"}

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


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """An empty folder to work in, with texts/*.txt (24 files of Python's own library) and tiny.yaml that trains on them."""
    make_workplace(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_workplace(folder: Path) -> None:
    (folder / "texts").mkdir()
    for source in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-c]*.py"))[:24]:
        (folder / "texts" / f"{source.stem}.txt").write_bytes(source.read_bytes()[:6000])
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """A finished run of tiny.yaml: the folder runs/tiny. Tests must not change it."""
    folder = tmp_path_factory.mktemp("trained")
    make_workplace(folder)
    done = command("train.py", "tiny.yaml", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "tiny"


def command(script: str, *arguments: str, cwd: Path | None = None, **options) -> subprocess.CompletedProcess:
    """Run a script of the repository (or `-m module`) in its own process."""
    start = ["-m", script.removeprefix("-m ")] if script.startswith("-m ") else [str(ROOT / script)]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)} | options.pop("env", {})
    return subprocess.run([sys.executable, *start, *map(str, arguments)], cwd=cwd, env=environment,
                          capture_output=True, text=True, timeout=options.pop("timeout", 120), **options)


def fails(done: subprocess.CompletedProcess, *words: str) -> None:
    """Assert that a command ended as user errors do: exit code 2, one or two lines a mistake, no traceback, `words` in them."""
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    message = done.stderr[done.stderr.index("error: "):]
    assert len(message.strip().splitlines()) <= 2, message
    for word in words:
        assert word in message, message


def metrics(run: Path) -> dict[int, dict]:
    """The lines of a run's metrics.jsonl by step, without what a clock or a memory gauge says. Asserts that no step is there twice."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    by_step = {r["step"]: {k: v for k, v in r.items() if k not in
                           ("seconds", "train/tokens_per_second", "train/memory_gb", "train/mfu")} for r in records}
    assert len(by_step) == len(records)
    return by_step
