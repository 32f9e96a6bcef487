"""The batch of a training step, as a pure function of (seed, step).

Nothing is drawn in sequence. Each of a step's W windows, of T + 1 tokens, is looked up:

    step s → windows s W … s W + W − 1 of the run    Batches.share
           → (source, index in that source)          Quotas.locate
           → T + 1 tokens                            TextWindows.rows or RepeatRows.rows

So there is no loader state to save, and a resumed run gets the same batches, on any number of
processes.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from math import lcm
from typing import NamedTuple, Protocol

from errors import UserError

import numpy as np
import torch
from torch import Tensor

from data.config import MixtureEntry, RepeatsConfig
from data.shards import TokenStream


class Batch(NamedTuple):
    """tokens, targets (B, T) int64; segments (B, T) document ids, or None to ignore documents."""

    tokens: Tensor
    targets: Tensor
    segments: Tensor | None = None

    def split(self, size: int) -> Iterator["Batch"]:
        """Micro-batches of `size` rows."""
        for first in range(0, len(self.tokens), size):
            rows = slice(first, first + size)
            segments = None if self.segments is None else self.segments[rows]
            yield Batch(self.tokens[rows], self.targets[rows], segments)

    def to(self, device: torch.device) -> "Batch":
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """The batch with `function` applied to each of its tensors."""
        segments = None if self.segments is None else function(self.segments)
        return Batch(function(self.tokens), function(self.targets), segments)


class Source(Protocol):
    """Rows to train on. Each is a pure function of (seed, index)."""

    def rows(self, index: np.ndarray) -> np.ndarray:
        """Rows index (N,) → (N, T + 1) int64."""


class Batches:
    """`batches[step]` is the global batch of one update; the first update has step 0.

    `document_start`: the token that begins each document. With it attention stays inside documents.
    """

    def __init__(self, sources: dict[str, Source], entries: list[MixtureEntry], batch_tokens: int,
                 n_ctx: int, document_start: int | None = None):
        self.sources, self.n_ctx, self.document_start = sources, n_ctx, document_start
        self.windows_per_step = batch_tokens // n_ctx
        self.quotas = Quotas(entries, self.windows_per_step)

    def __getitem__(self, step: int) -> Batch:
        return self.share(step, rank=0, world_size=1)

    def share(self, step: int, rank: int, world_size: int) -> Batch:
        """The rows of batch `step` that process `rank` of `world_size` trains on."""
        start = step * self.windows_per_step
        first = start + rank * self.windows_per_step // world_size
        end = start + (rank + 1) * self.windows_per_step // world_size
        places = defaultdict(list)              # source → the rows of the batch that it fills
        indices = defaultdict(list)             # source → which of its own rows go there
        for place, window in enumerate(range(first, end)):
            source, index = self.quotas.locate(window)
            places[source].append(place)
            indices[source].append(index)
        rows = np.empty((end - first, self.n_ctx + 1), np.int64)        # (B, T + 1)
        for source in places:
            index_array = np.array(indices[source], np.int64)
            rows[places[source]] = self.sources[source].rows(index_array)
        return as_batch(rows, self.document_start)

    def prefetch(self, first: int, end: int, device: torch.device, rank: int = 0,
                 world_size: int = 1) -> Iterator[Batch]:
        """This process's share of batches first … end − 1, on `device`.

        A thread makes two of them ahead, so that the device does not wait.
        """
        def make(step: int) -> Batch:
            batch = self.share(step, rank, world_size)
            return batch.map(Tensor.pin_memory) if device.type == "cuda" else batch

        with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
            queue = [pool.submit(make, step) for step in range(first, min(first + 2, end))]
            for step in range(first, end):
                batch = queue.pop(0).result()
                if step + 2 < end:
                    queue.append(pool.submit(make, step + 2))
                yield batch.to(device)


def as_batch(rows: np.ndarray, document_start: int | None = None) -> Batch:
    """Rows (B, T + 1) of tokens → inputs (B, T) and the targets one position later (B, T)."""
    windows = torch.from_numpy(rows)
    tokens = windows[:, :-1].contiguous()
    return Batch(tokens, windows[:, 1:].contiguous(), document_ids(tokens, document_start))


def document_ids(tokens: Tensor, document_start: int | None) -> Tensor | None:
    """(B, T) how many documents have begun in the row so far; None without a document_start."""
    return None if document_start is None else (tokens == document_start).cumsum(dim=1)


# --- which source a window comes from -------------------------------------------------------------

class Quotas:
    """Which source each window of the run comes from, without drawing and without history.

    `divide` says how many of the first n windows each source has. Window n belongs to the source
    that has one more of the first n + 1.
    """

    def __init__(self, entries: list[MixtureEntry], windows_per_step: int):
        # Weights change only after the steps named by `until`. Between two of these is a phase.
        self.phases: list[Phase] = []
        first, earlier = 0, dict.fromkeys((str(entry.corpus) for entry in entries), 0)
        for end in [*sorted({entry.until for entry in entries if entry.until}), None]:
            phase = Phase(first, weights_until(end, entries), dict(earlier))
            self.phases.append(phase)
            if end is not None:
                length = end * windows_per_step - first
                for source, count in divide(length, phase.weights).items():
                    earlier[source] += count
                first += length

    def locate(self, window: int) -> tuple[str, int]:
        """The source of a window, and which of that source's rows it is."""
        phase = next(phase for phase in reversed(self.phases) if phase.first <= window)
        before = divide(window - phase.first, phase.weights)
        after = divide(window - phase.first + 1, phase.weights)
        source = next(source for source in after if after[source] > before[source])
        return source, phase.earlier[source] + before[source]


class Phase(NamedTuple):
    first: int                      # its first window
    weights: dict[str, int]         # source → weight
    earlier: dict[str, int]         # source → how many windows it had before this phase


def weights_until(end: int | None, entries: list[MixtureEntry]) -> dict[str, int]:
    """Each source's weight in the phase before step `end` (None: the last phase).

    Only ratios matter, so the weights are scaled to whole numbers: exact, and 12 times faster to
    divide than fractions.
    """
    weights: dict[str, Fraction] = {}
    for entry in entries:
        active = entry.until is None or (end is not None and entry.until >= end)
        if active and entry.corpus not in weights:      # the first active entry of a corpus counts
            weights[entry.corpus] = Fraction(str(entry.weight))
    scale = lcm(*(weight.denominator for weight in weights.values()))
    return {source: int(weight * scale) for source, weight in weights.items()}


def divide(n: int, weights: dict[str, int]) -> dict[str, int]:
    """How many of a phase's first n windows each source gets.

    A source with a fraction w of the total weight gets ⌊n w⌋. The windows left are divided
    among the remaining sources in the same way, so the counts add up to n.
    """
    counts, total = {}, sum(weights.values())
    for source, weight in weights.items():
        counts[source] = n * weight // total
        n, total = n - counts[source], total - weight
    return counts


# --- sources --------------------------------------------------------------------------------------

class TextWindows:
    """Windows of T + 1 tokens of a text. Each epoch reads every window once, in its own order.

    The window borders shift between epochs, so that tokens cut apart in one are together in others.
    """

    def __init__(self, stream: TokenStream, n_ctx: int, seed: int):
        if len(stream) < n_ctx + 1:
            raise UserError(f"the training text has {len(stream)} tokens, less than one window of "
                            f"model.n_ctx={n_ctx} + 1\n  use more text or a smaller model.n_ctx")
        self.stream, self.n_ctx, self.seed = stream, n_ctx, seed
        self.windows_per_epoch = max(1, (len(stream) - n_ctx) // n_ctx)
        # An epoch begins its first window at one of the tokens 0 … n_shifts − 1.
        self.n_shifts = min(n_ctx, len(stream) - self.windows_per_epoch * n_ctx)

    def rows(self, index: np.ndarray) -> np.ndarray:
        """Windows index (N,) → (N, T + 1) int64."""
        return np.stack([self.stream.read(start, self.n_ctx + 1) for start in self.starts(index)])

    def starts(self, index: np.ndarray) -> np.ndarray:
        """Windows index (N,) → the position of each one's first token (N,)."""
        epochs, places = np.divmod(index, self.windows_per_epoch)
        starts = np.empty_like(index)
        for epoch in np.unique(epochs):
            rows = epochs == epoch
            key = random_key(self.seed, "text", int(epoch))
            shift = key % self.n_shifts
            starts[rows] = permute(places[rows], self.windows_per_epoch, key) * self.n_ctx + shift
        return starts


class SpreadWindows:
    """About `count` windows of T + 1 tokens, spread evenly over a text: always the same ones."""

    def __init__(self, stream: TokenStream, n_ctx: int, count: int):
        self.stream, self.length = stream, min(n_ctx, len(stream) - 1)
        self.last_start = len(stream) - 1 - self.length
        self.count = min(count, self.last_start // self.length + 1)

    def rows(self, index: np.ndarray) -> np.ndarray:
        """Windows index (N,) → (N, T + 1) int64."""
        starts = index * self.last_start // max(1, self.count - 1)
        return np.stack([self.stream.read(int(start), self.length + 1) for start in starts])


class RepeatRows:
    """Synthetic rows: a block of distinct random tokens of `ids`, repeated to the end.

    The period, which is the length of the block, is drawn for each row.
    """

    def __init__(self, config: RepeatsConfig, n_ctx: int, ids: np.ndarray, seed: int,
                 stream: str = "repeats"):
        shortest, longest = config.period
        self.periods = np.array([period for period in range(shortest, longest + 1)
                                 if period not in config.held_out_periods])
        self.vocabulary, _ = repeat_vocabulary(config, ids, seed)
        if len(self.vocabulary) < longest:
            raise UserError(f"data.repeats.period={config.period} needs blocks of {longest} "
                            f"distinct tokens, there are {len(self.vocabulary)} to draw from")
        self.n_ctx, self.seed, self.stream = n_ctx, seed, stream

    def rows(self, index: np.ndarray) -> np.ndarray:
        """Rows index (N,) → (N, T + 1) int64."""
        return np.stack([self.row(int(i)) for i in index])

    def row(self, index: int) -> np.ndarray:
        key = random_key(self.seed, self.stream, index)
        generator = np.random.Generator(np.random.Philox(key=key))
        period = generator.choice(self.periods)
        block = generator.choice(self.vocabulary, size=period, replace=False)
        return np.resize(block, self.n_ctx + 1).astype(np.int64)


class BegunRows:
    """The rows of another source, a `fraction` of them behind the token that begins a text.

    Which ones is drawn for each row. If one source's rows begin with that token and another's do
    not, then a model learns to tell the sources apart by their first token, and what it learned
    from one may show only behind that token (docs/studies/begin_token.md).
    """

    def __init__(self, source: Source, begin: int, fraction: float, seed: int, stream: str):
        self.source, self.begin, self.fraction = source, begin, fraction
        self.seed, self.stream = seed, stream

    def rows(self, index: np.ndarray) -> np.ndarray:
        """Rows index (N,) → (N, T + 1) int64."""
        rows = self.source.rows(index)
        begun = np.array([self.begins(int(i)) for i in index])
        rows[begun, 1:] = rows[begun, :-1]
        rows[begun, 0] = self.begin
        return rows

    def begins(self, index: int) -> bool:
        draw = random_key(self.seed, f"begin {self.stream}", index)         # 128 random bits
        return draw < self.fraction * 2 ** 128


def repeat_vocabulary(config: RepeatsConfig, ids: np.ndarray,
                      seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids that training repeats, ids held out of it), of a tokenizer's ordinary `ids`."""
    ids = ids[:config.n_tokens]
    order = permute(np.arange(len(ids)), len(ids), random_key(seed, "held-out tokens", 0))
    held_out = order < int(len(ids) * config.held_out_tokens)
    return ids[~held_out], ids[held_out]


# --- random, but looked up ------------------------------------------------------------------------

def permute(index: np.ndarray, size: int, key: int) -> np.ndarray:
    """A random permutation of 0 … size − 1, chosen by `key`, applied to `index` (N,).

    It needs no table: a Feistel network permutes 0 … 4^b − 1, the smallest such range that holds
    `size`. An output outside 0 … size − 1 goes through the network again until it is inside (cycle
    walking; Black and Rogaway 2002, method 3).
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)           # b, the bits of each half
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    round_keys = [np.uint64(random_key(key, "round", r) & 0xFFFFFFFFFFFFFFFF) for r in range(6)]
    permuted = index.astype(np.uint64)
    outside = np.ones(len(permuted), dtype=bool)
    while outside.any():
        left, right = permuted[outside] >> shift, permuted[outside] & mask
        for round_key in round_keys:
            left, right = right, left ^ (_mix(right + round_key) & mask)
        permuted[outside] = left << shift | right
        outside = permuted >= size
    return permuted.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele et al. 2014): every input bit changes every output bit."""
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


def random_key(seed: int, stream: str, index: int) -> int:
    """128 random bits for item `index` of a named stream; streams of one seed are independent."""
    digest = hashlib.blake2b(f"{seed}/{stream}/{index}".encode(), digest_size=16).digest()
    return int.from_bytes(digest, "big")
