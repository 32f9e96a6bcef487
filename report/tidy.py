"""What heads.py has measured as tidy rows: one number per row, for pandas and R."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from typing import Any

from induction.examine import Examination, HeadScores, TextScores
from induction.history import score_curves
from induction.intervals import Estimate
from induction.knockout import KnockoutPair
from induction.scores import SCORES
from model.taps import heads_of
from training.config import Config
from training.logger import Record

COLUMNS = ("run", "seed", "step", "head", "score", "value", "low", "high")
Row = Sequence[Any]


def as_csv(rows: Iterable[Row]) -> str:
    """A table with COLUMNS; an unknown interval, and the head of what belongs to the whole model,
    are empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(rows)
    return text.getvalue()


def tidy_rows(examination: Examination) -> Iterable[Row]:
    """Every score of every head, and what the model predicts, of one run at one step."""
    config, verdict = examination.config, examination.verdict
    start = (config.run, config.seed, examination.step)
    yield from score_rows(start, examination.table)
    for kind, behaviour in (("begun", verdict.behaviour.begun), ("bare", verdict.behaviour.bare)):
        for name in ("accuracy", "loss_first", "loss_known", "gain"):
            yield (*start, "", f"behaviour/{kind}/{name}", *cells(getattr(behaviour, name)))
    for name, value in verdict.repeat_losses._asdict().items():
        yield (*start, "", f"losses/{name}", *cells(value))
    evidence = verdict.mechanism.evidence
    if evidence.knockout:
        yield from knockout_rows(start, "knockout", evidence.knockout)
    yield from knockout_rows(start, "knockout_all_heads", evidence.everywhere)
    for path in evidence.paths:
        yield (*start, f"{path.sender}>{path.receiver}", f"paths/{path.into}", *cells(path.rise))
    if verdict.transition:
        yield (*start, "", "transition/onset", *cells(verdict.transition.onset))


def knockout_rows(start: tuple, name: str, pair: KnockoutPair) -> Iterable[Row]:
    for kind, knockout in (("begun", pair.begun), ("bare", pair.bare)):
        for part in ("gain", "gain_removed", "by_random", "by_misreading", "known"):
            value = getattr(knockout, part)
            if value is not None:
                yield (*start, "", f"{name}/{kind}/{part}", *cells(value))


def text_rows(config: Config, step: int, text: TextScores) -> Iterable[Row]:
    """Every score of every head on the user's own rows."""
    return score_rows((config.run, config.seed, step), text.table)


def score_rows(start: tuple, table: HeadScores) -> Iterable[Row]:
    for head, rise in table.ablated.items():
        for name, values in table.scores.items():
            value = Estimate(values[head].item())
            if name in table.bounds:
                low, high = table.bounds[name]
                value = Estimate(value, low[head], high[head])
            yield (*start, str(head), name, *cells(value))
        yield (*start, str(head), "alone", *cells(rise))


def history_rows(config: Config, records: list[Record], last: int) -> Iterable[Row]:
    """Every score of every head as it was measured during training, before step `last`; these have
    no intervals."""
    steps: Mapping[float, int] = {record["tokens"]: record["step"] for record in records}
    for name in SCORES:
        curve = score_curves(records, name, config.model)
        if curve is None:
            continue
        for tokens, values in zip(curve.tokens.tolist(), curve.values):
            if steps[tokens] < last:
                for head in heads_of(config.model):
                    yield (config.run, config.seed, steps[tokens], str(head), name,
                           *cells(float(values[head])))


def cells(value: float) -> list:
    """value, low, high; what is unknown is empty."""
    ends = [value.low, value.high] if isinstance(value, Estimate) else ["", ""]
    return [end if end == "" or isfinite(end) else "" for end in (float(value), *ends)]
