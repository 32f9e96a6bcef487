"""The tables of a study: what formed and when, and what it is worth, from the verdicts of its
runs."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bench.study_runs import Condition
from induction.examine import judge_run
from induction.history import icl_transition
from induction.intervals import FRACTION, NONNEGATIVE, over_seeds
from induction.metrics import ICL_SCORE
from induction.phase import Transition
from induction.verdict import Verdict
from report.text import percent, two_digits, with_interval
from training.config import load_config
from training.device import choose_device
from training.loaded_run import load_run
from training.logger import Record, read_metrics


class Outcome(NamedTuple):
    """The results of one run."""

    verdict: Verdict
    newest: dict[str, float]    # the newest value of each metric
    icl: Transition | None
    cache: int                  # numbers in the cache per token and layer
    records: list[Record]


def outcome(run: Path) -> Outcome:
    records = read_metrics(run / "metrics.jsonl")
    shape = load_config(run / "config.yaml").model
    newest = {key: value for record in records for key, value in record.items()}
    verdict = judge_run(load_run(run, device=choose_device("auto")))
    return Outcome(verdict, newest, icl_transition(records), 2 * shape.kv_heads * shape.head_size,
                   records)


Cell = Callable[[Outcome], str | None]              # None if a run has no such value


def millions(moment: Callable[[Outcome], float | None]) -> Cell:
    """Of tokens."""
    def cell(o: Outcome) -> str | None:
        tokens = moment(o)
        return None if tokens is None else f"{tokens / 1e6:.2f}"
    return cell


def on_text(metric: str) -> Cell:
    """Only of runs that saw text."""
    return lambda o: f"{o.newest[metric]:.3f}" if ICL_SCORE in o.newest else None


def unseen(o: Outcome) -> str | None:
    finding = o.verdict.transfer.unseen
    return None if finding is None else f"{finding.accuracy:.0%}"


def text_loss(o: Outcome, field: str) -> str | None:
    """Loss on held-out text with the begin token in front of it, or without."""
    loss = o.verdict.transfer.text_loss
    return None if loss is None else f"{getattr(loss, field):.3f}"


def of_edges(o: Outcome, field: str) -> float | None:
    """A field of the knockout of the induction edges, behind the begin token."""
    knockouts = o.verdict.mechanism.evidence.knockout
    return None if knockouts is None else getattr(knockouts.begun, field)


def edges_removed(field: str) -> Cell:
    def cell(o: Outcome) -> str | None:
        value = of_edges(o, field)
        return None if value is None else percent(value)
    return cell


def ablation_removed(o: Outcome) -> str | None:
    effect = o.verdict.mechanism.evidence.ablation
    return None if effect is None or effect.gain_removed is None else f"{effect.gain_removed:.0%}"


def on_text_edges(field: str) -> Cell:
    """A field of the knockout of the induction edges on held-out text."""
    def cell(o: Outcome) -> str | None:
        text = o.verdict.transfer.text
        if text is None or not o.verdict.mechanism.evidence.roles:
            return None
        return f"{getattr(text, field):+z.3f}"
    return cell


def previous_token(effect: str, into: str | None = None) -> Cell:
    """A field of the effect of the previous-token heads."""
    def cell(o: Outcome) -> str | None:
        heads = o.verdict.mechanism.evidence.previous_token
        if heads is None:
            return None
        value = getattr(heads, effect)
        return f"{value if into is None else value[into]:+z.2f}"
    return cell


# Heading → cell. A column without any value is left out, and so is a row.
FORMED: dict[str, Cell] = {
    "right with begin token": lambda o: f"{o.verdict.behaviour.begun.accuracy:.0%}",
    "without": lambda o: f"{o.verdict.behaviour.bare.accuracy:.0%}",
    "unseen tokens": unseen,
    "prefix matching": lambda o: f"{o.verdict.best:.2f}",
    "peak near target": lambda o: f"{o.verdict.measured.offset_profile.max():.2f}",
    "first copy": lambda o: f"{o.verdict.measured.loss_first:.2f}",
    "second copy": lambda o: f"{o.verdict.measured.loss_second:.3f}",
    "onset, M tokens": millions(lambda o: o.verdict.transition and o.verdict.transition.onset),
    "end": millions(lambda o: o.verdict.transition and o.verdict.transition.end),
    "faded": millions(lambda o: o.verdict.transition and o.verdict.transition.faded),
    "text loss": on_text("val/loss"),
    "text with begin token": lambda o: text_loss(o, "begun"),
    "text without": lambda o: text_loss(o, "bare"),
    "ICL score": on_text(ICL_SCORE),
    "its onset": millions(lambda o: o.icl and o.icl.onset),
    "its end": millions(lambda o: o.icl and o.icl.end),
    "it faded": millions(lambda o: o.icl and o.icl.faded),
}
NEEDED: dict[str, Cell] = {
    "without induction edges": edges_removed("gain_removed"),
    "without random edges": edges_removed("by_random"),
    "heads mean-ablated": ablation_removed,
    "previous-token heads": previous_token("total"),
    "patterns kept": previous_token("patterns_kept"),
    "into keys": previous_token("into", "k"),
    "into queries": previous_token("into", "q"),
    "on text, without induction edges": on_text_edges("matched"),
    "random edges": on_text_edges("by_random"),
}

class Mean(NamedTuple):
    """A number of which the mean over seeds is shown."""

    value: Callable[[Outcome], float | None]
    form: Callable[[float], str]
    limits: tuple[float, float]         # of what it can be


MEANS = {
    "right with begin token": Mean(lambda o: o.verdict.behaviour.begun.accuracy, percent, FRACTION),
    "without": Mean(lambda o: o.verdict.behaviour.bare.accuracy, percent, FRACTION),
    "prefix matching": Mean(lambda o: o.verdict.best, two_digits, FRACTION),
    "onset, M tokens": Mean(lambda o: o.verdict.transition and o.verdict.transition.onset / 1e6,
                            two_digits, NONNEGATIVE),
    "second copy": Mean(lambda o: o.verdict.measured.loss_second, two_digits, NONNEGATIVE),
    "without induction edges": Mean(lambda o: of_edges(o, "gain_removed"), percent,
                                    (-np.inf, 1.0)),
}
Results = dict[Condition, list[Outcome]]
Column = dict[Condition, str]


def tables(results: Results) -> str:
    """Markdown: what formed and when, and what it is worth. One row per condition; of several seeds
    the median and the range."""
    caches = {condition: outcomes[0].cache for condition, outcomes in results.items()}
    first = {"induction heads": {condition: answers(outcomes)
                                 for condition, outcomes in results.items()}}
    if len(set(caches.values())) > 1:
        first["cache, numbers a token and layer"] = {condition: str(cache)
                                                     for condition, cache in caches.items()}
    parts = [table(first | columns(results, FORMED)), table(columns(results, NEEDED))]
    if any(len(outcomes) > 1 for outcomes in results.values()):
        parts += ["Means over seeds, with 95% intervals (Student's t):",
                  table({heading: {condition: mean_over_seeds(outcomes, mean)
                                   for condition, outcomes in results.items()}
                         for heading, mean in MEANS.items()})]
    return "\n\n".join(markdown for markdown in parts if markdown)


def mean_over_seeds(outcomes: Sequence[Outcome], mean: Mean) -> str:
    """0.86 (0.83 to 0.90), of the seeds that have a value; their number, if not all do."""
    values = [mean.value(o) for o in outcomes]
    there = [value for value in values if value is not None]
    if not there:
        return ""
    few = "" if len(there) == len(values) else f", {len(there)} of {len(values)}"
    return with_interval(over_seeds(there, mean.limits), mean.form) + few


def answers(outcomes: list[Outcome]) -> str:
    """The verdicts of several seeds: yes 5 of 5; or no 2, yes 1 of 3."""
    counts = Counter(o.verdict.answer for o in outcomes)
    return (", ".join(f"{answer} {count}" for answer, count in counts.most_common())
            + f" of {len(outcomes)}")


def columns(results: Results, cells: dict[str, Cell]) -> dict[str, Column]:
    return {heading: {condition: spread([cell(o) for o in outcomes])
                      for condition, outcomes in results.items()}
            for heading, cell in cells.items()}


def table(all_columns: dict[str, Column]) -> str:
    filled = {heading: column for heading, column in all_columns.items() if any(column.values())}
    if not filled:
        return ""
    lines = ["|  | " + " | ".join(filled) + " |", "|" + "---|" * (1 + len(filled))]
    for condition in next(iter(filled.values())):
        cells = [column[condition] for column in filled.values()]
        if any(cells):
            lines.append(f"| `{condition.label}` | " + " | ".join(cell or "–" for cell in cells)
                         + " |")
    return "\n".join(lines)


def spread(cells: Sequence[str | None]) -> str:
    """The median and the range; the number of values, if some runs have none."""
    values = sorted((cell for cell in cells if cell), key=lambda cell: float(cell.rstrip("%")))
    if not values:
        return ""
    low, middle, high = values[0], values[(len(values) - 1) // 2], values[-1]
    few = "" if len(values) == len(cells) else f", {len(values)} of {len(cells)}"
    return f"{middle}{few}" if low == high else f"{middle} ({low} … {high}{few})"
