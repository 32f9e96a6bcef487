"""A run that is killed at any moment and continued equals one that was not, bit for bit."""

import os
import random
import signal
import time

import pytest
from commands import wait_until
from conftest import wandb_history

from faults.breaker import wandb_processes
from faults.lab import (
    OFFLINE,
    SIGNALS,
    Lab,
    check_files,
    check_same_run,
    count_lines,
    wait_for_a_line,
)
from training.checkpoint import list_checkpoints

COUNTS = {                  # how often each moment comes in a run of 12 steps with 3 checkpoints
    "a step": 24, "preparing the data": 40, "writing a checkpoint": 27,
    "renaming a checkpoint": 6, "pointing latest at it": 6, "deleting an old checkpoint": 3,
    "a line of metrics.jsonl": 12, "logging to wandb": 24, "a snapshot of the heads": 5,
    "writing the report": 1,
}
SEED = os.environ.get("FAULT_SEED", "1")
# A run that goes on until it is stopped.
ENDLESS = ["train.steps=100000", "eval.every=0"]


def draw_cases() -> list:
    """Every moment with one kill; in the full form with five kills and three other signals."""
    draw, cases = random.Random(SEED), []
    for moment, count in COUNTS.items():
        kills = sorted(draw.sample(range(1, count + 1), min(5, count)))
        always = draw.randrange(len(kills))
        for i, n in enumerate(kills):
            marks = [] if i == always else [pytest.mark.faults]
            cases.append(pytest.param(moment, n, "kill -9", marks=marks))
        for name in ("SIGTERM", "SIGINT", "SIGHUP"):
            n = draw.randint(1, count)
            cases.append(pytest.param(moment, n, name, marks=pytest.mark.faults))
    return cases


@pytest.mark.parametrize(("moment", "n", "name"), draw_cases())
def test_stopped_at_a_moment_and_continued_it_is_the_same_run(lab: Lab, fault, moment, n, name):
    run = f"{name.removeprefix('kill ')}-{moment}-{n}".replace(" ", "-").strip("-")
    number = SIGNALS[name]
    options, changes = {}, []
    if "wandb" in moment:
        options["env"] = OFFLINE
        changes.append("log.wandb=offline")
    if "data" in moment:
        changes.append(f"data.folder=out-{run}")
    if name == "kill -9":
        codes = (-9,)
    elif "data" in moment:
        # Before the first step a signal ends the process, and Ctrl-C prints "interrupted".
        codes = (-number, 130)
    else:
        codes = (0,)
    with fault(name, moment):
        lab.train_broken(moment, n, f"signal:{int(number)}", "tiny.yaml", f"run={run}", *changes,
                         codes=codes, **options)
        check_files(lab / f"runs/{run}", lab / f"out-{run}")
        lab.resume(run, *changes, **options)
        check_files(lab / f"runs/{run}", lab / f"out-{run}")
        check_same_run(lab / f"runs/{run}", lab.undisturbed)


@pytest.mark.parametrize("kills", [3, pytest.param(14, marks=pytest.mark.faults)])
def test_killed_again_and_again_by_the_clock_it_is_the_same_run(lab: Lab, fault, kills):
    """By a clock that ignores phases: while starting, training, saving or ending."""
    steps = ["train.steps=150", "checkpoint.every=5", "heads.every=50"]
    undisturbed = lab / f"runs/undisturbed-{kills}"
    lab.train("tiny.yaml", f"run={undisturbed.name}", *steps)
    draw, run = random.Random(SEED), lab / f"runs/clock-{kills}"
    for kill in range(kills):
        with fault("kill -9", "any moment, by the clock"):
            if (run / "config.yaml").exists():
                process = lab.start(f"runs/{run.name}")
            else:
                process = lab.start("tiny.yaml", f"run={run.name}", *steps)
            if kill % 3:                        # two of three not before training begins
                while process.stdout.readline()[:8] not in ("training", "continui", ""):
                    pass
            time.sleep(draw.uniform(0, 0.4 if kill % 3 else 2.5))
            process.send_signal(signal.SIGKILL)
            process.communicate()
            check_files(run, lab / "prepared")
    lab.resume(run.name, *steps)
    check_same_run(run, undisturbed)


@pytest.mark.parametrize("number", [
    signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.faults),
    pytest.param(signal.SIGHUP, marks=pytest.mark.faults)])
def test_a_signal_saves_and_says_how_to_continue(lab: Lab, fault, number):
    with fault(number.name, "any moment, by the clock"):
        run = lab / f"runs/told-{number.name}"
        process = lab.start("tiny.yaml", f"run={run.name}", *ENDLESS, "checkpoint.every=0")
        wait_for_a_line(run, process)
        process.send_signal(number)
        output, _ = process.communicate()
        assert process.returncode == 0 and "finishing this step" in output
        assert f"train.py runs/{run.name}" in output
        check_files(run)
        # With checkpoint.every=0 nothing else would have saved.
        saved = int(list_checkpoints(run / "checkpoints")[-1].name)
        assert saved == count_lines(run) > 0


@pytest.mark.faults
def test_wandb_ends_with_the_trainer_that_was_killed(lab: Lab, fault):
    with fault("kill -9", "with wandb's own process beside it"):
        process = lab.start("tiny.yaml", "run=orphan", *ENDLESS, "heads.every=0",
                            "log.wandb=offline", env=OFFLINE)
        wait_for_a_line(lab / "runs/orphan", process)
        assert wandb_processes(process.pid)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        wait_until(lambda: not wandb_processes(process.pid))


@pytest.mark.parametrize("group", [pytest.param(False, marks=pytest.mark.faults), True],
                         ids=["the trainer", "everything in the terminal"])
def test_ctrl_c_with_wandb_saves_too(lab: Lab, fault, group):
    """A terminal sends Ctrl-C to wandb's process as well."""
    with fault("SIGINT", "with wandb's own process beside it"):
        run = lab / f"runs/group-{group}"
        process = lab.start("tiny.yaml", f"run={run.name}", *ENDLESS, "heads.every=0",
                            "log.wandb=offline", env=OFFLINE, start_new_session=True)
        wait_for_a_line(run, process)
        if group:
            os.killpg(process.pid, signal.SIGINT)
        else:
            os.kill(process.pid, signal.SIGINT)
        output, _ = process.communicate()
        assert process.returncode == 0 and "wandb sync" in output, output
        check_files(run)
        assert len(wandb_history(run)) > 0
