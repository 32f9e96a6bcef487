"""File systems that lack links, locks and more; runs that are copied, renamed and moved."""

import errno
import os
import shutil
import subprocess
from pathlib import Path

from errors import UserError

import pytest
from commands import ROOT, Done, command, fails, succeeds
from faults.lab import check_files

from files import HOST, exclusive_lock
from training.checkpoint import find_checkpoint

compiles = pytest.mark.skipif(not shutil.which("gcc"), reason="needs a C compiler")


@pytest.fixture
def poor_disk(tmp_path) -> dict[str, str]:
    """Variables of a command whose file systems lack links, locks and permissions."""
    library = tmp_path / "poor_disk.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, ROOT / "tests/poor_disk.c"],
                   check=True)
    return {"LD_PRELOAD": str(library), "LACKING": str(errno.EOPNOTSUPP)}


def copied(run: Path, target: str, symlinks: bool = True) -> Path:
    shutil.copytree(run, target, symlinks=symlinks)
    return Path(target)


@compiles
@pytest.mark.long
@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EPERM])
def test_a_run_without_links_and_locks(workplace, trained, poor_disk, number):
    env = poor_disk | {"LACKING": str(number)}
    run = Path("runs/tiny")

    def train(*arguments: str) -> Done:
        return command("train.py", *arguments, env=env)

    succeeds(train("tiny.yaml", "train.steps=8", "checkpoint.every=3", "heads.every=0"))
    assert (run / "checkpoints/latest").read_text() == "000008"
    assert (run / "checkpoints/best").is_file() and not (run / ".lock").exists()
    assert find_checkpoint(run / "checkpoints/latest").name == "000008"
    (run / ".lock").touch()                         # a real lock's: the run was trained elsewhere
    succeeds(train(str(run), "train.steps=9"))
    assert (run / "checkpoints/latest").read_text() == "000009"
    check_files(run)
    succeeds(train("tiny.yaml", "run=second", f"init_from={run}", "train.steps=1",
                   f"data.tokenizer={run}/checkpoints/latest"))
    # A second trainer: on this machine, killed on this machine, and on another one.
    ended = subprocess.Popen(["true"])
    ended.wait()
    for process, host, is_held in ((os.getpid(), HOST, True), (ended.pid, HOST, False),
                                   (123, "node17", True)):
        (run / ".lock").write_text(f"{process}\n{host}\n")
        done = train(str(run), "train.steps=10")
        if is_held:
            fails(done, "runs/tiny is being trained by another process", f"process {process} on",
                  "runs/tiny/.lock")
        else:
            succeeds(done)
    assert "node17 holds runs/tiny/.lock; delete that file" in done.stderr


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
