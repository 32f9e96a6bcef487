"""A run of many steps uses no more memory and open files at its end than at its beginning."""

import os
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import read_records

from faults.lab import Lab, check_files
from training.checkpoint import list_checkpoints

SMALL = ["model={n_layers: 2, n_heads: 2, d_model: 16, n_ctx: 32}", "data.tokenizer=bytes",
         "train.batch_tokens=128", "optimizer.kind=adamw", "optimizer.lr=0.001",
         "eval={every: 200, tokens: 256}"]
MEMORY_GROWTH = 1.02


class Sample(NamedTuple):
    step: int               # of the newest checkpoint
    memory: int             # resident, in kB
    files: int              # open


def take_sample(run: Path, process: int) -> Sample:
    status = Path(f"/proc/{process}/status").read_text()
    checkpoints = list_checkpoints(run / "checkpoints")
    return Sample(step=int(checkpoints[-1].name) if checkpoints else 0,
                  memory=int(status.split("VmRSS:")[1].split()[0]),
                  files=len(os.listdir(f"/proc/{process}/fd")))


@pytest.mark.parametrize(("steps", "every"), [
    (600, 20), pytest.param(20_000, 100, marks=pytest.mark.faults)])
def test_a_long_run_stays_as_small_as_it_began(lab: Lab, fault, steps, every):
    run = lab / f"runs/long-{steps}"
    with fault("long run", f"{steps:,} steps"):
        process = lab.start(
            "tiny.yaml", f"run={run.name}", f"train.steps={steps}",
            f"checkpoint={{every: {every}, keep: 3}}", f"heads.every={every}", *SMALL)
        samples = []
        while process.poll() is None:
            time.sleep(0.05 if steps < 1000 else 0.5)
            try:
                samples.append(take_sample(run, process.pid))
            except (OSError, IndexError):                   # it has just ended
                break
        output, _ = process.communicate()
        assert process.returncode == 0, output
        warm = [sample for sample in samples if 0.3 * steps <= sample.step < steps]
        quarter = max(1, len(warm) // 4)
        first, last = warm[:quarter], warm[-quarter:]
        memory_before = statistics.median(sample.memory for sample in first)
        memory_after = statistics.median(sample.memory for sample in last)
        assert memory_after <= memory_before * MEMORY_GROWTH, samples
        files_before = statistics.median(sample.files for sample in first)
        files_after = statistics.median(sample.files for sample in last)
        assert files_after <= files_before, samples
        kept = [int(path.name) for path in list_checkpoints(run / "checkpoints")]
        assert kept[-3:] == [steps - 2 * every, steps - every, steps]
        assert len(kept) <= 4                               # the fourth is the best
        records = read_records(run)
        assert [record["step"] for record in records] == list(range(1, steps + 1))
        assert sum("val/loss" in record for record in records) == steps // 200
        assert sum("repeat/loss_first" in record for record in records) == steps // every
        assert len(list((run / "heads").glob("*.npz"))) <= 64
        check_files(run)
