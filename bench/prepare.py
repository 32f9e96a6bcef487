"""Text files → token shards, compared with `datasets`: MB/s and memory. `python -m bench.prepare`.

Each side is a command, timed from start to exit; they alternate, and the median is reported. Ours
is `python -m data.prepare`. The peer maps the same tiktoken encoding over batches of documents,
with a process per core and empty caches, and saves to disk. The text is several copies of Python's
library, each with its lines in another order, so that no cache helps. Memory is the highest sum
over the processes of a side: their own pages, with shared ones counted once and mapped files left
out. Linux only: it reads /proc.
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
from typing import NamedTuple

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
datasets.disable_progress_bars()
text, tokenizer_file, out, cores = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
processes = cores if cores > 1 else None
tokenizer = cache(lambda: load_tokenizer(tokenizer_file))           # once per process

def encode(batch):
    return {"ids": [tokenizer().encode(document).astype(np.uint16) for document in batch["text"]]}

documents = datasets.load_dataset("text", data_files=text, sample_by="document",
                                  keep_linebreaks=True, split="train")
features = datasets.Features({"ids": datasets.Sequence(datasets.Value("uint16"))})
tokens = documents.map(encode, batched=True, batch_size=100, num_proc=processes,
                       remove_columns=["text"], features=features)
tokens.save_to_disk(out, num_proc=processes)
"""


class Cost(NamedTuple):
    seconds: float
    mb: float                   # the most memory that the processes held
    tokens: int


def write_corpus(folder: Path, copies: int, files: int | None) -> int:
    """Write the first `files` files of the library `copies` times. Returns their size in bytes.

    The lines of each copy are shuffled.
    """
    folder.mkdir()
    texts, total = [path.read_text("utf-8").splitlines(True) for path in stdlib_files()[:files]], 0
    for copy in range(copies):
        generator = random.Random(copy)
        for n, lines in enumerate(texts):
            generator.shuffle(lines)
            total += (folder / f"{copy:03}-{n:04}.txt").write_bytes("".join(lines).encode())
    return total


def run_ours(text: Path, tokenizer: Path, scratch: Path, cores: int) -> Cost:
    config, folder = scratch / "ours.yaml", scratch / "ours"
    config.write_text(json.dumps({"data": {
        "corpus": "files", "files": [f"{text}/*.txt"], "tokenizer": str(tokenizer.parent),
        "folder": str(folder), "val_fraction": 0.01}}))
    seconds, mb = timed([sys.executable, "-m", "data.prepare", str(config)], scratch)
    shards = json.loads((folder / "manifest.json").read_text())["shards"]
    return Cost(seconds, mb, sum(shard["tokens"] for split in shards.values() for shard in split))


def run_peer(text: Path, tokenizer: Path, scratch: Path, cores: int) -> Cost:
    import pyarrow.compute as pc
    from datasets import load_from_disk
    folder = scratch / "peer"
    seconds, mb = timed([sys.executable, "-c", PEER, f"{text}/*.txt", str(tokenizer), str(folder),
                         str(cores)], scratch)
    lengths = pc.list_value_length(load_from_disk(folder).data.column("ids"))
    return Cost(seconds, mb, pc.sum(lengths).as_py())


def timed(command: list[str], scratch: Path) -> tuple[float, float]:
    """Seconds of a command, and the most MB that its processes held."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HOME": str(scratch / "cache"),
                                "HF_HUB_OFFLINE": "1"}
    started = time.perf_counter()
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL,
                          stderr=subprocess.PIPE, text=True) as process:
        samples = [0]
        sampler = threading.Thread(target=sample_memory, args=(process, samples))
        sampler.start()
        errors = process.communicate()[1]
        seconds = time.perf_counter() - started
        sampler.join()
    if process.returncode:
        raise RuntimeError(f"{command[:4]} failed: {errors[-2000:]}")
    return seconds, max(samples) / 1e6


def sample_memory(process: subprocess.Popen, samples: list[int]) -> None:
    """Append the memory of a process and its descendants every 50 ms."""
    while process.poll() is None:
        samples.append(memory_bytes(process.pid))
        time.sleep(0.05)


def memory_bytes(pid: int) -> int:
    """Bytes that a process and its descendants hold."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        children: list[str] = []
        for task in Path(f"/proc/{pid}/task").iterdir():
            children += (task / "children").read_text().split()
    except OSError:                         # it has just ended
        return 0
    own = sum(1024 * int(line.split()[1]) for line in lines
              if line.startswith(("Pss_Anon:", "Pss_Shmem:")))
    return own + sum(memory_bytes(int(child)) for child in children)


SIDES: dict[str, Callable[[Path, Path, Path, int], Cost]] = {"ours": run_ours, "datasets": run_peer}


def measure(text: Path, tokenizer: Path, cores: int, rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds and most MB of each side.

    Both must make the same number of tokens, except for those that begin documents.
    """
    costs: dict[str, list[Cost]] = {name: [] for name in SIDES}
    for n in range(rounds):
        for name, side in SIDES.items():
            results.meanwhile(f"{text.name}: round {n + 1} of {rounds}, {name}")
            with tempfile.TemporaryDirectory(dir=text.parent) as scratch:
                costs[name].append(side(text, tokenizer, Path(scratch), cores))
    results.meanwhile("")
    tokens = {name: side_costs[0].tokens for name, side_costs in costs.items()}
    assert abs(tokens["ours"] / tokens["datasets"] - 1) < 0.02, f"different tokens: {tokens}"
    return {name: {"seconds": statistics.median(cost.seconds for cost in side_costs),
                   "mb": max(cost.mb for cost in side_costs), "tokens": tokens[name]}
            for name, side_costs in costs.items()}


def main() -> None:
    parser = ArgumentParser("python -m bench.prepare", description=(
        "Text to token shards: speed and memory, compared with datasets."))
    parser.add_argument("--copies", type=int, nargs="+", default=[1, 4, 16],
                        help="text sizes, as multiples of Python's library (default 1 4 16)")
    parser.add_argument("--rounds", type=int, default=3,
                        help="number of rounds; their median is reported (default 3)")
    parser.add_argument("--vocab-size", type=int, default=8192,
                        help="of the BPE that both use, trained before (default 8192)")
    parser.add_argument("--files", type=int, help="number of the library's files (default: all)")
    args = parser.parse_args()
    cores, rows = usable_cores(), []

    print(f"text files to token shards on {cores} core(s), BPE of {args.vocab_size}, "
          f"tiktoken {version('tiktoken')}, datasets {version('datasets')}; "
          f"{args.rounds} alternating rounds")
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = Path(folder) / "tk" / "tokenizer.json"
        tokenizer.parent.mkdir()
        texts = (path.read_text("utf-8") for path in stdlib_files()[:args.files])
        tokenizer.write_text(train_bpe(texts, args.vocab_size).json)
        for copies in args.copies:
            text = Path(folder) / f"{copies}x"
            size = write_corpus(text, copies, args.files) / 1e6
            row = {"copies": copies, "mb": size} | measure(text, tokenizer, cores, args.rounds)
            speedup = row["datasets"]["seconds"] / row["ours"]["seconds"]
            print(f"  {copies:3} × ({size:6.1f} MB): {speedup:5.2f} × datasets", end="")
            for name in SIDES:
                seconds, mb = row[name]["seconds"], row[name]["mb"]
                print(f"    {name} {size / seconds:5.1f} MB/s ({seconds:.1f} s), {mb:.0f} MB held",
                      end="")
            print(flush=True)
            rows.append(row)
    results.write("prepare", {"cores": cores, "vocab_size": args.vocab_size, "rounds": args.rounds,
                              "rows": rows})


if __name__ == "__main__":
    run_command(main)
