"""Studies of how induction heads form: several configs, several seeds, one page of results each.

    python -m bench.study toy                   # train what is missing in runs/, two at a time, then write docs/studies/toy.md
    python -m bench.study toy --seeds 2         # a shorter form
"""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from errors import ArgumentParser, UserError, run_command
from training.checkpoint import whole_checkpoints
from training.config import load_config

CONFIGS = Path("configs/induction")


class Arm(NamedTuple):
    """One condition of a study: a config, what is changed of it, what to call it."""

    label: str
    config: str
    changes: tuple[str, ...] = ()

    def run(self, seed: int) -> str:
        return f"{self.label}-s{seed}"

    def train(self, seed: int) -> list[str]:
        return [sys.executable, "train.py", str(CONFIGS / f"{self.config}.yaml"), *self.changes, f"run={self.run(seed)}", f"seed={seed}",
                "log.wandb=disabled"]


STUDIES: dict[str, tuple[int, list[Arm]]] = {           # name → seeds, arms
    "toy": (5, [Arm(name, name) for name in ("toy_2l", "toy_1l", "toy_1l_smear", "toy_fixed_period")]),
    "text": (3, [Arm(name, name) for name in ("text_mixed_2l", "text_mixed_1l", "text_only_2l", "text_smear")]),
    "positions": (3, [Arm(f"position_{name}", "toy_2l", (f"model.position={name}",))
                      for name in ("rope", "learned", "sinusoidal", "none")]),
    "gqa": (3, [Arm(f"gqa_{kv}", "toy_2l", ("model.n_heads=8", f"model.n_kv_heads={kv}")) for kv in (8, 4, 2, 1)]),
}


def train_missing(arms: list[Arm], seeds: int, at_once: int) -> None:
    """Train every arm with every seed, `at_once` side by side on one thread each; what is finished stays as it is."""
    jobs = [(arm, seed) for seed in range(seeds) for arm in arms]
    missing = [(arm, seed) for arm, seed in jobs if not finished(arm, seed)]
    started = time.monotonic()

    def train(job: tuple[Arm, int]) -> None:
        done = subprocess.run(job[0].train(job[1]), capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        if done.returncode:
            raise UserError(f"{job[0].run(job[1])}: {done.stderr.strip().splitlines()[-1]}")

    with ThreadPoolExecutor(at_once) as pool:
        for n, (job, _) in enumerate(zip(missing, pool.map(train, missing)), 1):
            passed = time.monotonic() - started
            left = passed / n * (len(missing) - n)
            print(f"{n}/{len(missing)}  {job[0].run(job[1])}  {passed:.0f} s, about {left:.0f} s left", flush=True)


def finished(arm: Arm, seed: int) -> bool:
    run = Path("runs") / arm.run(seed)
    whole = whole_checkpoints(run / "checkpoints")
    return bool(whole) and int(whole[-1].name) >= load_config(run / "config.yaml").train.steps


def main() -> None:
    parser = ArgumentParser("python -m bench.study", description="Train the runs of a study and write its page, docs/studies/NAME.md.")
    parser.add_argument("study", choices=STUDIES, help="which")
    parser.add_argument("--seeds", type=int, help="fewer or more than the study's own number")
    parser.add_argument("--at-once", type=int, default=os.cpu_count() or 1, help="runs side by side (default: a run a core)")
    args = parser.parse_args()
    seeds, arms = STUDIES[args.study]
    train_missing(arms, args.seeds or seeds, args.at_once)


if __name__ == "__main__":
    run_command(main)
