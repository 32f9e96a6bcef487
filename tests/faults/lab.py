"""Where runs are broken: how to start them, and what must hold for their files afterwards."""

import json
import signal
import subprocess
from pathlib import Path

from errors import UserError

import numpy as np
import torch
from commands import ROOT, Done, command, start, wait_until
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

    @property
    def undisturbed(self) -> Path:
        """The run of tiny.yaml that no test disturbs."""
        return self / "runs/undisturbed"

    def train(self, *arguments: str, code: int = 0, **options) -> Done:
        """Run train.py, which must end with `code`."""
        return ended(command("train.py", *arguments, cwd=self.folder, **options), code)

    def train_broken(self, moment: str, n: int, deed: str, *arguments: str,
                     codes: tuple[int, ...] = (0,), **options) -> Done:
        """Run train.py, with `deed` done the n-th time that `moment` comes."""
        done = command(str(BREAKER), moment, str(n), deed, "train.py", *arguments,
                       cwd=self.folder, **options)
        return ended(done, *codes)

    def start(self, *arguments: str, **options) -> subprocess.Popen:
        """Start train.py in an interpreter of its own."""
        return start(ROOT / "train.py", *arguments, cwd=self.folder, **options)

    def resume(self, name: str, *arguments: str, **options) -> Done:
        """Continue run `name`, or begin it again if it had not begun."""
        run = f"runs/{name}"
        if (self / run / "config.yaml").exists():
            return self.train(run, **options)
        return self.train("tiny.yaml", f"run={name}", *arguments, **options)


def ended(done: Done, *codes: int) -> Done:
    """Assert that a command ended with one of `codes` and no traceback; returns it."""
    assert done.returncode in codes, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def count_lines(run: Path) -> int:
    """The number of complete lines of metrics.jsonl: a running trainer may be writing one."""
    return (run / "metrics.jsonl").read_text().count("\n")


def wait_for_a_line(run: Path, process: subprocess.Popen) -> None:
    """Wait until `process` has trained a step."""
    wait_until(lambda: (run / "metrics.jsonl").exists() and count_lines(run) > 0, process)


def check_files(run: Path, shards: Path | None = None) -> None:
    """Assert that every file of a broken run is complete, or that no reader accepts it."""
    for checkpoint in list_checkpoints(run / "checkpoints"):
        verify(checkpoint)
        state = json.loads((checkpoint / "training_state/state.json").read_text())
        assert state["step"] == int(checkpoint.name)
    if (run / "config.yaml").exists():
        assert read_file(run / "config.yaml")["run"]
    if (run / "metrics.jsonl").exists():
        *lines, rest = (run / "metrics.jsonl").read_bytes().split(b"\n")
        steps = [json.loads(line)["step"] for line in lines]
        assert steps == list(range(1, len(steps) + 1))
        assert rest == b"" or not is_json(rest)                 # a torn line, which readers drop
    for path in (run / "heads").glob("*.npz"):
        with np.load(path) as saved:
            assert all(saved[name].size for name in saved.files)
    if (run / "report.html").exists():
        assert (run / "report.html").read_text().rstrip().endswith("</script>")
    if shards is not None and shards.exists():
        try:
            Shards(shards, verify=True)
        except UserError as error:                              # all refused, none read
            assert "no prepared corpus" in str(error) and not (shards / "manifest.json").exists()


def is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Parameters, and the optimizer's state."""
    return dict(load_model(checkpoint)[0].named_parameters()) | load_optimizer(checkpoint)


def same_bits(a: Path, b: Path) -> bool:
    """Whether two checkpoints have the same parameters and optimizer state, bit for bit."""
    left, right = weights(a), weights(b)
    if left.keys() != right.keys():
        return False
    return all(torch.equal(left[name], right[name]) for name in left)


def check_same_run(run: Path, undisturbed: Path) -> None:
    """Assert that a run that was broken and continued equals an undisturbed one, bit for bit.

    Metrics, weights, optimizer state, snapshots and report.
    """
    last = list_checkpoints(undisturbed / "checkpoints")[-1].name
    assert metrics(run) == metrics(undisturbed)
    assert same_bits(run / "checkpoints" / last, undisturbed / "checkpoints" / last)
    assert (run / "checkpoints/latest").resolve().name == last
    snapshots, expected = ({path.name: path.read_bytes() for path in (folder / "heads").iterdir()}
                           for folder in (run, undisturbed))
    assert snapshots.keys() == expected.keys()
    for name in snapshots:
        assert snapshots[name] == expected[name], name
    pages = [(folder / "report.html").read_text().replace(f'"{folder.name}"', "")
             for folder in (run, undisturbed)]
    assert pages[0] == pages[1]
    assert not list(run.rglob("*partial*"))


# wandb writes its own files and sends no request.
OFFLINE = {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false"}
SIGNALS = {"kill -9": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT,
           "SIGHUP": signal.SIGHUP}
