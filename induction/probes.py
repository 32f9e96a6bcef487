"""The inputs on which heads are measured: fixed, seeded sequences that training never draws."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.batches import Batch, random_key, repeat_vocabulary
from data.config import SHORTEST_PERIOD, DataConfig
from data.tokenizer import Tokenizer

SHORTEST_CONTEXT = 1 + 2 * SHORTEST_PERIOD       # the first token, and the shortest block twice
FULL_ROWS_CONTEXT = 256                 # longer contexts get fewer rows
ROWS = 16               # of a probe: enough for scores within ±0.01; takes a few milliseconds
UNREPEATED = 25         # random tokens in a row that measures copying, as in Olsson et al. 2022


class Repeats(NamedTuple):
    """Rows of [begin] + a block of distinct random tokens, repeated to the end of the row."""

    tokens: Tensor          # (B, T)
    periods: Tensor         # (B,) length of each row's block

    @property
    def batch(self) -> Batch:
        """The rows as model inputs and next-token targets, (B, T − 1) each."""
        return Batch(self.tokens[:, :-1], self.tokens[:, 1:])

    @property
    def queries(self) -> Tensor:
        """The positions whose token occurred before, so that a head can know what comes next: the
        second and later copies, (B, T) bool."""
        return self._positions > self.periods[:, None]

    @property
    def first_copy(self) -> Tensor:
        """The targets tokens[:, 1:] that belong to the first copy: (B, T − 1) bool."""
        return self._positions[1:] <= self.periods[:, None]

    @property
    def second_copy(self) -> Tensor:
        """The targets that belong to the second copy, without its first token, which cannot be
        predicted: nothing tells the model that the block ends there. (B, T − 1) bool."""
        targets, periods = self._positions[1:], self.periods[:, None]
        return (targets > periods + 1) & (targets <= 2 * periods)

    def example(self, length: int) -> tuple[Tensor, str]:
        """The row that shows about three copies in `length` tokens, cut to that length, and a title
        for it: ids (T,) and text."""
        copies_of = min(length, self.tokens.shape[1]) / 3
        row = int((self.periods - copies_of).abs().argmin())
        return self.tokens[row, :length], f"random tokens, period {self.periods[row]}"

    @property
    def _positions(self) -> Tensor:
        return torch.arange(self.tokens.shape[1], device=self.tokens.device)

    def to(self, device: torch.device) -> "Repeats":
        return Repeats(self.tokens.to(device), self.periods.to(device))


def repeats(periods: Sequence[int], length: int, vocabulary: np.ndarray, begin: int, *,
            rows: int = ROWS, seed: int = 0) -> Repeats:
    """`rows` rows of `length` tokens. Row r has period periods[r mod len(periods)]; its block is
    drawn from `vocabulary` without replacement.

    Raises ValueError if the vocabulary has too few tokens for the longest block.
    """
    if len(vocabulary) < max(periods):
        raise ValueError(f"a block of {max(periods)} distinct tokens cannot be drawn from "
                         f"{len(vocabulary)}")
    row_periods = [periods[r % len(periods)] for r in range(rows)]
    tokens = []
    for r, period in enumerate(row_periods):
        draw = np.random.Generator(np.random.Philox(key=random_key(seed, f"probe {period}", r)))
        block = draw.choice(vocabulary, size=period, replace=False)
        tokens.append(np.array([begin, *np.resize(block, length - 1)], dtype=np.int64))
    return Repeats(torch.from_numpy(np.stack(tokens)), torch.tensor(row_periods))


def unrepeated(length: int, vocabulary: np.ndarray, begin: int, *, rows: int = ROWS,
               seed: int = 0) -> Tensor:
    """[begin] + distinct random tokens: (rows, T), T ≤ `length` and ≤ 1 + UNREPEATED."""
    period = min(length - 1, len(vocabulary), UNREPEATED)
    return repeats([period], 1 + period, vocabulary, begin, rows=rows, seed=seed).tokens


class Probes(NamedTuple):
    """The probes of a run. `scored` and `unrepeated` are measured during training, the others
    only for the verdict."""

    scored: Repeats                 # periods that training never repeats, if it leaves any
    never_trained: bool             # False if it leaves none: then `scored` has trained periods
    trained: Repeats | None         # periods that training repeats, if any
    unseen_tokens: Repeats | None   # tokens that training never repeats, if any are held out
    unrepeated: Tensor              # (B, 1 + n) distinct random tokens, for `copying`
    note: str                       # which periods `scored` has, in words

    def to(self, device: torch.device) -> "Probes":
        return Probes._make(part.to(device) if isinstance(part, (Repeats, Tensor)) else part
                            for part in self)


def probes_of(data: DataConfig, n_ctx: int, tokenizer: Tokenizer, seed: int,
              most: int = ROWS) -> Probes | None:
    """The probes for a run with this data, `most` rows each. Contexts above 256 tokens get fewer
    rows (at least four): fewer give the same precision there, and each costs more.

    None if the context is too short to repeat anything (fewer than SHORTEST_CONTEXT tokens).
    """
    known, unseen = repeat_vocabulary(data.repeats, tokenizer.ordinary_ids, seed)
    longest = min((n_ctx - 1) // 2, len(known))         # it must fit twice after the first token
    fitting = list(range(SHORTEST_PERIOD, longest + 1))
    if not fitting:
        return None
    trained = trained_periods(data, fitting)
    held_out = held_out_periods(data, fitting, trained)
    scored = held_out or trained
    rows = min(most, max(4, FULL_ROWS_CONTEXT * most // n_ctx))

    def probe(periods: list[int], vocabulary: np.ndarray) -> Repeats | None:
        periods = [p for p in periods if p <= len(vocabulary)]
        if not periods:
            return None
        return repeats(periods, n_ctx, vocabulary, tokenizer.begin, rows=rows, seed=seed)

    return Probes(repeats(scored, n_ctx, known, tokenizer.begin, rows=rows, seed=seed),
                  bool(held_out), probe(trained, known), probe(scored, unseen),
                  unrepeated(n_ctx, known, tokenizer.begin, rows=rows, seed=seed),
                  describe_periods(held_out, trained))


def trained_periods(data: DataConfig, fitting: list[int]) -> list[int]:
    """The periods of `fitting` that training repeats."""
    if "repeats" not in data.corpora:
        return []
    shortest, longest = data.repeats.period
    in_range = [p for p in fitting if shortest <= p <= longest]
    return [p for p in in_range if p not in data.repeats.held_out_periods]


def held_out_periods(data: DataConfig, fitting: list[int], trained: list[int]) -> list[int]:
    """The periods of `fitting` to score on: those that the config holds out; if it names none, four
    untrained ones, evenly spread; none if every period is trained."""
    if named := [p for p in data.repeats.held_out_periods if p in fitting]:
        return named
    untrained = [p for p in fitting if p not in trained]
    # The shortest periods tell least: every query then has many matches. Use them only if no other.
    untrained = [p for p in untrained if p >= 8] or untrained
    if not untrained:
        return []
    every = -(-len(untrained) // 4)                     # rounded up
    return untrained[::every]


def describe_periods(held_out: list[int], trained: list[int]) -> str:
    """The probe in words, for the head of a table."""
    if not held_out:
        return (f"random tokens, periods {_listed(trained)}: every period that fits was trained on")
    reason = "held out of training" if trained else "training repeats nothing"
    return f"random tokens, periods {_listed(held_out)} ({reason})"


def _listed(periods: list[int]) -> str:
    if len(periods) > 6:
        return f"{periods[0]} to {periods[-1]}"
    return ", ".join(map(str, periods))
