"""File systems that lack links, locks and more; runs that are copied, renamed and moved."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

from errors import UserError

import pytest
import yaml
from commands import ROOT, command, environment, fails, succeeds
from conftest import metrics
from faults.lab import check_files

from files import HOST, exclusive_lock
from training.checkpoint import find_checkpoint, list_checkpoints
from training.loaded_run import load_run

compiles = pytest.mark.skipif(not shutil.which("gcc"), reason="needs a C compiler")


@pytest.fixture
def poor_disk(tmp_path) -> dict[str, str]:
    """Variables of a command whose file systems lack links, locks and permissions."""
    library = tmp_path / "poor_disk.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, ROOT / "tests/poor_disk.c"],
                   check=True)
    return {"LD_PRELOAD": str(library), "LACKING": str(errno.EPERM)}


def copied(run: Path, target: str, symlinks: bool = True) -> Path:
    shutil.copytree(run, target, symlinks=symlinks)
    return Path(target)


@pytest.mark.long
@compiles
def test_a_run_without_links_and_locks(workplace, poor_disk):
    run = Path("runs/tiny")
    succeeds(command("train.py", "tiny.yaml", "train.steps=8", "checkpoint.every=3",
                     "heads.every=0", env=poor_disk))
    assert (run / "checkpoints/latest").read_text() == "000008"
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == ["000006", "000008"]
    assert (run / "checkpoints/best").is_file() and not (run / ".lock").exists()
    assert find_checkpoint(run / "checkpoints/latest").name == "000008"
    succeeds(command("train.py", "tiny.yaml", "run=second", f"init_from={run}", "train.steps=1",
                     f"data.tokenizer={run}/checkpoints/latest"))
    (run / ".lock").write_text("123\nnode17\n")
    refused = command("train.py", run, "train.steps=9", env=poor_disk)
    fails(refused, "runs/tiny is being trained by another process (process 123 on node17 holds "
                   "runs/tiny/.lock; delete that file if the process has ended)", "run=NEW")
    (run / ".lock").unlink()
    succeeds(command("train.py", run, "train.steps=9"))             # now with links
    assert (run / "checkpoints/latest").is_symlink()
    check_files(run)


# Tries to take a lock whose file holds each of the arguments.
TAKE_LOCKS = """
import sys
from pathlib import Path
from errors import UserError
from files import exclusive_lock
lock = Path("lock")
for text in sys.argv[1:]:
    lock.write_text(text)
    try:
        with exclusive_lock(lock, "it is used", "wait"):
            print("taken", lock.read_text().split()[:1])
    except UserError as error:
        print("refused", "process 12 on node17" in str(error))
"""


@compiles
@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EPERM, errno.ENOSYS, errno.ENOLCK])
def test_a_lock_without_locks(tmp_path, poor_disk, number):
    """Its file is the lock. A real lock's is empty; one of a process that has ended is free."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    process = subprocess.Popen(
        [sys.executable, "-c", TAKE_LOCKS, "", f"{ended.pid}\n{HOST}\n", f"{os.getpid()}\n{HOST}\n",
         "12\nnode17\n"], cwd=tmp_path, text=True, stdout=subprocess.PIPE,
        env=environment(**poor_disk | {"LACKING": str(number)}))
    taken = f"taken ['{process.pid}']"
    assert process.communicate()[0].splitlines() == [taken, taken, "refused False", "refused True"]


def test_a_lock_names_its_holder_and_forgets_it(tmp_path):
    lock = tmp_path / ".lock"
    with exclusive_lock(lock, "it is used", "wait"):
        with pytest.raises(UserError, match=rf"^it is used by another process \(process "
                                            rf"{os.getpid()} on this machine holds .*\)\n  wait$"):
            with exclusive_lock(lock, "it is used", "wait"):
                pass
    assert lock.read_text() == ""
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_copy_that_followed_links_or_dropped_them(workplace, trained):
    followed = copied(trained, "runs/followed", symlinks=False)
    latest = followed / "checkpoints/latest"
    assert latest.is_dir() and not latest.is_symlink()
    succeeds(command("train.py", followed, "train.steps=13"))
    assert latest.is_symlink() and latest.resolve().name == "000013"
    dropped = copied(trained, "runs/dropped")
    for name in ("latest", "best"):
        (dropped / "checkpoints" / name).unlink()
    assert find_checkpoint(dropped / "checkpoints/latest").name == "000012"
    # A folder of the user's is not deleted.
    (dropped / "checkpoints/latest").mkdir()
    (dropped / "checkpoints/latest/mine.txt").touch()
    fails(command("train.py", dropped, "train.steps=13"), "checkpoints/latest is a folder",
          "move it")
    assert (dropped / "checkpoints/latest/mine.txt").exists()


# --- renamed and moved runs -------------------------------------------------------------------

def test_a_renamed_run_is_the_same_run_under_its_new_name(workplace, trained):
    """It continues from its folder and from its config."""
    copied(trained, "runs/tiny")
    copied(trained.parent.parent / "prepared", "prepared")
    succeeds(command("train.py", "runs/tiny", "train.steps=14"))
    renamed = copied(trained, "runs/renamed-1")
    done = succeeds(command("train.py", renamed, "train.steps=13"))
    assert "changed    train.steps: 12 → 13" in done.stdout and "run:" not in done.stdout
    assert yaml.safe_load((renamed / "config.yaml").read_text())["run"] == "renamed-1"
    moved = Path("elsewhere/007")                   # a name that YAML reads as a number
    moved.parent.mkdir()
    renamed.rename(moved)
    succeeds(command("train.py", moved, "train.steps=14"))
    assert metrics(moved).keys() == set(range(1, 15))
    assert metrics(moved)[13]["train/loss"] == metrics(Path("runs/tiny"))[13]["train/loss"]
    moved.rename("runs/back")
    done = succeeds(command("train.py", "tiny.yaml", "train.steps=14", "run=back"))
    assert "runs/back is finished" in done.stdout
    fails(command("train.py", "runs/back", "run=other"), "run: 'back' → 'other'")
    assert load_run("runs/back").config.run == "back"       # the title of its report


def test_a_folder_whose_name_no_config_could_have_keeps_the_name_of_its_run(workplace, trained):
    copy = copied(trained, "runs/tiny (copy)")
    succeeds(command("train.py", copy, "train.steps=13"))
    assert yaml.safe_load((copy / "config.yaml").read_text())["run"] == "tiny"
    succeeds(command("train.py", copy, "train.steps=14"))


def test_wandb_keeps_the_id_of_a_renamed_run(workplace):
    env = {"WANDB_MODE": "offline"}
    arguments = ("log.wandb=offline", "heads.every=0", "eval.every=0")
    succeeds(command("train.py", "tiny.yaml", "train.steps=2", *arguments, env=env))
    run = Path("runs/tiny").rename("runs/renamed")
    before = (run / "wandb/id.json").read_text()
    succeeds(command("train.py", run, "train.steps=3", env=env))
    assert (run / "wandb/id.json").read_text() == before
    assert len(list((run / "wandb").glob("offline-run-*"))) == 2
