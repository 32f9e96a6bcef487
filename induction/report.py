"""What a run's heads came to: the page report.html, plots for a paper, the movie. All from files that the run has left."""

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from data.config import DataConfig
from errors import UserError
from files import whole_file
from induction.phase import FORMED, Transition, transition
from induction.pictures import movie, shade
from induction.scores import SCORES, Measured
from induction.snapshots import Snapshots
from induction.viewer import Passage, Snapshot, View, write_viewer
from kernels.planes import REACH
from model.config import ModelConfig
from model.taps import Head, heads_of

CURVES = ("train/loss", "val/loss", "repeat/loss_first", "repeat/loss_second", "icl/score")


def write_report(folder: Path, config, records: list[dict], causal: dict[str, float] | None = None, *, name: str = "report.html",
                 passages: list[Passage] | None = None, snapshots: Iterable[Snapshot] | None = None) -> Path | None:
    """Write `folder`/`name` from a run's config and its records of metrics.jsonl; its path, None if the run kept no snapshots.

    causal       what ablating each head alone costs, in nats
    passages     texts other than those the run kept pictures of, with their `snapshots`
    """
    saved, model = Snapshots(folder / "heads"), config.model
    if snapshots is None and not len(saved):
        return None                                         # stopped before the first look
    moved = model_transition(records)
    view = View(
        title=config.run, subtitle=f"{model.n_layers} layer{'s'[:model.n_layers > 1]} × {model.n_heads} heads, "
                                   f"{records[-1]['step'] if records else 0:,} steps",
        n_layers=model.n_layers, n_heads=model.n_heads, n_kv_heads=model.kv_heads,
        passages=saved.passages if passages is None else passages, snapshots=saved if snapshots is None else snapshots,
        scores={name: found for name in SCORES if (found := score_curves(records, name, model)) is not None},
        curves={name: found for name in CURVES if (found := curve(records, name)) is not None},
        marks={"onset": moved.onset, "end": moved.end} if moved else {}, causal=causal or {}, notes=remarks(config.data))
    write_viewer(folder / name, view)
    return folder / name


def curve(records: list[dict], name: str) -> tuple[np.ndarray, np.ndarray] | None:
    """A metric over training: tokens seen (N,) and its values (N,)."""
    points = [(record["tokens"], record[name]) for record in records if record.get(name) is not None]
    return tuple(np.array(points, dtype=float).T) if points else None


def score_curves(records: list[dict], score: str, model: ModelConfig) -> tuple[np.ndarray, np.ndarray] | None:
    """A score of all heads over training: tokens seen (N,) and values (N, L, H)."""
    keys = [f"heads/{score}/{head}" for head in heads_of(model)]
    looks = [record for record in records if keys[0] in record]
    if not looks:
        return None
    values = np.array([[record[key] for key in keys] for record in looks], dtype=float)      # a null becomes nan
    return np.array([record["tokens"] for record in looks], dtype=float), values.reshape(-1, model.n_layers, model.n_heads)


def best_of_looks(records: list[dict]) -> list[tuple[int, float]]:
    """(tokens, prefix matching of the best head) of every look at the heads."""
    looks = [(record["tokens"], [value for key, value in record.items() if key.startswith("heads/prefix_matching/") and value is not None])
             for record in records]
    return [(tokens, max(found)) for tokens, found in looks if found]


def model_transition(records: list[dict]) -> Transition | None:
    """When the model's best head of each moment rose to match prefixes, in tokens."""
    looks = best_of_looks(records)
    if not looks:
        return None
    tokens, best = zip(*looks)
    return transition(tokens, best)


def icl_transition(records: list[dict]) -> Transition | None:
    """When the in-context-learning score fell from what it was first measured at, in tokens; its `final` is how far it fell, in nats.
    Less than 0.1 may be the noise of a small validation text."""
    found = curve(records, "icl/score")
    return None if found is None else transition(found[0], found[1][0] - found[1], least=0.1)


def head_transitions(records: list[dict], model: ModelConfig) -> dict[Head, Transition]:
    """When each head that became an induction head did, in tokens."""
    found = score_curves(records, "prefix_matching", model)
    moved = {} if found is None else {head: transition(found[0], found[1][:, *head]) for head in heads_of(model)}
    return {head: when for head, when in moved.items() if when}


def remarks(data: DataConfig) -> list[str]:
    """What a reader of this run's figures must know."""
    said = []
    if "repeats" in data.corpora and data.text_corpus:
        said.append("Part of this run's rows were random tokens repeated. Its induction heads form because of these synthetic rows, "
                    "and far sooner than on text alone.")
    elif "repeats" in data.corpora:
        said.append("This run saw nothing but random tokens repeated: a laboratory task, not language.")
    if "repeats" in data.corpora and not data.repeats.held_out_periods:
        said.append("No period was held out of its training by name (data.repeats.held_out_periods).")
    return said


def kind_of_run(config) -> str:
    """What runs that differ by their seed alone share, as a name."""
    name = config.run
    for ending in (f"-s{config.seed}", f"_s{config.seed}", f"-seed{config.seed}"):
        name = name.removesuffix(ending)
    return name


# --- figures --------------------------------------------------------------------------------------------------------------

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
            with whole_file(target / f"{name}.{kind}") as file:
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
    with whole_file(path) as file:
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
