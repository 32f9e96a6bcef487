"""The studies: which configs each compares, and how their runs are trained."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from errors import UserError

from training.checkpoint import list_checkpoints
from training.config import differences, load_config
from training.resume import is_below, listed

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs" / "induction"


class Condition(NamedTuple):
    """One condition of a study: a name, a config, and what is changed in it."""

    label: str
    config: str
    changes: tuple[str, ...] = ()
    seeds: int | None = None            # fewer than the study's

    def first(self, seeds: int) -> range:
        """Its seeds in a study with this many."""
        return range(min(seeds, self.seeds or seeds))

    def run(self, seed: int) -> Path:
        return Path("runs") / f"{self.label}-s{seed}"

    def overrides(self, seed: int) -> list[str]:
        # Unasked, a study uploads none of its runs.
        wandb = "auto" if "WANDB_MODE" in os.environ else "disabled"
        groups = [f"log.group={study}" for study, (_, conditions) in STUDIES.items()
                  if self in conditions]
        return [*self.changes, f"run={self.run(seed).name}", f"seed={seed}", f"log.wandb={wandb}",
                *groups[:1]]


class Study(NamedTuple):
    seeds: int
    conditions: list[Condition]


def as_configured(*names: str) -> list[Condition]:
    """Conditions that are configs of configs/induction without changes."""
    return [Condition(name, name) for name in names]


STUDIES = {
    "toy": Study(5, as_configured("toy_2l", "toy_1l", "toy_1l_smear", "toy_fixed_period")),
    "text": Study(3, [
        *as_configured("text_mixed_2l", "text_mixed_1l", "text_only_2l", "text_smear"),
        Condition("text_unseen_tokens", "text_mixed_2l", (
            "data.repeats.held_out_tokens=0.1", "train.steps=3000",
            "data.mixture=[{corpus: stdlib, weight: 0.5}, {corpus: repeats, weight: 0.5}]"))]),
    "begin_token": Study(5, [
        *as_configured("text_mixed_2l"),
        Condition("text_mixed_gated", "text_mixed_2l", ("data.begin_fraction=null",), seeds=3)]),
    "positions": Study(3, [
        Condition(f"position_{name}", "toy_2l", (f"model.position={name}",))
        for name in ("rope", "learned", "sinusoidal", "none")]),
    "gqa": Study(3, [
        Condition(f"gqa_{n}", "toy_2l", ("model.n_heads=8", f"model.n_kv_heads={n}"))
        for n in (8, 4, 2, 1)]),
}


def condition_named(label: str) -> Condition:
    """The condition of that name, in whichever study it is."""
    return next(condition for study in STUDIES.values() for condition in study.conditions
                if condition.label == label)


# --- training -------------------------------------------------------------------------------------

def train_missing(conditions: list[Condition], seeds: int, at_once: int) -> None:
    """Train every condition with every seed, `at_once` runs side by side on one thread each.
    Finished runs stay as they are."""
    missing = [(condition, seed) for seed in range(seeds) for condition in conditions
               if seed in condition.first(seeds) and not finished(condition, seed)]
    started = time.monotonic()
    with ThreadPoolExecutor(at_once) as pool:
        for n, run in enumerate(pool.map(train, missing), 1):
            passed = time.monotonic() - started
            left = passed / n * (len(missing) - n)
            print(f"{n}/{len(missing)}  {run.name}  {passed:.0f} s, about {left:.0f} s left",
                  flush=True)


def train(job: tuple[Condition, int]) -> Path:
    """Train one condition with one seed in a process of its own; returns the run."""
    condition, seed = job
    run, config = condition.run(seed), CONFIGS / f"{condition.config}.yaml"
    command = [sys.executable, str(ROOT / "train.py"), str(config), *condition.overrides(seed)]
    done = subprocess.run(command, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        output = done.stderr.strip() or done.stdout.strip()
        raise UserError(f"{run}: {output.splitlines()[-1]}")
    return run


def finished(condition: Condition, seed: int) -> bool:
    """Whether the run exists and reached its last step. A UserError if it has another config."""
    run = condition.run(seed)
    wanted = load_config(CONFIGS / f"{condition.config}.yaml", condition.overrides(seed))
    if not (run / "config.yaml").exists():
        return False
    changes = [change for change in differences(load_config(run / "config.yaml"), wanted)
               if not is_below(change.key, ("log",))]
    if changes:
        raise UserError(f"{run} was trained with another config ({listed(changes[:3])})\n"
                        "  move it away and run this again")
    checkpoints = list_checkpoints(run / "checkpoints")
    return bool(checkpoints) and int(checkpoints[-1].name) >= wanted.train.steps
