"""lab.py does what the commands do: the same weights, the same text, the same numbers."""

import json
import os
import subprocess
import sys
from pathlib import Path

from errors import UserError

import pytest
import torch
import torch.nn.functional as F
from commands import command, environment, succeeds

import lab
from induction.examine import examine_run, probes_for
from model.taps import Head, taps
from training.config import load_config
from training.loaded_run import load_run


def weights_of(run: lab.LoadedRun) -> bytes:
    return (run.checkpoint / "model.safetensors").read_bytes()


def test_train_is_the_command(workplace, trained):
    run = lab.train("tiny.yaml")
    assert run.step == 12 and run.folder.resolve() == workplace / "runs/tiny"
    assert weights_of(run) == weights_of(load_run(trained))
    assert lab.train(Path("runs/tiny")).step == 12                          # finished
    assert lab.train("runs/tiny", "train.steps=13").step == 13
    config = load_config("tiny.yaml", ["run=short", "heads.every=0"])
    other = lab.train(config, "train.steps=2", "optimizer.lr=0.01")
    assert (other.folder.name, other.step, other.config.optimizer.lr) == ("short", 2, 0.01)
    # A second config of the same name is refused, as on the command line.
    with pytest.raises(UserError, match=r"holds a run of another config \(seed: 1 → 2\)"):
        lab.train(config, "train.steps=2", "optimizer.lr=0.01", "seed=2")


def test_sample_is_the_command(trained):
    run = lab.load_run(trained)
    before = {name: p.clone() for name, p in run.model.named_parameters()}

    def by_command(*options: object) -> str:
        done = succeeds(command("sample.py", trained, "def f(", "--json", *options))
        return json.loads(done.stdout)[0]["text"]

    assert lab.sample(run, "def f(", 20) == by_command("--max-tokens", 20)
    assert lab.sample(run, "def f(", 200, temperature=1.2, top_k=50, top_p=0.9, seed=3, stop="e",
                      repetition_penalty=1.3, slide=True) == by_command(
        "--temperature", 1.2, "--top-k", 50, "--top-p", 0.9, "--seed", 3, "--stop", "e",
        "--repetition-penalty", 1.3, "--slide")
    # The weights are not packed, and the caller's taps see the pass.
    assert before.keys() == dict(run.model.named_parameters()).keys()
    assert all(p.is_contiguous() for p in run.model.parameters())
    with taps(run.model, {"L0.z": torch.zeros_like, "L1.z": None}) as acts:
        silenced = lab.sample(run, "def f(", 20)
    assert acts["L1.z"].shape[1:] == (4, 1, 8) and silenced != lab.sample(run, "def f(", 20)


def test_scores_and_verdict_are_those_of_heads_py(trained, tmp_path):
    run = lab.load_run(trained)
    succeeds(command("heads.py", "verdict", trained, "--json", tmp_path / "verdict.json"))
    saved = json.loads((tmp_path / "verdict.json").read_text())["runs"][0]
    assert lab.scores(run) == lab.scores(trained) == saved["heads"]
    verdict = lab.verdict(run)
    assert verdict.answer == saved["answers"]["formed"]
    assert verdict.behaviour.begun.accuracy == saved["behaviour"]["begun"]["accuracy"]["value"]


@pytest.mark.parametrize("kind", ["mean", "zero"])
def test_ablate_is_the_loss_without_what_the_heads_write(trained, kind):
    run = lab.load_run(trained)
    probe = probes_for(run).scored

    def losses(replacements: dict) -> tuple[float, float]:
        with torch.no_grad(), taps(run.model, {"L1.z": None} | replacements) as acts:
            logits = run.model(probe.tokens)[:, :-1]
        intact["z"] = acts["L1.z"]
        each = F.cross_entropy(logits.flatten(0, 1), probe.tokens[:, 1:].flatten(),
                               reduction="none").view(len(logits), -1)
        return each[probe.unknown].mean().item(), each[probe.known].mean().item()

    intact: dict = {}
    first, second = losses({})
    mean = intact["z"].mean((0, 2)) if kind == "mean" else torch.zeros(4, 8)

    def without(z: torch.Tensor) -> torch.Tensor:
        z = z.clone()
        z[:, 1], z[:, 3] = mean[1], mean[3]
        return z

    ablation = lab.ablate(run, ["L1H1", Head(1, 3)], kind)
    assert ablation.heads == [Head(1, 1), Head(1, 3)]
    assert [ablation.first, ablation.second] == pytest.approx([first, second], rel=1e-3)
    assert [ablation.first_ablated, ablation.second_ablated] == pytest.approx(
        losses({"L1.z": without}), rel=1e-3)
    assert lab.ablate(run, "L1").heads == [Head(1, n) for n in range(4)]
    nothing = lab.ablate(run, [])
    assert nothing.second == nothing.second_ablated == pytest.approx(second, rel=1e-3)


@pytest.mark.parametrize(("call", "message"), [
    (lambda run: lab.ablate(run, "L2H0"), "heads L2H0: no such head; the model has L0H0 to L1H3"),
    (lambda run: lab.ablate(run, "L0", "men"), "kind='men' is not a kind of ablation"),
    (lambda run: lab.sample(run, "a", temperature=-1), "temperature=-1 must be at least 0"),
    (lambda run: lab.sample(run, "a", top_p=2), "top_p=2 must be from 1e-09 to 1"),
    (lambda run: lab.sample(run, "a", stop=""), "stop: an empty text would end at once"),
    (lambda run: lab.sample(run, "a " * 99), r"the model's context of 32\n.*slide=True"),
    (lambda run: lab.load_run("runs/none"), "runs/none: no such run"),
    (lambda run: lab.train("none.yaml"), "none.yaml: no such file"),
    (lambda run: lab.train("tiny.yaml", "model.n_headz=3"), "did you mean model.n_heads?"),
    (lambda run: lab.train(run.config, "checkpoint.every=0"), "there would be none to open"),
    (lambda run: lab.train("tiny.yaml", ["train.steps=3"]), "is not an override"),
    (lambda run: lab.train(run), "a LoadedRun is no config"),
    (lambda run: lab.load_run(run.folder, device="tpu"), "device=tpu is not available here"),
    (lambda run: lab.sample(run, "a", seed="b"), "seed='b' must be at least 0"),
    (lambda run: lab.scores("runs/none"), "runs/none: no such run"),
])
def test_mistakes_raise_a_user_error(workplace, trained, call, message):
    with pytest.raises(UserError, match=message.replace("?", r"\?")) as caught:
        call(lab.load_run(trained))
    # What IPython prints in place of a traceback.
    assert caught.value._render_traceback_() == [f"error: {caught.value}"]


def test_importing_needs_no_gpu_and_sets_what_torch_reads(tmp_path):
    """errors.py sets GOMP_SPINCOUNT for OpenMP, which PyTorch loads."""
    script = """
import os, sys
class Watch:
    def find_spec(name, *_):
        if name == "torch":
            print("torch", os.environ.get("GOMP_SPINCOUNT"))
sys.meta_path.insert(0, Watch)
import lab
print(*sorted(lab.__all__))
"""
    env = environment(CUDA_VISIBLE_DEVICES="")
    del env["GOMP_SPINCOUNT"]
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=env, text=True,
                          capture_output=True)
    assert done.stdout.splitlines()[0] == "torch 1000", done.stderr
    assert "train" in done.stdout and os.environ["GOMP_SPINCOUNT"] == "1000"


def test_what_is_printed_is_short(trained):
    run = lab.load_run(trained)
    shown = {
        "run": (run, ["LoadedRun(", "tiny at step 12 of 12", "2 layers × 4 heads", "50,080"]),
        "config": (run.config, ["Config(run='tiny', seed=1,", "model.n_kv_heads=2", "steps=12"]),
        "model": (run.config.model, ["ModelConfig(n_layers=2, n_kv_heads=2, d_model=32"]),
        "scores": (lab.scores(run), ["8 heads", "prefix_matching is 0.", "(L", "alone"]),
        "ablation": (lab.ablate(run, "L1H1"), ["mean of L1H1", "second copy 5."]),
        "verdict": (lab.verdict(run), ["tiny: induction heads formed: no;", "heads that attend"]),
        "examination": (examine_run(run), ["tiny at step 12", "8 heads", "Verdict(tiny"]),
    }
    with taps(run.model, ["L*.pattern", "L1.q", "embed"]) as acts:
        run.model(torch.zeros(1, 5, dtype=torch.long))
    shown["activations"] = (acts, ["4 activations", "embed  (1, 5, 32) float32",
                                   "L0.pattern, L1.pattern  (1, 4, 5, 5)", "L1.q  (1, 4, 5, 8)"])
    for name, (value, words) in shown.items():
        text = repr(value)
        assert str(value) == text and len(text) < 600 and text.count("\n") < 6, name
        for word in words:
            assert word in text, text
    deep = type(acts)({f"L{n}.q": acts["L1.q"] for n in range(12)})
    assert repr(deep).splitlines()[1] == "  L0.q … L11.q  (1, 4, 5, 8) float32"
