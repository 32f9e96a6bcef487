"""report.html of a run, from the files that the run left."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from data.config import DataConfig
from induction.history import curve, model_transition, score_curves
from induction.metrics import ICL_SCORE, LOSS_FIRST, LOSS_SECOND
from induction.phase import Transition
from induction.scores import SCORES
from report.snapshots import SnapshotFolder, attention_patterns, spell, tokens_shown
from report.viewer import Passage, PatternSnapshot, View, write_viewer
from training.config import Config
from training.loaded_run import LoadedRun, load_run
from training.logger import Record

CURVES = ("train/loss", "val/loss", LOSS_FIRST, LOSS_SECOND, ICL_SCORE)


class Pictures(NamedTuple):
    """Texts, and the patterns of all heads on them at some steps."""

    passages: list[Passage]
    snapshots: Iterable[PatternSnapshot]        # oldest first


def write_report(folder: Path, config: Config, records: list[Record],
                 causal: dict[str, float] | None = None, *, name: str = "report.html",
                 pictures: Pictures | None = None) -> Path | None:
    """Write `folder`/`name` from a run's config and its records of metrics.jsonl. Returns its path,
    or None if there is no snapshot to show.

    causal      "L1H3" → rise in loss when only this head is mean-ablated, in nats
    pictures    to show instead of those that the run kept while it trained
    """
    if pictures is None:
        kept = SnapshotFolder(folder / "heads")
        if len(kept) == 0:
            return None                                     # stopped before the first measurement
        pictures = Pictures(kept.passages, kept)
    model, rise = config.model, model_transition(records)
    layers = "1 layer" if model.n_layers == 1 else f"{model.n_layers} layers"
    steps = records[-1]["step"] if records else 0
    scores = {score: score_curves(records, score, model) for score in SCORES}
    curves = {metric: curve(records, metric) for metric in CURVES}
    view = View(
        title=config.run, subtitle=f"{layers} × {model.n_heads} heads, {steps:,} steps",
        n_layers=model.n_layers, n_heads=model.n_heads, n_kv_heads=model.kv_heads,
        passages=pictures.passages, snapshots=pictures.snapshots,
        scores={score: values for score, values in scores.items() if values is not None},
        curves={metric: values for metric, values in curves.items() if values is not None},
        marks=moments_of(rise) if rise else {},
        causal=causal or {}, notes=caveats(config.data))
    write_viewer(folder / name, view)
    return folder / name


def moments_of(rise: Transition) -> dict[str, float]:
    """The moments of a transition by the names that the page shows, in tokens seen."""
    moments = {"onset": rise.onset, "end": rise.end}
    return moments if rise.faded is None else moments | {"faded": rise.faded}


def pictures_at(run: LoadedRun, checkpoints: list[Path], ids: Tensor, title: str) -> Pictures:
    """The patterns of a run's heads on token ids (T,) at some of its checkpoints. A text too long
    to be shown is cut, and the title says so."""
    fits, device = tokens_shown(run.config.model, len(ids)), run.model.embed.weight.device
    if fits < len(ids):
        title = f"{title}, its first {fits} tokens"
    document_start = run.tokenizer.begin if run.config.data.mask_documents else None

    def snapshots() -> Iterator[PatternSnapshot]:
        for checkpoint in checkpoints:
            loaded = run if checkpoint == run.checkpoint else load_run(checkpoint, device=device)
            patterns = attention_patterns(loaded.model, [ids[:fits].to(device)], document_start)
            yield PatternSnapshot(loaded.step, loaded.state["tokens"], patterns)

    return Pictures([Passage(title, spell(ids[:fits], run.tokenizer))], snapshots())


def caveats(data: DataConfig) -> list[str]:
    """What a reader of this run's figures must know."""
    if "repeats" not in data.corpora:
        return []
    notes = []
    if data.text_corpus:
        notes.append("Some rows of this run's training data were repeated random tokens. Its "
                     "induction heads form because of these synthetic rows, and much earlier than "
                     "on text only.")
    else:
        notes.append("This run was trained only on repeated random tokens: a synthetic task, not "
                     "language.")
    if not data.repeats.held_out_periods:
        notes.append("No period was explicitly held out of training "
                     "(data.repeats.held_out_periods).")
    return notes
