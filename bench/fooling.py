"""Judge every model of the gallery, whose truth is known, and renew the tables of
docs/studies/fooling.md.

    python -m bench.fooling                 # half a minute on one core
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from errors import UserError, run_command

import torch

from bench.fooling_models import GALLERY, Entry, Truth
from bench.hand_built import probes
from bench.results import meanwhile
from bench.study import renew_results
from induction.knockout import Knockout
from induction.phase import INDUCTION_HEAD
from induction.probe_set import Probes
from induction.verdict import Verdict, judge


class Judged(NamedTuple):
    entry: Entry
    verdict: Verdict

    @property
    def found(self) -> Truth:
        """The verdict's answers."""
        verdict = self.verdict
        return Truth(verdict.behaviour.answer, verdict.mechanism.answer, verdict.transfer.periods,
                     verdict.transfer.tokens, verdict.answer)

    @property
    def by_pattern(self) -> str:
        """The answer of a rule that looks only at attention patterns, on periods that were never
        trained: is there a head with high prefix matching?"""
        return "yes" if self.verdict.best >= INDUCTION_HEAD else "no"


def judge_entry(entry: Entry, rows: Probes) -> Judged:
    return Judged(entry, judge(entry.name, entry.name, False, entry.build(), rows, None))


# --- tables ---------------------------------------------------------------------------------------

def tables(gallery: list[Judged]) -> str:
    """The answers, the numbers that decided, and how many are right."""
    right = sum(judged.found == judged.entry.truth for judged in gallery)
    fooled = sum((judged.by_pattern == "yes") != (judged.entry.truth.answer in ("yes", "partly"))
                 for judged in gallery)
    counts = (f"{len(gallery)} models. All answers of the verdict are right for {right}. The "
              f"answer by pattern is wrong for {fooled}, if partly counts as a yes.")
    return "\n\n".join([counts, answers(gallery), numbers(gallery)])


def answers(gallery: list[Judged]) -> str:
    rows = [["model", "what it is", "by pattern", "behaviour", "mechanism", "periods", "tokens",
             "answer"]]
    for judged in gallery:
        found, truth = judged.found, judged.entry.truth
        cells = [answer if answer == right else f"{answer} (should be: {right})"
                 for answer, right in zip(found, truth)]
        cells[-1] = f"**{cells[-1]}**"
        rows.append([f"`{judged.entry.name}`", summary(judged.entry), judged.by_pattern, *cells])
    return table(rows)


def numbers(gallery: list[Judged]) -> str:
    rows = [["model", "prefix matching", "right", "gain, nats", "edges removed", "random edges",
             "other tokens read"]]
    for judged in gallery:
        verdict = judged.verdict
        finding, pair = verdict.behaviour, verdict.mechanism.evidence.knockout
        gains = [min(kind.loss_first, finding.guessing) - kind.loss_known
                 for kind in (finding.begun, finding.bare)]
        rows.append([f"`{judged.entry.name}`", f"{verdict.best:.2f}",
                     f"{finding.begun.accuracy:.0%} / {finding.bare.accuracy:.0%}",
                     " / ".join(f"{gain:.1f}" for gain in gains),
                     *(removed(pair or (), field)
                       for field in ("gain_removed", "by_random", "by_misreading"))])
    return table(rows)


def summary(entry: Entry) -> str:
    """The first sentence of a model's description."""
    text = re.sub(r"\s+", " ", entry.build.__doc__ or "")
    return re.split(r"(?<=\.) ", text)[0].strip()


def removed(knockouts: Iterable[Knockout], field: str) -> str:
    """Fractions of the repeat gain that are removed, behind the begin token and without it."""
    fractions = [getattr(knockout, field) for knockout in knockouts]
    if all(fraction is None for fraction in fractions):
        return "–"
    return " / ".join("–" if fraction is None else f"{100 * fraction:.0f}%".replace("-0%", "0%")
                      for fraction in fractions)


def table(rows: list[list[str]]) -> str:
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    torch.set_num_threads(1)
    rows, gallery = probes(), []
    for entry in GALLERY:
        meanwhile(entry.name)
        gallery.append(judge_entry(entry, rows))
    meanwhile("")
    print(tables(gallery))
    print(f"\nwritten  {renew_results('fooling', tables(gallery))}")
    if wrong := [judged.entry.name for judged in gallery if judged.found != judged.entry.truth]:
        raise UserError(f"the verdict is wrong about {', '.join(wrong)}")


if __name__ == "__main__":
    run_command(main)
