"""What heads.py has measured, as JSON for other programs: one object per run.

docs/exports.md lists every key. Keys are added, never renamed; SCHEMA counts changes of meaning.
A number that was estimated from rows is {"value", "low", "high"}, with low and high null if its
interval is unknown.
"""

import json
import platform
from collections.abc import Iterable, Sequence
from math import isfinite
from typing import Any

import numpy as np
import torch

from induction.behaviour import Behaviour, InContextLearning, ProbeLosses
from induction.examine import Examination, HeadScores, TextScores
from induction.history import condition_of
from induction.intervals import FRACTION, Estimate, RowSums, over_seeds
from induction.knockout import Knockout, KnockoutPair
from induction.mechanism import MechanismEvidence
from induction.phase import Transition
from induction.probes import Pair, Probe
from induction.scores import Visible
from induction.verdict import BehaviourFinding, TransferFinding, Verdict
from kernels.planes import REACH
from report.verdict_page import statement
from training.config import Config

SCHEMA = 1
Json = dict[str, Any]


def as_text(content: Json) -> str:
    """Strict JSON: what is not finite becomes null."""
    return json.dumps(finite(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def finite(value: Any) -> Any:
    """The same dicts and lists, with null for numbers that are not finite: a loss may be NaN, and
    JSON has none."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def versions() -> Json:
    return {"python": platform.python_version(), "torch": torch.__version__,
            "numpy": np.__version__}


# --- JSON -----------------------------------------------------------------------------------------

def runs_as_json(examinations: Sequence[Examination]) -> Json:
    """Of `heads.py verdict --json`: every run, and every condition over its seeds."""
    conditions = dict.fromkeys(examination.verdict.condition for examination in examinations)
    return {"schema": SCHEMA, "versions": versions(),
            "runs": [run_as_json(examination) for examination in examinations],
            "conditions": [condition_as_json(condition, [
                examination for examination in examinations
                if examination.verdict.condition == condition]) for condition in conditions]}


def condition_as_json(condition: str, examinations: Sequence[Examination]) -> Json:
    """Runs that differ only by their seed: means with Student's interval over seeds."""
    verdicts = [examination.verdict for examination in examinations]
    onsets = [verdict.transition.onset for verdict in verdicts if verdict.transition]
    return {"condition": condition,
            "runs": [examination.config.run for examination in examinations],
            "formed": [verdict.answer for verdict in verdicts],
            "accuracy": number(over_seeds([verdict.behaviour.accuracy for verdict in verdicts],
                                          FRACTION)),
            "prefix_matching": number(over_seeds([verdict.best for verdict in verdicts],
                                                 FRACTION)),
            "onset": number(over_seeds(onsets)) if onsets else None}


def run_as_json(examination: Examination) -> Json:
    """Of `heads.py RUN --json`, and of the page."""
    config, verdict = examination.config, examination.verdict
    behaviour, evidence, transfer = (verdict.behaviour, verdict.mechanism.evidence,
                                     verdict.transfer)
    return {
        "schema": SCHEMA, "run": config.run, "condition": verdict.condition, "seed": config.seed,
        "step": examination.step, "tokens": examination.tokens, "control": verdict.control,
        "versions": versions(), "model": model_as_json(config),
        "answers": {"formed": verdict.answer, "behaviour": behaviour.answer,
                    "mechanism": verdict.mechanism.answer, "transfer_periods": transfer.periods,
                    "transfer_tokens": transfer.tokens},
        "summary": summary(verdict),
        **heads_as_json(examination.table),
        "by_period": by_period_as_json(verdict),
        "offset_profile": profiles_as_json(verdict),
        "losses": {name: number(value) for name, value
                   in verdict.repeat_losses._asdict().items()},
        "behaviour": finding_as_json(behaviour),
        "mechanism": mechanism_as_json(evidence),
        "composition": composition_as_json(examination),
        "transfer": transfer_as_json(transfer),
        "transition": transition_as_json(verdict.transition),
        "probes": probes_as_json(config, verdict),
        "rows": [*periodic_rows(verdict), *aperiodic_rows(verdict)]}


def rows_as_json(config: Config, step: int, title: str, n_rows: int, text: TextScores) -> Json:
    """Of `heads.py RUN --text T --json`, and likewise --file and --tokens."""
    return {"schema": SCHEMA, "run": config.run, "condition": condition_of(config),
            "seed": config.seed, "step": step, "versions": versions(),
            "model": model_as_json(config), "measured_on": title, "rows_given": n_rows,
            **heads_as_json(text.table),
            "visible": [visible_as_json(layer) for layer in text.visible]}


def model_as_json(config: Config) -> Json:
    shape = config.model
    return {"n_layers": shape.n_layers, "n_heads": shape.n_heads, "n_kv_heads": shape.kv_heads,
            "d_model": shape.d_model, "d_head": shape.head_size, "n_ctx": shape.n_ctx}


def summary(verdict: Verdict) -> str:
    """The verdict in a sentence."""
    answer, reason = statement(verdict)
    return f"{answer}: {reason}."


def headline(verdict: Verdict) -> dict[str, str | float]:
    """The verdict under flat names, for wandb."""
    behaviour, knockouts = verdict.behaviour, verdict.mechanism.evidence.knockout
    shown: dict[str, str | float] = {
        "verdict/formed": verdict.answer, "verdict/behaviour": behaviour.answer,
        "verdict/mechanism": verdict.mechanism.answer,
        "verdict/transfer_periods": verdict.transfer.periods,
        "verdict/transfer_tokens": verdict.transfer.tokens, "verdict/summary": summary(verdict)}
    numbers: dict[str, Estimate | None] = {
        "accuracy": behaviour.begun.accuracy, "accuracy_without_begin": behaviour.bare.accuracy}
    if knockouts:
        numbers |= {"gain_removed": knockouts.begun.gain_removed,
                    "gain_removed_random": knockouts.begun.by_random}
    for name, value in numbers.items():
        if value is not None:
            shown |= {f"verdict/{name}": float(value), f"verdict/{name}_low": value.low,
                      f"verdict/{name}_high": value.high}
    return shown


def number(value: float) -> Json:
    """A number with its interval."""
    low, high = (value.low, value.high) if isinstance(value, Estimate) else (np.nan, np.nan)
    return {"value": float(value), "low": low, "high": high}


def optional(value: float | None) -> Json | None:
    return None if value is None else number(value)


def heads_as_json(table: HeadScores) -> Json:
    """{"heads": {"L0H0": {"prefix_matching": 0.1, …}}, "intervals": {"L0H0": {…: [low, high]}}}"""
    intervals = {}
    for head, rise in table.ablated.items():
        bounds = {name: [float(ends.low[head]), float(ends.high[head])]
                  for name, ends in table.bounds.items()}
        intervals[str(head)] = bounds | {"alone": [rise.low, rise.high]}
    return {"heads": table.by_head, "intervals": intervals}


def by_period_as_json(verdict: Verdict) -> Json:
    """period → head → prefix matching"""
    rows, probe = verdict.measured.rows["prefix_matching"], verdict.probes.scored
    periods = {}
    for period in verdict.measured.by_period:
        selected = probe.periods == period
        part, resampling = rows.of(selected.cpu().numpy()), probe.rows(selected).resampling
        periods[str(period)] = {str(head): number(resampling.mean(part.of_head(head), FRACTION))
                                for head in verdict.heads}
    return periods


def profiles_as_json(verdict: Verdict) -> Json:
    profile = verdict.measured.offset_profile
    return {"offsets": list(range(-REACH, REACH + 1)),
            "heads": {str(head): profile[head].tolist() for head in verdict.heads}}


def finding_as_json(finding: BehaviourFinding) -> Json:
    return {"begun": behaviour_as_json(finding.begun), "bare": behaviour_as_json(finding.bare),
            "guessing": finding.guessing}


def behaviour_as_json(behaviour: Behaviour) -> Json:
    return {"accuracy": number(behaviour.accuracy), "loss_first": number(behaviour.loss_first),
            "loss_known": number(behaviour.loss_known), "gain": number(behaviour.gain),
            "chance": behaviour.chance}


def mechanism_as_json(evidence: MechanismEvidence) -> Json:
    previous, ablation = evidence.previous_token, evidence.ablation
    return {
        "heads": [{"head": str(role.head), "role": role.role,
                   "prefix_matching": number(role.prefix_matching), "copying": role.copying,
                   "copying_eigenvalues": role.eigenvalues, "alone": number(role.alone)}
                  for role in evidence.roles],
        "uniform": evidence.uniform,
        "peak": {"head": str(evidence.peak.head), "offset": evidence.peak.offset,
                 "weight": evidence.peak.weight},
        "knockout": None if evidence.knockout is None else pair_as_json(evidence.knockout),
        "knockout_all_heads": pair_as_json(evidence.everywhere),
        "ablation": None if ablation is None else {
            "known": number(ablation.known), "first_copy": number(ablation.first_copy),
            "gain_removed": optional(ablation.gain_removed)},
        "previous_token_heads": None if previous is None else {
            "heads": [str(head) for head in previous.heads], "total": number(previous.total),
            "patterns_kept": number(previous.patterns_kept),
            "into": {part: number(rise) for part, rise in previous.into.items()}},
        "paths": [{"sender": str(path.sender), "receiver": str(path.receiver), "into": path.into,
                   "rise": number(path.rise)} for path in evidence.paths]}


def pair_as_json(pair: KnockoutPair) -> Json:
    return {"begun": knockout_as_json(pair.begun), "bare": knockout_as_json(pair.bare)}


def knockout_as_json(knockout: Knockout) -> Json:
    return {"gain": number(knockout.gain), "gain_removed": optional(knockout.gain_removed),
            "by_random": optional(knockout.by_random),
            "by_misreading": optional(knockout.by_misreading), "known": number(knockout.known)}


def composition_as_json(examination: Examination) -> Json | None:
    composition = examination.composition
    if composition is None:
        return None
    return {"head": str(composition.head), "earlier": str(composition.earlier),
            "k": composition.k, "qk_trace": composition.qk_trace}


def transfer_as_json(transfer: TransferFinding) -> Json:
    text, loss = transfer.text, transfer.text_loss
    return {
        "by_period": {str(period): number(accuracy)
                      for period, accuracy in transfer.by_period.items()},
        "trained": optional(transfer.trained),
        "unseen_tokens": None if transfer.unseen is None else finding_as_json(transfer.unseen),
        "text": None if text is None else {
            "matched": number(text.matched), "by_random": number(text.by_random),
            "fraction": text.fraction},
        "text_loss": None if loss is None else {
            "begun": number(loss.begun), "bare": number(loss.bare),
            "difference": number(loss.difference)},
        "icl": None if transfer.icl is None else icl_as_json(transfer.icl),
        "windows": transfer.windows}


def icl_as_json(icl: InContextLearning) -> Json:
    return {"score": optional(icl.score),
            "positions": [{"start": position.start, "stop": position.stop,
                           "loss": number(position.loss), "change": number(position.change)}
                          for position in icl.positions]}


def transition_as_json(transition: Transition | None) -> Json | None:
    if transition is None:
        return None
    return {"onset": number(transition.onset), "end": number(transition.end),
            "final": transition.final, "peak": transition.peak, "peak_at": transition.peak_at,
            "faded": transition.faded,
            "crossings": {f"{level:g}": optional(tokens)
                          for level, tokens in transition.crossings.items()}}


def visible_as_json(visible: Visible) -> Json:
    return {"fraction": visible.fraction, "uniform": visible.uniform}


def probes_as_json(config: Config, verdict: Verdict) -> Json:
    """What is needed to make the same rows again; `rows` has the tokens themselves."""
    probes = verdict.probes
    return {"note": probes.note, "seed": config.seed, "vocabulary": probes.vocabulary,
            "never_trained": probes.never_trained, "repeats_trained": probes.repeats_trained,
            "history_known": probes.history_known,
            "periodic": {**shape_as_json(probes.periodic),
                         "periods": sorted(verdict.measured.by_period)},
            "aperiodic": shape_as_json(probes.aperiodic)}


def shape_as_json(rows: Pair) -> Json:
    n_rows, length = rows.begun.tokens.shape
    return {"rows": n_rows, "length": length}


def periodic_rows(verdict: Verdict) -> Iterable[Json]:
    """Each row of the periodic probe, behind the begin token."""
    probe, measured = verdict.probes.scored, verdict.measured
    matching = measured.rows["prefix_matching"]
    for n, row in enumerate(probe_rows("periodic", True, probe)):
        yield row | losses_of_row(measured.losses, n) | {"prefix_matching": {
            str(head): of_row(matching.of_head(head), n) for head in verdict.heads}}


def aperiodic_rows(verdict: Verdict) -> Iterable[Json]:
    """Each row of the aperiodic probe, behind the begin token and without it."""
    for begin, probe, behaviour in zip((True, False), verdict.probes.aperiodic,
                                       (verdict.behaviour.begun, verdict.behaviour.bare)):
        for n, row in enumerate(probe_rows("aperiodic", begin, probe)):
            yield row | losses_of_row(behaviour.losses, n) | {
                "accuracy": of_row(behaviour.right, n)}


def probe_rows(kind: str, begin: bool, probe: Probe) -> Iterable[Json]:
    for n, (tokens, block) in enumerate(zip(probe.tokens.tolist(), probe.blocks.tolist())):
        yield {"probe": kind, "begin": begin, "row": n, "block": block, "tokens": tokens}


def losses_of_row(losses: ProbeLosses, n: int) -> Json:
    return {"loss_first": of_row(losses.first, n), "loss_known": of_row(losses.known, n)}


def of_row(rows: RowSums, n: int) -> float | None:
    """The mean of row n; None if nothing in it counts."""
    return float(rows.sums[n] / rows.counts[n]) if rows.counts[n] else None
