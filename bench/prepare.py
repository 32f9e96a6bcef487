"""Text files → token shards: MB/s and memory, ours beside `datasets`: `python -m bench.prepare`.

Each side is a command, timed from its start to its exit; they take turns, and medians count. Ours is `python -m data.prepare`; the peer
maps the same tiktoken encoding over batches of documents in a process a core and saves to disk, from empty caches. The text is Python's
library again and again, each time with its lines in another order, so that nothing is known from before. Memory is the highest sum over
the processes of a side: their own pages, shared ones counted once, mapped files left out. Linux only: it reads /proc.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from errors import ArgumentParser, run_command

from bench import results
from data.byte_bpe import train_bpe
from data.corpus import stdlib_files
from data.encode import usable_cores

ROOT = Path(__file__).parent.parent
PEER = """
import os, sys
from functools import cache
import datasets, numpy as np
from data.load_tokenizer import load_tokenizer
from data.tokenizer import Tokenizer
datasets.disable_progress_bars()
text, tokenizer_file, out, cores = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
tokenizer = cache(lambda: load_tokenizer(tokenizer_file))           # once a process

def encode(batch):
    return {"ids": [tokenizer().encode(document).astype(np.uint16) for document in batch["text"]]}

documents = datasets.load_dataset("text", data_files=text, sample_by="document", keep_linebreaks=True, split="train")
features = datasets.Features({"ids": datasets.Sequence(datasets.Value("uint16"))})
tokens = documents.map(encode, batched=True, batch_size=100, num_proc=cores if cores > 1 else None, remove_columns=["text"],
                       features=features)
tokens.save_to_disk(out, num_proc=cores if cores > 1 else None)
"""


def write_corpus(folder: Path, copies: int, files: int | None) -> int:
    """The library's files (the first so many) `copies` times, each with its lines shuffled anew; their size in bytes."""
    folder.mkdir()
    texts, total = [path.read_text("utf-8").splitlines(True) for path in stdlib_files()[:files]], 0
    for copy in range(copies):
        draw = random.Random(copy)
        for n, lines in enumerate(texts):
            draw.shuffle(lines)
            total += (folder / f"{copy:03}-{n:04}.txt").write_bytes("".join(lines).encode())
    return total


def run_ours(text: Path, tokenizer: Path, scratch: Path, cores: int) -> tuple[float, float, int]:
    config = scratch / "ours.yaml"
    config.write_text(json.dumps({"data": {"corpus": "files", "files": [f"{text}/*.txt"], "tokenizer": str(tokenizer.parent),
                                           "folder": str(scratch / "ours"), "val_fraction": 0.01}}))
    seconds, peak = timed([sys.executable, "-m", "data.prepare", str(config)], scratch)
    shards = json.loads((scratch / "ours" / "manifest.json").read_text())["shards"]
    return seconds, peak, sum(shard["tokens"] for split in shards.values() for shard in split)


def run_peer(text: Path, tokenizer: Path, scratch: Path, cores: int) -> tuple[float, float, int]:
    import pyarrow.compute as pc
    from datasets import load_from_disk
    seconds, peak = timed([sys.executable, "-c", PEER, f"{text}/*.txt", str(tokenizer), str(scratch / "peer"), str(cores)], scratch)
    return seconds, peak, pc.sum(pc.list_value_length(load_from_disk(scratch / "peer").data.column("ids"))).as_py()


def timed(command: list[str], scratch: Path) -> tuple[float, float]:
    """Seconds of a command, and the most MB that its processes held."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HOME": str(scratch / "cache"), "HF_HUB_OFFLINE": "1"}
    started = time.perf_counter()
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        peaks = [0]
        watcher = threading.Thread(target=lambda: watch(process, peaks))
        watcher.start()
        complaint = process.communicate()[1]
        seconds = time.perf_counter() - started
        watcher.join()
    if process.returncode:
        raise RuntimeError(f"{command[:4]} failed: {complaint[-2000:]}")
    return seconds, max(peaks) / 1e6


def watch(process: subprocess.Popen, peaks: list[int]) -> None:
    """Note every 50 ms what the processes below hold."""
    while process.poll() is None:
        peaks.append(held(process.pid))
        time.sleep(0.05)


def held(pid: int) -> int:
    """Bytes of a process and of all below it."""
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        below = [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]
    except OSError:                         # it has just ended
        return 0
    return sum(1024 * int(line.split()[1]) for line in rollup if line.startswith(("Pss_Anon:", "Pss_Shmem:"))) + sum(map(held, below))


SIDES: dict[str, Callable] = {"ours": run_ours, "datasets": run_peer}


def measure(text: Path, tokenizer: Path, cores: int, rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds and MB of each side, which must have made the same number of tokens but for what begins documents."""
    taken: dict[str, list[tuple[float, float, int]]] = {name: [] for name in SIDES}
    for n in range(rounds):
        for name, side in SIDES.items():
            results.meanwhile(f"{text.name}: round {n + 1} of {rounds}, {name}")
            with tempfile.TemporaryDirectory(dir=text.parent) as scratch:
                taken[name].append(side(text, tokenizer, Path(scratch), cores))
    results.meanwhile("")
    tokens = {name: found[0][2] for name, found in taken.items()}
    assert abs(tokens["ours"] / tokens["datasets"] - 1) < 0.02, f"the two sides must make the same tokens: {tokens}"
    return {name: {"seconds": statistics.median(s for s, _, _ in found), "mb": max(mb for _, mb, _ in found), "tokens": found[0][2]}
            for name, found in taken.items()}


def main() -> None:
    parser = ArgumentParser("python -m bench.prepare", description="Text to token shards: speed and memory, beside datasets.")
    parser.add_argument("--copies", type=int, nargs="+", default=[1, 4, 16], help="sizes, in times Python's library (default 1 4 16)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds whose median counts (default 3)")
    parser.add_argument("--vocab-size", type=int, default=8192, help="of the BPE, trained beforehand for both (default 8192)")
    parser.add_argument("--files", type=int, help="so many of the library's files (default: all)")
    args = parser.parse_args()
    cores, rows = usable_cores(), []

    print(f"text files to token shards on {cores} core(s), BPE of {args.vocab_size}, tiktoken {version('tiktoken')}, "
          f"datasets {version('datasets')}; {args.rounds} rounds in turn")
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = Path(folder) / "tk" / "tokenizer.json"
        tokenizer.parent.mkdir()
        tokenizer.write_text(train_bpe((path.read_text("utf-8") for path in stdlib_files()[:args.files]), args.vocab_size).json)
        for copies in args.copies:
            text = Path(folder) / f"{copies}x"
            size = write_corpus(text, copies, args.files) / 1e6
            row = {"copies": copies, "mb": size} | measure(text, tokenizer, cores, args.rounds)
            ours, theirs = row["ours"], row["datasets"]
            print(f"  {copies:3} × ({size:6.1f} MB): {theirs['seconds'] / ours['seconds']:5.2f} × datasets    "
                  f"ours {size / ours['seconds']:5.1f} MB/s ({ours['seconds']:.1f} s), {ours['mb']:.0f} MB held    "
                  f"datasets {size / theirs['seconds']:5.1f} MB/s ({theirs['seconds']:.1f} s), {theirs['mb']:.0f} MB held", flush=True)
            rows.append(row)
    results.write("prepare", {"cores": cores, "vocab_size": args.vocab_size, "rounds": args.rounds, "rows": rows})


if __name__ == "__main__":
    run_command(main)
