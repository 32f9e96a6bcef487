"""What a run's heads came to: the page report.html, plots for a paper, the movie. All from files that the run has left."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from data.config import DataConfig
from induction.phase import Transition, transition
from induction.scores import SCORES
from induction.snapshots import Snapshots
from induction.viewer import Passage, Snapshot, View, write_viewer
from model.config import ModelConfig
from model.taps import heads_of

CURVES = ("train/loss", "val/loss", "repeat/loss_first", "repeat/loss_second", "icl/score")


def write_report(folder: Path, config, records: list[dict], causal: dict[str, float] | None = None, *,
                 passages: list[Passage] | None = None, snapshots: Iterable[Snapshot] | None = None) -> Path:
    """Write `folder`/report.html from a run's config and its records of metrics.jsonl; its path.

    causal       what ablating each head alone costs, in nats
    passages     texts other than those the run kept pictures of, with their `snapshots`
    """
    saved, model = Snapshots(folder / "heads"), config.model
    moved = model_transition(records)
    view = View(
        title=config.run, subtitle=f"{model.n_layers} layer{'s'[:model.n_layers > 1]} × {model.n_heads} heads, "
                                   f"{records[-1]['step'] if records else 0:,} steps",
        n_layers=model.n_layers, n_heads=model.n_heads, n_kv_heads=model.kv_heads,
        passages=saved.passages if passages is None else passages, snapshots=saved if snapshots is None else snapshots,
        scores={name: found for name in SCORES if (found := score_curves(records, name, model)) is not None},
        curves={name: found for name in CURVES if (found := curve(records, name)) is not None},
        marks={"onset": moved.onset, "end": moved.end} if moved else {}, causal=causal or {}, notes=remarks(config.data))
    path = folder / "report.html"
    write_viewer(path, view)
    return path


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
    values = np.array([[record[key] for key in keys] for record in looks], dtype=float)
    return np.array([record["tokens"] for record in looks], dtype=float), values.reshape(-1, model.n_layers, model.n_heads)


def model_transition(records: list[dict]) -> Transition | None:
    """When the model's best head of each moment rose to match prefixes, in tokens."""
    looks = [(record["tokens"], max(found)) for record in records
             if (found := [value for key, value in record.items() if key.startswith("heads/prefix_matching/")])]
    return transition(*zip(*looks)) if looks else None


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
