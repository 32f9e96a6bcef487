"""report.html of a run, from files that the run has left."""

from collections.abc import Iterable
from pathlib import Path

from data.config import DataConfig
from induction.history import curve, model_transition, score_curves
from induction.scores import SCORES
from report.snapshots import Snapshots
from report.viewer import Passage, Snapshot, View, write_viewer

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
