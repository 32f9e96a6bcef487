"""report.html of a run, from the files that the run left."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from torch import Tensor

from data.config import DataConfig
from induction.examine import Examination, HeadScores, score_rows
from induction.history import Curve, curve, model_transition, score_curves
from induction.metrics import (
    ACCURACY,
    ACCURACY_BARE,
    ICL_SCORE,
    KNOCKOUT,
    KNOCKOUT_RANDOM,
    LOSS_FIRST,
    LOSS_SECOND,
)
from induction.phase import Transition
from induction.scores import SCORES, means
from induction.token_rows import TokenRows
from model.taps import Head
from report.export import run_as_json
from report.snapshots import (
    PAGE_BYTES,
    SnapshotFolder,
    max_snapshots,
    read_passages,
    spell,
    tokens_shown,
)
from report.viewer import Passage, PatternSnapshot, View, write_viewer
from training.config import Config
from training.loaded_run import LoadedRun, load_run
from training.logger import Record

PROBE = "repeated random tokens"
CURVES = ("train/loss", "val/loss", LOSS_FIRST, LOSS_SECOND, ACCURACY, ACCURACY_BARE, KNOCKOUT,
          KNOCKOUT_RANDOM, ICL_SCORE)


class Pictures(NamedTuple):
    """Texts, and the patterns of all heads on them at some steps."""

    passages: list[Passage]
    snapshots: Iterable[PatternSnapshot]        # oldest first


class Examined(NamedTuple):
    """What was measured after training, to show beside the patterns."""

    tokens: str                 # what the heads read: "the given text"
    loss: str                   # the loss that rises when a head is ablated: "second copy"
    step: int                   # at which the heads were ablated
    ablated: Mapping[Head, float]   # rise in loss, in nats, when only this head is mean-ablated
    scores: dict[str, Curve] | None = None      # values (N, L, H); None: those in the records
    evidence: dict | None = None                # the run's object of `heads.py --json`


def write_report(folder: Path, config: Config, records: list[Record],
                 examined: Examined | None = None, *, name: str = "report.html",
                 pictures: Pictures | None = None) -> Path | None:
    """Write `folder`/`name`: the view of one run, see `run_view`. Returns its path, or None if
    there is no snapshot to show."""
    view = run_view(folder, config, records, examined, pictures=pictures)
    if view is None:
        return None
    write_viewer(folder / name, [view])
    return folder / name


Steps = Literal["kept", "this", "all"]


def probe_view(run: LoadedRun, examination: Examination, records: list[Record],
               steps: Steps = "kept", runs_in_page: int = 1) -> View:
    """What a page shows of a run that was examined on the probe.

    steps       whose patterns: those kept during training (if there are any, and this is the newest
                checkpoint), those of this checkpoint, or those of all checkpoints, at which
                `records` has the scores
    """
    table, probe = examination.table, examination.verdict.probes.scored
    examined = Examined(PROBE, "second copy", run.step, table.ablated,
                        evidence=run_as_json(examination))
    now = as_curves({run.state["tokens"]: table.scores})
    if steps == "kept" and run.checkpoint == run.checkpoints()[-1]:
        logged = {score: score_curves(records, score, run.config.model) for score in now}
        # Earlier versions logged fewer scores: then a score is shown at this step only.
        scores = {score: curve or now[score] for score, curve in logged.items()}
        view = run_view(run.folder, run.config, records, examined._replace(scores=scores),
                        runs_in_page=runs_in_page)
        if view is not None:
            return view
    if steps != "all":
        examined = examined._replace(scores=now)
    checkpoints = run.checkpoints() if steps == "all" else [run.checkpoint]
    example, title = probe.example(run.config.model.n_ctx)
    view = run_view(run.folder, run.config, records, examined,
                    pictures=pictures_at(run, checkpoints, example, title))
    assert view is not None             # it has pictures
    return view


def run_view(folder: Path, config: Config, records: list[Record], examined: Examined | None = None,
             *, pictures: Pictures | None = None, runs_in_page: int = 1) -> View | None:
    """What a page shows of a run, from its config and its records of metrics.jsonl, which hold
    curves and scores on the probe. None if there is no snapshot to show.

    records         [] on a page of other tokens than the probe's: curves of the probe do not belong
                    beside them
    pictures        to show instead of those that the run kept while it trained
    runs_in_page    how many runs share the page: each shows as many of the snapshots it kept as fit
                    into its part of PAGE_BYTES, evenly spaced
    """
    model, rise = config.model, model_transition(records)
    if pictures is None:
        kept = SnapshotFolder(folder / "heads")
        if len(kept) == 0:
            return None                                     # stopped before the first measurement
        if runs_in_page > 1:
            kept.most = max_snapshots(model.n_layers * model.n_heads, kept.passages,
                                      PAGE_BYTES / runs_in_page)
        pictures = Pictures(kept.passages, kept)
    layers = "1 layer" if model.n_layers == 1 else f"{model.n_layers} layers"
    examined = examined or Examined(PROBE, "", -1, {})
    steps = records[-1]["step"] if records else examined.step
    scores: Mapping[str, Curve | None] | None = examined.scores
    if scores is None:
        scores = {score: score_curves(records, score, model) for score in SCORES}
    curves = {metric: curve(records, metric) for metric in CURVES}
    return View(
        title=config.run, subtitle=f"{layers} × {model.n_heads} heads, {steps:,} steps",
        n_layers=model.n_layers, n_heads=model.n_heads, n_kv_heads=model.kv_heads,
        passages=pictures.passages, snapshots=pictures.snapshots,
        scores={score: values for score, values in scores.items() if values is not None},
        scored=examined.tokens,
        curves={metric: values for metric, values in curves.items() if values is not None},
        marks=moments_of(rise) if rise else {},
        causal={str(head): rise for head, rise in examined.ablated.items()},
        causal_loss=examined.loss, causal_step=examined.step, notes=caveats(config.data),
        evidence=examined.evidence)


def moments_of(rise: Transition) -> dict[str, float]:
    """The moments of a transition by the names that the page shows, in tokens seen."""
    moments: dict[str, float] = {"onset": rise.onset, "end": rise.end}
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
            readings = read_passages(loaded.model, [ids[:fits].to(device)], document_start)
            yield PatternSnapshot(loaded.step, loaded.state["tokens"], *readings)

    passage = Passage(title, spell(ids[:fits], run.tokenizer),
                      vocab_size=run.model.config.vocab_size)
    return Pictures([passage], snapshots())


def scores_on_rows(run: LoadedRun, table: HeadScores, rows: TokenRows,
                   checkpoints: list[Path]) -> dict[str, Curve]:
    """The scores on the user's rows at some of a run's checkpoints, values (N, L, H). `table` holds
    those of the checkpoint at which the run was opened."""
    measured = {}
    for checkpoint in checkpoints:
        if checkpoint == run.checkpoint:
            measured[run.state["tokens"]] = table.scores
        else:
            loaded = load_run(checkpoint, device=run.model.embed.weight.device)
            measured[loaded.state["tokens"]] = means(score_rows(loaded.model, rows)[0])
    return as_curves(measured)


def as_curves(measured: Mapping[int, dict[str, Tensor]]) -> dict[str, Curve]:
    """Tokens seen → all scores (L, H) as score → values (N, L, H)."""
    tokens, tables = np.array(list(measured), dtype=float), list(measured.values())
    return {score: Curve(tokens, np.stack([table[score].numpy() for table in tables]))
            for score in tables[0]}


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
