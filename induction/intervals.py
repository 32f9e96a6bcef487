"""95% confidence intervals: over the rows of a probe, over windows of text, over seeds.

A score is a mean over rows that were drawn at random, and another draw gives another number. Its
interval holds, for 95% of all draws, the mean over every row that could have been drawn. It says
nothing about other seeds of training: only several runs do (`over_seeds`).
`python -m bench.coverage` checks this on models small enough to know the truth.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit
from torch import Tensor

LEVEL = 0.95
RESAMPLES = 1000
LEAST_UNITS = 5         # fewer say too little: intervals would be too narrow
SMALLEST_ERROR = 0.2    # least standard error of a draw, in those of the estimate: if only one row
                        # fails, draws without it have none, and the interval would have no end
Statistic = Callable[..., np.ndarray]       # of means (…), an array of the same shape
NO_LIMITS, FRACTION, NONNEGATIVE = (-np.inf, np.inf), (0.0, 1.0), (0.0, np.inf)


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


class Bounds(NamedTuple):
    """Of many numbers: arrays of one shape."""

    low: np.ndarray
    high: np.ndarray


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

    The studentised bootstrap (Efron and Tibshirani 1993, "An Introduction to the Bootstrap",
    section 12.5): the distribution of (draw − estimate) / (standard error of that draw) says how
    many standard errors the truth may be away on either side. So a loss that a few rows make large
    gets an interval that reaches further up than down. Rows of several kinds (strata, here periods)
    are drawn kind by kind, as many of each as there are. Standard errors are linear in each row's
    influence on the number.
    """

    def __init__(self, units: Sequence[int], strata: Sequence[int]):
        """units     (B,) which draw each row comes from: rows with the same blocks go together
        strata       (B,) the kind of each row
        """
        self.units, self.strata = np.array(units), np.array(strata)

    @classmethod
    def of_rows(cls, n: int) -> "Resampling":
        """Of `n` rows of one kind: windows of text, a user's rows."""
        return cls(range(n), [0] * n)

    def bounds(self, statistic: Statistic, *rows: RowSums,
               limits: tuple[float, float] = NO_LIMITS) -> Bounds:
        """The interval of a function of means over the same rows, within the limits of what it can
        be; NaN if it is unknown. Rows in which nothing counts say nothing, and fewer than
        LEAST_UNITS draws are too few."""
        parts = [row.sums for row in rows]
        parts += [np.broadcast_to(row.counts, row.sums.shape) for row in rows]
        by_row = np.stack(parts, axis=-2)                               # (…, 2 · means, B)
        counts = by_row[..., len(rows):, :]
        counting = (counts > 0).any(tuple(range(counts.ndim - 1)))
        draws = resampled(tuple(self.units[counting]), tuple(self.strata[counting]))
        if draws.weights.shape[1] < LEAST_UNITS:
            unknown = np.full(by_row.shape[:-2], np.nan)
            return Bounds(unknown, unknown)
        units = by_row[..., counting] @ draws.unit_of_row               # (…, 2 · means, units)
        once = np.ones((1, units.shape[-1]))
        with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)             # losses that are not finite
            estimate, error = with_error(statistic, units, draws.members, once)         # (…, 1)
            drawn, errors = with_error(statistic, units, draws.members, draws.weights)
            t = (drawn - estimate) / np.maximum(errors, SMALLEST_ERROR * error)
            t = np.where(error == 0, 0, t)                              # all rows are alike
            below, above = np.nanquantile(t, [(1 + LEVEL) / 2, (1 - LEVEL) / 2], axis=-1)
        estimate, error = estimate[..., 0], error[..., 0]
        low = np.clip(estimate - below * error, *limits)
        high = np.clip(estimate - above * error, *limits)
        if limits == FRACTION:
            # Nothing failed, or everything: what fails less often than this may not have been seen.
            seldom = 1 - ((1 - LEVEL) / 2) ** (1 / np.maximum(counts[..., 0, :].sum(-1), 1))
            low = np.where((error == 0) & (estimate == 1), 1 - seldom, low)
            high = np.where((error == 0) & (estimate == 0), seldom, high)
        return Bounds(low, high)

    def estimate(self, statistic: Statistic, *rows: RowSums,
                 limits: tuple[float, float] = NO_LIMITS) -> Estimate:
        """A function of means over the same rows, with its interval."""
        low, high = self.bounds(statistic, *rows, limits=limits)
        return Estimate(float(statistic(*[row.mean for row in rows])), float(low), float(high))

    def mean(self, rows: RowSums, limits: tuple[float, float] = NO_LIMITS) -> Estimate:
        return self.estimate(identity, rows, limits=limits)

    def difference(self, after: RowSums, before: RowSums) -> Estimate:
        """after − before, on the same rows."""
        return self.estimate(np.subtract, after, before)


def identity(mean: np.ndarray) -> np.ndarray:
    return mean


def with_error(statistic: Statistic, units: np.ndarray, members: list[np.ndarray],
               weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(a function of means, its standard error) for each row of `weights` (R, units): (…, R) each.
    `units` (…, 2 · means, units): the sums, then the counts, of each unit; `members`: the units of
    each kind."""
    totals = np.moveaxis(units @ weights.T, -2, 0)                      # (2 · means, …, R)
    sums, counts = np.split(totals, 2)
    means = sums / counts
    slopes = np.stack([slope(statistic, means, k) for k in range(len(means))])
    # How much one more of each sum, and of each count, changes the number: (…, R, 2 · means).
    influence = np.moveaxis(np.concatenate([slopes / counts, -slopes * means / counts]), 0, -1)
    products = units[..., :, None, :] * units[..., None, :, :]
    variance = np.zeros(totals.shape[1:])
    for kind in members:
        n, weight = len(kind), weights[:, kind].T                       # (n, R)
        first = np.einsum("...rk,...kr->...r", influence, units[..., kind] @ weight)
        second = np.einsum("...rk,...rl,...klr->...r", influence, influence,
                           products[..., kind] @ weight)
        variance += n / (n - 1) * np.maximum(second - first ** 2 / n, 0)
    return statistic(*means), np.sqrt(variance)


def slope(statistic: Statistic, means: np.ndarray, k: int) -> np.ndarray:
    """The derivative of a function of means (K, …) by the mean k."""
    step = np.zeros_like(means)
    step[k] = 1e-6 * (1 + np.abs(means[k]))
    return (statistic(*(means + step)) - statistic(*(means - step))) / (2 * step[k])


class Draws(NamedTuple):
    unit_of_row: np.ndarray     # (B, units) one-hot
    members: list[np.ndarray]   # the units of each kind
    weights: np.ndarray         # (RESAMPLES, units) how often each unit is in a draw


@lru_cache(maxsize=64)
def resampled(units: tuple[int, ...], strata: tuple[int, ...]) -> Draws:
    """Draws from a fixed seed."""
    draw = np.random.default_rng(0)
    if not units:
        return Draws(np.zeros((0, 0)), [], np.zeros((RESAMPLES, 0)))
    names, unit_of_row = np.unique(units, return_inverse=True)
    stratum = np.empty(len(names), int)
    stratum[unit_of_row] = strata
    if np.unique(stratum, return_counts=True)[1].min() < 2:     # a kind with a single unit
        stratum[:] = 0
    members = [np.flatnonzero(stratum == kind) for kind in np.unique(stratum)]
    weights = np.zeros((RESAMPLES, len(names)))
    for kind in members:
        n = len(kind)
        weights[:, kind] = draw.multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    return Draws(np.eye(len(names))[unit_of_row], members, weights)


# --- over seeds -----------------------------------------------------------------------------------

def students_t(degrees: int) -> float:
    """The t that |T| does not exceed with probability LEVEL, for Student's T."""
    return float(stdtrit(degrees, (1 + LEVEL) / 2))


def over_seeds(values: Sequence[float], limits: tuple[float, float] = NO_LIMITS) -> Estimate:
    """The mean of one number per seed, and the interval of that mean by Student's t, within the
    limits of what it can be. It supposes that seeds scatter about normally: of numbers near a
    limit, or that jump, look at each seed."""
    seeds = np.array([float(value) for value in values])
    mean = seeds.mean()
    if len(seeds) < 2:
        return Estimate(mean)
    half = students_t(len(seeds) - 1) * seeds.std(ddof=1) / len(seeds) ** 0.5
    return Estimate(mean, *np.clip([mean - half, mean + half], *limits))
