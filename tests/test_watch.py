"""Watching heads while the real trainer trains: what is measured, what is kept, and that training
stays the same."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import command
from conftest import TINY, metrics, wandb_history
from faults.lab import same_bits
from PIL import Image

from data.config import DataConfig
from data.load_tokenizer import make_tokenizer
from induction.behaviour import behaviour
from induction.probe_set import probes_of
from induction.scores import Measured, measure
from induction.watch import live_rows
from model.config import ModelConfig
from model.taps import heads_of, taps
from report.figures import score_grids
from report.snapshots import SnapshotFolder, spell
from training.loaded_run import load_run

LOGGED = ("prefix_matching", "latest_match", "current_token", "previous_token",
          "previous_token_later", "duplicate_token", "first_token", "entropy", "distance",
          "copying")
HEADS = [f"L{layer}H{head}" for layer in range(2) for head in range(4)]


def train(*arguments: str):
    done = command("train.py", "tiny.yaml", *arguments)
    assert done.returncode == 0, done.stderr
    return done


def test_training_is_the_same_bit_for_bit_with_probes_and_without(workplace):
    """With random rows, a window, smeared keys and document masks: whatever could draw a number or
    keep a state."""
    options = ["data.mixture=[{corpus: files, weight: 0.5}, {corpus: repeats, weight: 0.5}]",
               "data.corpus=null", "data.repeats={period: [4, 12], held_out_periods: [6]}",
               "model.smear=true", "model.window=9", "data.mask_documents=true"]
    train("run=watched", "heads.every=1", *options)
    train("run=alone", "heads.every=0", *options)
    assert same_bits(*(Path(f"runs/{run}/checkpoints/000012") for run in ("watched", "alone")))
    watched, alone = metrics(Path("runs/watched")), metrics(Path("runs/alone"))
    assert all(watched[step][key] == value for step in alone for key, value in alone[step].items())
    assert not any(key.startswith(("heads", "repeat", "phase", "aperiodic", "knockout"))
                   for record in alone.values() for key in record)
    assert not Path("runs/alone/heads").exists() and not Path("runs/alone/report.html").exists()


def test_what_is_logged_is_what_the_checkpoint_measures(workplace):
    train("heads.every=5")
    records = metrics(Path("runs/tiny"))
    measured_steps = [step for step, record in records.items() if "repeat/loss_first" in record]
    assert measured_steps == [5, 10, 12]                                        # and at the end
    run = load_run("runs/tiny")
    probes = probes_of(DataConfig(**TINY["data"]), 32, run.tokenizer, 1)
    measured = measure(run.model, probes.scored, probes.unrepeated)
    metrics_at_end = records[12]
    for name in measured.scores:
        for head in heads_of(run.model.config):
            score = measured.scores[name][head].item()
            assert metrics_at_end[f"heads/{name}/{head}"] == pytest.approx(score, abs=1e-4)
    profile = measured.offset_profile[1, 3].tolist()
    assert metrics_at_end["heads/offset_profile/L1H3"] == pytest.approx(profile, abs=1e-4)
    assert metrics_at_end["repeat/loss_second"] == pytest.approx(measured.loss_second)
    assert "icl/score" in metrics_at_end
    begun, bare = (behaviour(run.model, probe) for probe in live_rows(probes, 2))
    assert metrics_at_end["aperiodic/accuracy"] == begun.accuracy
    assert metrics_at_end["aperiodic/accuracy_without_begin"] == bare.accuracy
    assert metrics_at_end["aperiodic/loss_known"] == pytest.approx(
        (begun.loss_known + bare.loss_known) / 2)
    assert "knockout/gain_removed" not in metrics_at_end    # in twelve steps there is no gain


def test_snapshots_are_the_patterns_and_go_on_where_the_run_does(workplace):
    train("heads.every=2", "train.steps=8")
    saved = SnapshotFolder(Path("runs/tiny/heads"))
    assert [(s.step, s.tokens) for s in saved] == [(2, 512), (4, 1024), (6, 1536), (8, 2048)]
    run = load_run("runs/tiny")
    last = list(saved)[-1]
    for n, passage in enumerate(json.loads(Path("runs/tiny/heads/passages.json").read_text())):
        assert len(passage["tokens"]) == len(passage["ids"]) == 32
        ids = torch.tensor([passage["ids"]])
        with taps(run.model, "L*.pattern") as cache, torch.no_grad():
            logits = run.model(ids)[0, :-1].double()
        dense = torch.stack([cache[f"L{layer}.pattern"][0] for layer in range(2)])
        assert np.abs(last.patterns[n] / 255 - dense.numpy()).max() <= 0.5 / 255 + 1e-6
        nats = -logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        assert last.losses[n] == pytest.approx(nats.numpy(), abs=1e-4)
        assert (last.right[n] == (logits.argmax(-1) == ids[0, 1:]).numpy()).all()
        assert saved.passages[n].vocab_size == run.model.config.vocab_size
    (Path("runs/tiny/heads") / "000099.npz").write_bytes(b"of steps that will be made again")
    assert command("train.py", "runs/tiny", "train.steps=10").returncode == 0
    assert [s.step for s in saved] == [2, 4, 6, 8, 10]
    assert Path("runs/tiny/report.html").stat().st_size > 20000


def test_a_long_run_keeps_few_snapshots(workplace):
    train("heads.every=1", "train.steps=100", "checkpoint.every=0", "eval.every=0",
          "train.batch_tokens=32")
    kept = [snapshot.step for snapshot in SnapshotFolder(Path("runs/tiny/heads"))]
    assert kept == list(range(2, 101, 2))                                       # 64 at most


def test_wandb_holds_every_key_image_table_and_page(workplace):
    done = command("train.py", "tiny.yaml", "heads.every=4", "heads.images_every=8",
                   "log.wandb=offline", env={"WANDB_MODE": "offline"})
    assert done.returncode == 0, done.stderr
    run = Path("runs/tiny")
    history = wandb_history(run)
    text = json.dumps(history)
    scores = [f"heads/{score}/{head}" for score in (*LOGGED, "offset_profile") for head in HEADS]
    for key in [*scores, "repeat/loss_first", "repeat/loss_second", "icl/score",
                "heads/patterns/random tokens", "heads/patterns/held-out text",
                "heads/strongest/1", "heads/strongest/3", "heads/table", "heads/report"]:
        assert key in text, key
    media = next((run / "wandb").glob("offline-run-*")) / "files" / "media"
    images = sorted(media.glob("images/**/*.png"))
    assert len(images) == 2 * 5                     # steps 8 and 12: two mosaics, three heads
    for path in images:
        image = np.asarray(Image.open(path).convert("L"))
        assert image.shape[0] > 100 and image.std() > 5
    page = next(media.glob("html/**/*.html")).read_text()
    assert "tiny" in page and "prefix_matching" in page
    assert page == (run / "report.html").read_text()
    table = json.loads(next(media.glob("table/**/*.json")).read_text())
    assert table["columns"] == ["head", *LOGGED] and [row[0] for row in table["data"]] == HEADS


def test_wandb_and_the_console_end_with_the_verdict_that_heads_py_gives(workplace):
    done = command("train.py", "tiny.yaml", "log.wandb=offline", env={"WANDB_MODE": "offline"})
    assert done.returncode == 0, done.stderr
    logged = {key: value for record in wandb_history(Path("runs/tiny"))
              for key, value in record["history"]["item"].items() if key.startswith("verdict/")}
    page = Path("runs/tiny/report.html").read_text()
    assert command("heads.py", "runs/tiny", "--json", "r.json").returncode == 0
    data = json.loads(Path("r.json").read_text())
    for name, answer in data["answers"].items():
        assert logged[f"verdict/{name}"] == answer, name
    for name, kind in (("accuracy", "begun"), ("accuracy_without_begin", "bare")):
        number = data["behaviour"][kind]["accuracy"]
        found = [logged[f"verdict/{name}{end}"] for end in ("", "_low", "_high")]
        assert found == pytest.approx(list(number.values()), abs=1e-6)
    assert logged["verdict/summary"] == data["summary"]
    assert f"verdict    {data['summary']}" in done.stdout
    assert json.dumps(data["summary"], ensure_ascii=True)[1:-1] in page     # it needs no heads.py


def test_tokens_are_spelled_so_that_each_can_be_seen():
    tokenizer = make_tokenizer(DataConfig(tokenizer="bytes").tokenizer, iter(()))
    ids = torch.tensor([256, 7, 65, 10, 200, 127])
    assert spell(ids, tokenizer) == ["<|endoftext|>", "\\x07", "A", "\n", "\\xc8", "\\x7f"]


def test_a_context_too_short_to_repeat_is_not_probed(workplace):
    train("model.n_ctx=4", "heads.every=2", "train.batch_tokens=64")
    assert not any("repeat/loss_first" in record for record in metrics(Path("runs/tiny")).values())


def test_a_figures_numbers_are_the_scores():
    """Without the zero before the point, and with every other digit: 10.36 is not 1.36."""
    values = torch.tensor([[10.36, -0.33, 0.5, 20.1]], dtype=torch.float64)
    measured = Measured({"distance": values}, torch.zeros(1, 4, 17), {}, 0, 0, {}, None)
    drawn = score_grids(ModelConfig(n_layers=1, n_heads=4, vocab_size=9), measured)
    assert [text.get_text() for text in drawn.axes[0].texts] == ["10.36", "-.33", ".50", "20.10"]
