"""Real processes under torchrun: they compute the run of one process, and survive a lost one."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import ROOT, command, environment, fails, start, succeeds, wait_until
from conftest import metrics
from faults.lab import weights

from training.checkpoint import find_checkpoint, load_model

TORCHRUN = ["-m", "torch.distributed.run"]
FOUR = pytest.param(4, marks=pytest.mark.faults)


def torchrun(processes: int, script: Path, *arguments: str,
             cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *TORCHRUN, "--standalone", f"--nproc-per-node={processes}", str(script),
         *arguments],
        cwd=cwd, env=environment(), capture_output=True, text=True)


def train(processes: int, *arguments: str, cwd: Path) -> str:
    """Train in `processes` processes, with torchrun if there are several; the output."""
    if processes == 1:
        return succeeds(command("train.py", *arguments, cwd=cwd)).stdout
    done = torchrun(processes, ROOT / "train.py", *arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- the run of one process -------------------------------------------------------------------

# Several processes sum in another order than one. In float32, a loss of 6 nats is stored to 5e-7.
# From zero-initialised projections such differences grow: some gradients consist only of rounding
# errors, which Muon scales to full-size updates. Two runs of *one* process that differed only in
# train.micro_batch were 2e-4 nats apart after 20 steps. From random projections they do not grow:
# losses and gradient norms differed by at most 1.4e-6, tensors by 6.4e-5 of their norm, over 4
# seeds and the CPU's avx512, avx2 and default kernels, in one process and in two.
RANDOM_PROJECTIONS = "model.zero_init=false"
CONFIG = ["tiny.yaml", RANDOM_PROJECTIONS, "train.steps=20", "train.micro_batch=1",
          "data.mask_documents=true", "model.d_mlp=40",
          "checkpoint={every: 5, keep: 9, background: true}"]
LOSSES = {"train/loss", "val/loss", "repeat/loss_first", "repeat/loss_second"}


def check_same_training(run: Path, expected: Path) -> None:
    """The losses of two runs agree to 1e-5 nats over 20 steps, their gradient norms to 1e-4."""
    records, expected_records = metrics(run), metrics(expected)
    assert list(records) == list(expected_records) == list(range(1, 21))
    for step, record in records.items():
        expected_record = expected_records[step]
        assert record.keys() == expected_record.keys()
        for key in LOSSES & record.keys():
            assert record[key] == pytest.approx(expected_record[key], abs=1e-5), (step, key)
        norm, expected_norm = record["train/grad_norm"], expected_record["train/grad_norm"]
        assert norm == pytest.approx(expected_norm, rel=1e-4), step
    tensors, expected_tensors = weights(find_checkpoint(run)), weights(find_checkpoint(expected))
    assert tensors.keys() == expected_tensors.keys()
    for name, tensor in expected_tensors.items():
        assert (tensors[name] - tensor).norm() <= 1e-3 * tensor.norm(), name


@pytest.fixture(scope="session")
def trained_with(made_once) -> Callable[[str, int], Path]:
    """`trained_with("fsdp", 2)`: a folder with two runs of the same config.

    runs/single was trained by one process, runs/parallel by this many; parallel.txt is the output
    of the second.
    """
    def folder_of(strategy: str, processes: int) -> Path:
        recompute = f"train.checkpoint_activations={'true' if strategy == 'fsdp' else 'false'}"

        def make(folder: Path) -> None:
            train(1, *CONFIG, "run=single", f"distributed={strategy}", cwd=folder)
            output = train(processes, *CONFIG, "run=parallel", f"distributed={strategy}",
                           recompute, cwd=folder)
            (folder / "parallel.txt").write_text(output)

        return made_once(f"{strategy}-{processes}", make)

    return folder_of


@pytest.mark.parametrize("processes", [2, FOUR])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_several_processes_train_the_model_of_one(trained_with, strategy, processes):
    """Muon and AdamW, accumulation, packed documents, evaluation and heads.

    Under fsdp, every process holds a part of the model, and activations are recomputed.
    """
    folder = trained_with(strategy, processes)
    single, parallel = folder / "runs/single", folder / "runs/parallel"
    batch = f"{processes} processes ({strategy}) × {8 // processes} × 1 windows a step"
    assert batch in (folder / "parallel.txt").read_text()
    check_same_training(parallel, single)
    checkpoint = find_checkpoint(parallel)
    torch.testing.assert_close(
        weights(checkpoint), weights(find_checkpoint(single)), rtol=1e-5, atol=1e-4)
    model_files = list(checkpoint.glob("model*.safetensors"))
    assert len(model_files) == (processes if strategy == "fsdp" else 1)


@pytest.mark.parametrize(("before", "after"), [
    (2, 1), pytest.param(1, 2, marks=pytest.mark.faults),
    pytest.param(4, 2, marks=pytest.mark.faults)])
def test_a_run_continues_on_another_number_of_processes(trained_with, tmp_path, before, after):
    shutil.copytree(trained_with("fsdp", max(before, 2)), tmp_path, symlinks=True,
                    dirs_exist_ok=True)
    continued, uninterrupted = tmp_path / "runs/parallel", tmp_path / "runs/single"
    if before == 1:
        continued, uninterrupted = uninterrupted, continued
    for step in ("000015", "000020"):                       # as if killed after step 10
        shutil.rmtree(continued / "checkpoints" / step)
    assert "continuing" in train(after, f"runs/{continued.name}", cwd=tmp_path)
    check_same_training(continued, uninterrupted)


def test_a_sharded_checkpoint_is_a_hugging_face_directory(trained_with, workplace):
    from transformers import AutoModelForCausalLM
    shutil.copytree(trained_with("fsdp", 2) / "runs/parallel", "runs/tiny", symlinks=True)
    checkpoint = find_checkpoint("runs/tiny")
    model, _ = load_model(checkpoint)
    hf_model = AutoModelForCausalLM.from_pretrained(checkpoint)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.allclose(hf_model(tokens).logits, model(tokens), atol=1e-4)
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())
    sizes = [path.stat().st_size for path in checkpoint.glob("model-*.safetensors")]
    assert max(sizes) < 0.7 * sum(sizes)
    succeeds(command("sample.py", "runs/tiny", "import", "--max-tokens", "3"))
    (checkpoint / "model-00002-of-00002.safetensors").unlink()
    fails(command("sample.py", "runs/tiny"), "model-00002-of-00002.safetensors", "is damaged")


def test_a_mistake_is_reported_once(workplace):
    done = torchrun(2, ROOT / "train.py", "tiny.yaml", "train.batch_tokens=288")
    assert done.returncode != 0 and not Path("runs/tiny").exists()
    message = "error: train.batch_tokens=288 is 9 windows, which 2 processes cannot share evenly"
    assert done.stderr.count(message) == 1
    assert "try train.batch_tokens=256" in done.stderr
    assert "Traceback" not in done.stderr.split("elastic")[0]


# --- processes that die -----------------------------------------------------------------------

SAVED = Path("runs/tiny/checkpoints/000020/manifest.json")
UNTIL_KILLED = ("tiny.yaml", "train.steps=100000", "eval.every=0", "heads.every=0",
                "checkpoint.every=20")
ONE_MACHINE = ("--standalone", "--nproc-per-node=2")


def launch(*arguments: str, options: tuple[str, ...] = ONE_MACHINE,
           **env: str) -> subprocess.Popen[str]:
    return start(*TORCHRUN, *options, ROOT / "train.py", *arguments, env=env)


def process_of(rank: int, *launchers: subprocess.Popen) -> int:
    """The process id of a rank that one of `launchers` started."""
    variable = f"RANK={rank}".encode()
    for launcher in launchers:
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text()
        for child in children.split():
            if variable in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
                return int(child)
    raise AssertionError(f"no process has rank {rank}")


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.faults)])
def test_when_a_process_dies_the_others_report_it_and_end(workplace, rank):
    launcher = launch(*UNTIL_KILLED)
    wait_until(SAVED.exists, launcher)
    os.kill(process_of(rank, launcher), signal.SIGKILL)
    output, _ = launcher.communicate()
    assert launcher.returncode != 0
    assert f"error: process {1 - rank} of 2 has lost another" in output
    assert "torchrun … train.py tiny.yaml" in output
    # The run's lock is free and its files are complete.
    step = int(find_checkpoint("runs/tiny").name)
    succeeds(command("train.py", "runs/tiny", f"train.steps={step + 2}"))


def test_torchrun_restarts_all_processes_from_the_newest_checkpoint(workplace):
    launcher = launch(*UNTIL_KILLED, "train.steps=160", "checkpoint.keep=99",
                      options=(*ONE_MACHINE, "--max-restarts=1"))
    wait_until(SAVED.exists, launcher)
    os.kill(process_of(1, launcher), signal.SIGKILL)
    output, _ = launcher.communicate()
    assert launcher.returncode == 0, output
    assert "continuing runs/tiny" in output
    assert list(metrics(Path("runs/tiny"))) == list(range(1, 161))


def test_a_signal_ends_all_processes_after_the_same_step(workplace):
    launcher = launch(*UNTIL_KILLED)
    wait_until(SAVED.exists, launcher)
    launcher.send_signal(signal.SIGTERM)                    # torchrun passes it on
    output, _ = launcher.communicate()
    assert "SIGTERM: finishing this step" in output
    assert re.search(r"continue   torchrun --nproc-per-node=2 \S*train.py runs/tiny", output)
    assert int(find_checkpoint("runs/tiny").name) == max(metrics(Path("runs/tiny")))


@pytest.mark.long
def test_two_machines_train_one_run(workplace):
    """Two launchers on the loopback interface, started as docs/distributed.md describes.

    SLURM starts one launcher on each machine.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ("--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=7",
               f"--rdzv-endpoint=127.0.0.1:{port}", "--max-restarts=1", "--local-addr=127.0.0.1")
    machines = [launch(*UNTIL_KILLED, "train.steps=140", "distributed=fsdp", options=options,
                       TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1") for _ in range(2)]
    wait_until(SAVED.exists, *machines)
    # One machine loses its process: both machines restart.
    os.kill(process_of(1, *machines), signal.SIGKILL)
    outputs = [machine.communicate()[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], outputs
    assert sum("continuing runs/tiny" in output for output in outputs) == 1
    assert list(metrics(Path("runs/tiny"))) == list(range(1, 141))


# --- what processes exchange ------------------------------------------------------------------

@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.faults)])
def test_what_processes_exchange(processes):
    """Whole matrices, and gradients only after the last part of a batch: see exchanges.py."""
    done = torchrun(processes, ROOT / "tests/exchanges.py")
    assert done.stdout.count("agreed") == processes, done.stderr
