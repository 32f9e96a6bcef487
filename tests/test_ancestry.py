"""training/ancestry.py: what weights were trained on before their run, after real trainings."""

import json
import shutil
from hashlib import sha256
from pathlib import Path

from errors import UserError

import pytest
import yaml
from commands import Done, command, fails, succeeds
from theirs import save_hf_model

from induction.examine import probes_for
from training.ancestry import ancestors
from training.checkpoint import find_checkpoint, list_checkpoints, read_state
from training.config import load_config
from training.import_model import import_model
from training.loaded_run import load_run

SMALL = {
    "seed": 3,
    "model": {"n_layers": 1, "n_heads": 2, "d_model": 16, "n_ctx": 32},
    "data": {"corpus": "repeats", "repeats": {"period": [4, 8]}},
    "train": {"steps": 2, "batch_tokens": 64}, "optimizer": {"warmup_steps": 1},
    "eval": {"every": 0}, "heads": {"every": 0}, "checkpoint": {"every": 1, "keep": 1},
    "log": {"wandb": "disabled"},
}


@pytest.fixture
def runs(tmp_path, monkeypatch) -> Path:
    """The folder runs of a working directory with small.yaml."""
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(SMALL))
    monkeypatch.chdir(tmp_path)
    return Path("runs")


def train(name: str, *arguments: str) -> Done:
    return succeeds(command("train.py", "small.yaml", f"run={name}", *arguments))


def train_from(origin: str, name: str, *arguments: str) -> Done:
    """A run of one step from the weights of another, whose tokenizer is bytes too."""
    return train(name, f"init_from={origin}", "train.steps=1", *arguments)


def periods(run: Path) -> list[tuple] | None:
    """(name, step, periods, seed) of each ancestor."""
    known = ancestors(find_checkpoint(run))
    return None if known is None else [
        (a.run, a.step, a.data.repeats.period, a.seed) for a in known]


def as_an_earlier_version_wrote_it(run: Path) -> None:
    """Take the history out of every checkpoint of a run."""
    for checkpoint in list_checkpoints(run / "checkpoints"):
        rewrite_state(checkpoint, remove="history")


def rewrite_state(checkpoint: Path, remove: str = "", **changes: object) -> None:
    path = checkpoint / "training_state/state.json"
    state = json.loads(path.read_text()) | changes
    state.pop(remove, None)
    path.write_text(json.dumps(state))
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["training_state/state.json"] = {
        "bytes": path.stat().st_size, "sha256": sha256(path.read_bytes()).hexdigest()}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


GRANDPARENT = ("a", 2, [4, 8], 3)
PARENT = ("b", 1, [12, 12], 5)


def make_chain() -> None:
    """c starts from b, which starts from a."""
    train("a", "data.repeats.held_out_tokens=0.25")
    train_from("runs/a", "b", "data.repeats.period=[12, 12]", "seed=5")
    train_from("runs/b/checkpoints/000001", "c", "data.repeats.held_out_periods=[6, 12]")


def test_a_chain_is_known_after_its_runs_were_deleted_and_its_own_checkpoints_pruned(runs):
    make_chain()
    assert periods(runs / "a") == [] and periods(runs / "b") == [GRANDPARENT]
    assert read_state(find_checkpoint(runs / "a"))["history"] == []
    shutil.rmtree(runs / "a")
    (runs / "b").rename("elsewhere")
    assert periods(runs / "c") == [GRANDPARENT, PARENT]
    succeeds(command("train.py", "runs/c", "train.steps=3"))
    assert [path.name for path in list_checkpoints(runs / "c/checkpoints")] == ["000003"]
    assert periods(runs / "c") == [GRANDPARENT, PARENT]
    first, second = ancestors(find_checkpoint(runs / "c"))
    assert first.data == load_config("small.yaml", ["data.repeats.held_out_tokens=0.25"]).data
    assert second.data.repeats.held_out_periods == []
    # The laundered look-back: c's config calls 6 and 12 held out, and its weights have seen both.
    probes = probes_for(load_run(runs / "c"))
    assert set(probes.trained.begun.periods.tolist()) == {4, 5, 6, 7, 8, 12}
    assert not {6, 12} & set(probes.scored.periods.tolist()) and probes.never_trained


def test_an_import_anywhere_in_the_chain_is_unknown(runs):
    save_hf_model("llama", Path("hf"))
    import_model(Path("hf"), runs / "theirs")
    assert read_state(find_checkpoint(runs / "theirs"))["history"] == [{"imported": "hf"}]
    assert periods(runs / "theirs") is None
    config = yaml.safe_load((runs / "theirs/config.yaml").read_text())
    small = SMALL | {"model": config["model"], "data": SMALL["data"] | {
        "tokenizer": str(runs / "theirs/checkpoints/latest")}, "optimizer": config["optimizer"]}
    Path("small.yaml").write_text(yaml.safe_dump(small))
    train_from("runs/theirs", "untrained")                  # from step 0: an import, and no run
    assert read_state(find_checkpoint(runs / "untrained"))["history"] == [{"imported": "hf"}]
    rows = ("data.corpus=repeats", "data.repeats.period=[4, 8]", "train.steps=1",
            "checkpoint.keep=1", "eval.every=0", "heads.every=0", "log.wandb=disabled",
            "train.batch_tokens=64")
    succeeds(command("train.py", "runs/theirs", *rows))
    assert not (runs / "theirs/checkpoints/000000").exists()
    assert periods(runs / "theirs") is None
    train_from("runs/theirs", "tuned")
    history = read_state(find_checkpoint(runs / "tuned"))["history"]
    assert [next(iter(entry)) for entry in history] == ["imported", "run"]
    assert periods(runs / "tuned") is None
    probes = probes_for(load_run(runs / "tuned"))
    assert not probes.history_known and not probes.never_trained and "unknown" in probes.note

    for name in ("theirs", "tuned"):
        as_an_earlier_version_wrote_it(runs / name)
        assert periods(runs / name) is None
    # A new model with that tokenizer looks like an import whose step 0 was pruned; with a tokenizer
    # of our own it does not.
    train("fresh", "train.steps=1")
    assert periods(runs / "fresh") == []
    as_an_earlier_version_wrote_it(runs / "fresh")
    assert periods(runs / "fresh") is None
    Path("small.yaml").write_text(yaml.safe_dump(SMALL))
    train("ours")
    train("ours_again", "data.tokenizer=runs/ours/checkpoints/latest")
    as_an_earlier_version_wrote_it(runs / "ours_again")
    assert periods(runs / "ours_again") == []


def test_an_imported_checkpoint_of_an_earlier_version(runs):
    save_hf_model("llama", Path("hf"))
    import_model(Path("hf"), runs / "theirs")
    rewrite_state(find_checkpoint(runs / "theirs"), remove="history", imported="hf")
    assert periods(runs / "theirs") is None


def test_checkpoints_of_earlier_versions_follow_init_from_on_the_disk(runs):
    make_chain()
    for name in "abc":
        as_an_earlier_version_wrote_it(runs / name)
    assert periods(runs / "a") == [] and periods(runs / "c") == [GRANDPARENT, PARENT]
    # Continuing it saves what can still be found.
    succeeds(command("train.py", "runs/c", "train.steps=2", "checkpoint.keep=2"))
    shutil.rmtree(runs / "a")
    assert periods(runs / "c") == [GRANDPARENT, PARENT]
    assert ancestors(runs / "c/checkpoints/000001") is None
    assert periods(runs / "b") is None
    # Nor is it known again when it goes on.
    succeeds(command("train.py", "runs/b", "train.steps=2"))
    assert read_state(find_checkpoint(runs / "b"))["history"] == [{"unknown": "runs/a"}]
    assert periods(runs / "b") is None


def test_a_run_that_took_the_name_of_its_origin_is_not_its_own_ancestor(runs):
    train("a")
    train_from("runs/a", "b")
    as_an_earlier_version_wrote_it(runs / "b")
    shutil.rmtree(runs / "a")
    (runs / "b").rename(runs / "a")
    assert periods(runs / "a") is None


def test_a_history_that_lies_is_refused_or_unknown(runs):
    train("a")
    checkpoint = find_checkpoint(runs / "a")
    rewrite_state(checkpoint, history="none")
    fails(command("train.py", "runs/a", "train.steps=3"), "state.json", "history")
    rewrite_state(checkpoint, history=[5])
    assert ancestors(checkpoint) is None
    entry = {"run": "b", "step": 1, "seed": 0, "data": {"repeats": {"period": 8}}}
    rewrite_state(checkpoint, history=[entry])
    with pytest.raises(UserError, match=r"state\.json: repeats\.period=8"):
        ancestors(checkpoint)
