"""95% confidence intervals: over the rows of a probe, over windows of text, over seeds.

A score is a mean over rows that were drawn at random, and another draw gives another number. Its
interval holds, for 95% of all draws, the mean over every row that could have been drawn. It says
nothing about other seeds of training: only several runs do (`over_seeds`).
`python -m bench.coverage` checks this on models small enough to know the truth.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from scipy.special import ndtr, stdtrit
from torch import Tensor

LEVEL = 0.95
RESAMPLES = 2000
Statistic = Callable[..., np.ndarray]       # of means (…), an array of the same shape


class Estimate(float):
    """A measured number and its 95% interval. In arithmetic it is a plain float."""

    low: float              # NaN if the interval is unknown: a single row, or a single seed
    high: float

    def __new__(cls, value: float, low: float = np.nan, high: float = np.nan) -> "Estimate":
        estimate = super().__new__(cls, value)
        estimate.low, estimate.high = float(low), float(high)
        return estimate

    @property
    def has_interval(self) -> bool:
        return not np.isnan(self.low)


class RowSums(NamedTuple):
    """What a mean over rows is made of: for each row a sum, and how many numbers are in it."""

    sums: np.ndarray        # (…, B) float64
    counts: np.ndarray      # (B,), or of the shape of `sums` or broadcast to it

    @property
    def mean(self) -> np.ndarray:
        """(…)"""
        return self.sums.sum(-1) / np.maximum(self.counts.sum(-1), 1)

    def of_head(self, head: tuple[int, int]) -> "RowSums":
        """Of sums (L, H, B) those of one head: (B,)."""
        return RowSums(self.sums[head], np.broadcast_to(self.counts, self.sums.shape)[head])

    def of(self, selected: np.ndarray) -> "RowSums":
        """Of some of the rows: (B,) bool."""
        return RowSums(self.sums[..., selected], self.counts[..., selected])


def row_sums(values: Tensor, counted: Tensor) -> RowSums:
    """Of the values (B, T) that `counted` (B, T) bool selects, row by row; summed in float64 on
    the CPU (some devices have no float64)."""
    values, counted = values.cpu().double(), counted.cpu()
    return RowSums(values.masked_fill(~counted, 0).sum(1).numpy(), counted.sum(1).numpy())


class Resampling:
    """Repeated draws of the same rows with replacement. Everything that is estimated with one
    object uses the same draws, so a difference of two means is paired: row by row.

    A bootstrap for rows of several kinds, here periods (strata), of each of which as many are drawn
    as there are, less one (Rao and Wu 1988, "Resampling Inference with Complex Survey Data",
    section 2): then the variance of a mean is not underestimated. The percentiles are those at
    which a normal distribution has the two ends of Student's t (Hesterberg 2015, "What Teachers
    Should Know About the Bootstrap", section 4, "expanded percentile"): few rows, wider intervals.
    """

    def __init__(self, units: Sequence[int], strata: Sequence[int]):
        """units     (B,) which draw each row comes from: rows with the same blocks go together
        strata       (B,) the kind of each row
        """
        self.weights, degrees = resampled_weights(tuple(units), tuple(strata))
        self.tail = float(ndtr(-stdtrit(degrees, (1 + LEVEL) / 2))) if degrees else np.nan

    @classmethod
    def of_rows(cls, n: int) -> "Resampling":
        """Of `n` rows of one kind: windows of text, a user's rows."""
        return cls(range(n), [0] * n)

    def bounds(self, statistic: Statistic, *rows: RowSums) -> tuple[np.ndarray, np.ndarray]:
        """The interval of a function of means over the same rows: (low, high), NaN if unknown."""
        with np.errstate(divide="ignore", invalid="ignore"):
            draws = statistic(*[row.sums @ self.weights.T / (row.counts @ self.weights.T)
                                for row in rows])                               # (…, RESAMPLES)
            if np.isnan(self.tail):
                nothing = np.full(draws.shape[:-1], np.nan)
                return nothing, nothing
            low, high = np.nanquantile(draws, [self.tail, 1 - self.tail], axis=-1)
        return low, high

    def estimate(self, statistic: Statistic, *rows: RowSums) -> Estimate:
        """A function of means over the same rows, with its interval."""
        low, high = self.bounds(statistic, *rows)
        return Estimate(float(statistic(*[row.mean for row in rows])), float(low), float(high))

    def mean(self, rows: RowSums) -> Estimate:
        return self.estimate(identity, rows)

    def difference(self, after: RowSums, before: RowSums) -> Estimate:
        """after − before, on the same rows."""
        return self.estimate(np.subtract, after, before)


def identity(mean: np.ndarray) -> np.ndarray:
    return mean


@lru_cache(maxsize=64)
def resampled_weights(units: tuple[int, ...], strata: tuple[int, ...]) -> tuple[np.ndarray, int]:
    """How often each row counts in each draw, (RESAMPLES, B), and the degrees of freedom: units
    less strata; 0 if there are too few rows for an interval. Drawn from a fixed seed."""
    draw = np.random.default_rng(0)
    names, unit_of_row = np.unique(units, return_inverse=True)
    stratum = np.empty(len(names), int)
    stratum[unit_of_row] = strata
    if np.unique(stratum, return_counts=True)[1].min() < 2:     # a kind with a single unit
        stratum[:] = 0
    weights, degrees = np.ones((RESAMPLES, len(names))), 0
    for kind in np.unique(stratum):
        members = np.flatnonzero(stratum == kind)
        n = len(members)
        if n > 1:
            counts = draw.multinomial(n - 1, np.full(n, 1 / n), size=RESAMPLES)
            weights[:, members] = counts * n / (n - 1)
        degrees += n - 1
    return weights[:, unit_of_row], degrees


# --- over seeds -----------------------------------------------------------------------------------

def students_t(degrees: int) -> float:
    """The t that |T| does not exceed with probability LEVEL, for Student's T."""
    return float(stdtrit(degrees, (1 + LEVEL) / 2))


def over_seeds(values: Sequence[float]) -> Estimate:
    """The mean of one number per seed, and the interval of that mean by Student's t. It supposes
    that seeds scatter about normally: of numbers near a limit, or that jump, look at each seed."""
    seeds = np.array([float(value) for value in values])
    mean = seeds.mean()
    if len(seeds) < 2:
        return Estimate(mean)
    half = students_t(len(seeds) - 1) * seeds.std(ddof=1) / len(seeds) ** 0.5
    return Estimate(mean, mean - half, mean + half)
