"""Write docs/reliability.md: the faults, and how often each was injected and survived."""

import os
import platform
import sys
import textwrap
import time
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

RESUMED = ("no checkpoint, shard, snapshot or line of metrics.jsonl on the disk is wrong; when the "
           "run is continued, it ends with the metrics, weights, optimizer state, snapshots and "
           "report of an undisturbed run, bit for bit")
CHECKS = {                                  # fault → what its test asserts
    "kill -9": RESUMED,
    "SIGTERM": "training saves, prints how to resume and exits with status 0 (before training "
               "starts, it ends at once); " + RESUMED,
    "SIGINT": "as for SIGTERM",
    "SIGHUP": "as for SIGTERM; a run that was started with it ignored (nohup) trains on",
    "disk full": "an error of two lines, exit status 2, no half-written file; with free space "
                 "again, the run continues as for kill -9",
    "read-only folder": "an error of two lines, exit status 2, nothing left behind",
    "folder deleted": "a deleted run ends with an error of two lines and is not partly created "
                      "again; deleted shards that are open are read to the end",
    "clock and file times jump back": "the same run, bit for bit",
    "two trainers on one run": "the second is refused and does not disturb the first; the lock of "
                               "a killed trainer is free",
    "wandb's process killed": "training ends as if undisturbed, without a traceback",
    "wandb's server unreachable": "training ends within seconds as if undisturbed; wandb's offline "
                                  "files have all steps",
    "damaged checkpoint": "an error that names the damaged file and the previous checkpoint",
    "damaged shard": "an error that names the damaged file",
    "another run's files": "an error that names the file or the run",
    "latest points nowhere": "the newest complete checkpoint is used, and a note says so",
    "damaged config": "a run, or a clear error with exit status 2 that leaves no run behind",
    "untrusted checkpoint": "an error of two lines, within 20 s of processor time and 1.2 GB of "
                            "memory; no code from the file is executed",
    "untrusted config": "as for an untrusted checkpoint",
    "untrusted corpus": "as for an untrusted checkpoint",
    "untrusted shards": "as for an untrusted checkpoint",
    "untrusted snapshot": "as for an untrusted checkpoint",
    "long run": "after warm-up, resident memory grows by at most 2% and the number of open files "
                "does not grow; checkpoint.keep is respected; metrics.jsonl has every line",
}

# kind → (what was tried, the result) …; the tests are named last.
FROM_THE_FIELD = {
    "a tokenizer.json read in part": [
        ("two splits, a regex in ByteLevel, other pre-tokenizers, normalizers, added tokens with "
         "lstrip, rstrip, single_word; ignore_merges; ids in gaps", "run by its library, same ids"),
        ("saved padding and truncation", "off: a prompt is only its own tokens"),
        ("dropout, subword prefixes and suffixes, a decoder that changes text, an unknown part, "
         "WordPiece, unigram", "refused by name"),
        ("lowercasing, accents composed, spaces dropped",
         "prepared, with a warning that names the share lost: test_foreign_tokenizer.py, "
         "test_prepare.py")],
    "types guessed, columns, caches": [
        ("nulls before text, changing and nested types, huge numbers in other columns; NA, 007, "
         "dates, True in the text column; jsonl, json, csv, tsv, parquet, arrow, compressed too",
         "the text, exactly"),
        ("a csv row too short or too long, a quote without end, bytes that are not UTF-8, a column "
         "of lists or numbers, a missing column, JSON that is cut off",
         "refused: file, line, counts or type"),
        ("half of a surrogate pair", "� and a note with the line"),
        ("a home that cannot be written", "works: test_fields.py")],
    "encodings": [
        ("UTF-8, UTF-16 and UTF-32 with a byte-order mark, in corpora and in --file",
         "decoded, without the mark"),
        ("UTF-16 and UTF-32 without a mark", "refused by name; other bytes are kept as they are"),
        ("a prompt that is not UTF-8, with --json", "valid JSON: test_text_files.py")],
    "names as patterns": [
        ("brackets, stars, question marks, ::, #, %, zip://, a folder named ~",
         "an existing name means itself: test_text_files.py")],
    "the console": [
        ("ASCII, a full disk, closed streams, a vanished reader, a closed terminal, a full pipe; "
         "training, preparing, heads.py, torchrun, with wandb", "goes on, and saves"),
        ("a sample or a verdict that cannot be written",
         "exit status 2, one line; 141 for a vanished reader: test_console.py")],
    "signals": [
        ("SIGHUP; ignored (nohup); SIGTERM while a line is being printed",
         "saved; trains on; saved: test_console.py")],
    "file systems": [
        ("no symbolic links, hard links, flock, permissions or flushing of folders",
         "trains, saves, resumes, refuses a second trainer"),
        ("a lock of this and of another machine, of a living and a dead process",
         "named with process, host and file"),
        ("a copy that followed links, or dropped them", "continues: test_file_systems.py")],
    "moved and renamed": [
        ("runs, trained and imported; the project; the raw text gone, its shards finished",
         "continues: test_file_systems.py, test_import.py, test_text_files.py")],
    "work without end": [
        ("a million spaces, dashes, letters; base64; emoji; bytes that are not UTF-8",
         "linear time: 1 MB of each prepared in 13 s: test_tokenizer.py"),
        ("link loops, one JSON value over many lines, gzip bombs",
         "ends: test_text_files.py, test_fields.py")],
    "values without meaning": [
        ("--stop '', temperature 1e-46, a learning rate that is 0 in float32, -n 10¹²",
         "refused, or the obvious"),
        ("run=001, run=1e3; --optimizer.lr=0.1 from a sweep",
         "the name as written; understood: test_arguments.py, test_settings.py, test_sample.py")],
    "imports": [
        ("special tokens past the embedding", "imported if no text becomes them, else named"),
        ("chat template, roles, generation settings", "in every checkpoint: test_import.py")],
}

PAGE = """# Faults: what was broken, and what survived

This page lists every fault that the tests inject into real commands, how often each was survived,
and what is guaranteed as a result.

`make test-faults` wrote this page on {date} from the counts of the tests.
{machine}

**{injected:,} faults were injected, {configs:,} of them damaged configs.
{survived:,} were survived, with the guarantees below.**{failed}

Each test starts the real `train.py` (or `sample.py`, `heads.py`, `data.prepare`) and breaks it. The
moment of a fault is exact: a wrapper ends the process at the n-th call that marks a moment
(`tests/faults/breaker.py`), without changing the tested code. A fixed seed chooses n;
`FAULT_SEED=2 make test-faults` chooses others. Hypothesis generates the damaged configs.

| fault | at | injected | survived |
|---|---|--:|--:|
{rows}

What "survived" means:

{meanings}

## Inputs and surroundings from the field

Inputs and surroundings on which programs of this kind have failed, each with its siblings. They are
ordinary tests, in the files named last.

| kind | tried | result |
|---|---|---|
{field}

## What is guaranteed

- A run that is stopped at any moment, by any signal, and continued with `python train.py runs/NAME`
  equals the run that was not stopped, bit for bit: all metrics except those of time and memory, all
  weights, the optimizer state, the head snapshots and the report. This holds on a CPU in float32
  with the same number of threads, the same versions and the same data.
- A checkpoint exists completely or not at all. If it is damaged later, it is refused because of its
  SHA-256. The error names the file and the previous checkpoint. Nothing is deleted to work around
  it.
- A full or read-only disk ends a run with an error of two lines and exit status 2. Nothing that was
  saved is lost.
- wandb cannot stop a run, and cannot delay it by more than half a minute. metrics.jsonl is
  complete.
- No file that is read can run code. No file is unpickled.

## What is not guaranteed

- On a GPU, or with another number of threads, a continued run gets the same batches but not the
  same bits.
- Files are flushed before they are renamed, but these tests did not cut the power and did not use a
  disk that reports a flush it has not done.
- kill -9 of a trainer that logs to wandb may lose the last second of wandb's offline file.
- A wandb server that fails in the middle of an online run was not tested.
- Someone who damages a file and also rewrites its manifest may go unnoticed, because the manifest
  protects against accidents. Limits on sizes protect against the rest.
- A run's config.yaml is a config. If you continue a run that someone sent you, the files that it
  names are read and the data folder that it names is written.
- Several machines, real network file systems (only what they lack was simulated) and Windows were
  not tested.
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
        failed = f" The table shows which {injected - survived} were not."
    tested = {fault for fault, _ in counts}
    meanings = [textwrap.fill(f"- **{fault}**: {check}.", 100, subsequent_indent="  ",
                              break_on_hyphens=False)
                for fault, check in CHECKS.items() if fault in tested]
    path.write_text(PAGE.format(
        date=time.strftime("%Y-%m-%d"), machine=machine(),
        injected=injected, survived=survived, configs=configs, failed=failed,
        rows="\n".join(rows), meanings="\n".join(meanings), field="\n".join(
            f"| {kind} | {tried} | {result} |" for kind, cases in FROM_THE_FIELD.items()
            for tried, result in cases)))


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
