"""train.py as users run it: new, extended, fine-tuned and profiled runs, and users' mistakes.

tests/faults kills the trainer and damages its files.
"""

import json
import os
import shutil
import subprocess
import sys
from math import log
from pathlib import Path

import pytest
import torch
import yaml
from commands import ROOT, Done, command, fails, start, succeeds
from conftest import TINY, metrics
from faults.lab import same_bits, weights

from data.config import DataConfig
from data.dataset import Dataset
from training.checkpoint import find_checkpoint, list_checkpoints, load_model, read_state


def train(*arguments: str, env: dict[str, str] | None = None) -> Done:
    """Run train.py in the working directory, to its end."""
    return command("train.py", *arguments, env=env)


def checkpoint_names(run: Path) -> list[str]:
    return [path.name for path in list_checkpoints(run / "checkpoints")]


def losses(run: Path) -> list[float]:
    """The training loss of every logged step."""
    return [record["train/loss"] for record in metrics(run).values() if "train/loss" in record]


def test_a_run_holds_what_the_readme_says(trained):
    assert checkpoint_names(trained) == ["000008", "000012"]
    assert (trained / "checkpoints" / "latest").resolve().name == "000012"
    assert (trained / "checkpoints" / "best").exists()
    checkpoint = find_checkpoint(trained)
    files = {str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*") if p.is_file()}
    assert files == {
        "model.safetensors", "config.json", "generation_config.json", "tokenizer.json",
        "tokenizer_config.json", "manifest.json", "training_state/optimizer.safetensors",
        "training_state/state.json", "training_state/config.yaml"}
    records = metrics(trained)
    assert list(records) == list(range(1, 13))
    assert records[3].keys() == {"step", "tokens", "train/loss", "train/lr", "train/grad_norm"}
    assert {"val/loss", "val/bpb"} <= records[6].keys() & records[12].keys()
    assert records[12]["tokens"] == 12 * 256
    assert records[12]["train/loss"] < records[1]["train/loss"]
    state = read_state(checkpoint)
    assert state["val_loss"] == records[12]["val/loss"] and state["git"]
    config = yaml.safe_load((trained / "config.yaml").read_text())
    assert config["optimizer"]["betas"] == [0.9, 0.95] and config["model"]["n_ctx"] == 32


def test_bits_per_byte_are_nats_over_bytes(trained):
    """Recomputed from the model's own logits and the bytes of the validation text."""
    checkpoint = find_checkpoint(trained)
    model, tokenizer = load_model(checkpoint)
    data = Dataset(DataConfig(**TINY["data"]), 1, read_state(checkpoint)["data"]["folder"])
    nats, n_bytes = 0.0, 0
    for batch in data.validation(1024, 32, 8):
        with torch.no_grad():
            log_probs = model(batch.tokens).double().log_softmax(-1)        # (B, T, V)
        nats -= log_probs.gather(2, batch.targets[..., None]).sum().item()
        n_bytes += sum(len(tokenizer.decode_bytes(row)) for row in batch.targets.tolist())
    assert metrics(trained)[12]["val/bpb"] == pytest.approx(nats / log(2) / n_bytes, rel=1e-5)


def test_finishing_extending_and_starting_from_weights(workplace):
    succeeds(train("tiny.yaml"))
    finished = succeeds(train("tiny.yaml"))
    assert "finished" in finished.stdout and "train.steps=24" in finished.stdout
    succeeds(train("runs/tiny"))
    extended = succeeds(train("runs/tiny", "train.steps=15"))
    assert "continuing runs/tiny" in extended.stdout
    assert "train.steps: 12 → 15" in extended.stdout
    assert list(metrics(Path("runs/tiny"))) == list(range(1, 16))
    succeeds(train("tiny.yaml", "run=tuned", "init_from=runs/tiny",
                   "data.tokenizer={kind: runs/tiny/checkpoints/latest}",
                   "optimizer.lr=1e-9", "optimizer.adam_lr=1e-9", "train.steps=1"))
    source, _ = load_model(find_checkpoint("runs/tiny"))
    tuned, _ = load_model(find_checkpoint("runs/tuned"))
    torch.testing.assert_close(tuned.state_dict(), source.state_dict(), rtol=1e-5, atol=1e-6)
    fails(train("tiny.yaml", "train.steps=99"),
          "train.steps: 15 → 99", "train.py runs/tiny")
    fails(train("runs/tiny", "model.n_layers=3"), "model.n_layers: 2 → 3", "init_from=runs/tiny")


def test_a_run_refuses_data_that_changed(workplace):
    succeeds(train("tiny.yaml"))
    Path("texts/abc.txt").write_text("another text altogether")
    succeeds(train("runs/tiny", "train.steps=13"))          # the run's own shards still exist
    shutil.rmtree("prepared")
    fails(train("runs/tiny", "train.steps=14"), "other data", "run=NEW")


def test_micro_batches_and_background_saving_change_nothing(workplace):
    succeeds(train("tiny.yaml", "train.micro_batch=2", "run=micro2"))
    succeeds(train("tiny.yaml", "train.micro_batch=8", "run=micro8"))
    assert losses(Path("runs/micro2")) == pytest.approx(losses(Path("runs/micro8")), rel=1e-4)
    succeeds(train("tiny.yaml", "checkpoint.background=true", "checkpoint.steps=[1, 5, 99]",
                   "run=background"))
    assert same_bits(Path("runs/background/checkpoints/000012"),
                     Path("runs/micro8/checkpoints/000012"))
    assert {"000001", "000005", "000008", "000012"} <= set(
        checkpoint_names(Path("runs/background")))


def test_bf16_masked_documents_and_adamw_train_without_checkpoints(workplace):
    done = succeeds(train("tiny.yaml", "train.precision=bf16", "data.mask_documents=true",
                          "optimizer.kind=adamw", "checkpoint.every=0"))
    assert "bfloat16" in done.stdout and not checkpoint_names(Path("runs/tiny"))


@pytest.mark.long
def test_a_compiled_step_gives_the_same_losses(workplace):
    small = ("tiny.yaml", "model.n_layers=1", "train.steps=3", "eval.every=0", "heads.every=0")
    succeeds(train(*small, "run=plain"))
    succeeds(train(*small, "run=compiled", "train.compile=true"))
    assert len(losses(Path("runs/plain"))) == 3
    assert losses(Path("runs/compiled")) == pytest.approx(losses(Path("runs/plain")), rel=1e-4)


def test_training_goes_on_when_the_console_closes(workplace):
    process = start(ROOT / "train.py", "tiny.yaml", "train.steps=100", "eval.every=0",
                    "heads.every=0", cwd=workplace)
    while not process.stdout.readline().startswith("training"):
        pass
    process.stdout.close()                                  # as `| head -1` does
    assert process.wait() == 0
    assert find_checkpoint("runs/tiny").name == "000100"
    assert len(metrics(Path("runs/tiny"))) == 100


def test_checkpoints_record_the_validation_loss_of_their_step_and_best_is_the_lowest(workplace):
    run = Path("runs/tiny")
    succeeds(train("tiny.yaml", "train.steps=20", "checkpoint.keep=9"))
    # Evaluated at 6, 12, 18 and 20; saved at every fourth step.
    recorded = {path.name: read_state(path)["val_loss"]
                for path in list_checkpoints(run / "checkpoints")}
    logged = {step: record.get("val/loss") for step, record in metrics(run).items()}
    assert recorded == {"000004": None, "000008": None, "000012": logged[12], "000016": None,
                        "000020": logged[20]}
    best = "000012" if logged[12] < logged[20] else "000020"
    assert (run / "checkpoints/best").resolve().name == best


def test_weights_need_their_tokenizer_and_a_run_keeps_its_optimizer(workplace, trained):
    fails(train("tiny.yaml", "run=new", f"init_from={trained}", "data.tokenizer=bytes"),
          "another tokenizer", "data.tokenizer=")
    shutil.copytree(trained, "runs/tiny", symlinks=True)
    fails(train("runs/tiny", "train.steps=14", "optimizer.kind=adamw"),
          "optimizer.kind: 'muon' → 'adamw'")


# --- mistakes of users ------------------------------------------------------------------------

@pytest.mark.parametrize(("arguments", "words"), [
    (["tiny.yaml", "model.n_head=4"], ["model.n_head", "did you mean model.n_heads"]),
    (["tiny.yaml", "train.steps=many"], ["train.steps='many'"]),
    (["tiny.yaml", "model.n_kv_heads=3"], ["n_kv_heads=3", "n_heads=4"]),
    (["tiny.yaml", "model.d_head=7"], ["d_head=7", "rope"]),
    (["nothing.yaml"], ["nothing.yaml", "no such file"]),
    (["runs/gone"], ["runs/gone: no such file", "lists the configs"]),
    (["tiny.yaml", "run=../up"], ["run='../up'", "letters, digits"]),
    (["tyni.yaml"], ["did you mean tiny.yaml"]),
    (["texts"], ["texts", "config.yaml"]),
    (["tiny.yaml", "data.files=[no/*.txt]"], ["data.files", "no/*.txt", "data.files='[my.txt]'"]),
    (["tiny.yaml", "data.files=[empty.txt]"], ["empty"]),
    (["tiny.yaml", "data.files=[short.txt]", "data.tokenizer=bytes"], ["window", "n_ctx=32"]),
    (["tiny.yaml", "data.tokenizer=gpt9"], ["data.tokenizer.kind='gpt9'"]),
    (["tiny.yaml", "train.device=cuda:9"], ["train.device=cuda:9"]),
    (["tiny.yaml", "model.vocab_size=100"], ["model.vocab_size=100"]),
    (["tiny.yaml", "init_from=runs/none"], ["runs/none", "no such run"]),
    (["tiny.yaml", "--steps=3"], ["unknown key steps; did you mean train.steps"]),
    (["tiny.yaml", "steps"], ["'steps' is not key.path=value"]),
])
def test_mistakes_print_two_lines_and_write_nothing(workplace, arguments, words):
    Path("empty.txt").write_text("")
    Path("short.txt").write_text("too short")
    fails(train(*arguments), *words)
    assert not Path("runs").exists()


def test_a_checkpoint_in_the_place_of_its_run_is_named(trained):
    for checkpoint in (trained / "checkpoints").iterdir():          # latest and best too
        words = ["is a checkpoint: name its run", "runs/tiny", f"init_from={checkpoint}"]
        fails(train(str(checkpoint)), *words)
    fails(train(""), "'' holds no config.yaml")


def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(workplace):
    done = train("tiny.yaml", "optimizer.kind=adamw", "optimizer.lr=1e19", "optimizer.clip=0",
                 "optimizer.warmup_steps=0", "checkpoint.every=1", "train.steps=40",
                 "model.zero_init=false")
    fails(done, "at step", "batch", "optimizer.lr")
    for checkpoint in list_checkpoints(Path("runs/tiny/checkpoints")):
        for name, tensor in weights(checkpoint).items():
            assert torch.isfinite(tensor).all(), (checkpoint, name)


# --- kernels, profiler, threads ---------------------------------------------------------------

def test_our_kernels_train_the_same_model(workplace):
    """The trainer with our kernels, in Triton's interpreter, gives the losses of PyTorch's. Without
    a checkpoint: the verdict on one would run for minutes there."""
    for backend, env in (("sdpa", {}), ("triton", {"TRITON_INTERPRET": "1"})):
        succeeds(train("tiny.yaml", f"run={backend}", f"train.attention={backend}",
                       "train.steps=3", "train.batch_tokens=64", "eval.tokens=64",
                       "checkpoint.every=0", "data.mask_documents=true", "model.window=9",
                       "model.n_layers=1", env=env))
    expected = losses(Path("runs/sdpa"))
    assert len(expected) == 3
    assert losses(Path("runs/triton")) == pytest.approx(expected, rel=0, abs=2e-5)


def test_our_kernels_without_a_gpu_are_refused(workplace):
    fails(train("tiny.yaml", "train.attention=triton", "train.device=cpu"),
          "train.attention", "GPU", "train.attention=auto")
    assert not Path("runs").exists() or not os.listdir("runs")


def test_a_profiled_run_is_the_same_run(trained, workplace):
    """The trace contains the matrix products of the profiled steps. Profiling changes nothing."""
    run = Path("runs/tiny")
    done = succeeds(train("tiny.yaml", "train.profile=true"))
    assert "steps 10 to 12 in runs/tiny/trace.json" in done.stdout
    events = json.loads((run / "trace.json").read_text())["traceEvents"]
    products = sum(event.get("name") == "aten::mm" for event in events)
    # Two blocks of four products, and the head. Each product has two more in the backward pass.
    products_per_step = 3 * (2 * 4 + 1)
    assert products >= 3 * products_per_step and "aten::mm" in done.stdout
    assert metrics(run) == metrics(trained)
    assert same_bits(find_checkpoint(run), find_checkpoint(trained))


# Prints whether the limit is set, when a command is about to load PyTorch.
AT_THE_FIRST_IMPORT_OF_TORCH = """
import os, runpy, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print("GOMP_SPINCOUNT" in os.environ, flush=True)
            os._exit(0)

sys.path.insert(0, os.getcwd())
sys.meta_path.insert(0, Watch())
command = sys.argv.pop(1)
if command.endswith(".py"):
    runpy.run_path(command, run_name="__main__")
else:
    runpy.run_module(command, run_name="__main__")
"""


@pytest.mark.parametrize("name", [
    "train.py", "sample.py", "heads.py", "training.plan", "training.import_model", "bench.train"])
def test_openmp_threads_spin_briefly(name, monkeypatch):
    """errors.py limits spinning, and every command imports it before PyTorch, which is when OpenMP
    reads the limit.

    Without it, two runs at a time on two cores take nine times as long as one after the other.
    """
    monkeypatch.delenv("GOMP_SPINCOUNT")                    # conftest.py has set it
    done = subprocess.run([sys.executable, "-c", AT_THE_FIRST_IMPORT_OF_TORCH, name, "--help"],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr
