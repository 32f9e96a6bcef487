"""The page of `heads.py verdict`: for each run the answer and the evidence, in Markdown."""

from typing import NamedTuple

from induction.phase import INDUCTION_HEAD, Transition
from induction.verdict import (
    MAX_CONTROL,
    MAX_LOSS_RATIO,
    PreviousTokenHeads,
    SetAblation,
    Verdict,
)
from report.text import listed, rises

CAVEAT = ("Attention weights show what was averaged, not what was used. Ablation shows what this "
          "model loses on this task, not what the head does elsewhere. The probe is random tokens: "
          "on text a head may do more, or other things.")


def verdict_page(verdicts: list[Verdict]) -> str:
    """The answers of all runs, then the evidence of each, then what it cannot show."""
    lines = ["# Did induction heads form?", ""]
    for condition in dict.fromkeys(verdict.condition for verdict in verdicts):
        runs = [verdict for verdict in verdicts if verdict.condition == condition]
        lines.append(headline(condition, runs))
    lines += ["", describe_controls([verdict for verdict in verdicts if verdict.control])]
    not_controls = [verdict.run for verdict in verdicts
                    if verdict.one_layer and not verdict.control]
    if not_controls:
        lines.append("One-layer runs that are not controls (unfinished, or with smeared keys or a "
                     "single period, which let one layer meet the probe): "
                     f"{', '.join(not_controls)}.")
    lines.append("")
    for verdict in verdicts:
        lines += section(verdict)
    return "\n".join([*lines, CAVEAT, ""])


def headline(condition: str, runs: list[Verdict]) -> str:
    """The answer for runs that differ only by their seed."""
    yes = [verdict for verdict in runs if verdict.answer == "yes"]
    if len(yes) == len(runs):
        answer = "Yes"
    elif yes:
        answer = "In some"
    else:
        answer = runs[0].answer.capitalize()
    line = f"**{answer}: in {len(yes)} of {plural(len(runs), 'run')} of {condition}**"
    onsets = [verdict.transition.onset / 1e6 for verdict in yes if verdict.transition]
    if onsets:
        line += f", from {spread(onsets)} M tokens on"
    return line + f"; prefix matching of the best head: {spread([run.best for run in runs])}."


def describe_controls(controls: list[Verdict]) -> str:
    if not controls:
        return ("No one-layer control is among these runs; a claim about composition needs one.")
    worst = max(verdict.best for verdict in controls)
    n_runs = plural(len(controls), "run")
    line = f"One-layer control: prefix matching at most {worst:.2f} in {n_runs}"
    if worst <= MAX_CONTROL:
        return f"{line}, as expected."
    return (f"{line} (more than {MAX_CONTROL}: the probe can be met without induction, so doubt "
            "the other results).")


def section(verdict: Verdict) -> list[str]:
    """The evidence of one run."""
    lines = [f"## {verdict.run}: {verdict.answer}", ""]
    if verdict.transition:
        lines += [describe_transition(verdict.transition), ""]
    lines += ["| question | measured | evidence |", "|---|---|---|"]
    for row in rows(verdict):
        evidence = {None: "–", True: "for", False: "**against**"}[row.supports]
        lines.append(f"| {row.question} | {row.measured} | {evidence} |")
    return [*lines, ""]


def describe_transition(transition: Transition) -> str:
    crossings = ", ".join(f"{level:g} at {tokens / 1e6:.2f}" for level, tokens
                          in transition.crossings.items() if tokens is not None)
    faded = ""
    if transition.faded is not None:
        faded = f", and faded at {transition.faded / 1e6:.2f} M, to {transition.final:.2f}"
    return (f"Prefix matching rose between {transition.onset / 1e6:.2f} and "
            f"{transition.end / 1e6:.2f} M tokens (10% to 90% of its rise to "
            f"{transition.height:.2f}; it passed {crossings} M){faded}.")


# --- the table ------------------------------------------------------------------------------------

class Row(NamedTuple):
    question: str
    measured: str
    supports: bool | None       # as in induction.verdict.Criteria


def rows(verdict: Verdict) -> list[Row]:
    criteria, measured = verdict.criteria, verdict.measured
    periods = "periods never trained" if verdict.probes.never_trained else "trained periods"
    n_heads = measured.scores["prefix_matching"].numel()
    table = [
        Row(f"Do heads attend to what followed an earlier copy, on {periods}?",
            f"prefix matching {verdict.best:.2f} ({verdict.strongest}), {len(verdict.heads)} of "
            f"{n_heads} heads ≥ {INDUCTION_HEAD}", criteria.matches_prefixes),
        Row("Or only on trained periods, by looking back a fixed distance?",
            describe_trained_periods(verdict), criteria.beyond_trained_periods),
        Row("Does repetition lower the loss?",
            f"first copy {measured.loss_first:.2f} nats, second {measured.loss_second:.2f}",
            criteria.repeats_help),
        Row("Where around the induction target do they attend?", describe_peak(verdict),
            criteria.peaks_on_target)]
    if verdict.copying:
        copying = verdict.copying
        table.append(Row(
            "Does the strongest head raise the token it reads?",
            f"{copying.ratio:.1f} times as much as at chance (copying {copying.score:.2f}, at "
            f"chance {copying.chance:.2f}), eigenvalues {copying.eigenvalues:.2f}",
            criteria.copies))
    if verdict.ablation:
        table += ablation_rows(verdict, verdict.ablation)
    if verdict.previous_token:
        table.append(Row("Are they driven by previous-token heads?",
                         describe_previous_token(verdict.previous_token), None))
    if verdict.unseen:
        unseen = verdict.unseen
        table.append(Row(
            "On tokens that training never repeated?",
            f"prefix matching {unseen.scores['prefix_matching'].max().item():.2f}, first copy "
            f"{unseen.loss_first:.2f} nats, second {unseen.loss_second:.2f}", None))
    return table


def describe_trained_periods(verdict: Verdict) -> str:
    if verdict.probes.trained is None:
        return "training has no synthetic repeats"
    if verdict.trained is None:
        return ("unknown: every period that fits was trained on (hold some out with "
                "data.repeats.held_out_periods)")
    best = verdict.trained.scores["prefix_matching"].max().item()
    return (f"trained periods {best:.2f} (second copy {verdict.trained.loss_second:.2f} nats), "
            f"held-out {verdict.best:.2f}")


def describe_peak(verdict: Verdict) -> str:
    head, offset, weight = verdict.peak
    place = "on it" if offset == 0 else f"{offset:+d} tokens from it"
    text = f"{head} attends most {place} ({weight:.2f})"
    measured = verdict.measured
    if not verdict.heads and measured.loss_second < MAX_LOSS_RATIO * measured.loss_first:
        text += "; still, the model predicts the second copy, so it uses another circuit"
    return text


def ablation_rows(verdict: Verdict, ablation: SetAblation) -> list[Row]:
    effect, criteria = ablation.effect, verdict.criteria
    table = [Row("Does the model need them?",
                 f"mean-ablating {listed(ablation.heads)} {rises(effect.second_copy)}, "
                 f"{effect.gain_removed:.0%} of the repeat gain", criteria.needed),
             Row("More than other heads of the same layers?", describe_others(ablation),
                 criteria.needed_more_than_others)]
    if effect.validation is not None:
        text = f"validation loss {effect.validation:+.3f} nats"
        if effect.icl is not None:
            text += f", ICL score {effect.icl:+.3f}"
        table.append(Row("What does ablating them change on held-out text?", text, None))
    return table


def describe_others(ablation: SetAblation) -> str:
    if ablation.others_mean is None:
        return "there are none to compare with"
    sets, size = plural(len(ablation.others), "other set"), len(ablation.heads)
    if ablation.other_sizes != {size}:
        sets += f" (of {min(ablation.other_sizes)} heads, not {size}: there are no more)"
    return (f"{sets}: {spread(ablation.others, '{:.0%}')} of the repeat gain, mean "
            f"{ablation.others_mean:.0%}")


def describe_previous_token(heads: PreviousTokenHeads) -> str:
    into = heads.into
    return (f"mean-ablating {listed(heads.heads)} {rises(heads.total)}; with all attention "
            f"patterns fixed {heads.patterns_kept:+.2f}; only on the direct path into their keys "
            f"{into['k']:+.2f}, queries {into['q']:+.2f}, values {into['v']:+.2f}")


def plural(n: int, noun: str) -> str:
    """1 run, 2 runs."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def spread(values: list[float], form: str = "{:.2f}") -> str:
    """Their range, 0.91 to 0.95, or one number if both ends are equal as printed."""
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low} to {high}"
