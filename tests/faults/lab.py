"""Where runs are broken: how to start them, and what must hold of what is left."""

import json
import signal
import subprocess
from pathlib import Path

from errors import UserError

import numpy as np
import torch
from commands import ROOT, command, start, wait_until
from conftest import metrics

from data.shards import Shards
from settings.yaml12 import read_file
from training.checkpoint import list_checkpoints, load_model, load_optimizer, verify

BREAKER = Path(__file__).with_name("breaker.py")


class Lab:
    """A workplace in which runs are begun, broken and continued."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def train(self, *arguments: str, code: int = 0, **options) -> subprocess.CompletedProcess:
        """train.py in its own process, which must end with `code`."""
        return self.ended(command("train.py", *arguments, cwd=self.folder, **options), code)

    def train_broken(self, moment: str, n: int, deed: str, *arguments: str, codes: tuple[int, ...] = (0,), **options):
        """train.py, with `deed` done the n-th time that `moment` comes."""
        return self.ended(command(str(BREAKER), moment, str(n), deed, "train.py", *arguments, cwd=self.folder, **options), *codes)

    def start(self, *arguments: str, **options) -> subprocess.Popen:
        return start(ROOT / "train.py", *arguments, cwd=self.folder, **options)

    @staticmethod
    def lines(run: Path) -> int:
        """How many lines its metrics.jsonl has. Those that are complete: a trainer that runs may be in the middle of one."""
        return (run / "metrics.jsonl").read_text().count("\n")

    def wait_for_a_line(self, run: Path, process: subprocess.Popen) -> None:
        """Until `process` has trained a step."""
        wait_until(lambda: (run / "metrics.jsonl").exists() and self.lines(run) > 0, process)

    @staticmethod
    def records(run: Path) -> list[dict]:
        """The lines of its metrics.jsonl."""
        return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]

    @staticmethod
    def ended(done: subprocess.CompletedProcess, *codes: int) -> subprocess.CompletedProcess:
        assert done.returncode in codes, (done.returncode, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr, done.stderr
        return done

    def go_on(self, name: str, *arguments: str, **options) -> subprocess.CompletedProcess:
        """Continue run `name`, or begin it anew where it had not begun."""
        run = f"runs/{name}"
        begun = (self / run / "config.yaml").exists()
        return self.train(*([run] if begun else ["tiny.yaml", f"run={name}", *arguments]), **options)


def check_what_is_left(run: Path, shards: Path | None = None) -> None:
    """No file of a broken run says anything wrong: each is whole, or is not taken for one."""
    for checkpoint in list_checkpoints(run / "checkpoints"):
        verify(checkpoint)
        assert json.loads((checkpoint / "training_state/state.json").read_text())["step"] == int(checkpoint.name)
    if (run / "config.yaml").exists():
        assert read_file(run / "config.yaml")["run"]
    if (run / "metrics.jsonl").exists():
        *whole, end = (run / "metrics.jsonl").read_bytes().split(b"\n")
        steps = [json.loads(line)["step"] for line in whole]
        assert steps == list(range(1, len(steps) + 1))
        assert end == b"" or not json_or_none(end)              # a torn end, which no reader takes for a line
    for path in (run / "heads").glob("*.npz"):
        with np.load(path) as saved:
            assert all(saved[name].size for name in saved.files)
    if (run / "report.html").exists():
        assert (run / "report.html").read_text().rstrip().endswith("</script>")
    if shards is not None and shards.exists():
        try:
            Shards(shards, verify=True)
        except UserError as error:
            assert "no prepared corpus" in str(error) and not (shards / "manifest.json").exists()   # refused whole, not read in part


def json_or_none(text: bytes):
    try:
        return json.loads(text)
    except ValueError:
        return None


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Parameters, and everything that the optimizer remembers."""
    return dict(load_model(checkpoint)[0].named_parameters()) | load_optimizer(checkpoint)


def same_bits(a: Path, b: Path) -> bool:
    left, right = weights(a), weights(b)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def check_same_run(run: Path, whole: Path) -> None:
    """A run that was broken and continued is the run that was not: metrics, weights, optimizer and snapshots, bit for bit."""
    last = list_checkpoints(whole / "checkpoints")[-1].name
    assert metrics(run) == metrics(whole)
    assert same_bits(run / "checkpoints" / last, whole / "checkpoints" / last)
    assert (run / "checkpoints/latest").resolve().name == last
    assert {p.name for p in (run / "heads").iterdir()} == {p.name for p in (whole / "heads").iterdir()}
    for path in (run / "heads").iterdir():
        assert path.read_bytes() == (whole / "heads" / path.name).read_bytes(), path
    pages = [(folder / "report.html").read_text().replace(f'"{folder.name}"', "") for folder in (run, whole)]
    assert pages[0] == pages[1]
    assert not list(run.rglob("*partial*"))


def is_left(of: int) -> bool:
    """Whether wandb's own process runs for the trainer of that number."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"wandb-core" in command[0] and str(of).encode() in command:
            return True
    return False


OFFLINE = {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false"}       # wandb's own files, and no request to anyone
SIGNALS = {"kill -9": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}
