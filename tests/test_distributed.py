"""Real processes under torchrun: the same run as one process, whatever shares it out, and what happens when one of them dies."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import ROOT, command, environment, fails, start, wait_until
from conftest import metrics

from training.checkpoint import find_checkpoint, load_model, load_optimizer

TORCHRUN = ["-m", "torch.distributed.run"]
FOUR = pytest.param(4, marks=pytest.mark.faults)


def torchrun(processes: int, *arguments: str, script: Path = ROOT / "train.py", cwd: Path | None = None) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *TORCHRUN, "--standalone", f"--nproc-per-node={processes}", str(script), *arguments],
                          cwd=cwd, env=environment(), capture_output=True, text=True)


def trained(processes: int, *arguments: str, cwd: Path | None = None) -> str:
    done = torchrun(processes, *arguments, cwd=cwd) if processes > 1 else command("train.py", *arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


# Processes sum in another order, and float32 keeps a loss of 6 nats to 5e-7. From zero-initialised projections such differences grow: some
# gradients there are nothing but rounding, which Muon scales to full-size updates. Two runs of *one* process that differ only in
# train.micro_batch were 2e-4 nats apart after 20 steps. From random projections they do not grow: losses and gradient norms at most 1.4e-6
# apart, tensors 6.4e-5 of their norm, over 4 seeds and the CPU's avx512, avx2 and default kernels, in one process and in two.
STEADY = "model.zero_init=false"


def same_run(a: Path, b: Path) -> None:
    """Both runs' measurements agree to 1e-5 of a nat over 20 steps, gradient norms to 1e-4."""
    left, right = metrics(a), metrics(b)
    assert list(left) == list(right) == list(range(1, 21))
    for step in range(1, 21):
        assert left[step].keys() == right[step].keys()
        for key in left[step].keys() & {"train/loss", "val/loss", "repeat/loss_first", "repeat/loss_second"}:
            assert left[step][key] == pytest.approx(right[step][key], abs=1e-5), (step, key)
        assert left[step]["train/grad_norm"] == pytest.approx(right[step]["train/grad_norm"], rel=1e-4)
    one, many = checkpoint_tensors(a), checkpoint_tensors(b)
    assert one.keys() == many.keys()
    for name in one:
        assert (one[name] - many[name]).norm() <= 1e-3 * one[name].norm(), name


def checkpoint_tensors(run: Path) -> dict[str, torch.Tensor]:
    """Weights, and everything that the optimizer remembers."""
    checkpoint = find_checkpoint(run)
    return dict(load_model(checkpoint)[0].named_parameters()) | load_optimizer(checkpoint)


@pytest.fixture(scope="session")
def together(made_once):
    """`together(kind, processes)`: a folder with runs/one, runs/many, and what was said while the second was trained."""
    shape = ["tiny.yaml", STEADY, "train.steps=20", "train.micro_batch=1", "data.mask_documents=true", "model.d_mlp=40",
             "checkpoint={every: 5, keep: 9, background: true}"]

    def trained_by(kind: str, processes: int) -> Path:
        def train(folder: Path) -> None:
            trained(1, *shape, "run=one", f"distributed={kind}", cwd=folder)
            again = f"train.checkpoint_activations={str(kind == 'fsdp').lower()}"
            (folder / "said").write_text(trained(processes, *shape, "run=many", f"distributed={kind}", again, cwd=folder))

        return made_once(f"{kind}-{processes}", train)

    return trained_by


@pytest.mark.parametrize("processes", [2, FOUR])
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_several_processes_train_the_model_of_one(together, kind, processes):
    """Muon and AdamW, accumulation, packed documents, evaluation and heads; fully sharded with activations computed again."""
    folder = together(kind, processes)
    assert f"{processes} processes ({kind}) × {8 // processes} × 1 windows a step" in (folder / "said").read_text()
    same_run(folder / "runs/one", folder / "runs/many")
    one, many = checkpoint_tensors(folder / "runs/one"), checkpoint_tensors(folder / "runs/many")
    assert all(torch.allclose(one[name], many[name], atol=1e-4) for name in one)
    assert len(list(find_checkpoint(folder / "runs/many").glob("model*.safetensors"))) == (processes if kind == "fsdp" else 1)


@pytest.mark.parametrize(("before", "after"), [(2, 1), *(pytest.param(*pair, marks=pytest.mark.faults) for pair in ((1, 2), (4, 2)))])
def test_a_run_goes_on_in_another_number_of_processes(together, tmp_path, before, after):
    shutil.copytree(together("fsdp", max(before, 2)), tmp_path, symlinks=True, dirs_exist_ok=True)
    run, whole = (tmp_path / "runs" / name for name in (("one", "many") if before == 1 else ("many", "one")))
    for step in (15, 20):                                           # as if it had been killed behind step 10
        shutil.rmtree(run / f"checkpoints/{step:06d}")
    assert "continuing" in trained(after, f"runs/{run.name}", cwd=tmp_path)
    same_run(whole, run)


def test_shared_out_files_are_a_hugging_face_directory(together, workplace):
    from transformers import AutoModelForCausalLM
    shutil.copytree(together("fsdp", 2) / "runs/many", "runs/tiny", symlinks=True)
    checkpoint = find_checkpoint("runs/tiny")
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    model, _ = load_model(checkpoint)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.allclose(AutoModelForCausalLM.from_pretrained(checkpoint)(tokens).logits, model(tokens), atol=1e-4)
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())
    sizes = [path.stat().st_size for path in checkpoint.glob("model-*.safetensors")]
    assert max(sizes) < 0.7 * sum(sizes)
    assert command("sample.py", "runs/tiny", "import", "--max-tokens", "3").returncode == 0
    (checkpoint / "model-00002-of-00002.safetensors").unlink()
    fails(command("sample.py", "runs/tiny"), "model-00002-of-00002.safetensors", "is damaged")


def test_a_mistake_is_said_once(workplace):
    done = torchrun(2, "tiny.yaml", "train.batch_tokens=288")
    assert done.returncode != 0 and not Path("runs/tiny").exists()
    assert done.stderr.count("error: train.batch_tokens=288 is 9 windows, which 2 processes cannot share evenly") == 1
    assert "try train.batch_tokens=256" in done.stderr and "Traceback" not in done.stderr.split("elastic")[0]


# --- processes that die ----------------------------------------------------------------------------------------------

SAVED = Path("runs/tiny/checkpoints/000020/manifest.json")
LONG = ("tiny.yaml", "train.steps=100000", "eval.every=0", "heads.every=0", "checkpoint.every=20")


def launch(*arguments: str, options: tuple[str, ...] = ("--standalone", "--nproc-per-node=2"), **env: str) -> subprocess.Popen:
    return start(*TORCHRUN, *options, ROOT / "train.py", *arguments, env=env)


def process_of(rank: int, launchers: list[subprocess.Popen]) -> int:
    """The process id of a rank started by one of `launchers`."""
    for launcher in launchers:
        for child in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
            if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
                return int(child)
    raise AssertionError(f"no process has rank {rank}")


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.faults)])
def test_when_one_dies_the_others_say_so_and_end(workplace, rank):
    launcher = launch(*LONG)
    wait_until(SAVED.exists, launcher)
    os.kill(process_of(rank, [launcher]), signal.SIGKILL)
    output, _ = launcher.communicate()
    assert launcher.returncode != 0
    assert f"error: process {1 - rank} of 2 has lost another" in output and "torchrun … train.py tiny.yaml" in output
    step = int(find_checkpoint("runs/tiny").name)
    assert command("train.py", "runs/tiny", f"train.steps={step + 2}").returncode == 0         # its lock is free, its files are whole


def test_torchrun_starts_all_again_from_the_newest_checkpoint(workplace):
    launcher = launch(*LONG[:1], "train.steps=160", *LONG[2:], "checkpoint.keep=99",
                     options=("--standalone", "--nproc-per-node=2", "--max-restarts=1"))
    wait_until(SAVED.exists, launcher)
    os.kill(process_of(1, [launcher]), signal.SIGKILL)
    output, _ = launcher.communicate()
    assert launcher.returncode == 0, output
    assert "continuing runs/tiny" in output and list(metrics(Path("runs/tiny"))) == list(range(1, 161))


def test_a_signal_ends_all_behind_the_same_step(workplace):
    launcher = launch(*LONG)
    wait_until(SAVED.exists, launcher)
    launcher.send_signal(signal.SIGTERM)                            # torchrun passes it on
    output, _ = launcher.communicate()
    assert "SIGTERM: finishing this step" in output and "continue   torchrun --nproc-per-node=2 train.py runs/tiny" in output
    assert int(find_checkpoint("runs/tiny").name) == max(metrics(Path("runs/tiny")))


@pytest.mark.long
def test_two_machines_meet(workplace):
    """Two launchers on the loopback, as SLURM would start one on each of two machines: docs/distributed.md's recipe."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meet_at = f"127.0.0.1:{free.getsockname()[1]}"
    recipe = ("--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint={meet_at}", "--rdzv-id=7", "--max-restarts=1")
    arguments = (LONG[0], "train.steps=140", *LONG[2:], "distributed=fsdp")
    machines = [launch(*arguments, options=(*recipe, "--local-addr=127.0.0.1"), TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
                for _ in range(2)]
    wait_until(SAVED.exists, *machines)
    os.kill(process_of(1, machines), signal.SIGKILL)                # one machine loses its process: both start again
    outputs = [machine.communicate()[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], outputs
    assert sum("continuing runs/tiny" in output for output in outputs) == 1
    assert list(metrics(Path("runs/tiny"))) == list(range(1, 141))


# --- what they send ---------------------------------------------------------------------------------------------------

EXCHANGES = """
import torch, torch.distributed as dist
from model.config import ModelConfig
from model.gpt import GPT
from training.parallel import DataParallel, FullySharded
from training.world import join
from training.optimizer import orthogonalise
world = join()
for parallel in (DataParallel(world), FullySharded(world)):
    for N, R, C in [(2, 8, 20), (4, 9, 9), (1, 5, 9), (5, 2, 7), (3, 33, 10)]:
        whole = torch.randn(N, R, C, generator=torch.Generator().manual_seed(N * R * C))
        rows = -(-R // world.size)
        mine = slice(rows * world.rank, rows * world.rank + rows) if parallel.sharded else slice(None)
        calls = []
        got = parallel.map_matrices(lambda g: calls.append(len(g)) or orthogonalise(g), whole[:, mine], R)
        assert torch.allclose(got, orthogonalise(whole)[:, mine], atol=1e-6), (parallel.name, N, R, C)
        assert sum(calls) <= -(-N // world.size), "each process computes its share alone"

def send(state, bucket):
    exchanges.append(part)
    return torch.futures.collect_all([dist.all_reduce(bucket.buffer(), async_op=True).get_future()]).then(lambda done: bucket.buffer())
for parallel in (DataParallel(world), FullySharded(world)):
    with torch.device("meta"):
        model = GPT(ModelConfig(n_layers=2, d_model=32, n_ctx=16, vocab_size=50, mlp="none"))
    parallel.place(model, torch.device("cpu"))
    model.init_weights(0, parallel.fill)
    loss, exchanges, exchanged = parallel.replicate(model, model.loss), [], []
    if parallel.name == "ddp":
        loss.register_comm_hook(None, send)
    tokens = torch.arange(64).view(4, 16) % 50
    for part in parallel.accumulate([0, 1, 2], model, loss):
        loss((tokens + part) % 50, tokens).backward()
        if parallel.sharded and all(p.grad is not None for p in model.parameters()):    # a shard's gradient comes with the exchange
            exchanges.append(part)
    assert exchanges == [2], (parallel.name, exchanges)
print("agreed")
world.close()
"""


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.faults)])
def test_what_processes_send(tmp_path, processes):
    """Whole matrices, each computed once among all: odd rows, fewer matrices than processes, shares without a row. And gradients, behind
    the last part of a batch alone."""
    (tmp_path / "exchange.py").write_text(EXCHANGES)
    done = torchrun(processes, script=tmp_path / "exchange.py")
    assert done.stdout.count("agreed") == processes, done.stderr
