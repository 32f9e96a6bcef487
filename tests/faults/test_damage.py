"""Checkpoints and shards that are damaged, exchanged or lost: noticed by name, with a way on."""

import json
import shutil
from pathlib import Path

import pytest
from commands import command, fails
from conftest import metrics

from faults.lab import Lab, same_bits
from training.checkpoint import find_checkpoint, list_checkpoints, verify

full = pytest.mark.faults
FILES = ["model.safetensors", "training_state/optimizer.safetensors", "training_state/state.json", "training_state/config.yaml",
         "config.json", "tokenizer.json", "manifest.json"]
DAMAGE = ["flip", "truncate", "remove"]
SHORT = {("model.safetensors", "flip"), ("training_state/state.json", "flip"), ("tokenizer.json", "remove")}


def copied(lab: Lab, name: str) -> Path:
    return Path(shutil.copytree(lab / "runs/whole", lab / f"runs/{name}", symlinks=True))


def damage_file(path: Path, damage: str) -> None:
    raw = bytearray(path.read_bytes())
    match damage:
        case "remove":
            path.unlink()
        case "truncate":
            path.write_bytes(raw[:-3])
        case "flip":                                # one bit, of a digit of the step where there is one
            at = raw.index(b'"step": 12') + 9 if path.name == "state.json" else len(raw) // 2
            raw[at] ^= 1
            path.write_bytes(raw)


def test_a_whole_checkpoint_is_verified_by_any_path(lab: Lab):
    verify(lab / "runs/../runs/whole/checkpoints/000012")


@pytest.mark.parametrize(("name", "damage"), [pytest.param(name, damage, marks=[full] * ((name, damage) not in SHORT))
                                              for name in FILES for damage in DAMAGE])
def test_a_damaged_checkpoint_is_refused_and_nothing_is_lost(lab: Lab, fault, name, damage):
    with fault("damaged checkpoint", f"{damage} {name}"):
        run = copied(lab, f"{damage}-{FILES.index(name)}")
        newest, before = run / "checkpoints/000012", run / "checkpoints/000008"
        damage_file(newest / name, damage)
        if (name, damage) == ("manifest.json", "remove"):               # then it was never finished, as far as anyone can tell
            lab.train(f"runs/{run.name}")
        else:
            named = [name] * ((name, damage) != ("manifest.json", "flip"))          # then it is another's name or sum that is wrong
            fails(lab.train(f"runs/{run.name}", "train.steps=14", code=2), *named, "is damaged",
                  f"to go on from runs/{run.name}/checkpoints/000008, delete runs/{run.name}/checkpoints/000012")
            if name in ("model.safetensors", "tokenizer.json"):
                fails(command("sample.py", f"runs/{run.name}", cwd=lab.folder), name, "is damaged")
            assert list(metrics(run)) == list(range(1, 13)) and before.exists()
            if (name, damage) != ("model.safetensors", "flip"):         # the way on is the same for all
                return
            shutil.rmtree(newest)
            lab.train(f"runs/{run.name}")
        assert same_bits(newest, lab / "runs/whole/checkpoints/000012")


@pytest.mark.parametrize("what", ["model.safetensors", pytest.param("training_state/optimizer.safetensors", marks=full),
                                  "all", pytest.param("all, by another model", marks=full), pytest.param("all, by other data", marks=full)])
def test_what_comes_from_another_run_is_refused(lab: Lab, fault, what):
    """Another seed: the same shapes, other weights."""
    with fault("another run's files", what):
        change = {"all, by another model": "model.n_heads=2", "all, by other data": "data.val_fraction=0.3"}.get(what, "seed=2")
        other = f"other-{change.replace('=', '-')}"
        if not (lab / f"runs/{other}").exists():
            lab.train("tiny.yaml", f"run={other}", change)
        run = copied(lab, f"exchanged-{what.replace(' ', '-').replace('/', '-')}")
        target, source = run / "checkpoints/000012", lab / f"runs/{other}/checkpoints/000012"
        if what.startswith("all"):
            shutil.rmtree(target)
            shutil.copytree(source, target)
            fails(lab.train(f"runs/{run.name}", "train.steps=14", code=2), f"runs/{run.name}")
        else:
            shutil.copy(source / what, target / what)
            fails(lab.train(f"runs/{run.name}", "train.steps=14", code=2), what, "is damaged", "SHA-256")


@pytest.mark.parametrize("command_line", [("train.py",), ("sample.py", "def "), pytest.param(("heads.py",), marks=full)])
def test_a_latest_that_points_nowhere_is_said_and_passed_over(lab: Lab, fault, command_line):
    script, *arguments = command_line
    with fault("latest points nowhere", script):
        run = copied(lab, f"nowhere-{script[:-3]}")
        link = run / "checkpoints/latest"
        for where in ("", "/checkpoints/latest") if script != "train.py" else ("",):
            link.unlink()
            link.symlink_to("000099")
            done = lab.ended(command(script, f"runs/{run.name}{where}", *arguments, cwd=lab.folder), 0)
            assert "latest names 000099, which is no whole checkpoint; the newest is" in done.stderr and "000012" in done.stderr
        if script == "train.py":
            assert link.resolve().name == "000012"


def test_what_a_kill_left_is_put_right(lab: Lab, fault):
    with fault("latest points nowhere", "train.py, beside unfinished folders"):
        run = copied(lab, "left")
        folder = run / "checkpoints"
        shutil.copytree(folder / "000008", folder / ".partial-000016")
        (folder / "000012/manifest.json").unlink()          # never finished
        (run / "report.html").unlink()
        lab.train("runs/left")
        assert [p.name for p in list_checkpoints(folder)] == ["000008", "000012"] and not list(folder.glob(".partial*"))
        assert find_checkpoint(run).name == "000012" and same_bits(folder / "000012", lab / "runs/whole/checkpoints/000012")
        (run / "report.html").unlink()
        assert "finished" in lab.train("runs/left").stdout and (run / "report.html").exists()


@pytest.mark.parametrize(("name", "damage"), [pytest.param(name, damage, marks=[full] * ((name, damage) not in (
    ("train-00000.npy", "flip"), ("val-00000.npy", "truncate")))) for name in ("train-00000.npy", "val-00000.npy", "tokenizer.json",
                                                                             "manifest.json") for damage in DAMAGE])
def test_a_damaged_shard_is_refused(lab: Lab, fault, name, damage):
    with fault("damaged shard", f"{damage} {name}"):
        run, data = f"shard-{damage}-{name}", lab / f"data-{damage}-{name}"
        lab.ended(command("-m data.prepare", "tiny.yaml", f"data.folder={data.name}", cwd=lab.folder), 0)
        whole = json.loads((data / "manifest.json").read_text())
        damage_file(data / name, damage)
        done = command("train.py", "tiny.yaml", f"run={run}", f"data.folder={data.name}", cwd=lab.folder)
        if name == "manifest.json" and damage != "flip":                # a preparation that never ended: it is made again, or refused
            assert (done.returncode == 0 and json.loads((data / name).read_text()) == whole) or done.returncode == 2
        elif name != "manifest.json":
            fails(done, name)
            assert not (lab / f"runs/{run}").exists()
        assert "Traceback" not in done.stderr
