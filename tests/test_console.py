"""Commands whose console fails: no encoding, a full disk, a closed stream, a terminal that is gone.
And what closing the terminal does to a run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import ROOT, environment, fails, started, succeeds, wait_until
from conftest import metrics

from training.checkpoint import list_checkpoints

posix = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
SHORT = ("tiny.yaml", "train.steps=3", "eval.every=0", "heads.every=0")
ENDLESS = ("tiny.yaml", "train.steps=100000", "eval.every=0", "heads.every=0", "checkpoint.every=0")


def shell(redirection: str, script: str, *words: object, **env: str) -> subprocess.CompletedProcess:
    """Run a command with a shell's redirection behind it."""
    module = script.split() if script.startswith("-m ") else [ROOT / script]
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {redirection}', "sh", sys.executable, *module, *map(str, words)],
        env=environment(**env), capture_output=True, text=True)


def last_checkpoint(run: str) -> str:
    return list_checkpoints(Path(run) / "checkpoints")[-1].name


@posix
def test_training_outlives_a_full_disk_behind_its_output(workplace):
    done = succeeds(shell(">/dev/full", "train.py", *SHORT))
    assert done.stderr.count("note: standard output: No space left on device") == 1
    assert last_checkpoint("runs/tiny") == "000003"
    assert list(metrics(Path("runs/tiny"))) == [1, 2, 3]


@posix
@pytest.mark.parametrize("redirection", ["<&- >&- 2>&-", ">/dev/full 2>&1"])
def test_preparing_training_and_wandb_outlive_a_console_that_takes_nothing(workplace, redirection):
    """Preparing prints messages and a progress bar to stderr."""
    succeeds(shell(redirection, "train.py", *SHORT, "log.wandb=offline", WANDB_MODE="offline"))
    assert last_checkpoint("runs/tiny") == "000003"
    assert list(Path("runs/tiny/wandb").glob("offline-run-*/*.wandb"))


def test_the_encoding_of_the_console_lacks_characters(workplace):
    done = succeeds(shell("", "train.py", *SHORT, "run=tiny", PYTHONIOENCODING="ascii"))
    assert r"1 \xd7 8 windows a step" in done.stdout
    assert last_checkpoint("runs/tiny") == "000003"


@posix
def test_looking_at_heads_goes_on_without_a_console(trained, tmp_path):
    scores = tmp_path / "scores.json"
    run = shutil.copytree(trained, tmp_path / "run", symlinks=True)
    succeeds(shell(">&- 2>/dev/full", "heads.py", run, "--text", "abcabc", "--json", scores))
    assert "L0H0" in json.loads(scores.read_text())["heads"] and (run / "report-text.html").exists()
    verdict = shell(">/dev/full", "heads.py", "verdict", trained)
    fails(verdict, "standard output cannot be written (No space left on device)")


@posix
def test_a_sample_that_cannot_be_written_is_an_error(trained):
    for redirection, reason in ((">/dev/full", "No space left on device"),
                                (">&-", "it is closed")):
        done = shell(redirection, "sample.py", trained, "--max-tokens", 4)
        fails(done, f"standard output cannot be written ({reason})")
        assert len(done.stderr.splitlines()) == 1
    for command in (["-m training.plan", trained], ["-m training.config"]):
        fails(shell(">/dev/full", *command), "standard output cannot be written")


def test_a_sample_ends_quietly_when_its_reader_has_ended(trained):
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, ROOT / "sample.py", trained, "--max-tokens", "9"],
                          stdout=writing, stderr=subprocess.PIPE, env=environment())
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_sample_keeps_bytes_and_escapes_what_the_console_lacks(trained):
    greedy = ("sample.py", str(trained), "--max-tokens", "1", "--temperature", "0")
    prompt = os.fsdecode("é".encode() + b"\xff")
    plain = succeeds(shell("", *greedy, "é", PYTHONIOENCODING="ascii"))
    assert plain.stdout.startswith(r"\xe9")
    given = subprocess.run([sys.executable, ROOT / "sample.py", *greedy[1:], prompt],
                           stdout=subprocess.PIPE, env=environment(), check=True)
    assert given.stdout.startswith(b"\xc3\xa9\xff")
    done = subprocess.run([sys.executable, ROOT / "sample.py", *greedy[1:], "--json",
                           prompt], stdout=subprocess.PIPE,
                          env=environment(PYTHONIOENCODING="ascii"), check=True)
    assert json.loads(done.stdout.decode("utf-8"))[0]["prompt"] == "é\udcff"


# --- terminals and signals --------------------------------------------------------------------

def start_in_terminal(*arguments: str) -> tuple[subprocess.Popen, int]:
    """Start train.py with a terminal as its console; also gives the terminal's other end."""
    ours, theirs = os.openpty()
    process = subprocess.Popen([sys.executable, ROOT / "train.py", *arguments], env=environment(),
                               stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    started.append(process)
    return process, ours


def steps(run: str) -> int:
    path = Path(run, "metrics.jsonl")
    return path.read_text().count("\n") if path.exists() else 0


@posix
def test_training_outlives_its_terminal(workplace):
    process, terminal = start_in_terminal("tiny.yaml", "train.steps=60", "eval.every=0",
                                          "heads.every=0")
    wait_until(lambda: steps("runs/tiny") > 0, process)
    os.close(terminal)                                      # writing to it is an error from now on
    assert process.wait() == 0
    assert last_checkpoint("runs/tiny") == "000060"


@posix
def test_a_signal_while_a_line_is_being_printed(workplace):
    """A terminal that nobody reads takes 4 kB; then printing waits, and the signal comes then."""
    process, terminal = start_in_terminal(*ENDLESS)

    def blocked() -> bool:
        before = steps("runs/tiny")
        time.sleep(0.3)
        return before > 0 and steps("runs/tiny") == before

    wait_until(blocked, process)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    output = b""
    while process.poll() is None:
        try:
            output += os.read(terminal, 4096)
        except OSError:                                     # it has ended
            break
    assert process.wait() == 0, output
    assert b"Traceback" not in output
    assert int(last_checkpoint("runs/tiny")) == steps("runs/tiny")


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="this system has no SIGHUP")
@pytest.mark.parametrize("ignored", [False, True])
def test_a_hang_up_saves_unless_it_is_ignored(workplace, ignored):
    """A closed terminal sends SIGHUP; nohup ignores it."""
    command = [sys.executable, str(ROOT / "train.py"), *ENDLESS]
    trap = "trap '' HUP; " if ignored else ""
    process = subprocess.Popen(["sh", "-c", f'{trap}exec "$@"', "sh", *command], text=True,
                               env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    started.append(process)
    wait_until(lambda: steps("runs/tiny") > 0, process)
    process.send_signal(signal.SIGHUP)
    if ignored:
        before = steps("runs/tiny")
        wait_until(lambda: steps("runs/tiny") > before + 20, process)
        process.send_signal(signal.SIGTERM)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    expected = "SIGTERM" if ignored else "SIGHUP"
    assert f"{expected}: finishing this step, then saving" in output
    assert int(last_checkpoint("runs/tiny")) == steps("runs/tiny")
