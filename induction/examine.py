"""Measures the heads of a run on disk, for heads.py and for studies of several runs."""

import textwrap
from collections.abc import Collection
from typing import NamedTuple

from errors import UserError

import numpy as np
import torch
from torch import Tensor

from data.batches import Batch
from induction.ablation import ProgressBar, ablate_each_head
from induction.history import condition_of, model_transition
from induction.intervals import Bounds, Estimate, Resampling, RowSums
from induction.probe_set import Probes, Training, probes_of
from induction.probes import SHORTEST_CONTEXT, Probe
from induction.scores import (
    SCORES,
    Measured,
    Visible,
    attention_scores,
    bounds_of,
    composition,
    copying_eigenvalues,
    means,
    measure,
    qk_trace,
    score_bounds,
)
from induction.token_rows import TokenRows
from induction.verdict import Verdict, judge
from induction.watch import as_metrics
from model.gpt import GPT
from model.taps import Head
from training.ancestry import ancestors
from training.checkpoint import read_state
from training.config import Config
from training.loaded_run import LoadedRun, load_run
from training.logger import Record

VISIBLE = "prefix_matching_visible"
PROBE_ROWS = 64         # four times as many as during training
BATCH = 16              # rows in one forward pass


def probes_for(run: LoadedRun) -> Probes:
    """The probes of a run, on its model's device, with more rows than during training.

    Raises UserError if the model's context is too short for any.
    """
    n_ctx, earlier = run.config.model.n_ctx, ancestors(run.checkpoint)
    before = None
    if earlier is not None:
        before = [Training(ancestor.data, ancestor.seed) for ancestor in earlier]
    probes = probes_of(run.config.data, n_ctx, run.tokenizer, run.config.seed, most=PROBE_ROWS,
                       before=before)
    if probes is None:
        raise UserError(f"{run.folder}: model.n_ctx={n_ctx} is too short to repeat anything (at "
                        f"least {SHORTEST_CONTEXT} tokens), or fewer than 3 tokens can be repeated")
    return probes.to(run.model.embed.weight.device)


def measure_checkpoints(run: LoadedRun, probes: Probes, known: Collection[int]) -> list[Record]:
    """What the trainer would have logged at every checkpoint that is kept, without those at which
    it was logged (`known`, in tokens seen)."""
    records = []
    for checkpoint in run.checkpoints():
        if read_state(checkpoint)["tokens"] in known:
            continue
        loaded = load_run(checkpoint, device=run.model.embed.weight.device)
        measured = measure(loaded.model, probes.scored, probes.unrepeated)
        records.append({"step": loaded.step, "tokens": loaded.state["tokens"]}
                       | as_metrics(loaded.model.config, measured))
    return records


class HeadScores(NamedTuple):
    """A table of heads."""

    scores: dict[str, Tensor]           # name → (L, H)
    bounds: dict[str, Bounds]           # the intervals of those that have one
    ablated: dict[Head, Estimate]       # rise in loss, in nats, when only this head is mean-ablated

    @property
    def by_head(self) -> "Scores":
        return Scores({str(head): {name: values[head].item()
                                   for name, values in self.scores.items()} | {"alone": float(rise)}
                       for head, rise in self.ablated.items()})


class Scores(dict[str, dict[str, float]]):
    """The scores of every head by name, {"L1H3": {"prefix_matching": 0.94, …}}, with "alone": the
    rise in loss, in nats, when only this head is mean-ablated."""

    def __repr__(self) -> str:
        best = max(self, key=lambda head: self[head]["prefix_matching"])
        return (f"Scores of {len(self)} heads; the highest prefix_matching is "
                f"{self[best]['prefix_matching']:.3f} ({best})\n  "
                + "\n  ".join(textwrap.wrap(", ".join(self[best]), 98)))


class KeyComposition(NamedTuple):
    """From the weights: the earlier head whose output a head's keys read most."""

    head: Head
    earlier: Head
    k: float                            # K-composition, above chance
    qk_trace: float                     # in standard deviations


class Examination(NamedTuple):
    """All that is measured on a run after its training."""

    config: Config
    step: int
    tokens: int                                 # seen by this step
    table: HeadScores                           # on the periodic probe, behind the begin token
    verdict: Verdict
    composition: KeyComposition | None          # of the strongest induction head, if there is one

    def __repr__(self) -> str:
        return (f"Examination({self.config.run} at step {self.step:,}, {self.tokens:,} tokens, "
                f"{len(self.table.ablated)} heads:\n  {self.verdict!r})")


def examine_run(run: LoadedRun, progress: ProgressBar = iter) -> Examination:
    """Judge a run, score every head and ablate each head; `progress` wraps what is ablated one by
    one."""
    verdict = judge_run(run, progress)
    evidence = verdict.mechanism.evidence
    table = score_heads(run.model, verdict.probes.scored, verdict.measured, verdict.eigenvalues,
                        progress)
    composition = key_composition(run.model, evidence.attending[0]) if evidence.roles else None
    return Examination(run.config, run.step, run.state["tokens"], table, verdict, composition)


def scores_of(run: LoadedRun, progress: ProgressBar = iter) -> Scores:
    """The scores of every head of a run: those of `examine_run`, without the verdict."""
    probes = probes_for(run)
    measured = measure(run.model, probes.scored, probes.unrepeated)
    return score_heads(run.model, probes.scored, measured, copying_eigenvalues(run.model),
                       progress).by_head


def score_heads(model: GPT, probe: Probe, measured: Measured, eigenvalues: Tensor,
                progress: ProgressBar) -> HeadScores:
    """The table of heads on a periodic probe on which they were `measured`; eigenvalues (L, H)."""
    return HeadScores(
        measured.scores | {"copying_eigenvalues": eigenvalues}, score_bounds(measured, probe),
        ablate_each_head(model, probe.batch, probe.known, probe.resampling, progress))


def apart_if_unlike(examinations: list[Examination]) -> list[Examination]:
    """The same examinations, but runs whose names promise one condition form several if their
    configs differ by more than the seed, or if they were examined at different steps: each run is
    then a condition of its own."""
    def settings(examination: Examination) -> str:
        config = examination.config.model_dump_json(include={
            "model": True, "data": True, "optimizer": True, "train": {"steps", "batch_tokens"}})
        return f"{examination.step} {config}"

    kinds: dict[str, set[str]] = {}
    for examination in examinations:
        kinds.setdefault(examination.verdict.condition, set()).add(settings(examination))
    return [examination if len(kinds[examination.verdict.condition]) == 1
            else examination._replace(verdict=examination.verdict._replace(
                condition=examination.verdict.run)) for examination in examinations]


def key_composition(model: GPT, head: Head) -> KeyComposition | None:
    """The earlier head that composes most with the keys of `head`; None in the first layer."""
    strengths: dict[Head, float] = {}
    for layer in range(head.layer):
        k = composition(model, layer, head.layer).k[head.index]             # (H earlier,)
        strengths |= {Head(layer, index): strength for index, strength in enumerate(k.tolist())}
    if not strengths:
        return None
    earlier = max(strengths, key=lambda other: strengths[other])
    trace = qk_trace(model, earlier.layer, head.layer)[head.index, earlier.index].item()
    return KeyComposition(head, earlier, strengths[earlier], trace)


class TextScores(NamedTuple):
    """What heads do on the user's own rows."""

    table: HeadScores
    visible: list[Visible]              # of each layer: queries that have an induction target


def examine_on_rows(model: GPT, rows: TokenRows, progress: ProgressBar = iter) -> TextScores:
    """Score every head on all of the user's rows, and ablate each head on the first BATCH rows."""
    device = model.embed.weight.device
    tokens, queries = rows.tokens[:BATCH], rows.queries[:BATCH].to(device)
    batch = Batch(tokens[:, :-1], tokens[:, 1:]).to(device)
    # A position is real if the next one is: the last of each row has no target.
    real = queries[:, 1:]
    ablated = ablate_each_head(model, batch, real, Resampling.of_rows(len(tokens)), progress,
                               real=real)
    scored, visible = score_rows(model, rows)
    resampling = Resampling.of_rows(len(rows.tokens))
    bounds = {name: bounds_of(name, score, resampling) for name, score in scored.items()}
    return TextScores(HeadScores(means(scored), bounds, ablated), visible)


def score_rows(model: GPT, rows: TokenRows) -> tuple[dict[str, RowSums], list[Visible]]:
    """What the scores on all rows are made of, BATCH rows at a time, and of each layer how many
    queries have an induction target."""
    device = model.embed.weight.device
    parts: list[dict[str, RowSums]] = []
    seeing = torch.zeros(model.config.n_layers, dtype=torch.float64)
    uniform = torch.zeros(model.config.n_layers, dtype=torch.float64)
    for n in range(0, len(rows.tokens), BATCH):
        tokens, queries = rows.tokens[n:n + BATCH], rows.queries[n:n + BATCH]
        weight = (queries.sum() / rows.queries.sum()).double()
        measured = attention_scores(model, tokens.to(device), queries.to(device))
        # Left out if every query sees a target: then it is the same.
        parts.append({VISIBLE: measured.rows["prefix_matching"]} | measured.rows)
        fractions = torch.tensor([layer.fraction for layer in measured.visible]).double()
        seeing += fractions * weight
        uniform += fractions * weight * torch.tensor([layer.uniform for layer in measured.visible])
    uniform = uniform / seeing.clamp(min=1e-30)
    joined = {name: RowSums(*(np.concatenate(values, axis=-1)
                              for values in zip(*(part[name] for part in parts))))
              for name in SCORES if name in parts[0]}
    return joined, [Visible(*layer) for layer in zip(seeing.tolist(), uniform.tolist())]


def judge_run(run: LoadedRun, progress: ProgressBar = iter) -> Verdict:
    """The verdict on a run."""
    data, shape, steps = run.config.data, run.config.model, run.config.train.steps
    shortest, longest = data.repeats.period
    fixed_period = "repeats" in data.corpora and shortest == longest
    finished = run.step >= steps
    name = run.folder.name
    if not finished:
        name += f" (at step {run.step:,} of {steps:,})"
    # Documents that must not see each other would need their own edges and their own begin tokens.
    text = None
    if not data.mask_documents:         # the windows of an evaluation: they give its ICL score
        text = run.validation(max(1, run.config.eval.tokens // shape.n_ctx))
    # One layer cannot form induction heads, unless its keys are smeared; a single period can be
    # learned by position. An unfinished run shows nothing yet.
    control = shape.n_layers == 1 and not shape.smear and not fixed_period and finished
    return judge(name, condition_of(run.config), control, run.model, probes_for(run),
                 model_transition(run.records()), text, progress)
