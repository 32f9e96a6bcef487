"""Plots of a run for a paper, as PNG and SVG."""

import re
from pathlib import Path

import numpy as np

from files import atomic_write
from induction.history import curve, model_transition, score_curves
from induction.phase import FORMED
from induction.scores import SCORES, Measured
from kernels.head_statistics import REACH
from model.config import ModelConfig
from model.taps import Head, heads_of

GREY, INK, BLUE = "#9aa0a8", "#30343a", "#2c69b0"
FIRST, SECOND = "#e0a458", "#c8553d"            # the copies of a block


def plots(target: Path, config, records: list[dict], measured: Measured) -> list[Path]:
    """Figures of a run in the folder `target`, PNG and SVG each; the paths of the PNGs."""
    made = {"scores": grids(config.model, measured), "offsets": offsets(config.model, measured)}
    if found := score_curves(records, "prefix_matching", config.model):
        made = {"formation": formation(config.model, records, *found)} | made
    target.mkdir(exist_ok=True)
    for name, figure in made.items():
        for kind in ("png", "svg"):
            with atomic_write(target / f"{name}.{kind}") as file:
                figure.savefig(file, format=kind, dpi=160)
    return [target / f"{name}.png" for name in made]


def figure(width: float, height: float, rows: int = 1, columns: int = 1, **options):
    """A matplotlib figure and its axes, as an array, drawn without a screen and without the state of pyplot."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    with rc_context({"font.size": 9, "axes.edgecolor": GREY, "axes.labelcolor": INK,
                     "axes.spines.top": False, "axes.spines.right": False, "xtick.color": INK, "ytick.color": INK}):
        drawn = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(drawn)
        return drawn, drawn.subplots(rows, columns, squeeze=False, **options)


def titled(axes, text: str) -> None:
    axes.set_title(text, fontsize=9, loc="left", color=INK)


def formation(model: ModelConfig, records: list[dict], tokens: np.ndarray, scores: np.ndarray):
    """Losses above, prefix matching of every head below, on one axis of tokens."""
    drawn, ((above,), (below,)) = figure(6.4, 4.4, 2, 1, sharex=True)
    for name, label, colour in (("train/loss", "training", GREY), ("val/loss", "validation", INK),
                                ("repeat/loss_first", "random tokens", FIRST), ("repeat/loss_second", "the same, repeated", SECOND)):
        if found := curve(records, name):
            above.plot(found[0] / 1e6, found[1], color=colour, lw=1.2, label=label)
    above.set_ylabel("loss, nats per token")
    above.legend(frameon=False, fontsize=8)
    for head in heads_of(model):
        strong = scores[-1][head] >= FORMED
        below.plot(tokens / 1e6, scores[:, *head], **_line(head, strong))
    if moved := model_transition(records):
        for axes in (above, below):
            axes.axvspan(moved.onset / 1e6, moved.end / 1e6, color=BLUE, alpha=0.10, lw=0)
    below.set(xlabel="million tokens", ylabel="prefix matching", ylim=(-0.02, 1.02))
    if (scores[-1] >= FORMED).any():
        below.legend(frameon=False, fontsize=8)
    return drawn


def grids(model: ModelConfig, measured: Measured):
    """Every score as a grid of heads, layer 0 below."""
    names = [name for name in SCORES if name in measured.scores]
    columns = min(4, len(names))
    drawn, axes = figure(2.3 * columns, (0.7 + 0.45 * model.n_layers) * -(-len(names) // columns), -(-len(names) // columns), columns)
    for place, name in zip(axes.flat, names):
        values = measured.scores[name].numpy()
        low, high = {"copying": (-1, 1), "distance": (0, max(1.0, values.max()))}.get(name, (0, 1))
        place.imshow(values, cmap="RdBu_r" if low < 0 else "Blues", vmin=low, vmax=high, origin="lower", aspect="auto")
        for layer, index in heads_of(model) if model.n_heads <= 8 else ():
            dark = abs(values[layer, index] - (low + high) / 2 * (low < 0)) > 0.6 * high
            place.text(index, layer, re.sub(r"^(-?)0\.", r"\1.", f"{values[layer, index]:.2f}"), ha="center", va="center", fontsize=7,
                       color="white" if dark else "black")
        titled(place, name.replace("_", " "))
        place.set(xticks=range(model.n_heads), yticks=range(model.n_layers))
        place.set_xticklabels([f"H{index}" for index in range(model.n_heads)], fontsize=7)
        place.set_yticklabels([f"L{layer}" for layer in range(model.n_layers)], fontsize=7)
    for place in axes.flat[len(names):]:
        place.set_axis_off()
    return drawn


def offsets(model: ModelConfig, measured: Measured):
    """Attention around the induction target, a line a head."""
    drawn, ((axes,),) = figure(6.4, 2.6)
    for head in heads_of(model):
        strong = bool(measured.scores["prefix_matching"][head] >= FORMED or measured.offset_profile[head].max() >= FORMED)
        axes.plot(range(-REACH, REACH + 1), measured.offset_profile[head], **_line(head, strong))
    axes.axvline(0, color=GREY, lw=0.8, ls=":")
    axes.set(xlabel="position, relative to the token after the latest earlier copy", ylabel="attention", ylim=(-0.02, 1.02))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)
    return drawn


def _line(head: Head, strong: bool) -> dict:
    """A head that stands out has a colour and a name, the others are grey."""
    return {"lw": 1.6, "label": str(head)} if strong else {"lw": 0.8, "color": GREY}
