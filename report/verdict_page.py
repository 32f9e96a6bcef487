"""The page of `heads.py verdict`: for each run the answers and the evidence, in Markdown."""

from typing import NamedTuple

from induction.ablation import INPUTS, Path
from induction.intervals import FRACTION, over_seeds
from induction.mechanism import Peak
from induction.phase import INDUCTION_HEAD, Transition
from induction.verdict import (
    MAX_RANDOM,
    MIN_ACCURACY,
    MIN_GAIN,
    MIN_REMOVED,
    BehaviourFinding,
    TransferFinding,
    Verdict,
)
from report.text import (
    INPUT_NAMES,
    describe_ablation,
    describe_behaviour,
    describe_by_period,
    describe_knockout,
    describe_roles,
    listed,
    percent,
    plural,
    rises,
    spread,
    strongest_paths,
    thousandths,
    with_interval,
)

RULES = (f"**How to read this.** *Behaviour* is yes if the model predicts at least "
         f"{MIN_ACCURACY:.0%} of the known tokens of the aperiodic probe, and at least {MIN_GAIN} "
         "nats better than without repetition, with the begin token in front and without it. "
         f"*Mechanism* is yes if removing the attention edges to induction targets removes at "
         f"least {MIN_REMOVED:.0%} of the repeat gain, and as many random edges at most "
         f"{MAX_RANDOM:.0%}, and if reading other tokens over these edges removes as much. The "
         "repeat gain is the loss of the first copy (here of guessing, if that is less) minus the "
         "loss of known tokens. *Transfer* counts only what training never repeated, on the kinds "
         "of rows on which the behaviour is there. The probes are random tokens: on text a head "
         "may do more, or other things. If two circuits do the same and each is enough, removing "
         "one removes nothing, and the answer is no.")


def verdict_page(verdicts: list[Verdict]) -> str:
    """The answers of all runs, then the evidence of each, then what it cannot show."""
    failing = [verdict for verdict in verdicts if verdict.control_fails]
    lines = ["# Did induction heads form?", ""]
    for condition in dict.fromkeys(verdict.condition for verdict in verdicts):
        runs = [verdict for verdict in verdicts if verdict.condition == condition]
        lines += [headline(condition, runs, failing), ""]
    lines.append(describe_controls([verdict for verdict in verdicts if verdict.control], failing))
    not_controls = [verdict.run for verdict in verdicts
                    if verdict.one_layer and not verdict.control]
    if not_controls:
        lines.append("One-layer runs that are not controls (unfinished, or with smeared keys or a "
                     "single period, which let one layer meet a probe): "
                     f"{', '.join(not_controls)}.")
    lines.append("")
    for verdict in verdicts:
        lines += section(verdict, believed=not failing)
    return "\n".join([*lines, RULES, ""])


# --- the headline ---------------------------------------------------------------------------------

def headline(condition: str, runs: list[Verdict], failing: list[Verdict]) -> str:
    """One sentence for runs that differ only by their seed, and what transfers."""
    if any(run in failing for run in runs):
        return (f"**{condition}: a control that fails**. It cannot form induction heads, and still "
                f"predicts repeated tokens ({measured_accuracy(runs)}).")
    if failing and not any(run.control for run in runs):
        return (f"**{condition}: not shown**, because a control that cannot form induction heads "
                f"passes too ({', '.join(run.run for run in failing)}).")
    kinds = [statement(run) for run in runs]
    parts = []
    for kind in dict.fromkeys(kinds):
        of_kind = [run for run, other in zip(runs, kinds) if other == kind]
        count = "" if len(runs) == 1 else f" in {len(of_kind)} of {plural(len(runs), 'run')}"
        parts.append(f"**{kind.answer}{count}**: {kind.reason} ({measured_accuracy(of_kind)})")
    sentence = f"**{condition}**: " + "; ".join(parts) + "."
    onsets = [run.transition.onset / 1e6 for run in runs
              if run.transition and run.answer in ("yes", "partly")]
    if onsets:
        sentence += f" Prefix matching rises from {spread(onsets)} M tokens on"
        if len(onsets) > 1:
            sentence += f" (mean {with_interval(over_seeds(onsets))})"
        sentence += "."
    return f"{sentence} {transfer_sentence(runs)}"


class Statement(NamedTuple):
    answer: str
    reason: str


def statement(verdict: Verdict) -> Statement:
    """What a reader of a single sentence should take away."""
    behaviour, mechanism = verdict.behaviour.answer, verdict.mechanism.answer
    if behaviour == "not shown":
        return Statement("Not shown", "the context or the vocabulary is too small for a probe that "
                         "no fixed look-back can meet")
    if mechanism == "not shown":
        return Statement("Not shown", "removing random attention edges does damage, too")
    if behaviour in ("no", "weak"):
        amount = "does not continue" if behaviour == "no" else "hardly continues"
        reason = f"the model {amount} sequences that it has just seen"
        if mechanism in ("attention only", "yes"):
            reason += ", though heads attend as induction heads do"
        return Statement("No", reason)
    where = ""
    if behaviour == "only with begin token":
        where = ", but only behind the begin token"
    elif behaviour == "only without begin token":
        where = ", but not behind the begin token"
    limit = limits(verdict)
    if mechanism == "another":
        return Statement("No", "the model continues sequences of random tokens that it has just "
                         f"seen{where}{limit}; it does not need to copy from induction targets"
                         + elsewhere(verdict.mechanism.evidence.peak))
    if mechanism != "yes":
        place = "behind" if mechanism == "only with begin token" else "not behind"
        return Statement("Partly", "the model continues sequences of random tokens that it has "
                         f"just seen{limit}, and induction heads do it, but only {place} the begin "
                         "token")
    return Statement("Partly" if where else "Yes", "the model continues sequences of random tokens "
                     f"that it has just seen{where}{limit}, and induction heads do it")


def limits(verdict: Verdict) -> str:
    """What was never trained and where the behaviour is missing."""
    transfer = verdict.transfer
    missing = []
    if transfer.periods == "no":
        missing.append("at distances that training never repeated")
    if transfer.tokens == "no":
        missing.append("of tokens that training never repeated")
    return f" (not sequences {' or '.join(missing)})" if missing else ""


def elsewhere(peak: Peak) -> str:
    """Where heads attend instead, if they do so near induction targets."""
    if peak.offset == 0 or peak.weight < INDUCTION_HEAD:
        return ""
    return f": {peak.head} attends {beside(peak, 'them')}"


def beside(peak: Peak, targets: str) -> str:
    """2 tokens after it."""
    side = "after" if peak.offset > 0 else "before"
    return f"{plural(abs(peak.offset), 'token')} {side} {targets}"


def measured_accuracy(runs: list[Verdict]) -> str:
    """Of one run with its interval over rows; of several seeds their range, and the interval of
    their mean on the worse kind of rows."""
    chance = sum(run.behaviour.begun.chance for run in runs) / len(runs)
    if len(runs) == 1:
        begun, bare = (kind.accuracy for kind in (runs[0].behaviour.begun, runs[0].behaviour.bare))
        return (f"{with_interval(begun, percent)} of known tokens right behind the begin token, "
                f"{with_interval(bare, percent)} without it, {chance:.0%} by chance")
    accuracies = [accuracy for run in runs
                  for accuracy in (run.behaviour.begun.accuracy, run.behaviour.bare.accuracy)]
    mean = over_seeds([run.behaviour.accuracy for run in runs], FRACTION)
    return (f"{spread(accuracies, percent)} of known tokens right, {chance:.0%} by chance; on the "
            f"worse kind of rows on average {with_interval(mean, percent)} over the seeds")


def transfer_sentence(runs: list[Verdict]) -> str:
    """Never trained periods and tokens, each counted over the runs."""
    parts = []
    for name, answers in (("periods", [run.transfer.periods for run in runs]),
                          ("tokens", [run.transfer.tokens for run in runs])):
        shown = [answer for answer in answers if answer != "not shown"]
        if not shown:
            parts.append(f"{name} never repeated in training: not shown")
        else:
            parts.append(f"{name} never repeated in training: "
                         f"{shown.count('yes')} of {len(shown)}")
    return f"Transfer to {'; to '.join(parts)}."


def describe_controls(controls: list[Verdict], failing: list[Verdict]) -> str:
    shown = [verdict for verdict in controls if verdict.behaviour.answer != "not shown"]
    if not shown:
        return ("No one-layer control that shows something is among these runs; a claim about "
                "composition needs one.")
    worst = max(max(verdict.behaviour.begun.accuracy, verdict.behaviour.bare.accuracy)
                for verdict in shown)
    line = (f"One-layer control: at most {worst:.0%} of known tokens right in "
            f"{plural(len(shown), 'run')}")
    if not failing:
        return f"{line}, as expected."
    return f"{line}: **it fails**, so nothing is claimed of the other runs."


# --- the evidence ---------------------------------------------------------------------------------

class Row(NamedTuple):
    question: str
    measured: str
    answer: str


def section(verdict: Verdict, believed: bool) -> list[str]:
    """The evidence of one run; `believed`: no control fails."""
    answer = verdict.answer if believed else "not shown (a control fails)"
    lines = [f"## {verdict.run}: {answer}", "", f"Probed on {verdict.probes.note}.", ""]
    if verdict.transition:
        lines += [describe_transition(verdict.transition), ""]
    lines += ["| question | measured | answer |", "|---|---|---|"]
    rows = [*behaviour_rows(verdict.behaviour), *mechanism_rows(verdict),
            *transfer_rows(verdict)]
    lines += [f"| {row.question} | {row.measured} | {row.answer} |" for row in rows]
    lines.append("")
    if verdict.mechanism.evidence.paths:
        lines += path_table(verdict.mechanism.evidence.paths)
    return lines


def describe_transition(transition: Transition) -> str:
    crossings = ", ".join(f"{level:g} at {tokens / 1e6:.2f}" for level, tokens
                          in transition.crossings.items() if tokens is not None)
    faded = ""
    if transition.faded is not None:
        faded = f", and faded at {transition.faded / 1e6:.2f} M, to {transition.final:.2f}"
    return (f"Prefix matching rose between {transition.onset / 1e6:.2f} and "
            f"{transition.end / 1e6:.2f} M tokens (10% to 90% of its rise to "
            f"{transition.height:.2f}; it passed {crossings} M){faded}.")


def behaviour_rows(finding: BehaviourFinding) -> list[Row]:
    begun, bare = finding.begun, finding.bare
    return [
        Row("**Behaviour.** Does it predict repeated tokens, where no fixed look-back helps?",
            describe_behaviour(finding), f"**{finding.answer}**"),
        Row("What is repeating worth?",
            f"with the begin token {begun.loss_first:.2f} → {begun.loss_known:.2f} nats, a gain of "
            f"{with_interval(begun.gain)}; without {bare.loss_first:.2f} → {bare.loss_known:.2f}, "
            f"{with_interval(bare.gain)} (guessing: {finding.guessing:.2f})",
            "")]


def mechanism_rows(verdict: Verdict) -> list[Row]:
    finding, evidence = verdict.mechanism, verdict.mechanism.evidence
    peak = evidence.peak
    place = "on it" if peak.offset == 0 else beside(peak, "it")
    attention = describe_roles(evidence.roles) if evidence.roles else "none"
    table = [Row("**Mechanism.** Which heads attend to what followed an earlier copy?",
                 f"{attention} (uniform attention: {evidence.uniform:.2f})",
                 f"**{finding.answer}**"),
             Row("Where around the induction target?",
                 f"{peak.head} attends most {place} ({peak.weight:.2f})", ""),
             Row("And on periodic rows?", describe_by_period(verdict.measured), "")]
    if evidence.knockout:
        table.append(Row("Without the attention edges of these heads to induction targets?",
                         describe_knockout(evidence.knockout), ""))
    table.append(Row("Without the edges of all heads to induction targets?",
                     describe_knockout(evidence.everywhere), ""))
    if evidence.ablation:
        table.append(Row("Without these heads as a whole?",
                         f"mean ablation {describe_ablation(evidence.ablation)}", ""))
    if evidence.suppressing:
        table.append(Row("Do some of them suppress what they read?",
                         f"{listed(evidence.suppressing)} lower the token they attend to", ""))
    if evidence.previous_token:
        heads = evidence.previous_token
        into = ", ".join(f"{INPUT_NAMES[part]} {rise:+z.2f}" for part, rise in heads.into.items())
        table.append(Row("Are they driven by previous-token heads?",
                         f"mean-ablating {listed(heads.heads)} {rises(heads.total)}; with all "
                         f"attention patterns fixed {heads.patterns_kept:+z.2f}; only on the "
                         f"direct path into their {into}", ""))
    if paths := strongest_paths(evidence.paths):
        table.append(Row("Which single paths from lower heads matter most?", paths, ""))
    return table


def path_table(paths: list[Path]) -> list[str]:
    """Single paths: a row for each sender, a column for each receiver."""
    senders = list(dict.fromkeys(path.sender for path in paths))
    receivers = list(dict.fromkeys(path.receiver for path in paths))
    rise = {(path.sender, path.receiver, path.into): path.rise for path in paths}
    lines = ["Rise of the loss of known tokens, in nats, without a single path into a head's "
             "queries / keys / values (of a large model only from the heads that are missed most):",
             "",
             f"| from | {' | '.join(f'into {receiver}' for receiver in receivers)} |",
             "|---" * (1 + len(receivers)) + "|"]
    for sender in senders:
        cells = []
        for receiver in receivers:
            rises = [rise.get((sender, receiver, into)) for into in INPUTS]
            cells.append(" / ".join("–" if value is None else f"{value:+z.2f}" for value in rises))
        lines.append(f"| {sender} | {' | '.join(cells)} |")
    return [*lines, ""]


def transfer_rows(verdict: Verdict) -> list[Row]:
    transfer, probes = verdict.transfer, verdict.probes
    periods = ", ".join(f"{period}: {with_interval(accuracy, percent)}"
                        for period, accuracy in transfer.by_period.items())
    trained = "never trained" if probes.never_trained else "that were all trained"
    if not probes.history_known:
        trained = "that may have been trained (what came before this run is unknown)"
    elif not probes.repeats_trained:
        trained = "of synthetic repeats, of which training has none"
    if transfer.trained is not None:
        periods += f"; on trained periods: {transfer.trained:.0%}"
    return [Row(f"**Transfer.** To periods {trained}?", f"known tokens right by period: {periods}",
                f"**{transfer.periods}**"),
            Row("To tokens that training never repeated?", describe_unseen(transfer, verdict),
                f"**{transfer.tokens}**"),
            *text_rows(transfer)]


def describe_unseen(transfer: TransferFinding, verdict: Verdict) -> str:
    if transfer.unseen is not None:
        return describe_behaviour(transfer.unseen)
    if verdict.probes.repeats_trained:
        return "none were held out (data.repeats.held_out_tokens)"
    if not verdict.probes.history_known:
        return "what the weights were trained on is unknown"
    return "training has no synthetic repeats"


def text_rows(transfer: TransferFinding) -> list[Row]:
    rows = []
    if transfer.text is not None:
        text = transfer.text
        rows.append(Row("What are these attention edges worth on held-out text?",
                        f"without them tokens that have an induction target ({text.fraction:.0%}) "
                        f"cost {with_interval(text.matched, thousandths)} nats, without as many "
                        f"random edges {with_interval(text.by_random, thousandths)}", ""))
    if transfer.text_loss is not None:
        loss = transfer.text_loss
        rows.append(Row("What does the begin token in front of text change?",
                        f"{loss.begun:.3f} nats with it, {loss.bare:.3f} without: "
                        f"{with_interval(loss.difference, thousandths)}", ""))
    icl = transfer.icl
    if icl is not None and icl.score is not None:
        first, last = icl.positions[0], icl.positions[-1]
        rows.append(Row("Does text get easier along the context?",
                        f"{first.loss:.2f} nats at the first token, {last.loss:.2f} at tokens "
                        f"{last.start + 1} to {last.stop}; ICL score "
                        f"{with_interval(icl.score, thousandths)}", ""))
    return rows
