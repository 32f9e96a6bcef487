"""Text encoded in several processes: the same shards, and no process left when one dies."""

import os
import signal
from pathlib import Path

import pytest
from commands import ROOT, start, wait_until
from test_prepare import data_config

import data.encode
import data.prepare
from data.prepare import prepare
from data.shards import Shards


def test_processes_do_not_change_the_result(workplace, monkeypatch):
    expected = Shards(prepare(data_config(folder="a"))).hash
    monkeypatch.setattr(data.prepare, "SMALL_BYTES", 0)
    monkeypatch.setattr(data.prepare, "usable_cores", lambda: 3)
    monkeypatch.setattr(data.encode, "BATCH_BYTES", 1000)
    monkeypatch.setattr(data.prepare, "PART_BYTES", 20_000)     # parts end in the middle of batches
    several = Shards(prepare(data_config(folder="b")))
    monkeypatch.setattr(data.prepare, "usable_cores", lambda: 1)
    assert several.hash == Shards(prepare(data_config(folder="c"))).hash
    monkeypatch.undo()
    monkeypatch.chdir(workplace)
    assert Shards(prepare(data_config(folder="d"))).hash == expected
    for split in ("train", "val"):
        a, b = (getattr(Shards(folder), split) for folder in ("a", "b"))
        assert (a.read(0, len(a)) == b.read(0, len(b))).all() and len(a) == len(b)


PREPARE_IN_TWO = """
import data.prepare
data.prepare.SMALL_BYTES, data.prepare.PART_BYTES, data.prepare.usable_cores = 0, 500_000, lambda: 2
if __name__ == '__main__':
    from errors import run_command
    run_command(data.prepare.main)
"""


@pytest.fixture
def long_text(workplace) -> Path:
    """A folder whose p.yaml prepares a text of many batches."""
    lines = [f"line {n} of a long text, {n * n}" for n in range(400_000)]
    Path("texts/long.txt").write_text("\n".join(lines))
    Path("p.yaml").write_text(
        "data: {corpus: files, files: [texts/*.txt], tokenizer: bytes, folder: out}")
    return workplace


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds children in /proc")
@pytest.mark.parametrize("victim", ["parent", "child"])
def test_children_end_with_their_parent_and_it_reports_one_that_is_killed(long_text, victim):
    process = start("-c", PREPARE_IN_TWO, "p.yaml")
    wait_until(Path("out/train-00000.npy").exists, process)
    children_file = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    children = [int(pid) for pid in children_file.read_text().split()
                if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]
    assert len(children) == 2
    os.kill(process.pid if victim == "parent" else children[0], signal.SIGKILL)
    output = process.communicate()[0]
    if victim == "child":
        assert process.returncode == 2, output
        assert "was killed" in output and "Traceback" not in output, output
    wait_until(lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in children))


def test_a_process_killed_in_the_middle_of_a_result_is_noticed(long_text):
    """Half of the result is in the pipe when the process dies.

    Python runs a sitecustomize.py first, in every process.
    """
    Path("sitecustomize.py").write_text("""
import multiprocessing, os, signal
from multiprocessing.connection import Connection

def send_half(self, message, send=Connection._send):
    if len(message) > 100_000 and multiprocessing.parent_process():
        send(self, message[:70_000])
        os.kill(os.getpid(), signal.SIGKILL)
    send(self, message)

Connection._send = send_half
""")
    path = f"{long_text}{os.pathsep}{ROOT}"
    process = start("-c", PREPARE_IN_TWO, "p.yaml", env={"PYTHONPATH": path})
    output = process.communicate()[0]
    assert process.returncode == 2, output
    assert "was killed" in output and "Traceback" not in output, output
