"""Judge every model of the gallery, whose truth is known, and some trained ones, and renew the
tables of docs/studies/fooling.md.

    python -m bench.fooling                 # a minute on one core, and the runs that are missing
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from errors import ArgumentParser, UserError, run_command

import torch

from bench.fooling_models import GALLERY, Entry, Truth
from bench.gpu_page import table
from bench.hand_built import probes
from bench.results import meanwhile
from bench.study import renew_results
from bench.study_runs import Condition, condition_named, finished, train
from induction.behaviour import repeat_gain
from induction.examine import judge_run
from induction.knockout import Knockout
from induction.phase import INDUCTION_HEAD
from induction.probe_set import Probes
from induction.verdict import Verdict, judge
from report.text import percent
from training.loaded_run import load_run


class Judged(NamedTuple):
    entry: Entry
    verdict: Verdict

    @property
    def found(self) -> Truth:
        """The verdict's answers."""
        verdict = self.verdict
        return Truth(verdict.behaviour.answer, verdict.mechanism.answer, verdict.transfer.periods,
                     verdict.transfer.tokens, verdict.answer)


def judge_entry(entry: Entry, rows: Probes) -> Judged:
    return Judged(entry, judge(entry.name, entry.name, False, entry.build(), rows, None))


# --- trained models -------------------------------------------------------------------------------

FIRST = Condition("look_back_24", "toy_fixed_period", (
    "data.repeats={period: [24, 24], held_out_periods: [12], n_tokens: 128}", "train.steps=700"))
LAUNDERED = Condition("laundered", "toy_fixed_period", (
    "data.repeats={period: [8, 9], held_out_periods: [24], n_tokens: 128}", "train.steps=1",
    "optimizer.lr=1e-12", f"init_from={FIRST.run(0)}"))
TOY, TEXT, SMEAR, GATED = (condition_named(name) for name in (
    "toy_2l", "text_mixed_2l", "text_smear", "text_mixed_gated"))


class Trained(NamedTuple):
    """A run, and by what its weights are multiplied before it is judged."""

    what: str
    condition: Condition
    w_q: float = 1.0        # of the last layer
    w_o: float = 1.0


TRAINED = [
    Trained("`toy_2l`", TOY),
    Trained("`toy_2l` with W_q × 0.15 and W_O × 4 in layer 1: soft attention", TOY, 0.15, 4.0),
    Trained("`toy_2l` with W_O × 0.05 in layer 1: hardly any effect", TOY, w_o=0.05),
    Trained("`toy_2l` with W_O × 0.01 in layer 1", TOY, w_o=0.01),
    Trained("look-back of 24, then one step at a learning rate of 1e-12 in a run that declares "
            "period 24 held out", LAUNDERED),
    Trained("`text_smear`: text only, smeared keys", SMEAR),
    Trained("`text_mixed_gated`: only repeats begin with the begin token", GATED),
    Trained("`text_mixed_2l`: rows of both kinds begin alike", TEXT)]


def judge_trained(trained: Trained) -> Verdict:
    """The verdict on a run, which is trained first if it is missing."""
    for condition in (FIRST, trained.condition):
        if not finished(condition, seed=0):
            train((condition, 0))
    run = load_run(trained.condition.run(0))
    attn = run.model.blocks[-1].attn
    with torch.no_grad():
        attn.w_q.weight.mul_(trained.w_q)
        attn.w_o.weight.mul_(trained.w_o)
    return judge_run(run)


def trained_table() -> str:
    heading = ("trained model", "prefix matching", "by pattern", "right", "edges removed",
               "random edges", "behaviour", "mechanism", "answer")
    rows = []
    for trained in TRAINED:
        meanwhile(trained.what)
        verdict = judge_trained(trained)
        finding, pair = verdict.behaviour, verdict.mechanism.evidence.knockout
        rows.append((trained.what, f"{verdict.best:.2f}", by_pattern(verdict),
                     f"{finding.begun.accuracy:.0%} / {finding.bare.accuracy:.0%}",
                     *(removed(pair or (), field) for field in ("gain_removed", "by_random")),
                     finding.answer, verdict.mechanism.answer, f"**{verdict.answer}**"))
    return "\n".join(table(heading, rows))


def by_pattern(verdict: Verdict) -> str:
    """The answer of a rule that looks only at attention patterns, on periods that were never
    trained: is there a head with high prefix matching?"""
    return "yes" if verdict.best >= INDUCTION_HEAD else "no"


# --- tables ---------------------------------------------------------------------------------------

def tables(gallery: list[Judged]) -> str:
    """The answers, the numbers that decided, and how many are right."""
    right = sum(judged.found == judged.entry.truth for judged in gallery)
    fooled = sum((by_pattern(judged.verdict) == "no") != (judged.entry.truth.answer == "no")
                 for judged in gallery)
    counts = (f"{len(gallery)} models. All answers of the verdict are right for {right}. The "
              f"answer by pattern is wrong for {fooled}, if partly counts as a yes.")
    return "\n\n".join([counts, answers(gallery), numbers(gallery)])


def answers(gallery: list[Judged]) -> str:
    heading = ("model", "what it is", "by pattern", "behaviour", "mechanism", "periods", "tokens",
               "answer")
    rows = []
    for judged in gallery:
        found, truth = judged.found, judged.entry.truth
        cells = [answer if answer == right else f"{answer} (should be: {right})"
                 for answer, right in zip(found, truth)]
        cells[-1] = f"**{cells[-1]}**"
        rows.append((f"`{judged.entry.name}`", summary(judged.entry), by_pattern(judged.verdict),
                     *cells))
    return "\n".join(table(heading, rows))


def numbers(gallery: list[Judged]) -> str:
    heading = ("model", "prefix matching", "right", "gain, nats", "edges removed", "random edges",
               "other tokens read")
    rows = []
    for judged in gallery:
        verdict = judged.verdict
        finding, pair = verdict.behaviour, verdict.mechanism.evidence.knockout
        gains = [repeat_gain(kind.loss_first, kind.loss_known, finding.guessing)
                 for kind in (finding.begun, finding.bare)]
        rows.append((f"`{judged.entry.name}`", f"{verdict.best:.2f}",
                     f"{finding.begun.accuracy:.0%} / {finding.bare.accuracy:.0%}",
                     " / ".join(f"{gain:.1f}" for gain in gains),
                     *(removed(pair or (), field)
                       for field in ("gain_removed", "by_random", "by_misreading"))))
    return "\n".join(table(heading, rows))


def summary(entry: Entry) -> str:
    """The first sentence of a model's description."""
    text = re.sub(r"\s+", " ", entry.build.__doc__ or "")
    return re.split(r"(?<=\.) ", text)[0].strip()


def removed(knockouts: Iterable[Knockout], field: str) -> str:
    """Fractions of the repeat gain that are removed, behind the begin token and without it."""
    fractions = [getattr(knockout, field) for knockout in knockouts]
    if all(fraction is None for fraction in fractions):
        return "–"
    return " / ".join("–" if fraction is None else percent(fraction) for fraction in fractions)


def main() -> None:
    ArgumentParser("python -m bench.fooling", description="Judge models whose truth is known, and "
                   "write the tables of docs/studies/fooling.md. Trains the runs that are missing "
                   "in runs/.").parse_args()
    torch.set_num_threads(1)
    rows, gallery = probes(), []
    for entry in GALLERY:
        meanwhile(entry.name)
        gallery.append(judge_entry(entry, rows))
    markdown = f"{tables(gallery)}\n\n{trained_table()}"
    meanwhile("")
    print(markdown)
    print(f"\nwritten  {renew_results('fooling', markdown)}")
    if wrong := [judged.entry.name for judged in gallery if judged.found != judged.entry.truth]:
        raise UserError(f"the verdict is wrong about {', '.join(wrong)}")


if __name__ == "__main__":
    run_command(main)
