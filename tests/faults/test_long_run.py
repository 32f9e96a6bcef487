"""A run of many steps takes no more memory and no more files at its end than at its beginning."""

import os
import statistics
import time
from pathlib import Path

import pytest

from faults.lab import Lab, check_what_is_left
from training.checkpoint import list_checkpoints

SMALL = ["model={n_layers: 2, n_heads: 2, d_model: 16, n_ctx: 32}", "data.tokenizer=bytes", "train.batch_tokens=128",
         "optimizer.kind=adamw", "optimizer.lr=0.001", "eval={every: 200, tokens: 256}"]
GROWTH = 1.02


def measured(pid: int) -> tuple[int, int]:
    """Resident memory in kB, and open files."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]), len(os.listdir(f"/proc/{pid}/fd"))


@pytest.mark.parametrize(("steps", "every"), [(600, 20), pytest.param(20_000, 100, marks=pytest.mark.faults)])
def test_a_long_run_stays_as_small_as_it_began(lab: Lab, fault, steps, every):
    run = lab / f"runs/long-{steps}"
    with fault("long run", f"{steps:,} steps"):
        process = lab.start("tiny.yaml", f"run={run.name}", f"train.steps={steps}", f"checkpoint={{every: {every}, keep: 3}}",
                            f"heads.every={every}", *SMALL)
        samples: list[tuple[int, int, int]] = []            # step, kB, files
        while process.poll() is None:
            time.sleep(0.05 if steps < 1000 else 0.5)
            checkpoints = list_checkpoints(run / "checkpoints")
            try:
                samples.append((int(checkpoints[-1].name) if checkpoints else 0, *measured(process.pid)))
            except (OSError, IndexError):                   # it has just ended
                break
        output, _ = process.communicate()
        assert process.returncode == 0, output
        warm = [sample for sample in samples if 0.3 * steps <= sample[0] < steps]
        quarter = max(1, len(warm) // 4)
        for what in (1, 2):
            before, after = (statistics.median(sample[what] for sample in part) for part in (warm[:quarter], warm[-quarter:]))
            assert after <= before * (GROWTH if what == 1 else 1.0), (what, before, after, samples)
        kept = [int(path.name) for path in list_checkpoints(run / "checkpoints")]
        assert kept[-3:] == [steps - 2 * every, steps - every, steps] and len(kept) <= 4      # besides, the best
        records = lab.records(run)
        assert [record["step"] for record in records] == list(range(1, steps + 1))
        assert sum("val/loss" in record for record in records) == steps // 200
        assert sum("repeat/loss_first" in record for record in records) == steps // every
        assert len(list((run / "heads").glob("*.npz"))) <= 64
        check_what_is_left(run)
