"""Plots of a run for a paper, as PNG and SVG."""

import re
from pathlib import Path
from typing import Any

import numpy as np

from files import atomic_write
from induction.history import (
    Curve,
    curve,
    head_transitions,
    model_transition,
    score_curves,
)
from induction.metrics import ACCURACY, ACCURACY_BARE, LOSS_FIRST, LOSS_SECOND
from induction.phase import INDUCTION_HEAD
from induction.scores import SCORES, Measured
from kernels.planes import REACH
from model.config import ModelConfig
from model.taps import Head, heads_of
from training.config import Config
from training.logger import Record

GREY, INK, BLUE = "#9aa0a8", "#30343a", "#2c69b0"
FIRST, SECOND = "#e0a458", "#c8553d"            # the first and the second copy
Figure = Any                                    # matplotlib's, which is imported only to draw
Axes = Any


def write_figures(target: Path, config: Config, records: list[Record],
                  measured: Measured) -> list[Path]:
    """Draw a run into the folder `target`, as PNG and SVG; returns the paths of the PNGs."""
    figures = {"scores": score_grids(config.model, measured),
               "offsets": offset_profiles(config.model, measured)}
    scores = score_curves(records, "prefix_matching", config.model)
    if scores is not None:
        figures = {"formation": formation(config.model, records, scores)} | figures
    target.mkdir(exist_ok=True)
    for name, drawn in figures.items():
        for suffix in ("png", "svg"):
            with atomic_write(target / f"{name}.{suffix}") as file:
                drawn.savefig(file, format=suffix, dpi=160)
    return [target / f"{name}.png" for name in figures]


def figure(width: float, height: float, rows: int = 1, columns: int = 1,
           **options: Any) -> tuple[Figure, np.ndarray]:
    """A matplotlib figure and its axes (rows, columns), drawn without a screen and without pyplot's
    global state."""
    import matplotlib.figure
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    with matplotlib.rc_context({"font.size": 9, "axes.edgecolor": GREY, "axes.labelcolor": INK,
                                "axes.spines.top": False, "axes.spines.right": False,
                                "xtick.color": INK, "ytick.color": INK}):
        drawn = matplotlib.figure.Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(drawn)
        return drawn, drawn.subplots(rows, columns, squeeze=False, **options)


def titled(axes: Axes, text: str) -> None:
    axes.set_title(text, fontsize=9, loc="left", color=INK)


def formation(model: ModelConfig, records: list[Record], scores: Curve) -> Figure:
    """Losses above, prefix matching of every head below, over tokens; the transition shaded, a
    dashed line where it faded."""
    drawn, ((above,), (below,)) = figure(6.4, 4.4, 2, 1, sharex=True)
    for name, label, colour in (("train/loss", "training", GREY), ("val/loss", "validation", INK),
                                (LOSS_FIRST, "random tokens, first copy", FIRST),
                                (LOSS_SECOND, "random tokens, second copy", SECOND)):
        loss = curve(records, name)
        if loss is not None:
            above.plot(loss.tokens / 1e6, loss.values, color=colour, lw=1.2, label=label)
    above.set_ylabel("loss, nats per token")
    above.legend(frameon=False, fontsize=8)
    final = scores.values[-1]                                                   # (L, H)
    formed = head_transitions(records, model)               # of heads that faded, too
    named = [head for head in heads_of(model) if head in formed or final[head] >= INDUCTION_HEAD]
    for head in heads_of(model):
        style = line_style(head, head in named)
        below.plot(scores.tokens / 1e6, scores.values[:, *head], **style)
    for name, dashes, label in ((ACCURACY, "--", "known tokens right"),
                                (ACCURACY_BARE, ":", "without begin token")):
        right = curve(records, name)
        if right is not None:
            below.plot(right.tokens / 1e6, right.values, color=INK, lw=1.0, ls=dashes, label=label)
    if rise := model_transition(records):
        for axes in (above, below):
            axes.axvspan(rise.onset / 1e6, rise.end / 1e6, color=BLUE, alpha=0.10, lw=0)
            if rise.faded is not None:
                axes.axvline(rise.faded / 1e6, color=BLUE, lw=0.8, ls="--")
    below.set(xlabel="million tokens seen", ylabel="prefix matching, fraction right",
              ylim=(-0.02, 1.02))
    if below.get_legend_handles_labels()[0]:
        below.legend(frameon=False, fontsize=8)
    return drawn


def score_grids(model: ModelConfig, measured: Measured) -> Figure:
    """Every score as a grid of heads, layer 0 at the bottom."""
    names = [name for name in SCORES if name in measured.scores]
    columns = min(4, len(names))
    rows = -(-len(names) // columns)                                            # rounded up
    drawn, axes = figure(2.3 * columns, (0.7 + 0.45 * model.n_layers) * rows, rows, columns)
    for panel, name in zip(axes.flat, names):
        draw_grid(panel, model, name, measured.scores[name].numpy())
    for panel in axes.flat[len(names):]:
        panel.set_axis_off()
    return drawn


def draw_grid(axes: Axes, model: ModelConfig, name: str, values: np.ndarray) -> None:
    """One score (L, H); with numbers if there are at most eight heads per layer. A score with
    negative values is white at 0, blue above as the others are, and red below."""
    high = np.abs(values[np.isfinite(values)]).max(initial=1.0)
    signed = (values < -0.005).any()                                # what reads −.01 or less
    axes.imshow(values, cmap="RdBu" if signed else "Blues", vmin=-high if signed else 0, vmax=high,
                origin="lower", aspect="auto")
    if model.n_heads <= 8:
        for layer, index in heads_of(model):
            value = values[layer, index]
            number = re.sub(r"^(-?)0\.", r"\1.", f"{value:z.2f}").replace("nan", "–")
            colour = "white" if abs(value) > 0.6 * high else "black"
            axes.text(index, layer, number, ha="center", va="center", fontsize=7, color=colour)
    titled(axes, name.replace("_", " ") + (" (red: below 0)" if signed else ""))
    axes.set(xticks=range(model.n_heads), yticks=range(model.n_layers))
    axes.set_xticklabels([f"H{index}" for index in range(model.n_heads)], fontsize=7)
    axes.set_yticklabels([f"L{layer}" for layer in range(model.n_layers)], fontsize=7)


def offset_profiles(model: ModelConfig, measured: Measured) -> Figure:
    """Attention around the induction target, one line per head."""
    drawn, ((axes,),) = figure(6.4, 2.6)
    for head in heads_of(model):
        profile = measured.offset_profile[head]
        highest = max(measured.scores["prefix_matching"][head].item(), profile.max().item())
        style = line_style(head, highest >= INDUCTION_HEAD)
        axes.plot(range(-REACH, REACH + 1), profile, **style)
    axes.axvline(0, color=GREY, lw=0.8, ls=":")
    axes.set(xlabel="position relative to the induction target "
                    "(the token after the latest earlier copy)",
             ylabel="attention", ylim=(-0.02, 1.02))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)
    return drawn


def line_style(head: Head, strong: bool) -> dict[str, Any]:
    """A strong head has a colour and a name in the legend; the others are grey."""
    if strong:
        return {"lw": 1.6, "label": str(head)}
    return {"lw": 0.8, "color": GREY}
