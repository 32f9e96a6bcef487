"""heads.gif: the pattern of a run's strongest head over training."""

from pathlib import Path
from typing import NamedTuple

from errors import UserError

import numpy as np

from files import atomic_write
from induction.history import Curve, curve, score_curves
from induction.metrics import LOSS_FIRST, LOSS_SECOND
from model.config import ModelConfig
from model.taps import Head, heads_of
from report.figures import BLUE, FIRST, INK, SECOND, Axes, figure, titled
from report.pictures import shade, write_gif
from report.snapshots import SnapshotFolder
from report.viewer import PatternSnapshot
from training.config import Config
from training.logger import Record


class Movie(NamedTuple):
    """What the movie of a run shows."""

    path: Path
    snapshots: SnapshotFolder
    prefix_matching: Curve              # values (N, L, H)
    records: list[Record]
    model: ModelConfig

    @property
    def head(self) -> Head:
        """The head that ends strongest."""
        final = self.prefix_matching.values[-1]
        return max(heads_of(self.model), key=lambda head: final[head])


def movie_of(folder: Path, config: Config, records: list[Record]) -> Movie:
    """The movie of a run. Raises UserError if the run kept too few snapshots for one."""
    snapshots = SnapshotFolder(folder / "heads")
    scores = score_curves(records, "prefix_matching", config.model)
    if len(snapshots) < 2 or scores is None:
        raise UserError(f"{folder} has no snapshots for a movie (train with heads.every above 0)")
    return Movie(folder / "heads.gif", snapshots, scores, records, config.model)


def write_movie(movie: Movie) -> Path:
    """Write it: at every snapshot the pattern of the strongest head, beside the curves that belong
    to it. Returns its path."""
    frames = [frame(movie, movie.head, snapshot) for snapshot in movie.snapshots]
    with atomic_write(movie.path) as file:
        write_gif(file, frames)
    return movie.path


def frame(movie: Movie, head: Head, snapshot: PatternSnapshot) -> np.ndarray:
    """The picture of one snapshot: (height, width, 3) uint8."""
    drawn, axes = figure(7.2, 3.6, 2, 2, width_ratios=(1.15, 1))
    grid = axes[0, 0].get_gridspec()
    for axis in axes[:, 0]:
        axis.remove()
    draw_pattern(drawn.add_subplot(grid[:, 0]), head, snapshot)
    upper, lower = axes[:, 1]
    draw_scores(upper, head, movie)
    draw_losses(lower, movie.records)
    for axis in (upper, lower):
        axis.axvline(snapshot.tokens / 1e6, color=INK, lw=0.9)
        axis.set_xlim(0, movie.prefix_matching.tokens[-1] / 1e6)
    drawn.canvas.draw()
    return np.asarray(drawn.canvas.buffer_rgba())[..., :3].copy()


def draw_pattern(axes: Axes, head: Head, snapshot: PatternSnapshot) -> None:
    axes.imshow(shade(snapshot.patterns[0][head]), interpolation="nearest")
    axes.set(xticks=[], yticks=[], xlabel="key", ylabel="query")
    titled(axes, f"{head} on repeated random tokens")
    axes.text(0.98, 0.96, f"step {snapshot.step:,}\n{snapshot.tokens / 1e6:.2f} M tokens",
              transform=axes.transAxes, ha="right", va="top", fontsize=10)


def draw_scores(axes: Axes, head: Head, movie: Movie) -> None:
    tokens, values = movie.prefix_matching
    for other in heads_of(movie.model):
        axes.plot(tokens / 1e6, values[:, *other], color="#cfd4da", lw=0.9, zorder=1)
    axes.plot(tokens / 1e6, values[:, *head], color=BLUE, lw=1.8, zorder=3)
    axes.set(ylim=(-0.02, 1.02), xticklabels=[])
    titled(axes, "prefix matching, all heads")


def draw_losses(axes: Axes, records: list[Record]) -> None:
    for name, colour, label in ((LOSS_FIRST, FIRST, "first copy"),
                                (LOSS_SECOND, SECOND, "second copy")):
        loss = curve(records, name)
        if loss is not None:
            axes.plot(loss.tokens / 1e6, loss.values, color=colour, lw=1.5, label=label)
    axes.legend(frameon=False, fontsize=7, loc="lower left")
    axes.set(xlabel="million tokens seen")
    titled(axes, "loss on random tokens, nats")
