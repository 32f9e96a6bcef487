"""docs/reliability.md, written by the tests themselves: what was broken, how often, and what survived."""

import os
import platform
import sys
import time
from collections import defaultdict
from pathlib import Path

RESUMED = ("no checkpoint, shard, snapshot or line of metrics.jsonl on the disk says anything wrong; continued, the run ends with the "
           "metrics, weights, optimizer state, snapshots and report of the run that nobody disturbed, bit for bit")
CHECKED = {                                 # fault → what its test asserts
    "kill -9": RESUMED, "SIGTERM": "it saves, says how to go on and exits with 0 (before training: ends at once); " + RESUMED,
    "SIGINT": "as SIGTERM", "disk full": "two lines that say so, exit code 2, nothing half-written; with room again, as above",
    "read-only folder": "two lines that say so, exit code 2, nothing left behind",
    "folder deleted": "a deleted run ends with two lines and does not come back in part; deleted shards are read to the end",
    "clock and file times jump back": "the same run, bit for bit",
    "two trainers on one run": "the second is refused, the first is not disturbed; a killed one's lock is free",
    "wandb's process killed": "training goes on and ends as undisturbed, without a traceback",
    "wandb's server unreachable": "training ends within seconds as undisturbed; all steps are in wandb's offline files",
    "damaged checkpoint": "refused by name; the earlier checkpoint is named", "damaged shard": "refused by name",
    "another run's files": "refused by name", "latest points nowhere": "the newest whole checkpoint is used, and a note says so",
    "damaged config": "a run, or a clear error with exit code 2 that leaves no run behind",
    "untrusted checkpoint": "refused in two lines, within 40 s and 1.2 GB, nothing executed", "untrusted config": "as before",
    "untrusted corpus": "as before", "untrusted shards": "as before", "untrusted snapshot": "as before",
    "long run": "resident memory at most 2% and open files no more than after warm-up; checkpoint.keep kept; no line missing",
}

PAGE = """# Faults: what was broken, and what survived

Written by `{command}` on {date}, whole, from what the tests counted. {machine}

**{injected:,} faults were injected, {configs:,} of them damaged configs; {survived:,} were survived as promised.**{failed}

Each test starts the real `train.py` (or `sample.py`, `heads.py`, `data.prepare`) and breaks it. Moments are hit for certain: a wrapper
ends the process at the n-th call that marks a moment (`tests/faults/breaker.py`); the code that is tested is not changed. Which n, is
drawn from a fixed seed; `FAULT_SEED=2 make test-faults` draws others. Damaged configs are drawn by hypothesis.

| fault | at | injected | survived |
|---|---|--:|--:|
{rows}

What survival means:

{meanings}

## What is promised

- On a CPU in float32, with the same number of threads, the same versions and the same data: a run that is stopped at any moment, by
  any signal, and continued with `python train.py runs/NAME` is the run that was not stopped, bit for bit: every metric but those of the
  clock and of memory, every weight, the optimizer's state, the snapshots of the heads and the report.
- A checkpoint is there whole or not at all. What is damaged later is refused by its SHA-256, with the name of the file and of the
  checkpoint before it. Nothing is deleted to get around it.
- A full disk or one that cannot be written ends a run in two lines with exit code 2, and loses nothing that was saved.
- wandb cannot stop a run, nor hold it up by more than half a minute. metrics.jsonl has everything.
- No file that is read can run code, and none is unpickled.

## What is not

- On a GPU, or with another number of threads, a continued run gives the same batches but not the same bits.
- Files are flushed before they are renamed, but no power was cut and no disk lied about having flushed.
- kill -9 of wandb's trainer may lose the last second of wandb's own offline file.
- A wandb server that dies in the middle of an online run was not tried.
- Not every file that is damaged by someone who also rewrites its manifest can be told from a true one: the manifest guards against
  accidents. Bounds on sizes guard against the rest.
- A run's config.yaml is a config: continuing a stranger's run reads the files, and writes the data folder, that it names.
- Several machines, network file systems and Windows were not tried.
"""


def write_page(path: Path, found: list[tuple[str, str, int, int]]) -> None:
    """Write the page from (fault, moment, injected, survived) of every test."""
    counts: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for fault, moment, injected, survived in found:
        counts[fault, moment][0] += injected
        counts[fault, moment][1] += survived
    order = {fault: n for n, fault in enumerate(CHECKED)}
    table = sorted(counts.items(), key=lambda item: (order[item[0][0]], item[0][1]))
    injected, survived = (sum(count[n] for count in counts.values()) for n in (0, 1))
    path.write_text(PAGE.format(
        command="make test-faults", date=time.strftime("%Y-%m-%d"), machine=machine(), injected=injected, survived=survived,
        configs=sum(count[0] for (fault, _), count in counts.items() if fault == "damaged config"),
        failed="" if survived == injected else f" The table says which {injected - survived} were not.",
        rows="\n".join(f"| {fault} | {moment} | {count[0]} | {count[1]} |" for (fault, moment), count in table),
        meanings="\n".join(f"- **{fault}**: {checked}." for fault, checked in CHECKED.items() if any(fault == key[0] for key in counts))))


def machine() -> str:
    from importlib.metadata import version
    names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "numpy", "safetensors", "wandb"))
    return (f"Machine: {platform.system()} {platform.machine()}, {os.cpu_count()} × {names[0] if names else 'CPU'}. "
            f"Python {sys.version.split()[0]}, {packages}.")
