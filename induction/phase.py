"""When heads formed: the transition in a score's curve over training, in tokens."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from induction.intervals import Estimate, students_t

INDUCTION_HEAD = 0.4        # prefix matching from which a head counts as an induction head
LEVELS = (0.3, 0.4, 0.5)    # other thresholds, to show how much the moment depends on the choice
Values = Sequence[float] | np.ndarray


class Transition(NamedTuple):
    """Moments in the units of the x axis (tokens, or steps). Those at which the curve crosses a
    level have the two measurements around them as their bounds: of one run no more is known."""

    onset: Estimate                         # the curve leaves the first tenth of its rise for good
    end: Estimate                           # the curve first enters the last tenth of its rise
    final: float                            # mean of the last tenth of the measurements
    crossings: dict[float, Estimate | None]     # level of LEVELS → where the curve first reaches it
    peak: float                             # the highest value; one alone counts as noise
    peak_at: float
    faded: float | None                     # after its peak the curve falls below half of its rise
                                            # for good; None if it is still there at the end

    @property
    def height(self) -> float:
        """Where the rise leads: to the final score, or to the peak of a curve that faded."""
        return self.final if self.faded is None else self.peak


def transition(at: Values, scores: Values, least: float = INDUCTION_HEAD) -> Transition | None:
    """The transition of a curve that ends at `least` or higher, or that was there before, in two
    measurements in a row, and faded (Singh et al. 2023); None for any other curve.

    Its rise is from the first measurement to the final score, or to the peak if it faded. Linear
    between measurements.
    """
    x, y = np.asarray(at, float), np.asarray(scores, float)
    if len(y) == 0:
        return None
    last_tenth = max(1, len(y) // 10)
    final = float(y[-last_tenth:].mean())
    formed = in_a_row(y >= least)
    if final >= least:                                      # as its last measurements are a mean
        formed[-last_tenth:] = True
    if not formed.any() or not np.isfinite(final):
        return None
    top = int(np.where(formed, y, -np.inf).argmax())
    faded = fading(x[top:], y[top:], y[0], final, least)
    if final < least and faded is None:                     # only now on its way up
        return None
    height = final if faded is None else float(y[top])
    low, high = (y[0] + fraction * (height - y[0]) for fraction in (0.1, 0.9))
    end = crossing(x, y, high)
    if end is None:
        return None
    below = np.flatnonzero((x <= end) & (y < low))
    start = int(below[-1]) if len(below) else 0             # earlier blips above `low` are noise
    onset = crossing(x[start:], y[start:], low)
    if onset is None:
        return None
    return Transition(onset, end, final, {level: crossing(x, y, level) for level in LEVELS},
                      float(y[top]), float(x[top]), faded)


def in_a_row(condition: np.ndarray) -> np.ndarray:
    """Where a condition holds for a measurement and for a neighbour of it, (N,) bool."""
    pairs = condition[1:] & condition[:-1]
    return np.append(pairs, False) | np.append(False, pairs)


def fading(x: np.ndarray, y: np.ndarray, first: float, final: float, least: float) -> float | None:
    """Where a curve from its peak on, y (N,), last falls below half of its rise from `first`; None
    if it ends above. If it ends below `least` but above that half: where it last falls below
    `least`."""
    if first >= least:                      # there from the beginning, so its rise was before
        first = 0.0
    half = (first + y[0]) / 2
    level = half if final < half else least
    falls = np.flatnonzero((y[:-1] >= level) & (y[1:] < level))
    if final >= level or len(falls) == 0:
        return None
    i = int(falls[-1])
    return float(x[i] + (y[i] - level) / (y[i] - y[i + 1]) * (x[i + 1] - x[i]))


def crossing(x: np.ndarray, y: np.ndarray, level: float) -> Estimate | None:
    """Where a curve first reaches `level`, and the measurements around it; None if it never does.
    """
    above = np.flatnonzero(y >= level)
    if len(above) == 0:
        return None
    i = int(above[0])
    if i == 0:
        return Estimate(x[0], x[0], x[0])
    share = (level - y[i - 1]) / (y[i] - y[i - 1])
    return Estimate(x[i - 1] + share * (x[i] - x[i - 1]), x[i - 1], x[i])


class Band(NamedTuple):
    """The mean of several seeds' curves and its 95% confidence interval (Student's t), at the
    points that all curves cover: (N,) each."""

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def band(curves: Sequence[tuple[Values, Values]]) -> Band:
    """The band of curves (x, y), one for each seed. A single curve has no width."""
    x = np.unique(np.concatenate([np.asarray(xs, float) for xs, _ in curves]))
    x = x[(x >= max(xs[0] for xs, _ in curves)) & (x <= min(xs[-1] for xs, _ in curves))]
    y = np.stack([np.interp(x, xs, ys) for xs, ys in curves])           # (seeds, N)
    mean = y.mean(axis=0)
    if len(y) == 1:
        return Band(x, mean, mean, mean)
    half = students_t(len(y) - 1) * y.std(axis=0, ddof=1) / len(y) ** 0.5
    return Band(x, mean, mean - half, mean + half)
