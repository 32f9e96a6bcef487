"""When heads formed: the transition in a score's curve over training, in tokens."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

INDUCTION_HEAD = 0.4        # prefix matching from which a head counts as an induction head
LEVELS = (0.3, 0.4, 0.5)    # other thresholds, to show how much the moment depends on the choice
Values = Sequence[float] | np.ndarray
# Student's t for a two-sided 95% interval, by sample size
STUDENT_T = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}


class Transition(NamedTuple):
    """Moments in the units of the x axis (tokens, or steps)."""

    onset: float                            # the curve leaves the first tenth of its rise for good
    end: float                              # the curve first enters the last tenth of its rise
    final: float                            # mean of the last tenth of the measurements
    crossings: dict[float, float | None]    # level of LEVELS → where the curve first reaches it


def transition(at: Values, scores: Values, least: float = INDUCTION_HEAD) -> Transition | None:
    """The transition of a curve whose final score is at least `least`; None for any other curve.

    Its rise is from the first measurement to the final score. Linear between measurements.
    """
    x, y = np.asarray(at, float), np.asarray(scores, float)
    if len(y) == 0:
        return None
    final = float(y[-max(1, len(y) // 10):].mean())
    low, high = (y[0] + fraction * (final - y[0]) for fraction in (0.1, 0.9))
    end = crossing(x, y, high)
    if final < least or end is None:
        return None
    below = np.flatnonzero((x <= end) & (y < low))
    start = int(below[-1]) if len(below) else 0             # earlier blips above `low` are noise
    onset = crossing(x[start:], y[start:], low)
    if onset is None:
        return None
    return Transition(onset, end, final, {level: crossing(x, y, level) for level in LEVELS})


def crossing(x: np.ndarray, y: np.ndarray, level: float) -> float | None:
    """Where a curve first reaches `level`; None if it never does."""
    above = np.flatnonzero(y >= level)
    if len(above) == 0:
        return None
    i = int(above[0])
    if i == 0:
        return float(x[0])
    return float(x[i - 1] + (level - y[i - 1]) / (y[i] - y[i - 1]) * (x[i] - x[i - 1]))


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
    half = STUDENT_T.get(len(y), 2.0) * y.std(axis=0, ddof=1) / len(y) ** 0.5
    return Band(x, mean, mean - half, mean + half)
