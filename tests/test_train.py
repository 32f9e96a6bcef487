"""The real trainer in real processes: finished, extended, started from weights, misused. What breaks it: tests/faults."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from commands import ROOT, command, fails, start
from conftest import TINY, metrics
from faults.lab import same_bits, weights

from training.checkpoint import find_checkpoint, list_checkpoints, load_model


def train(*arguments, cwd=None, **options):
    return command("train.py", *arguments, cwd=cwd, **options)


def test_a_run_holds_what_the_readme_says(trained):
    assert [p.name for p in list_checkpoints(trained / "checkpoints")] == ["000008", "000012"]
    assert (trained / "checkpoints" / "latest").resolve().name == "000012"
    assert (trained / "checkpoints" / "best").exists()
    checkpoint = find_checkpoint(trained)
    names = {str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*") if p.is_file()}
    assert names == {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
                     "manifest.json", "training_state/optimizer.safetensors", "training_state/state.json", "training_state/config.yaml"}
    records = metrics(trained)
    assert list(records) == list(range(1, 13))
    assert records[3].keys() == {"step", "tokens", "train/loss", "train/lr", "train/grad_norm"}
    assert {"val/loss", "val/bpb"} <= records[6].keys() & records[12].keys() and records[12]["tokens"] == 12 * 256
    assert records[12]["train/loss"] < records[1]["train/loss"]
    state = json.loads((checkpoint / "training_state/state.json").read_text())
    assert state["val_loss"] == records[12]["val/loss"] and state["git"]
    config = yaml.safe_load((trained / "config.yaml").read_text())
    assert config["optimizer"]["betas"] == [0.9, 0.95] and config["model"]["n_ctx"] == 32


def test_bits_per_byte_are_nats_over_bytes(trained):
    """Recomputed from the model's own logits and the bytes of the validation text."""
    from math import log

    from data.config import DataConfig
    from data.dataset import Dataset
    model, tokenizer = load_model(find_checkpoint(trained))
    folder = json.loads((find_checkpoint(trained) / "training_state/state.json").read_text())["data"]["folder"]
    nats, characters = 0.0, 0
    for batch in Dataset(DataConfig(**TINY["data"]), 1, folder).validation(1024, 32, 8):
        with torch.no_grad():
            nats -= model(batch.tokens).double().log_softmax(-1).gather(2, batch.targets[..., None]).sum().item()
        characters += sum(len(tokenizer.decode_bytes(row)) for row in batch.targets.tolist())
    assert metrics(trained)[12]["val/bpb"] == pytest.approx(nats / log(2) / characters, rel=1e-5)


def test_finishing_extending_and_starting_from_weights(workplace):
    assert train("tiny.yaml").returncode == 0
    again = train("tiny.yaml")
    assert again.returncode == 0 and "finished" in again.stdout and "train.steps=24" in again.stdout
    assert train("runs/tiny").returncode == 0
    longer = train("runs/tiny", "train.steps=15")
    assert longer.returncode == 0 and "continuing runs/tiny" in longer.stdout and "train.steps: 12 → 15" in longer.stdout
    assert list(metrics(Path("runs/tiny"))) == list(range(1, 16))
    tuned = train("tiny.yaml", "run=tuned", "init_from=runs/tiny", "data.tokenizer={kind: runs/tiny/checkpoints/latest}",
                  "optimizer.lr=1e-9", "optimizer.adam_lr=1e-9", "train.steps=1")
    assert tuned.returncode == 0, tuned.stderr
    a, b = (load_model(find_checkpoint(f"runs/{name}"))[0] for name in ("tiny", "tuned"))
    assert all(torch.allclose(x, y, atol=1e-6) for x, y in zip(a.parameters(), b.parameters()))
    fails(train("tiny.yaml", "train.steps=99"), "train.steps: 15 → 99", "python train.py runs/tiny")
    fails(train("runs/tiny", "model.n_layers=3"), "model.n_layers: 2 → 3", "init_from=runs/tiny")


def test_shards_that_changed_under_a_run_are_noticed(workplace):
    assert train("tiny.yaml").returncode == 0
    Path("texts/abc.txt").write_text("another text altogether")
    assert train("runs/tiny", "train.steps=13").returncode == 0             # its own shards are still there
    shutil.rmtree("prepared")
    fails(train("runs/tiny", "train.steps=14"), "other data", "run=NEW")


def test_micro_batches_precision_masks_and_background_saving_run(workplace):
    assert train("tiny.yaml", "train.micro_batch=2", "run=a").returncode == 0
    assert train("tiny.yaml", "train.micro_batch=8", "run=b").returncode == 0
    for step, record in metrics(Path("runs/a")).items():
        assert record["train/loss"] == pytest.approx(metrics(Path("runs/b"))[step]["train/loss"], rel=1e-4)
    assert train("tiny.yaml", "checkpoint.background=true", "checkpoint.steps=[1, 5, 99]", "run=c").returncode == 0
    assert same_bits(Path("runs/c/checkpoints/000012"), Path("runs/b/checkpoints/000012"))
    assert {p.name for p in list_checkpoints(Path("runs/c/checkpoints"))} >= {"000001", "000005", "000008", "000012"}
    done = train("tiny.yaml", "train.precision=bf16", "data.mask_documents=true", "optimizer.kind=adamw", "checkpoint.every=0", "run=d")
    assert done.returncode == 0 and "bfloat16" in done.stdout and not list_checkpoints(Path("runs/d/checkpoints"))


@pytest.mark.long
def test_a_compiled_step_gives_the_same_losses(workplace):
    small = ("tiny.yaml", "model.n_layers=1", "train.steps=3", "eval.every=0", "heads.every=0")
    assert train(*small, "run=plain").returncode == 0
    done = train(*small, "run=fast", "train.compile=true")
    assert done.returncode == 0, done.stderr
    for step, record in metrics(Path("runs/plain")).items():
        assert metrics(Path("runs/fast"))[step]["train/loss"] == pytest.approx(record["train/loss"], rel=1e-4)


def test_a_console_that_is_gone_does_not_end_training(workplace):
    process = start(ROOT / "train.py", "tiny.yaml", "train.steps=100", "eval.every=0", "heads.every=0", cwd=workplace)
    while not process.stdout.readline().startswith("training"):
        pass
    process.stdout.close()                                  # as `| head -1` does
    assert process.wait() == 0
    assert find_checkpoint("runs/tiny").name == "000100" and len(metrics(Path("runs/tiny"))) == 100


def test_a_checkpoint_notes_the_validation_loss_of_its_own_step_and_best_is_the_lowest(workplace):
    assert train("tiny.yaml", "train.steps=20", "checkpoint.keep=9").returncode == 0        # evaluated at 6, 12, 18 and 20
    noted = {p.name: json.loads((p / "training_state/state.json").read_text())["val_loss"]
             for p in list_checkpoints(Path("runs/tiny/checkpoints"))}
    measured = {f"{step:06d}": record.get("val/loss") for step, record in metrics(Path("runs/tiny")).items()}
    assert noted == {name: measured[name] for name in ("000004", "000008", "000012", "000016", "000020")}
    best = min(("000012", "000020"), key=measured.get)
    assert Path("runs/tiny/checkpoints/best").resolve().name == best


def test_weights_are_not_given_to_another_tokenizer_and_optimizers_not_exchanged(workplace, trained):
    fails(train("tiny.yaml", "run=new", f"init_from={trained}", "data.tokenizer=bytes"), "another tokenizer", "data.tokenizer=")
    shutil.copytree(trained, "runs/tiny", symlinks=True)
    fails(train("runs/tiny", "train.steps=14", "optimizer.kind=adamw"), "optimizer.kind: 'muon' → 'adamw'")


# --- what a user gets wrong, and what breaks ---------------------------------------------------------------------------

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
    (["tiny.yaml", "--steps=3"], ["--steps=3"]),
    (["tiny.yaml", "steps"], ["'steps' is not key.path=value"]),
])
def test_mistakes_are_two_lines_and_leave_nothing(workplace, arguments, words):
    Path("empty.txt").write_text("")
    Path("short.txt").write_text("too short")
    fails(train(*arguments), *words)
    assert not Path("runs").exists()


def test_a_loss_that_is_no_number_stops_the_run_at_the_last_good_checkpoint(workplace):
    done = train("tiny.yaml", "optimizer.kind=adamw", "optimizer.lr=1e19", "optimizer.clip=0", "optimizer.warmup_steps=0",
                 "checkpoint.every=1", "train.steps=40", "model.zero_init=false")
    fails(done, "at step", "batch", "optimizer.lr")
    for checkpoint in list_checkpoints(Path("runs/tiny/checkpoints")):
        assert all(torch.isfinite(value).all() for value in weights(checkpoint).values())


def test_our_kernels_train_the_same_model(workplace):
    """train.attention=triton under the interpreter: the losses of PyTorch's attention, by the real trainer."""
    losses = []
    for backend, environment in (("sdpa", {}), ("triton", {"TRITON_INTERPRET": "1"})):
        done = command("train.py", "tiny.yaml", f"run={backend}", f"train.attention={backend}", "train.steps=3", "train.batch_tokens=64",
                       "eval.tokens=64", "data.mask_documents=true", "model.window=9", "model.n_layers=1", cwd=workplace, env=environment)
        assert done.returncode == 0, done.stderr
        losses.append([record["train/loss"] for record in metrics(workplace / "runs" / backend).values() if "train/loss" in record])
    assert len(losses[0]) == 3 and max(abs(a - b) for a, b in zip(*losses)) < 2e-5


def test_our_kernels_without_a_gpu_are_refused(workplace):
    done = command("train.py", "tiny.yaml", "train.attention=triton", "train.device=cpu", cwd=workplace)
    fails(done, "train.attention", "GPU", "train.attention=auto")
    assert not (workplace / "runs").exists() or not list((workplace / "runs").iterdir())


def test_a_profiled_run_is_the_same_run(trained, workplace):
    """The trace holds the matrix products of the steps that it names, and looking changes nothing."""
    done = train("tiny.yaml", "train.profile=true", cwd=workplace)
    assert done.returncode == 0 and "steps 10 to 12 in runs/tiny/trace.json" in done.stdout, done.stdout + done.stderr
    events = json.loads((workplace / "runs/tiny/trace.json").read_text())["traceEvents"]
    products = sum(event.get("name") == "aten::mm" for event in events)
    a_step = 3 * (2 * 4 + 1)                # two blocks of four products and the head; each asks for two more in the backward pass
    assert products >= 3 * a_step and "aten::mm" in done.stdout
    assert metrics(workplace / "runs/tiny") == metrics(trained)
    assert same_bits(find_checkpoint(workplace / "runs/tiny"), find_checkpoint(trained))


def test_threads_do_not_spin_for_long(monkeypatch):
    """Set before PyTorch is loaded, when OpenMP reads it: two runs on the same two cores took nine times one after the other."""
    monkeypatch.delenv("GOMP_SPINCOUNT")                    # which conftest.py has set
    said = subprocess.run([sys.executable, "-c", "import os, sys; from errors import run_command; assert 'torch' not in sys.modules\n"
                           "run_command(lambda: print(os.environ['GOMP_SPINCOUNT']))"], cwd=ROOT, capture_output=True, text=True)
    assert said.stdout == "1000\n", said.stderr
