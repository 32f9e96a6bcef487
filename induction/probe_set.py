"""Which probes a run is measured on: what its training never repeated, as far as that is known."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.batches import repeat_vocabulary
from data.config import SHORTEST_PERIOD, DataConfig
from data.tokenizer import Tokenizer
from induction.probes import (
    ROWS,
    SHORTEST_CONTEXT,
    Pair,
    Probe,
    aperiodic,
    repeats,
    unrepeated,
)

FULL_ROWS_CONTEXT = 256                 # longer contexts get fewer rows
SHORTEST_USEFUL = 8     # with a shorter period every query has many matches, so scores say little


class Training(NamedTuple):
    """A config's data and seed: what was trained on, by a run or by an ancestor of it."""

    data: DataConfig
    seed: int


class Probes(NamedTuple):
    """All probes of a run."""

    periodic: Pair                  # known tokens, on periods never trained if there are any
    aperiodic: Pair                 # known tokens
    trained: Pair | None            # periodic, on periods that training repeats, if any
    unseen_tokens: Pair | None      # aperiodic, of tokens that training never repeats, if it holds
                                    # some out
    unrepeated: Tensor              # (B, 1 + n) distinct random tokens, for `copying`
    never_trained: bool             # whether no period of `periodic` was trained
    repeats_trained: bool           # whether training repeats anything
    history_known: bool             # False: the weights were trained before, nobody knows on what
    vocabulary: int                 # how many tokens training repeats: guessing among them is the
                                    # measure for every probe, also for `unseen_tokens`
    note: str                       # which periods `periodic` has, in words

    @property
    def scored(self) -> Probe:
        """The rows on which heads are scored during training."""
        return self.periodic.begun

    def to(self, device: torch.device) -> "Probes":
        return Probes._make(part.to(device) if isinstance(part, (Pair, Probe, Tensor)) else part
                            for part in self)


def probes_of(data: DataConfig, n_ctx: int, tokenizer: Tokenizer, seed: int, most: int = ROWS,
              before: Sequence[Training] | None = ()) -> Probes | None:
    """The probes for a run with this data, `most` rows each. Contexts above 256 tokens get fewer
    rows (at least a quarter): fewer give the same precision there, and each costs more.

    `before`: what the weights were trained on before this run; None if that is unknown. None if
    the context is too short to repeat anything (fewer than SHORTEST_CONTEXT tokens).
    """
    ids = tokenizer.ordinary_ids
    trainings = [Training(data, seed), *(before or ())]
    known, unseen = repeated_ids(trainings, ids)
    longest = min((n_ctx - 1) // 2, len(known))         # it must fit twice after the first token
    fitting = list(range(SHORTEST_PERIOD, longest + 1))
    if n_ctx < SHORTEST_CONTEXT or not fitting:
        return None
    trained = sorted({period for training in trainings
                      for period in trained_periods(training.data, fitting)})
    held_out = held_out_periods(data, fitting, trained)
    scored = held_out or trained
    rows = min(most, max(most // 4, FULL_ROWS_CONTEXT * most // n_ctx))

    def periodic(periods: list[int]) -> Pair:
        n_rows = max(rows, len(held_out))               # at least one row of each scored period
        return Pair(*(repeats(periods, n_ctx, known, begin, rows=n_rows, seed=seed)
                      for begin in (tokenizer.begin, None)))

    def segments_of(vocabulary: np.ndarray) -> Pair:
        return Pair(*(aperiodic(n_ctx, vocabulary, begin, rows=rows, seed=seed)
                      for begin in (tokenizer.begin, None)))

    return Probes(
        periodic=periodic(scored), aperiodic=segments_of(known),
        trained=periodic(trained) if trained else None,
        unseen_tokens=segments_of(unseen) if len(unseen) >= SHORTEST_PERIOD else None,
        unrepeated=unrepeated(n_ctx, known, tokenizer.begin, rows=rows, seed=seed),
        never_trained=bool(held_out) and before is not None,
        repeats_trained=any("repeats" in training.data.corpora for training in trainings),
        history_known=before is not None, vocabulary=len(known),
        note=describe_periods(held_out, trained, history_known=before is not None))


def repeated_ids(trainings: Sequence[Training], ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(ids that the first of `trainings`, the run itself, repeats; ids that none of them does), of
    a tokenizer's ordinary `ids`."""
    run, *before = trainings
    known, unseen = repeat_vocabulary(run.data.repeats, ids, run.seed)
    for training in before:
        if "repeats" in training.data.corpora:
            repeated, _ = repeat_vocabulary(training.data.repeats, ids, training.seed)
            unseen = unseen[~np.isin(unseen, repeated)]
    return known, unseen


def trained_periods(data: DataConfig, fitting: list[int]) -> list[int]:
    """The periods of `fitting` that training repeats."""
    if "repeats" not in data.corpora:
        return []
    shortest, longest = data.repeats.period
    in_range = [p for p in fitting if shortest <= p <= longest]
    return [p for p in in_range if p not in data.repeats.held_out_periods]


def held_out_periods(data: DataConfig, fitting: list[int], trained: list[int]) -> list[int]:
    """The periods of `fitting` to score on: those that the config holds out; if it names none, up
    to four untrained ones, evenly spread; none if every period is trained.

    A period with a multiple or a divisor among the trained ones tells less: looking back by 24
    meets period 12 and period 8 too. Such periods are chosen only if there are no others.
    """
    untrained = [p for p in fitting if p not in trained]
    if named := [p for p in data.repeats.held_out_periods if p in untrained]:
        return named
    unrelated: list[int] = []
    for period in reversed(untrained):                  # long periods have fewer multiples
        if period >= SHORTEST_USEFUL and not related(period, [*trained, *unrelated]):
            unrelated.insert(0, period)
    candidates = unrelated or [p for p in untrained if p >= SHORTEST_USEFUL] or untrained
    if not candidates:
        return []
    every = -(-len(candidates) // 4)                    # rounded up
    return candidates[::every]


def related(period: int, others: Sequence[int]) -> list[int]:
    """Those of `others` that are a multiple or a divisor of a period."""
    return [other for other in others if other % period == 0 or period % other == 0]


def describe_periods(held_out: list[int], trained: list[int], history_known: bool) -> str:
    """The probe in words, for the head of a table."""
    if not held_out:
        return (f"random tokens, periods {listed(trained)}: every period that fits was trained on")
    nothing = "training repeats nothing" if history_known else "no repeats were trained here"
    reason = "held out of training" if trained else nothing
    if close := [period for period in held_out if related(period, trained)]:
        reason += f"; of {listed(close)} a multiple or a divisor was trained"
    if not history_known:
        reason += "; what the weights were trained on before is unknown"
    return f"random tokens, periods {listed(held_out)} ({reason})"


def listed(periods: list[int]) -> str:
    if len(periods) > 6:
        return f"{periods[0]} to {periods[-1]}"
    return ", ".join(map(str, periods))
