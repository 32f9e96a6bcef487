"""heads.gif: the pattern of a run's strongest head over training."""

from pathlib import Path

import numpy as np

from errors import UserError
from files import atomic_write
from induction.history import curve, score_curves
from model.config import ModelConfig
from model.taps import Head, heads_of
from report.figures import BLUE, FIRST, INK, SECOND, figure, titled
from report.pictures import movie, shade
from report.snapshots import Snapshots
from report.viewer import Snapshot


def movie_of(folder: Path, config, records: list[dict]) -> tuple[Snapshots, np.ndarray, np.ndarray]:
    """What a run's movie shows: snapshots, and prefix matching over training. Raises UserError where the run kept too little."""
    saved, found = Snapshots(folder / "heads"), score_curves(records, "prefix_matching", config.model)
    if len(saved) < 2 or found is None:
        raise UserError(f"{folder} has no snapshots to make a movie of (train with heads.every above 0)")
    return saved, *found


def write_movie(folder: Path, config, records: list[dict]) -> Path:
    """`folder`/heads.gif: the pattern of the head that ends strongest, at every snapshot, beside the curves it belongs to.

    Raises UserError where the run kept no snapshots.
    """
    saved, tokens, scores = movie_of(folder, config, records)
    head = max(heads_of(config.model), key=lambda head: scores[-1][head])
    frames = [_frame(snapshot, head, tokens, scores, records, config.model) for snapshot in saved]
    path = folder / "heads.gif"
    with atomic_write(path) as file:
        movie(file, frames)
    return path


def _frame(snapshot: Snapshot, head: Head, tokens: np.ndarray, scores: np.ndarray, records: list[dict], model: ModelConfig) -> np.ndarray:
    drawn, axes = figure(7.2, 3.6, 2, 2, width_ratios=(1.15, 1))
    grid = axes[0, 0].get_gridspec()
    for place in axes[:, 0]:
        place.remove()
    left = drawn.add_subplot(grid[:, 0])
    left.imshow(shade(snapshot.patterns[0][head]), interpolation="nearest")
    left.set(xticks=[], yticks=[], xlabel="attends to", ylabel="token")
    titled(left, f"{head} on random tokens, repeated")
    upper, lower = axes[:, 1]
    for one in heads_of(model):
        upper.plot(tokens / 1e6, scores[:, *one], color=BLUE if one == head else "#cfd4da", lw=1.8 if one == head else 0.9,
                   zorder=3 if one == head else 1)
    upper.set(ylim=(-0.02, 1.02), xticklabels=[])
    titled(upper, "prefix matching, every head")
    for name, colour, label in (("repeat/loss_first", FIRST, "first copy"), ("repeat/loss_second", SECOND, "second copy")):
        if found := curve(records, name):
            lower.plot(found[0] / 1e6, found[1], color=colour, lw=1.5, label=label)
    lower.legend(frameon=False, fontsize=7, loc="lower left")
    lower.set(xlabel="million tokens trained on")
    titled(lower, "loss on random tokens")
    for place in (upper, lower):
        place.axvline(snapshot.tokens / 1e6, color=INK, lw=0.9)
        place.set_xlim(0, tokens[-1] / 1e6)
    left.text(0.98, 0.96, f"step {snapshot.step:,}\n{snapshot.tokens / 1e6:.2f} M tokens", transform=left.transAxes,
              ha="right", va="top", fontsize=10)
    drawn.canvas.draw()
    return np.asarray(drawn.canvas.buffer_rgba())[..., :3].copy()
