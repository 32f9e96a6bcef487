"""What heads are shown to be measured: fixed, seeded sequences that training never draws."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.batches import Batch, random_key, repeat_row, repeat_vocabulary
from data.config import DataConfig
from data.tokenizer import Tokenizer

ROWS = 16               # of a probe: enough for scores to ±0.01, at the cost of a few milliseconds on a small model
UNREPEATED = 25         # random tokens on which copying is measured, as in Olsson et al. 2022


class Repeats(NamedTuple):
    """Rows of [begin] + a block of distinct random tokens, again and again to the end of the row."""

    tokens: Tensor          # (B, T)
    periods: Tensor         # (B,) length of each row's block

    @property
    def batch(self) -> Batch:
        """What a model reads and what it is asked for."""
        return Batch(self.tokens[:, :-1], self.tokens[:, 1:])

    @property
    def queries(self) -> Tensor:
        """Where a head can know what comes next: the second and later copies, (B, T) bool."""
        return self._position > self.periods[:, None]

    @property
    def first_copy(self) -> Tensor:
        """Which of the targets tokens[:, 1:] lie in the first copy: (B, T − 1) bool."""
        return self._position[1:] <= self.periods[:, None]

    @property
    def second_copy(self) -> Tensor:
        """Which lie in the second, its first token left out: nothing says that the block ends there. (B, T − 1) bool."""
        return (self._position[1:] > self.periods[:, None] + 1) & (self._position[1:] <= 2 * self.periods[:, None])

    def example(self, length: int) -> tuple[Tensor, str]:
        """A row that shows about three copies in `length` tokens, cut to them, and what it is: ids (T,) and a title."""
        row = int((self.periods - min(length, self.tokens.shape[1]) / 3).abs().argmin())
        return self.tokens[row, :length], f"random tokens, period {self.periods[row]}"

    @property
    def _position(self) -> Tensor:
        return torch.arange(self.tokens.shape[1], device=self.tokens.device)

    def to(self, device: torch.device) -> "Repeats":
        return Repeats(self.tokens.to(device), self.periods.to(device))


def repeats(periods: Sequence[int], length: int, vocabulary: np.ndarray, begin: int, *, rows: int = ROWS, seed: int = 0) -> Repeats:
    """`rows` rows of `length` tokens; row r repeats a block of periods[r mod …] tokens drawn from `vocabulary` without replacement.

    Raises ValueError where the vocabulary has too few tokens for the longest block.
    """
    if len(vocabulary) < max(periods):
        raise ValueError(f"a block of {max(periods)} distinct tokens cannot be drawn from {len(vocabulary)}")
    chosen = [periods[r % len(periods)] for r in range(rows)]
    made = []
    for r, period in enumerate(chosen):
        draw = np.random.Generator(np.random.Philox(key=random_key(seed, f"probe {period}", r)))
        made.append(repeat_row(begin, draw.choice(vocabulary, size=period, replace=False), length - 1))
    return Repeats(torch.from_numpy(np.stack(made)), torch.tensor(chosen))


def unrepeated(length: int, vocabulary: np.ndarray, begin: int, *, rows: int = ROWS, seed: int = 0) -> Tensor:
    """[begin] + distinct random tokens, (rows, at most length)."""
    period = min(length - 1, len(vocabulary), UNREPEATED)
    return repeats([period], 1 + period, vocabulary, begin, rows=rows, seed=seed).tokens


class Probes(NamedTuple):
    """The probes of a run: those it is scored on while it trains, and those the verdict asks for besides."""

    held_out: Repeats               # periods that training never repeats; where it repeats every one that fits, those
    never_trained: bool             # which of the two
    trained: Repeats | None         # periods that it does, where it repeats any
    unseen_tokens: Repeats | None   # held-out periods of tokens that training never repeats, where some are held out
    unrepeated: Tensor
    note: str                       # which periods these are

    def to(self, device: torch.device) -> "Probes":
        return Probes._make(part.to(device) if isinstance(part, (Repeats, Tensor)) else part for part in self)


def probes_of(data: DataConfig, n_ctx: int, tokenizer: Tokenizer, seed: int, most: int = ROWS) -> Probes | None:
    """The probes for a run with this data, `most` rows or about 256 tokens for each, at least four; None where its context is too short
    to repeat anything (fewer than 7 tokens)."""
    rows = min(most, max(4, 256 * most // n_ctx))               # of a long context few say as much, and each costs more
    fits = list(range(3, (n_ctx - 1) // 2 + 1))                 # the periods that fit twice behind the first token
    known, unseen = repeat_vocabulary(data.repeats, tokenizer.ordinary_ids, seed)
    fits = [period for period in fits if period <= len(known)]
    if not fits:
        return None
    trains = "repeats" in data.corpora
    in_training = [p for p in fits if trains and data.repeats.period[0] <= p <= data.repeats.period[1]
                   and p not in data.repeats.held_out_periods]
    held_out = [p for p in data.repeats.held_out_periods if p in fits]
    if not held_out:                                            # none named: four of the others, spread evenly
        others = [p for p in fits if p not in in_training]
        others = [p for p in others if p >= 8] or others        # the shortest say least: matches crowd there
        held_out = others[::-(-len(others) // 4)] if others else []
    note = (f"random tokens, periods {_listed(held_out)}" + (" (held out of training)" if in_training else " (training repeats nothing)")
            if held_out else f"random tokens, periods {_listed(in_training)}: every period that fits was trained on")
    shown = held_out or in_training

    def of(periods: list[int], vocabulary: np.ndarray) -> Repeats | None:
        periods = [p for p in periods if p <= len(vocabulary)]
        return repeats(periods, n_ctx, vocabulary, tokenizer.begin, rows=rows, seed=seed) if periods else None

    scored = of(shown, known)
    assert scored is not None                                   # the periods shown are of those that fit
    return Probes(scored, bool(held_out), of(in_training, known), of(shown, unseen),
                  unrepeated(n_ctx, known, tokenizer.begin, rows=rows, seed=seed), note)


def _listed(periods: list[int]) -> str:
    if len(periods) > 6:
        return f"{periods[0]} to {periods[-1]}"
    return ", ".join(map(str, periods))
