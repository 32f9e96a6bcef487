"""Writes docs/reliability.md from what the tests counted: faults injected and survived."""

import os
import platform
import sys
import textwrap
import time
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

RESUMED = (
    "every checkpoint, shard, snapshot and line of metrics.jsonl on the disk is complete and "
    "correct; continued, the run ends with the metrics, weights, optimizer state, snapshots and "
    "report of an undisturbed run, bit for bit")
CHECKS = {                      # fault → what its test asserts
    "kill -9": RESUMED,
    "SIGTERM": "the run saves, prints how to continue and exits with 0 (before training it ends "
               "at once); " + RESUMED,
    "SIGINT": "as SIGTERM",
    "disk full": "an error of two lines names the cause, exit code 2, no incomplete file remains; "
                 "with room again, as above",
    "read-only folder": "an error of two lines names the cause, exit code 2, nothing is left "
                        "behind",
    "folder deleted": "a deleted run ends with an error of two lines and no part of it reappears; "
                      "deleted shards are read to the end",
    "clock and file times jump back": "the same run, bit for bit",
    "two trainers on one run": "the second is refused and the first goes on; the lock of a killed "
                               "trainer is free",
    "wandb's process killed": "training goes on and ends as if undisturbed, without a traceback",
    "wandb's server unreachable": "training ends within seconds as if undisturbed; all steps are "
                                  "in wandb's offline files",
    "damaged checkpoint": "refused by name, and the previous checkpoint is named",
    "damaged shard": "refused by name",
    "another run's files": "refused by name",
    "latest points nowhere": "the newest complete checkpoint is used, and a note says so",
    "damaged config": "a run, or a clear error with exit code 2 that leaves no run behind",
    "untrusted checkpoint": "refused in two lines, within 40 s and 1.2 GB, and nothing is executed",
    "untrusted config": "as before",
    "untrusted corpus": "as before",
    "untrusted shards": "as before",
    "untrusted snapshot": "as before",
    "long run": "after warm-up, resident memory grows by at most 2% and the number of open files "
                "not at all; checkpoint.keep is respected; no line is missing",
}

PAGE = """# Faults: what was broken, and what survived

Written by `make test-faults` on {date} from what the tests counted.
{machine}

**{injected:,} faults were injected, {configs:,} of them damaged configs; {survived:,} were
survived as promised.**{failed}

Each test starts the real `train.py` (or `sample.py`, `heads.py`, `data.prepare`) and breaks it. A
named moment is hit exactly: a wrapper ends the process at the n-th call that marks the moment
(`tests/faults/breaker.py`); the tested code is not changed. n is drawn from a fixed seed;
`FAULT_SEED=2 make test-faults` draws others. Damaged configs are drawn by hypothesis.

| fault | at | injected | survived |
|---|---|--:|--:|
{rows}

What survival means:

{meanings}

## What is promised

- On a CPU in float32, with the same number of threads, the same versions and the same data: a run
  that is stopped at any moment by any signal, and continued with `python train.py runs/NAME`,
  equals a run that was not stopped, bit for bit. This holds for every metric except those of the
  clock and of memory, every weight, the optimizer state, the snapshots of the heads and the report.
- A checkpoint exists completely or not at all. If it is damaged later, its SHA-256 gives it away:
  the error names the file and the previous checkpoint. Nothing is deleted to get around it.
- A full or read-only disk ends a run with an error of two lines and exit code 2, and nothing that
  was saved is lost.
- wandb cannot stop a run, and cannot delay it by more than half a minute. metrics.jsonl has
  everything.
- Reading a file never runs code, and nothing is unpickled.

## What is not promised

- On a GPU, or with another number of threads, a continued run gets the same batches but not the
  same bits.
- Files are flushed before they are renamed, but no test cut the power, and no disk claimed to have
  flushed what it had not.
- kill -9 of wandb's trainer may lose the last second of wandb's own offline file.
- A wandb server that dies in the middle of an online run was not tried.
- The manifest guards against accidents: it cannot detect every file damaged by someone who also
  rewrites the manifest. Bounds on sizes guard against the rest.
- A run's config.yaml is a config: continuing a stranger's run reads the files, and writes the data
  folder, that it names.
- Several machines, network file systems and Windows were not tried.
"""


class Outcome(NamedTuple):
    """What a test counted of one fault at one moment."""

    fault: str
    moment: str
    injected: int
    survived: int


def write_page(path: Path, outcomes: list[Outcome]) -> None:
    """Write the page from the outcomes of every test."""
    counts: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for fault, moment, injected, survived in outcomes:
        counts[fault, moment][0] += injected
        counts[fault, moment][1] += survived
    order = {fault: n for n, fault in enumerate(CHECKS)}
    table = sorted(counts, key=lambda key: (order[key[0]], key[1]))
    rows = [f"| {fault} | {moment} | {counts[fault, moment][0]} | {counts[fault, moment][1]} |"
            for fault, moment in table]
    injected = sum(count[0] for count in counts.values())
    survived = sum(count[1] for count in counts.values())
    configs = sum(count[0] for (fault, _), count in counts.items() if fault == "damaged config")
    failed = ""
    if survived < injected:
        failed = f" The table says which {injected - survived} were not."
    tested = {fault for fault, _ in counts}
    meanings = [textwrap.fill(f"- **{fault}**: {check}.", 100, subsequent_indent="  ")
                for fault, check in CHECKS.items() if fault in tested]
    path.write_text(PAGE.format(
        date=time.strftime("%Y-%m-%d"), machine=machine(),
        injected=injected, survived=survived, configs=configs, failed=failed,
        rows="\n".join(rows), meanings="\n".join(meanings)))


def machine() -> str:
    """The machine and the versions, for the page."""
    processors = [line.split(":")[1].strip()
                  for line in Path("/proc/cpuinfo").read_text().splitlines()
                  if line.startswith("model name")]
    processor = processors[0] if processors else "CPU"
    packages = ", ".join(f"{name} {version(name)}"
                         for name in ("torch", "numpy", "safetensors", "wandb"))
    return (f"Machine: {platform.system()} {platform.machine()}, {os.cpu_count()} × {processor}.\n"
            f"Python {sys.version.split()[0]}, {packages}.")
