"""What happens around a trainer: the disk fills up, folders vanish, the clock jumps, wandb dies, another trainer comes."""

import itertools
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from commands import command, fails, wait_until
from conftest import metrics, wandb_history

from data.shards import Shards
from faults.lab import OFFLINE, Lab, check_same_run, check_what_is_left
from training.checkpoint import load_model, read_state, whole_checkpoints

full = pytest.mark.faults


@contextmanager
def file_system(at: Path, options: str = "size=64m") -> Iterator[None]:
    """A small file system of its own at that folder."""
    at.mkdir(parents=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(at)], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(at)], check=True)


def room(at: Path) -> None:
    """Take away what filled the disk."""
    (at / "filler").unlink()


@pytest.mark.parametrize(("hit", "moment", "n", "says"), [
    ("writing a checkpoint", "writing a checkpoint", 3, "saving runs/"),
    pytest.param("writing a checkpoint", "writing a checkpoint", 14, "000004 is intact", marks=full),
    pytest.param("writing a checkpoint", "writing a checkpoint", 17, "000004 is intact", marks=full),
    ("a snapshot of the heads", "a line of metrics.jsonl", 3, "saving what was measured"),
    pytest.param("a snapshot of the heads", "a line of metrics.jsonl", 11, "saving what was measured", marks=full),
    pytest.param("a line of metrics.jsonl", "a snapshot of the heads", 1, "writing metrics.jsonl", marks=full),
])
def test_a_full_disk_ends_the_run_and_loses_nothing(lab: Lab, fault, hit, moment, n, says):
    """The disk is full from a moment on, and the next thing that does not fit is `hit`."""
    run = lab / f"runs/full-{moment.replace(' ', '-')}-{n}"
    with file_system(run), fault("disk full", hit):
        done = lab.train_broken(moment, n, f"fill:{run}", "tiny.yaml", f"run={run.name}", codes=(2,))
        fails(done, "No space left", says, "make room", f"python train.py runs/{run.name}")
        assert not list(run.rglob("*partial*"))
        check_what_is_left(run)
        for checkpoint in whole_checkpoints(run / "checkpoints"):
            load_model(checkpoint)
        room(run)
        lab.go_on(run.name)
        check_same_run(run, lab / "runs/whole")


@pytest.mark.parametrize("wandb", [False, pytest.param(True, marks=full)])
def test_a_disk_that_is_full_of_measurements(lab: Lab, fault, wandb):
    """On 64 kB, which some hundred lines of metrics.jsonl fill: the line that did not fit is taken back whole."""
    run = lab / f"runs/lines-{wandb}"
    changes = [f"run={run.name}", "train.steps=3000", "eval.every=0", "heads.every=0", "checkpoint.every=0"]
    with file_system(run, "size=64k" if not wandb else "size=512k"):
        with fault("disk full", "a line of metrics.jsonl" + ", with wandb on" * wandb):
            done = lab.train("tiny.yaml", *changes, *["log.wandb=offline"] * wandb, code=2, env=OFFLINE if wandb else {})
            fails(done, "writing metrics.jsonl", "No space left", "make room")
            check_what_is_left(run)
            assert (run / "metrics.jsonl").read_bytes().endswith(b"}\n") and 50 < len(metrics(run)) < 3000


@pytest.mark.parametrize("size", ["size=100k", pytest.param("size=12k", marks=full), pytest.param("size=180k", marks=full)])
def test_a_full_disk_while_preparing(lab: Lab, fault, size):
    folder = lab / f"full-{size[5:]}"
    with file_system(folder, size), fault("disk full", "preparing the data"):
        done = command("-m data.prepare", "tiny.yaml", f"data.folder={folder.name}", cwd=lab.folder)
        fails(done, "No space left", "make room")
        assert not (folder / "manifest.json").exists() and not list(folder.glob("*partial*"))
        subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)
        assert command("-m data.prepare", "tiny.yaml", f"data.folder={folder.name}", cwd=lab.folder).returncode == 0
        assert Shards(folder, verify=True).hash == read_state(lab / "runs/whole/checkpoints/000012")["data"]["hash"]


def test_a_folder_that_cannot_be_written(lab: Lab, fault):
    with file_system(lab / "runs/readonly", "size=1m,ro"), fault("read-only folder", "the run's"):
        fails(lab.train("tiny.yaml", "run=readonly", code=2), "runs/readonly", "Read-only file system")
    with file_system(lab / "readonly", "size=1m,ro"), fault("read-only folder", "the data's"):
        fails(lab.train("tiny.yaml", "run=never", "data.folder=readonly", code=2), "readonly", "Read-only file system")
        assert not (lab / "runs/never").exists()
    with fault("read-only folder", "a file where runs/ should be"):
        (lab / "elsewhere").mkdir()
        (lab / "elsewhere/runs").write_text("a file where the folder should be")
        fails(command("train.py", lab / "tiny.yaml", f"data.files=[{lab.folder}/texts/*.txt]", cwd=lab / "elsewhere"), "runs")


@pytest.mark.parametrize(("moment", "n"), [("a step", 9), pytest.param("writing a checkpoint", 12, marks=full),
                                           pytest.param("a snapshot of the heads", 3, marks=full),
                                           pytest.param("writing the report", 1, marks=full)])
def test_a_run_that_is_deleted_while_it_trains_does_not_come_back_in_part(lab: Lab, fault, moment, n):
    run = lab / f"runs/gone-{n}"
    with fault("folder deleted", moment):
        done = lab.train_broken(moment, n, f"delete:{run}", "tiny.yaml", f"run={run.name}", codes=(2,))
        fails(done, f"runs/{run.name}")
        assert not run.exists()


def test_shards_that_are_deleted_while_they_are_read_are_read_to_the_end(lab: Lab, fault):
    with fault("folder deleted", "the data's, while training"):
        lab.train_broken("a step", 9, f"delete:{lab / 'mine'}", "tiny.yaml", "run=shardless", "data.folder=mine")
        check_same_run(lab / "runs/shardless", lab / "runs/whole")


@pytest.mark.parametrize("n", [9, pytest.param(2, marks=full), pytest.param(22, marks=full)])
def test_a_clock_that_jumps_ten_years_back_changes_nothing(lab: Lab, fault, n):
    with fault("clock and file times jump back", "a step"):
        lab.train_broken("a step", n, "clock", "tiny.yaml", f"run=clock-{n}", "log.wandb=offline", env=OFFLINE)
        check_same_run(lab / f"runs/clock-{n}", lab / "runs/whole")
        assert all(record["seconds"] >= 0 for record in lab.records(lab / f"runs/clock-{n}"))


def test_one_trainer_at_a_time(lab: Lab, fault):
    run = lab / "runs/alone"
    process = lab.start("tiny.yaml", "run=alone", "train.steps=100000", "eval.every=0", "heads.every=0", "checkpoint.every=0")
    lab.wait_for_a_line(run, process)
    with fault("two trainers on one run", "the second is refused"):
        before = lab.lines(run)
        fails(lab.train("runs/alone", code=2), "being trained by another process")
        wait_until(lambda: lab.lines(run) > before, process)
    process.kill()
    process.communicate()
    with fault("two trainers on one run", "the lock of a killed one is free"):
        lab.train("runs/alone", "train.steps=12")
        assert len(metrics(run)) == 12


def test_one_preparation_at_a_time(lab: Lab, fault):
    from files import exclusive_lock
    (lab / "out").mkdir()
    with fault("two trainers on one run", "two that prepare the same data"), exclusive_lock(lab / "out/.lock", "mine"):
        fails(command("-m data.prepare", "tiny.yaml", "data.folder=out", cwd=lab.folder), "being prepared by another process")
    assert command("-m data.prepare", "tiny.yaml", "data.folder=out", cwd=lab.folder).returncode == 0


# --- wandb ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n", [7, pytest.param(1, marks=full), pytest.param(24, marks=full)])
def test_training_goes_on_where_wandbs_process_is_killed(lab: Lab, fault, n):
    run = lab / f"runs/core-{n}"
    with fault("wandb's process killed", "a step"):
        done = lab.train_broken("a step", n, "core", "tiny.yaml", f"run={run.name}", "log.wandb=offline", env=OFFLINE)
        assert done.stdout.count("wandb      stopped") == 1             # it was not called again
        check_same_run(run, lab / "runs/whole")


@pytest.mark.parametrize("server", ["is silent", pytest.param("refuses", marks=full)])
def test_training_goes_on_where_wandbs_server_cannot_be_reached(lab: Lab, fault, server):
    """Nothing listens there, or something that takes a call and never answers: a black hole."""
    run = lab / f"runs/server-{server.replace(' ', '-')}"
    with fault("wandb's server unreachable", f"it {server}"), socket.create_server(("127.0.0.1", 0)) as listening:
        port = 9 if server == "refuses" else listening.getsockname()[1]
        done = lab.train("tiny.yaml", f"run={run.name}", "log.wandb=online", env={
            "WANDB_MODE": "online", "WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": f"http://127.0.0.1:{port}"})
        assert "logging offline" in done.stdout
        assert calls(listening) == (server == "is silent")              # the trainer's, of 3 s; wandb itself would go on for 20 s
        check_same_run(run, lab / "runs/whole")
        logged = [record for record in wandb_history(run) if "train/lr" in str(record)]
        assert len(logged) == 12


def calls(listening: socket.socket) -> int:
    """How many connections nobody has taken yet."""
    listening.setblocking(False)
    for n in itertools.count():
        try:
            listening.accept()[0].close()
        except BlockingIOError:
            return n
