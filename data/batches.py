"""The batch of a step, as a pure function of (seed, step).

Nothing is drawn in sequence: window n of the run is looked up, so there is no loader state to save, and resuming, on
another number of processes too, gives the same batches.
"""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from math import floor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.config import MixtureEntry, RepeatsConfig
from data.shards import TokenStream
from errors import UserError


class Batch(NamedTuple):
    """tokens, targets (B, T) int64; segments (B, T) document numbers, or None when documents may see each other."""

    tokens: Tensor
    targets: Tensor
    segments: Tensor | None = None

    def split(self, rows: int) -> Iterator["Batch"]:
        """Micro-batches of `rows` windows."""
        for n in range(0, len(self.tokens), rows):
            yield Batch._make(None if part is None else part[n:n + rows] for part in self)

    def to(self, device: torch.device) -> "Batch":
        return Batch._make(None if part is None else part.to(device, non_blocking=True) for part in self)


class Batches:
    """`batches[step]` is the global batch of update `step` (0 for the first)."""

    def __init__(self, sources: dict[str, "TextWindows | RepeatRows"], entries: list[MixtureEntry], batch_tokens: int,
                 n_ctx: int, separator: int | None = None):
        """`separator`: number the documents by the token that each begins with, so that attention can be kept inside each."""
        self.sources, self.separator, self.n_ctx = sources, separator, n_ctx
        self.windows = batch_tokens // n_ctx
        self.quotas = Quotas(entries, self.windows)

    def __getitem__(self, step: int) -> Batch:
        return self.share(step, 0, 1)

    def share(self, step: int, rank: int, world_size: int) -> Batch:
        """The rows of batch `step` that fall to process `rank` of `world_size`."""
        mine = range(step * self.windows + rank * self.windows // world_size,
                     step * self.windows + (rank + 1) * self.windows // world_size)
        where = [self.quotas.locate(n) for n in mine]
        rows = np.empty((len(mine), self.n_ctx + 1), np.int64)
        for name, source in self.sources.items():
            here = [r for r, (owner, _) in enumerate(where) if owner == name]
            if here:
                rows[here] = source.rows(np.array([where[r][1] for r in here], dtype=np.int64))
        return as_batch(rows, self.separator)

    def ahead(self, first: int, last: int, device: torch.device, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """Batches first … last − 1 on `device`, two of them made in the background so that it never waits."""
        def make(step: int) -> Batch:
            batch = self.share(step, rank, world_size)
            return Batch._make(None if part is None else part.pin_memory() for part in batch) if device.type == "cuda" else batch

        with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
            queue = [pool.submit(make, step) for step in range(first, min(first + 2, last))]
            for step in range(first, last):
                batch = queue.pop(0).result()
                if step + 2 < last:
                    queue.append(pool.submit(make, step + 2))
                yield batch.to(device)


def as_batch(rows: np.ndarray, separator: int | None = None) -> Batch:
    """(B, T + 1) tokens as inputs and the targets one to the right."""
    windows = torch.from_numpy(rows)
    tokens = windows[:, :-1].contiguous()
    return Batch(tokens, windows[:, 1:].contiguous(), documents(tokens, separator))


def documents(tokens: Tensor, separator: int | None) -> Tensor | None:
    """The numbers of the documents that tokens (B, T) belong to, each beginning with `separator`; None where that is None."""
    return None if separator is None else (tokens == separator).cumsum(dim=1)


# --- sources: row n of each is a pure function of (seed, n) -----------------------------------------------------------

class TextWindows:
    """Windows of T + 1 tokens of a text, each once per epoch in an order of its own.

    Epochs shift the window borders, so that what is cut apart in one is whole in another.
    """

    def __init__(self, stream: TokenStream, n_ctx: int, seed: int):
        if len(stream) < n_ctx + 1:
            raise UserError(f"the training text has {len(stream)} tokens, less than one window of model.n_ctx={n_ctx} + 1\n"
                            "  use more text or a smaller model.n_ctx")
        self.stream, self.n_ctx, self.seed = stream, n_ctx, seed
        self.per_epoch = max(1, (len(stream) - n_ctx) // n_ctx)
        self.slack = min(n_ctx, len(stream) - self.per_epoch * n_ctx)       # where window 0 may begin

    def rows(self, n: np.ndarray) -> np.ndarray:
        """Windows n (N,) → (N, T + 1) int64."""
        return np.stack([self.stream.read(start, self.n_ctx + 1) for start in self.starts(n)])

    def starts(self, n: np.ndarray) -> np.ndarray:
        """The first token of each window."""
        starts = np.empty_like(n)
        for epoch in np.unique(n // self.per_epoch):
            key = random_key(self.seed, "text", int(epoch))
            here = n // self.per_epoch == epoch
            starts[here] = permute(n[here] % self.per_epoch, self.per_epoch, key) * self.n_ctx + key % self.slack
        return starts


class RepeatRows:
    """[begin] + a block of distinct random tokens of `ids`, repeated to the end of the row; the period is drawn per row."""

    def __init__(self, config: RepeatsConfig, n_ctx: int, begin: int, ids: np.ndarray, seed: int, stream: str = "repeats"):
        shortest, longest = config.period
        self.periods = np.array([p for p in range(shortest, longest + 1) if p not in config.held_out_periods])
        self.vocabulary, _ = repeat_vocabulary(config, ids, seed)
        if len(self.vocabulary) < longest:
            raise UserError(f"data.repeats.period={config.period} needs blocks of {longest} distinct tokens, "
                            f"there are {len(self.vocabulary)} to draw from")
        self.n_ctx, self.begin, self.seed, self.stream = n_ctx, begin, seed, stream

    def rows(self, n: np.ndarray) -> np.ndarray:
        """Rows n (N,) → (N, T + 1) int64."""
        return np.stack([self.row(int(i)) for i in n])

    def row(self, n: int) -> np.ndarray:
        draw = np.random.Generator(np.random.Philox(key=random_key(self.seed, self.stream, n)))
        block = draw.choice(self.vocabulary, size=draw.choice(self.periods), replace=False)
        return repeat_row(self.begin, block, self.n_ctx)


def repeat_row(begin: int, block: np.ndarray, length: int) -> np.ndarray:
    """[begin] + `block` again and again for `length` tokens: (1 + length,) int64."""
    return np.array([begin, *np.resize(block, length)], dtype=np.int64)


def repeat_vocabulary(config: RepeatsConfig, ids: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of `ids` (a tokenizer's ordinary ones) training repeats, and those held out of it."""
    ids = ids[:config.n_tokens]
    order = permute(np.arange(len(ids)), len(ids), random_key(seed, "held-out tokens", 0))
    held_out = order < int(len(ids) * config.held_out_tokens)
    return ids[~held_out], ids[held_out]


# --- order ----------------------------------------------------------------------------------------------------------

class Quotas:
    """Which source each window of the run comes from, without drawing and without history.

    With weight w a source has had ⌊n w⌋ of the first n windows, so window n is its own when ⌊(n+1) w⌋ > ⌊n w⌋. With
    more sources the windows that the first leaves are numbered anew and shared among the rest in the same way.
    """

    def __init__(self, entries: list[MixtureEntry], windows_per_step: int):
        ends = [*sorted({e.until for e in entries if e.until}), None]
        self.phases: list[tuple[int, list[tuple[str, Fraction]], dict[str, int]]] = []
        first, had = 0, dict.fromkeys((str(e.corpus) for e in entries), 0)
        for end in ends:
            active: dict[str, Fraction] = {}
            for entry in entries:                       # the first entry of a corpus that has not ended counts
                if entry.until is None or (end is not None and entry.until >= end):
                    active.setdefault(entry.corpus, Fraction(str(entry.weight)))
            self.phases.append((first, list(active.items()), dict(had)))
            if end is not None:
                last = end * windows_per_step
                for name, count in self._counts(last - first, list(active.items())).items():
                    had[name] += count
                first = last

    def locate(self, n: int) -> tuple[str, int]:
        """The source of window n, and which of its own windows that is."""
        first, weights, had = next(phase for phase in reversed(self.phases) if phase[0] <= n)
        n, total = n - first, sum(weight for _, weight in weights)
        for name, weight in weights:
            before = floor(n * weight / total)
            if floor((n + 1) * weight / total) > before:
                return name, had[name] + before
            n, total = n - before, total - weight
        raise AssertionError("the last source takes every window that is left")

    @staticmethod
    def _counts(n: int, weights: list[tuple[str, Fraction]]) -> dict[str, int]:
        counts, total = {}, sum(weight for _, weight in weights)
        for name, weight in weights:
            counts[name] = floor(n * weight / total)
            n, total = n - counts[name], total - weight
        return counts


def permute(index: np.ndarray, size: int, key: int) -> np.ndarray:
    """A keyed permutation of 0 … size − 1 applied to `index` (N,), in O(1) memory.

    A Feistel network permutes the next even power of two; an index that lands outside is sent through again until it
    is inside (cycle walking; Black and Rogaway 2002, method 3).
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    keys = [np.uint64(random_key(key, "round", r) & 0xFFFFFFFFFFFFFFFF) for r in range(6)]
    x = index.astype(np.uint64)
    outside = np.ones(len(x), dtype=bool)
    while outside.any():
        left, right = x[outside] >> np.uint64(half), x[outside] & mask
        for k in keys:
            left, right = right, left ^ (_mix(right + k) & mask)
        x[outside] = left << np.uint64(half) | right
        outside = x >= size
    return x.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele et al. 2014): every input bit reaches every output bit."""
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


def random_key(seed: int, stream: str, n: int) -> int:
    """128 random bits for item n of a named stream: streams of one seed never meet."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{stream}/{n}".encode(), digest_size=16).digest(), "big")
