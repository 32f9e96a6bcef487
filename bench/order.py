"""The order of batches at 10¹² tokens and 1,024 processes: `python -m bench.order`.

The code is what training runs: `permute`, `TextWindows`, `Quotas`, `Batches.share`, on a
`TokenStream` of thousands of shards. Only the tokens come from no file: a shard computes them from
their position. So the corpus needs no disk, and every row that is read can be checked.
"""

import math
import time
import tracemalloc
from functools import partial
from itertools import pairwise

from errors import ArgumentParser, UserError, run_command

import numpy as np
import torch

from bench import results
from bench.timers import seconds_of
from data.batches import Batches, BegunRows, RepeatRows, Source, TextWindows, permute, random_key
from data.config import MixtureEntry, RepeatsConfig
from data.shards import TokenStream

BUCKETS = 1000
WORLD_SIZES = (1, 8, 1000, 1024)        # 1000 does not divide a step's windows


class ComputedShard:
    """Tokens first … first + n − 1 of an endless text, computed from their positions."""

    def __init__(self, first: int, n: int):
        self.first, self.n = first, n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, _ = part.indices(self.n)
        return token_at(np.arange(self.first + start, self.first + stop))


def token_at(position: np.ndarray) -> np.ndarray:
    """16 bits of each position (N,), so that neighbours and shards differ."""
    product = position.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return (product >> np.uint64(48)).astype(np.uint16)


def corpus(tokens: int, shards: int) -> TokenStream:
    """`tokens` computed tokens in `shards` nearly equal shards."""
    ends = [tokens * n // shards for n in range(shards + 1)]
    return TokenStream([ComputedShard(first, end - first) for first, end in pairwise(ends)])


# --- is it a permutation, and does it look random? ------------------------------------------------

def check_epoch(windows: TextWindows, block: int = 10 ** 6) -> int:
    """Look up every window of one epoch. Returns their number.

    Raises AssertionError if one is missing or read twice.
    """
    seen = np.zeros(windows.windows_per_epoch, dtype=bool)
    offset = random_key(windows.seed, "text", 0) % windows.n_shifts
    for first in range(0, windows.windows_per_epoch, block):
        index = np.arange(first, min(first + block, windows.windows_per_epoch))
        starts = windows.starts(index) - offset
        assert (starts % windows.n_ctx == 0).all(), "a window begins off its border"
        # As many lookups as windows: if every window is seen, each is seen once.
        seen[starts // windows.n_ctx] = True
    assert seen.all(), f"{(~seen).sum()} windows are never read"
    return windows.windows_per_epoch


def randomness(size: int, n: int, key: int) -> dict[str, float]:
    """Permute n consecutive indices of 0 … size − 1: duplicates, and p-values of two statistics.

    Chi-square over equal buckets (Wilson and Hilferty's normal approximation), and the correlation
    of each output with the next, which is normal with standard deviation 1/√n.
    """
    index = np.arange(n) + key % max(1, size - n)
    out = permute(index, size, key)
    assert out.min() >= 0 and out.max() < size, "an output is outside the range"
    duplicates = n - len(np.unique(out))
    counts, freedom = np.bincount(out * BUCKETS // size, minlength=BUCKETS), BUCKETS - 1
    chi2 = float(((counts - n / BUCKETS) ** 2).sum() / (n / BUCKETS))
    variance = 2 / (9 * freedom)
    z = ((chi2 / freedom) ** (1 / 3) - (1 - variance)) / math.sqrt(variance)
    x = out / size
    r = float(np.corrcoef(x[:-1], x[1:])[0, 1])
    return {"duplicates": duplicates, "chi2": chi2, "p_uniform": math.erfc(z / math.sqrt(2)) / 2,
            "serial_correlation": r,
            "p_serial": math.erfc(abs(r) * math.sqrt(n - 1) / math.sqrt(2))}


# --- what it costs --------------------------------------------------------------------------------

def cost(tokens: int, n_ctx: int, n: int) -> dict[str, float]:
    """Microseconds per index of `TextWindows.starts`, n at a time and one by one.

    Also the peak memory per index of the n.
    """
    windows = TextWindows(corpus(tokens, max(1, tokens // 250_000_000)), n_ctx, seed=0)
    index = np.arange(n) % windows.windows_per_epoch        # of one epoch, which needs one key
    together = min(seconds_of(lambda: windows.starts(index)) for _ in range(3))
    single = seconds_of(lambda: [windows.starts(index[i:i + 1]) for i in range(200)]) / 200
    tracemalloc.start()
    windows.starts(index)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {"tokens": tokens, "us_an_index": together / n * 1e6, "us_single": single * 1e6,
            "peak_bytes_an_index": peak / n}


# --- the same batch on any number of processes ----------------------------------------------------

def make_batches(tokens: int, shards: int, n_ctx: int, batch_tokens: int, repeats: bool) -> Batches:
    """Batches of the computed corpus; with `repeats` a tenth of the rows are synthetic."""
    sources: dict[str, Source] = {"files": TextWindows(corpus(tokens, shards), n_ctx, seed=0)}
    entries = [MixtureEntry(corpus="files", weight=0.9 if repeats else 1.0)]
    if repeats:
        ids = np.arange(2 ** 16)
        rows = RepeatRows(RepeatsConfig(), n_ctx, ids, seed=0)
        sources["repeats"] = BegunRows(rows, 2 ** 16, 1.0, 0, "repeats")
        entries.append(MixtureEntry(corpus="repeats", weight=0.1))
    return Batches(sources, entries, batch_tokens, n_ctx)


def check_shares(batches: Batches, steps: list[int], world_sizes: tuple[int, ...]) -> int:
    """Compare the shares of all processes with each step's batch, for each number of processes.

    Returns how many shares were compared. Raises AssertionError if they differ, or if a row of text
    does not hold the tokens of its place.
    """
    compared = 0
    for step in steps:
        batch = batches[step]
        check_rows(batches, step, batch.tokens.numpy())
        for world_size in world_sizes:
            shares = [batches.share(step, rank, world_size).tokens for rank in range(world_size)]
            assert torch.equal(torch.cat(shares), batch.tokens), (
                f"step {step} differs on {world_size} processes")
            compared += world_size
    return compared


def check_rows(batches: Batches, step: int, tokens: np.ndarray) -> None:
    """Compare every 50th row of a batch, if it is text, with the computed tokens."""
    text = batches.sources["files"]
    assert isinstance(text, TextWindows)
    for row in range(0, batches.windows_per_step, 50):
        source, index = batches.quotas.locate(step * batches.windows_per_step + row)
        if source == "files":
            start = int(text.starts(np.array([index]))[0])
            expected = token_at(np.arange(start, start + batches.n_ctx))
            assert (tokens[row] == expected).all(), "a row is not its text"


def share_milliseconds(batches: Batches, world_size: int, rounds: int) -> float:
    """The median time in which one process looks up and reads its share of a step."""
    times = [seconds_of(partial(batches.share, step, step % world_size, world_size))
             for step in range(1000, 1000 + rounds)]
    return float(np.median(times)) * 1e3


def measure(tokens: int, n_ctx: int, batch_tokens: int, n: int, epoch_tokens: int,
            world_sizes: tuple[int, ...]) -> dict:
    """All measurements, printed as they are made."""
    shards = min(4000, tokens // 1000)
    figures: dict = {"tokens": tokens, "n_ctx": n_ctx, "batch_tokens": batch_tokens,
                     "shards": shards}
    print(f"{tokens:,} tokens in {shards:,} shards, windows of {n_ctx:,}, "
          f"{batch_tokens:,} tokens a step")

    windows = TextWindows(corpus(epoch_tokens, shards), n_ctx, seed=0)
    started = time.perf_counter()
    figures["epoch_windows"] = check_epoch(windows)
    print(f"an epoch of {epoch_tokens:,} tokens: all {figures['epoch_windows']:,} windows read "
          f"exactly once ({time.perf_counter() - started:.0f} s)")

    figures["randomness"] = [randomness(tokens, n, random_key(0, "bench", k)) for k in range(5)]
    print(f"{n:,} consecutive indices of {tokens:,}, by key: duplicates, "
          f"chi² over {BUCKETS:,} buckets (p), serial correlation (p)")
    for row in figures["randomness"]:
        print(f"  {row['duplicates']}   {row['chi2']:8.1f} ({row['p_uniform']:.3f})"
              f"   {row['serial_correlation']:+.5f} ({row['p_serial']:.3f})")

    figures["cost"] = [cost(10 ** e, n_ctx, min(n, 10 ** 6)) for e in range(6, 13)]
    print("tokens in the corpus, µs per index, µs for a single index, bytes of memory per index")
    for row in figures["cost"]:
        print(f"  {row['tokens']:20,}   {row['us_an_index']:.3f}   {row['us_single']:6.1f}"
              f"   {row['peak_bytes_an_index']:6.1f}")

    for name, repeats in (("text", False), ("mixture", True)):
        batches = make_batches(tokens, shards, n_ctx, batch_tokens, repeats)
        figures[name] = measure_shares(batches, tokens // batch_tokens - 1, world_sizes)
    return figures


def measure_shares(batches: Batches, last: int, world_sizes: tuple[int, ...]) -> dict:
    """Check the shares of the first and the last step, and time them."""
    compared = check_shares(batches, [0, last], world_sizes)
    milliseconds = {size: share_milliseconds(batches, size, 5) for size in world_sizes}
    print(f"{' and '.join(batches.sources)}: {compared:,} shares of steps 0 and {last:,} make the "
          f"same batches on {', '.join(map(str, world_sizes))} processes\n"
          "  ms per share, by processes: "
          + ", ".join(f"{size}: {ms:.2f}" for size, ms in milliseconds.items()))
    return {"shares_compared": compared, "share_ms": milliseconds}


def main() -> None:
    parser = ArgumentParser("python -m bench.order", description=(
        "The order of batches at internet scale: complete, random, cheap, and the same on any "
        "number of processes. Takes some minutes."))
    parser.add_argument("--tokens", type=lambda text: int(float(text)), default=10 ** 12,
                        help="tokens of the corpus (default 1e12)")
    parser.add_argument("--n-ctx", type=int, default=4096, help="tokens of a window (default 4096)")
    parser.add_argument("--batch-tokens", type=int, default=2 ** 22,
                        help="tokens of a step (default 4194304)")
    parser.add_argument("--indices", type=int, default=10 ** 7,
                        help="indices for the tests of randomness (default 10000000)")
    parser.add_argument("--epoch", type=lambda text: int(float(text)),
                        help="tokens of the epoch that is looked up (default: the corpus)")
    args = parser.parse_args()
    if args.indices > args.tokens or args.batch_tokens // args.n_ctx < max(WORLD_SIZES):
        raise UserError(f"--indices at most --tokens={args.tokens}, and --batch-tokens "
                        f"at least {max(WORLD_SIZES)} windows of {args.n_ctx}")
    results.write("order", measure(args.tokens, args.n_ctx, args.batch_tokens, args.indices,
                                   args.epoch or args.tokens, WORLD_SIZES))


if __name__ == "__main__":
    run_command(main)
