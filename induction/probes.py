"""The inputs on which heads are measured: fixed, seeded rows of random tokens that training never
draws, of two kinds.

    periodic    A block of distinct tokens, repeated to the end of the row. Every query has the same
                distance to its target, so a model that looks back by that distance meets the row
                without knowing what it reads.
    aperiodic   A block of distinct tokens, then short segments of it in random order. No look-back
                of any fixed length, and no counting, tells what comes next: only finding the
                current token's earlier place does.

Each exists behind the token that begins a text and without it, because a model can learn to do
induction only behind that token (docs/studies/begin_token.md).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.batches import Batch, random_key
from induction.intervals import Resampling

SHORTEST_CONTEXT = 7            # the begin token, and the shortest block (3 tokens) twice
ROWS = 16               # of a probe: standard errors of scores are about 0.015
UNREPEATED = 25         # random tokens in a row that measures copying, as in Olsson et al. 2022
SEGMENTS = range(3, 8)  # lengths of the segments of an aperiodic row, in tokens


class Probe(NamedTuple):
    """Rows of random tokens that repeat, and which of their tokens can be known."""

    tokens: Tensor          # (B, T)
    blocks: Tensor          # (B,) length of each row's block
    periods: Tensor         # (B,) the same for periodic rows, 0 for aperiodic ones
    queries: Tensor         # (B, T) bool: tokens with an earlier copy that tells what follows
    first_copy: Tensor      # (B, T) bool: tokens of the block, where nothing is repeated yet
    known: Tensor           # (B, T − 1) bool: the targets tokens[:, 1:] that can be known
    draws: Tensor           # (B,) which draw of random tokens a row shows: 0, 1, 2 …

    @property
    def batch(self) -> Batch:
        """The rows as model inputs and next-token targets, (B, T − 1) each."""
        return Batch(self.tokens[:, :-1], self.tokens[:, 1:])

    @property
    def unknown(self) -> Tensor:
        """The targets that belong to the block, which nobody can know: (B, T − 1) bool."""
        return self.first_copy[:, 1:]

    @property
    def chance(self) -> float:
        """How often a random token of the block is the next one."""
        return (1 / self.blocks.double()).mean().item()

    @property
    def resampling(self) -> Resampling:
        """For the intervals of what is measured on these rows."""
        return Resampling(self.draws.tolist(), self.periods.tolist())

    def rows(self, index: Tensor | slice) -> "Probe":
        """Some of the rows: index (N,), (B,) bool, or a slice."""
        return Probe(*(part[index] for part in self))

    def example(self, length: int) -> tuple[Tensor, str]:
        """The row that shows about three copies in `length` tokens, cut to that length, and a title
        for it: ids (T,) and text."""
        copies_of = min(length, self.tokens.shape[1]) / 3
        row = int((self.blocks - copies_of).abs().argmin())
        return self.tokens[row, :length], f"random tokens, period {self.blocks[row]}"

    def to(self, device: torch.device) -> "Probe":
        return Probe(*(part.to(device) for part in self))


class Pair(NamedTuple):
    """The same rows behind the token that begins a text, and without it."""

    begun: Probe
    bare: Probe

    @property
    def both(self) -> Probe:
        """All rows as one probe: (2 B, T)."""
        return Probe(*map(torch.cat, zip(self.begun, self.bare)))

    def rows(self, index: Tensor | slice) -> "Pair":
        """Some of the rows, the same of both kinds."""
        return Pair(self.begun.rows(index), self.bare.rows(index))

    def to(self, device: torch.device) -> "Pair":
        return Pair(self.begun.to(device), self.bare.to(device))


# --- periodic rows --------------------------------------------------------------------------------

def repeats(periods: Sequence[int], length: int, vocabulary: np.ndarray, begin: int | None, *,
            rows: int = ROWS, seed: int = 0) -> Probe:
    """`rows` rows of `length` tokens, [begin] + a block of distinct tokens repeated. Row r has
    period periods[r mod len(periods)]; its block is drawn from `vocabulary` without replacement.

    What can be known is the second copy without its first token: nothing tells the model that the
    block ends there. Raises ValueError if the vocabulary has too few tokens for the longest block.
    """
    row_periods = [periods[r % len(periods)] for r in range(rows)]
    return periodic([draw_block(period, vocabulary, seed, f"probe {period}", r)
                     for r, period in enumerate(row_periods)], length, begin)


def periodic(blocks: Sequence[np.ndarray], length: int, begin: int | None) -> Probe:
    """Rows of `length` tokens, [begin] + one of the blocks (period,) repeated."""
    start = 0 if begin is None else 1
    tokens = np.empty((len(blocks), length), np.int64)
    if begin is not None:
        tokens[:, 0] = begin
    for row, block in zip(tokens, blocks):
        row[start:] = np.resize(block, length - start)
    periods = np.array([len(block) for block in blocks])
    position = np.arange(length) - start            # in what is repeated; −1 is the begin token
    second = (position > periods[:, None]) & (position < 2 * periods[:, None])
    return as_probe(tokens, periods, periods, queries=position >= periods[:, None],
                    first_copy=(position >= 0) & (position < periods[:, None]),
                    known=second[:, 1:])


def unrepeated(length: int, vocabulary: np.ndarray, begin: int, *, rows: int = ROWS,
               seed: int = 0) -> Tensor:
    """[begin] + distinct random tokens: (rows, T), T ≤ `length` and ≤ 1 + UNREPEATED."""
    period = min(length - 1, len(vocabulary), UNREPEATED)
    return repeats([period], 1 + period, vocabulary, begin, rows=rows, seed=seed).tokens


def draw_block(size: int, vocabulary: np.ndarray, seed: int, stream: str, row: int) -> np.ndarray:
    """Distinct random tokens: (size,). Raises ValueError if there are too few."""
    if len(vocabulary) < size:
        raise ValueError(f"a block of {size} distinct tokens cannot be drawn from "
                         f"{len(vocabulary)}")
    draw = np.random.Generator(np.random.Philox(key=random_key(seed, stream, row)))
    return draw.choice(vocabulary, size=size, replace=False)


def as_probe(tokens: np.ndarray, blocks: np.ndarray, periods: np.ndarray, queries: np.ndarray,
             first_copy: np.ndarray, known: np.ndarray) -> Probe:
    draws = np.arange(len(tokens))
    return Probe(*map(torch.from_numpy, (tokens, blocks, periods, queries, first_copy, known,
                                         draws)))


# --- aperiodic rows -------------------------------------------------------------------------------

def aperiodic(length: int, vocabulary: np.ndarray, begin: int | None, *, rows: int = ROWS,
              seed: int = 0) -> Probe:
    """`rows` rows of `length` tokens, [begin] + a block of distinct tokens + segments of it.

    The block takes a quarter to a half of the row. What can be known is what lies inside a segment;
    where a segment begins cannot. Raises ValueError if a row is shorter than SHORTEST_CONTEXT, or
    the vocabulary has fewer than 3 tokens.
    """
    if length < SHORTEST_CONTEXT or len(vocabulary) < 3:
        raise ValueError(f"an aperiodic row needs {SHORTEST_CONTEXT} tokens and 3 different ones, "
                         f"there are {length} and {len(vocabulary)}")
    start = 0 if begin is None else 1
    tokens, inside = np.empty((rows, length), np.int64), np.zeros((rows, length), bool)
    if begin is not None:
        tokens[:, 0] = begin
    blocks = np.empty(rows, np.int64)
    longest = min((length - 1) // 2, len(vocabulary))
    for r in range(rows):
        draw = np.random.Generator(np.random.Philox(key=random_key(seed, "segments", r)))
        blocks[r] = draw.integers(max(3, min(length // 4, longest)), longest + 1)
        block = draw_block(blocks[r], vocabulary, seed, "aperiodic", r)
        places, inside_row = segments(blocks[r], length, draw)
        tokens[r, start:] = block[places][:length - start]      # the same with `begin` and without
        inside[r, start:] = inside_row[:length - start]
    position = np.arange(length) - start
    queries = np.pad(inside[:, 1:], ((0, 0), (0, 1)))       # the next token is inside a segment
    return as_probe(tokens, blocks, np.zeros_like(blocks), queries=queries,
                    first_copy=(position >= 0) & (position < blocks[:, None]),
                    known=inside[:, 1:])


def segments(block: int, room: int, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """For each of `room` tokens its place in the block, and whether it follows the token before it
    in the same segment: (room,) each.

    No two segments of a row are at the same distance from the block, as far as there are enough
    places, and none continues the one before it: so no look-back meets more than one segment.
    """
    places, inside = list(range(block)), [False] * block
    distances: set[int] = set()
    while len(places) < room:
        size = min(int(draw.choice(SEGMENTS)), block - 1)
        begins = [place for place in range(block - size + 1)
                  if place != (places[-1] + 1) % block]
        new = [place for place in begins if len(places) - place not in distances]
        place = int(draw.choice(new or begins))
        distances.add(len(places) - place)
        places += range(place, place + size)
        inside += [False] + [True] * (size - 1)
    return np.array(places[:room]), np.array(inside[:room])
