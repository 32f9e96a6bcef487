"""A trainer's surroundings fail: full disks, deleted folders, clock jumps, wandb, other runs."""

import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from commands import command, fails, succeeds, wait_until
from conftest import metrics, read_records, wandb_history

from data.shards import Shards
from faults.lab import (
    OFFLINE,
    Lab,
    check_files,
    check_same_run,
    count_lines,
    wait_for_a_line,
)
from files import exclusive_lock
from training.checkpoint import list_checkpoints, load_model, read_state

full = pytest.mark.faults           # only with `make test-faults`


@contextmanager
def file_system(folder: Path, options: str = "size=64m") -> Iterator[None]:
    """Mount a small file system of its own at `folder`."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


# --- disks and folders -----------------------------------------------------------------------

@pytest.mark.parametrize(("write", "moment", "n", "message"), [
    ("writing a checkpoint", "writing a checkpoint", 3, "saving runs/"),
    pytest.param("writing a checkpoint", "writing a checkpoint", 14, "000004 is intact",
                 marks=full),
    pytest.param("writing a checkpoint", "writing a checkpoint", 17, "000004 is intact",
                 marks=full),
    ("a snapshot of the heads", "a line of metrics.jsonl", 3, "saving measurements of"),
    pytest.param("a snapshot of the heads", "a line of metrics.jsonl", 11,
                 "saving measurements of", marks=full),
    pytest.param("a line of metrics.jsonl", "a snapshot of the heads", 1, "writing metrics.jsonl",
                 marks=full),
])
def test_a_full_disk_ends_the_run_and_loses_nothing(lab: Lab, fault, write, moment, n, message):
    """The disk is full from a moment on; `write` is the next thing that does not fit."""
    run = lab / f"runs/full-{moment.replace(' ', '-')}-{n}"
    with file_system(run), fault("disk full", write):
        done = lab.train_broken(moment, n, f"fill:{run}", "tiny.yaml", f"run={run.name}",
                                codes=(2,))
        fails(done, "No space left", message, "make room", f"train.py runs/{run.name}")
        assert not list(run.rglob("*partial*"))
        check_files(run)
        for checkpoint in list_checkpoints(run / "checkpoints"):
            load_model(checkpoint)
        (run / "filler").unlink()                           # make room
        lab.resume(run.name)
        check_same_run(run, lab.undisturbed)


@pytest.mark.parametrize("wandb", [False, pytest.param(True, marks=full)])
def test_a_disk_that_metrics_fill(lab: Lab, fault, wandb):
    """64 kB hold some hundred lines of metrics.jsonl: the line that does not fit is removed."""
    run = lab / f"runs/lines-{wandb}"
    changes = [f"run={run.name}", "train.steps=3000", "eval.every=0", "heads.every=0",
               "checkpoint.every=0"]
    size, moment, env = "size=64k", "a line of metrics.jsonl", {}
    if wandb:
        size, moment, env = "size=512k", "a line of metrics.jsonl, with wandb on", OFFLINE
        changes.append("log.wandb=offline")
    with file_system(run, size), fault("disk full", moment):
        done = lab.train("tiny.yaml", *changes, code=2, env=env)
        fails(done, "writing metrics.jsonl", "No space left", "make room")
        check_files(run)
        assert (run / "metrics.jsonl").read_bytes().endswith(b"}\n")
        assert 50 < len(metrics(run)) < 3000


@pytest.mark.parametrize("size", [
    "100k", pytest.param("12k", marks=full), pytest.param("180k", marks=full)])
def test_a_full_disk_while_preparing(lab: Lab, fault, size):
    folder = lab / f"full-{size}"
    prepare = ("-m data.prepare", "tiny.yaml", f"data.folder={folder.name}")
    with file_system(folder, f"size={size}"), fault("disk full", "preparing the data"):
        fails(command(*prepare, cwd=lab.folder), "No space left", "make room")
        assert not (folder / "manifest.json").exists() and not list(folder.glob("*partial*"))
        subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)
        succeeds(command(*prepare, cwd=lab.folder))
        state = read_state(lab.undisturbed / "checkpoints/000012")
        assert Shards(folder, verify=True).hash == state["data"]["hash"]


def test_a_folder_that_cannot_be_written(lab: Lab, fault):
    with file_system(lab / "runs/readonly", "size=1m,ro"), fault("read-only folder", "the run's"):
        done = lab.train("tiny.yaml", "run=readonly", code=2)
        fails(done, "runs/readonly", "Read-only file system")
    with file_system(lab / "readonly", "size=1m,ro"), fault("read-only folder", "the data's"):
        done = lab.train("tiny.yaml", "run=never", "data.folder=readonly", code=2)
        fails(done, "readonly", "Read-only file system")
        assert not (lab / "runs/never").exists()
    with fault("read-only folder", "a file where runs/ should be"):
        (lab / "elsewhere").mkdir()
        (lab / "elsewhere/runs").write_text("a file where the folder should be")
        done = command("train.py", lab / "tiny.yaml", f"data.files=[{lab.folder}/texts/*.txt]",
                       cwd=lab / "elsewhere")
        fails(done, "runs")


@pytest.mark.parametrize(("moment", "n"), [
    ("a step", 9), pytest.param("writing a checkpoint", 12, marks=full),
    pytest.param("a snapshot of the heads", 3, marks=full),
    pytest.param("writing the report", 1, marks=full)])
def test_a_run_deleted_while_it_trains_does_not_come_back_in_part(lab: Lab, fault, moment, n):
    run = lab / f"runs/gone-{n}"
    with fault("folder deleted", moment):
        done = lab.train_broken(moment, n, f"delete:{run}", "tiny.yaml", f"run={run.name}",
                                codes=(2,))
        fails(done, f"runs/{run.name}")
        assert not run.exists()


def test_shards_deleted_while_they_are_read_are_read_to_the_end(lab: Lab, fault):
    with fault("folder deleted", "the data's, while training"):
        lab.train_broken("a step", 9, f"delete:{lab / 'mine'}", "tiny.yaml", "run=shardless",
                         "data.folder=mine")
        check_same_run(lab / "runs/shardless", lab.undisturbed)


@pytest.mark.parametrize("n", [9, pytest.param(2, marks=full), pytest.param(22, marks=full)])
def test_a_clock_that_jumps_ten_years_back_changes_nothing(lab: Lab, fault, n):
    run = lab / f"runs/clock-{n}"
    with fault("clock and file times jump back", "a step"):
        lab.train_broken("a step", n, "clock", "tiny.yaml", f"run={run.name}", "log.wandb=offline",
                         env=OFFLINE)
        check_same_run(run, lab.undisturbed)
        assert all(record["seconds"] >= 0 for record in read_records(run))


# --- other trainers --------------------------------------------------------------------------


def test_one_trainer_at_a_time(lab: Lab, fault):
    run = lab / "runs/alone"
    process = lab.start("tiny.yaml", "run=alone", "train.steps=100000", "eval.every=0",
                        "heads.every=0", "checkpoint.every=0")
    wait_for_a_line(run, process)
    with fault("two trainers on one run", "the second is refused"):
        before = count_lines(run)
        fails(lab.train("runs/alone", code=2), "being trained by another process")
        wait_until(lambda: count_lines(run) > before, process)
    process.kill()
    process.communicate()
    with fault("two trainers on one run", "the lock of a killed one is free"):
        lab.train("runs/alone", "train.steps=12")
        assert len(metrics(run)) == 12


def test_one_preparation_at_a_time(lab: Lab, fault):
    (lab / "out").mkdir()
    prepare = ("-m data.prepare", "tiny.yaml", "data.folder=out")
    with fault("two trainers on one run", "two that prepare the same data"):
        with exclusive_lock(lab / "out/.lock", "mine", "wait"):
            fails(command(*prepare, cwd=lab.folder), "being prepared by another process")
    succeeds(command(*prepare, cwd=lab.folder))


# --- wandb -----------------------------------------------------------------------------------

@pytest.mark.parametrize("n", [7, pytest.param(1, marks=full), pytest.param(24, marks=full)])
def test_training_goes_on_if_wandbs_process_is_killed(lab: Lab, fault, n):
    run = lab / f"runs/core-{n}"
    with fault("wandb's process killed", "a step"):
        done = lab.train_broken("a step", n, "core", "tiny.yaml", f"run={run.name}",
                                "log.wandb=offline", env=OFFLINE)
        assert done.stdout.count("wandb      stopped") == 1         # it is not called again
        check_same_run(run, lab.undisturbed)


@pytest.mark.parametrize("server", ["is silent", pytest.param("refuses", marks=full)])
def test_training_goes_on_if_wandbs_server_cannot_be_reached(lab: Lab, fault, server):
    """Nothing listens there, or something that accepts connections and never answers."""
    run = lab / f"runs/server-{server.replace(' ', '-')}"
    moment = f"it {server}"
    with fault("wandb's server unreachable", moment), socket.create_server(
            ("127.0.0.1", 0)) as listener:
        port = 9 if server == "refuses" else listener.getsockname()[1]
        done = lab.train("tiny.yaml", f"run={run.name}", "log.wandb=online", env={
            "WANDB_MODE": "online", "WANDB_API_KEY": "0" * 40,
            "WANDB_BASE_URL": f"http://127.0.0.1:{port}"})
        assert "logging offline" in done.stdout
        # One connection: the trainer's own, of 3 s. wandb itself would try for 20 s.
        assert waiting_connections(listener) == (1 if server == "is silent" else 0)
        check_same_run(run, lab.undisturbed)
        logged = [record for record in wandb_history(run) if "train/lr" in str(record)]
        assert len(logged) == 12


def waiting_connections(listener: socket.socket) -> int:
    """The number of connections that have not been accepted; accepts and closes them."""
    listener.setblocking(False)
    count = 0
    while True:
        try:
            listener.accept()[0].close()
        except BlockingIOError:
            return count
        count += 1
