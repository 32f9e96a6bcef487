"""When it formed: the transition in a score's curve over training, in tokens."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

FORMED = 0.4                            # the prefix matching from which a head counts as an induction head here
LEVELS = (0.3, 0.4, 0.5)                # how much the moment depends on where that line is drawn
Curve = Sequence[float] | np.ndarray
STUDENT_T = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}        # 95%, two-sided, by sample size


class Transition(NamedTuple):
    """Moments in the units of the x axis it was found on (tokens, or steps)."""

    onset: float                        # where it leaves the first tenth of its rise for good
    end: float                          # where it first enters the last
    final: float                        # the score it comes to, the mean of its last tenth of looks
    crossings: dict[float, float | None]        # where it first reaches each of LEVELS


def transition(at: Curve, scores: Curve, least: float = FORMED) -> Transition | None:
    """The transition of a curve to at least `least`; None where it never gets there. Its rise is from the first measurement to the
    final score; linear between measurements."""
    x, y = np.asarray(at, float), np.asarray(scores, float)
    if len(y) == 0:
        return None
    final = float(y[-max(1, len(y) // 10):].mean())
    low, high = (y[0] + share * (final - y[0]) for share in (0.1, 0.9))
    end = crossing(x, y, high)
    if final < least or end is None:
        return None
    before = np.flatnonzero((x <= end) & (y < low))
    start = int(before[-1]) if len(before) else 0           # the last measurement still below: earlier blips are noise
    onset = crossing(x[start:], y[start:], low)
    assert onset is not None                                # it comes before the end
    return Transition(onset, end, final, {level: crossing(x, y, level) for level in LEVELS})


def crossing(x: np.ndarray, y: np.ndarray, level: float) -> float | None:
    """Where a curve first reaches `level`, None where it does not."""
    above = np.flatnonzero(y >= level)
    if len(above) == 0:
        return None
    i = int(above[0])
    if i == 0:
        return float(x[0])
    return float(x[i - 1] + (level - y[i - 1]) / (y[i] - y[i - 1]) * (x[i] - x[i - 1]))


class Band(NamedTuple):
    """The mean of several seeds' curves and its 95% confidence interval (Student's t), on the points that all have."""

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def band(curves: Sequence[tuple[Curve, Curve]]) -> Band:
    """Curves (x, y) of one seed each → their band; one curve alone has no width."""
    x = np.unique(np.concatenate([np.asarray(xs, float) for xs, _ in curves]))
    x = x[(x >= max(xs[0] for xs, _ in curves)) & (x <= min(xs[-1] for xs, _ in curves))]
    y = np.stack([np.interp(x, xs, ys) for xs, ys in curves])
    width = STUDENT_T.get(len(y), 2.0) * y.std(axis=0, ddof=1) / len(y) ** 0.5 if len(y) > 1 else 0.0 * y[0]
    return Band(x, y.mean(axis=0), y.mean(axis=0) - width, y.mean(axis=0) + width)
