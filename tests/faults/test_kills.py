"""A trainer that is killed at any moment, and continued, is the trainer that was not: bit for bit."""

import os
import random
import signal
import time

import pytest
from commands import wait_until
from conftest import wandb_history

from faults.lab import OFFLINE, SIGNALS, Lab, check_same_run, check_what_is_left, is_left
from training.checkpoint import list_checkpoints

TIMES = {                   # how often each moment comes in a run of 12 steps with 3 checkpoints
    "a step": 24, "preparing the data": 40, "writing a checkpoint": 27, "renaming a checkpoint": 6, "pointing latest at it": 6,
    "deleting an old checkpoint": 3, "a line of metrics.jsonl": 12, "logging to wandb": 24, "a snapshot of the heads": 5,
    "writing the report": 1,
}


def drawn() -> list:
    """Every moment: one kill with every `make test`; in the full form five, SIGTERM and SIGINT as well."""
    draw, cases = random.Random(os.environ.get("FAULT_SEED", "1")), []
    for moment, times in TIMES.items():
        kills = sorted(draw.sample(range(1, times + 1), min(5, times)))
        first = draw.randrange(len(kills))
        cases += [pytest.param(moment, n, "kill -9", marks=[pytest.mark.faults] * (i != first)) for i, n in enumerate(kills)]
        cases += [pytest.param(moment, draw.randint(1, times), name, marks=pytest.mark.faults) for name in ("SIGTERM", "SIGINT")]
    return cases


@pytest.mark.parametrize(("moment", "n", "name"), drawn())
def test_stopped_at_a_moment_and_continued_it_is_the_same_run(lab: Lab, fault, moment, n, name):
    run = f"{name.removeprefix('kill ')}-{moment}-{n}".replace(" ", "-").strip("-")
    options = {"env": OFFLINE} if "wandb" in moment else {}
    changes = ["log.wandb=offline"] * ("wandb" in moment) + [f"data.folder=out-{run}"] * ("data" in moment)
    number = SIGNALS[name]
    with fault(name, moment):
        # SIGTERM before the first step ends the process as it ends any other, Ctrl-C says "interrupted"
        codes = (-9,) if name == "kill -9" else (-number, 130) if "data" in moment else (0,)
        lab.train_broken(moment, n, f"signal:{int(number)}", "tiny.yaml", f"run={run}", *changes, codes=codes, **options)
        check_what_is_left(lab / f"runs/{run}", lab / f"out-{run}")
        lab.go_on(run, *changes, **options)
        check_what_is_left(lab / f"runs/{run}", lab / f"out-{run}")
        check_same_run(lab / f"runs/{run}", lab / "runs/whole")


@pytest.mark.parametrize("kills", [3, pytest.param(14, marks=pytest.mark.faults)])
def test_killed_again_and_again_by_the_clock_it_is_the_same_run(lab: Lab, fault, kills):
    """By a clock that knows nothing of phases: while starting, training, saving or ending."""
    steps = ["train.steps=150", "checkpoint.every=5", "heads.every=50"]
    lab.train("tiny.yaml", f"run=whole-{kills}", *steps)
    draw, run = random.Random(os.environ.get("FAULT_SEED", "1")), lab / f"runs/clock-{kills}"
    for kill in range(kills):
        with fault("kill -9", "any moment, by the clock"):
            target = [f"runs/{run.name}"] if (run / "config.yaml").exists() else ["tiny.yaml", f"run={run.name}", *steps]
            process = lab.start(*target)
            if kill % 3:                                    # two of three not before training begins
                while process.stdout.readline()[:8] not in ("training", "continui", ""):
                    pass
            time.sleep(draw.uniform(0, 0.4 if kill % 3 else 2.5))
            process.send_signal(signal.SIGKILL)
            process.communicate()
            check_what_is_left(run, lab / "prepared")
    lab.go_on(run.name, *steps)
    check_same_run(run, lab / f"runs/whole-{kills}")


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.faults)])
def test_a_signal_saves_and_says_how_to_go_on(lab: Lab, fault, number):
    with fault(number.name, "any moment, by the clock"):
        run = lab / f"runs/told-{number.name}"
        process = lab.start("tiny.yaml", f"run={run.name}", "train.steps=100000", "eval.every=0", "checkpoint.every=0")
        lab.wait_for_a_line(run, process)
        process.send_signal(number)
        output, _ = process.communicate()
        assert process.returncode == 0 and "finishing this step" in output and f"python train.py runs/{run.name}" in output
        check_what_is_left(run)
        saved = int(list_checkpoints(run / "checkpoints")[-1].name)           # even where it would save nothing else
        assert saved == lab.lines(run) > 0


@pytest.mark.faults
def test_wandb_ends_with_the_trainer_that_was_killed(lab: Lab, fault):
    with fault("kill -9", "with wandb's own process beside it"):
        process = lab.start("tiny.yaml", "run=orphan", "train.steps=100000", "eval.every=0", "heads.every=0", "log.wandb=offline",
                            env=OFFLINE)
        lab.wait_for_a_line(lab / "runs/orphan", process)
        assert is_left(process.pid)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        wait_until(lambda: not is_left(process.pid))


@pytest.mark.parametrize("group", [pytest.param(False, marks=pytest.mark.faults), True], ids=["the trainer", "everything in the terminal"])
def test_ctrl_c_with_wandb_saves_too(lab: Lab, fault, group):
    """A terminal sends Ctrl-C to wandb's process as well."""
    with fault("SIGINT", "with wandb's own process beside it"):
        run = lab / f"runs/group-{group}"
        process = lab.start("tiny.yaml", f"run={run.name}", "train.steps=100000", "eval.every=0", "heads.every=0", "log.wandb=offline",
                            env=OFFLINE, start_new_session=True)
        lab.wait_for_a_line(run, process)
        (os.killpg if group else os.kill)(process.pid, signal.SIGINT)
        output, _ = process.communicate()
        assert process.returncode == 0 and "wandb sync" in output, output
        check_what_is_left(run)
        assert len(wandb_history(run)) > 0
