"""Damaged, exchanged or lost checkpoints and shards are refused by name, with a way to go on."""

import json
import shutil
from pathlib import Path

import pytest
from commands import command, fails, succeeds
from conftest import metrics

from faults.lab import Lab, same_bits
from training.checkpoint import find_checkpoint, list_checkpoints, verify

full = pytest.mark.faults           # only with `make test-faults`
DAMAGE = ["flip", "truncate", "remove"]
CHECKPOINT_FILES = [
    "model.safetensors", "training_state/optimizer.safetensors", "training_state/state.json",
    "training_state/config.yaml", "config.json", "tokenizer.json", "manifest.json"]
SHARD_FILES = ["train-00000.npy", "val-00000.npy", "tokenizer.json", "manifest.json"]


def every_damage(files: list[str], always: set[tuple[str, str]]) -> list:
    """All damage to all files; what is not in `always` only in the full form."""
    cases = []
    for name in files:
        for damage in DAMAGE:
            marks = [] if (name, damage) in always else [full]
            cases.append(pytest.param(name, damage, marks=marks))
    return cases


def copy_of_run(lab: Lab, name: str) -> Path:
    return Path(shutil.copytree(lab.undisturbed, lab / f"runs/{name}", symlinks=True))


def damage_file(path: Path, damage: str) -> None:
    raw = bytearray(path.read_bytes())
    match damage:
        case "remove":
            path.unlink()
        case "truncate":
            path.write_bytes(raw[:-3])
        case "flip":                    # one bit; in state.json of a digit of the step
            at = raw.index(b'"step": 12') + 9 if path.name == "state.json" else len(raw) // 2
            raw[at] ^= 1
            path.write_bytes(raw)


def test_an_undamaged_checkpoint_is_verified_by_any_path(lab: Lab):
    verify(lab / "runs/../runs" / lab.undisturbed.name / "checkpoints/000012")


@pytest.mark.parametrize(("name", "damage"), every_damage(CHECKPOINT_FILES, {
    ("model.safetensors", "flip"), ("training_state/state.json", "flip"),
    ("tokenizer.json", "remove")}))
def test_a_damaged_checkpoint_is_refused_and_nothing_is_lost(lab: Lab, fault, name, damage):
    with fault("damaged checkpoint", f"{damage} {name}"):
        run = copy_of_run(lab, f"{damage}-{CHECKPOINT_FILES.index(name)}")
        newest, before = run / "checkpoints/000012", run / "checkpoints/000008"
        damage_file(newest / name, damage)
        if (name, damage) == ("manifest.json", "remove"):
            # Without a manifest the checkpoint counts as unfinished.
            lab.train(f"runs/{run.name}")
        else:
            # A flipped bit in the manifest may make another file look damaged.
            named = [] if (name, damage) == ("manifest.json", "flip") else [name]
            fails(lab.train(f"runs/{run.name}", "train.steps=14", code=2), *named, "is damaged",
                  f"to go on from runs/{run.name}/checkpoints/000008, "
                  f"delete runs/{run.name}/checkpoints/000012")
            if name in ("model.safetensors", "tokenizer.json"):
                fails(command("sample.py", f"runs/{run.name}", cwd=lab.folder), name, "is damaged")
            assert list(metrics(run)) == list(range(1, 13)) and before.exists()
            if (name, damage) != ("model.safetensors", "flip"):     # the way on is always the same
                return
            shutil.rmtree(newest)
            lab.train(f"runs/{run.name}")
        assert same_bits(newest, lab.undisturbed / "checkpoints/000012")


@pytest.mark.parametrize("exchanged", [
    "model.safetensors", pytest.param("training_state/optimizer.safetensors", marks=full), "all",
    pytest.param("all, by another model", marks=full),
    pytest.param("all, by other data", marks=full)])
def test_files_of_another_run_are_refused(lab: Lab, fault, exchanged):
    """Another seed: the same shapes, other weights."""
    with fault("another run's files", exchanged):
        changes = {"all, by another model": "model.n_heads=2",
                   "all, by other data": "data.val_fraction=0.3"}
        change = changes.get(exchanged, "seed=2")
        other = f"other-{change.replace('=', '-')}"
        if not (lab / f"runs/{other}").exists():
            lab.train("tiny.yaml", f"run={other}", change)
        run = copy_of_run(lab, f"exchanged-{exchanged.replace(' ', '-').replace('/', '-')}")
        target = run / "checkpoints/000012"
        source = lab / f"runs/{other}/checkpoints/000012"
        if exchanged.startswith("all"):
            shutil.rmtree(target)
            shutil.copytree(source, target)
            words = [f"runs/{run.name}"]
        else:
            shutil.copy(source / exchanged, target / exchanged)
            words = [exchanged, "is damaged", "SHA-256"]
        fails(lab.train(f"runs/{run.name}", "train.steps=14", code=2), *words)


@pytest.mark.parametrize("command_line", [
    ("train.py",), ("sample.py", "def "), pytest.param(("heads.py",), marks=full)])
def test_a_latest_that_points_nowhere_is_noted_and_ignored(lab: Lab, fault, command_line):
    script, *arguments = command_line
    with fault("latest points nowhere", script):
        run = copy_of_run(lab, f"nowhere-{script[:-3]}")
        link = run / "checkpoints/latest"
        targets = [""] if script == "train.py" else ["", "/checkpoints/latest"]
        for target in targets:
            link.unlink()
            link.symlink_to("000099")
            done = succeeds(command(script, f"runs/{run.name}{target}", *arguments,
                                    cwd=lab.folder))
            assert ("latest points at 000099, which is not a complete checkpoint; the newest is"
                    in done.stderr)
            assert "000012" in done.stderr
        if script == "train.py":
            assert link.resolve().name == "000012"


def test_unfinished_files_of_a_killed_run_are_repaired(lab: Lab, fault):
    with fault("latest points nowhere", "train.py, beside unfinished folders"):
        run = copy_of_run(lab, "left")
        folder = run / "checkpoints"
        shutil.copytree(folder / "000008", folder / ".partial-000016")
        (folder / "000012/manifest.json").unlink()          # never finished
        (run / "report.html").unlink()
        lab.train("runs/left")
        assert [path.name for path in list_checkpoints(folder)] == ["000008", "000012"]
        assert not list(folder.glob(".partial*"))
        assert find_checkpoint(run).name == "000012"
        assert same_bits(folder / "000012", lab.undisturbed / "checkpoints/000012")
        (run / "report.html").unlink()
        assert "finished" in lab.train("runs/left").stdout and (run / "report.html").exists()


@pytest.mark.parametrize(("name", "damage"), every_damage(SHARD_FILES, {
    ("train-00000.npy", "flip"), ("val-00000.npy", "truncate")}))
def test_a_damaged_shard_is_refused(lab: Lab, fault, name, damage):
    with fault("damaged shard", f"{damage} {name}"):
        run, data = f"shard-{damage}-{name}", lab / f"data-{damage}-{name}"
        succeeds(command("-m data.prepare", "tiny.yaml", f"data.folder={data.name}",
                         cwd=lab.folder))
        manifest = json.loads((data / "manifest.json").read_text())
        damage_file(data / name, damage)
        done = command("train.py", "tiny.yaml", f"run={run}", f"data.folder={data.name}",
                       cwd=lab.folder)
        if name == "manifest.json" and damage != "flip":
            # As if preparing had never ended: the data is prepared again, or refused.
            prepared_again = (done.returncode == 0
                              and json.loads((data / name).read_text()) == manifest)
            assert prepared_again or done.returncode == 2
        elif name != "manifest.json":
            fails(done, name)
            assert not (lab / f"runs/{run}").exists()
        assert "Traceback" not in done.stderr
