"""What heads.py prints: tables and sentences, as strings."""

import textwrap
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from induction.ablation import Effect, Path
from induction.examine import Examination, HeadScores, KeyComposition, TextScores
from induction.history import icl_transition, model_transition, step_at
from induction.intervals import Estimate
from induction.knockout import KnockoutPair
from induction.mechanism import PREVIOUS_TOKEN_HEAD, HeadRole, PreviousTokenHeads
from induction.metrics import ACCURACY, ACCURACY_BARE, scores_by_head
from induction.phase import Transition
from induction.scores import SCORES, Measured
from induction.verdict import BehaviourFinding
from model.taps import Head
from training.logger import Record

SHORT = {"prefix_matching": "prefix", "prefix_matching_visible": "visible",
         "latest_match": "latest", "current_token": "current", "previous_token": "previous",
         "previous_token_later": "later", "duplicate_token": "duplicate", "first_token": "first",
         "copying_eigenvalues": "eigen"}
MOST_ROLES = 12         # heads named in a sentence
INPUT_NAMES = {"q": "queries", "k": "keys", "v": "values"}

EXPLANATIONS = SCORES | {"copying_eigenvalues": "the same as copying, from the head's weights"}


def head_table(table: HeadScores, text: str, formed: Mapping[Head, Transition]) -> str:
    """One row per head, and a legend. `text` says on what the loss was measured; `formed` has the
    transitions of the heads that became induction heads, if the run recorded any."""
    columns = {SHORT.get(name, name): values for name, values in table.scores.items()}
    widths = {name: max(7, len(name) + 1) for name in columns}
    header = "head   " + "".join(f"{name:>{widths[name]}}" for name in columns) + f"{'alone':>8}"
    if formed:
        header += f"{'formed':>9}"
    lines = [header]
    for head, rise in table.ablated.items():
        line = f"{head!s:7}"
        line += "".join(f"{values[head].item():{widths[name]}.3f}"
                        for name, values in columns.items())
        line += f"{rise:+8.3f}"
        if head in formed:
            onset, faded = formed[head].onset, formed[head].faded
            line += f"{onset / 1e6:7.2f} M"
            if faded is not None:
                line += f", faded at {faded / 1e6:.2f} M"
        lines.append(line)
    lines += ["", *legend(list(table.scores), text, bool(formed))]
    if widest := widest_interval(table):
        lines.append(widest)
    return "\n".join(lines)


def legend(scores: list[str], text: str, formed: bool) -> list[str]:
    """What the columns mean, in lines of at most 100 characters."""
    entries = {SHORT.get(name, name): EXPLANATIONS[name] for name in scores
               if name in EXPLANATIONS}
    entries["alone"] = (f"rise in loss on {text}, in nats, if only this head is mean-ablated; "
                        "little for a head that other heads can replace")
    if formed:
        entries["formed"] = ("tokens seen when the head's prefix matching began to rise, and, if "
                             "it faded, when it fell below half of that rise for good")
    return [textwrap.fill(meaning, 100, initial_indent=f"{column:11} ",
                          subsequent_indent=" " * 12) for column, meaning in entries.items()]


def widest_interval(table: HeadScores) -> str:
    """How exact the scores are, in one line; empty if no interval is known."""
    halves = {(SHORT.get(name, name), Head(*place)): (bounds.high - bounds.low)[place] / 2
              for name, bounds in table.bounds.items() if name != "distance"
              for place in np.ndindex(bounds.low.shape)}
    halves = {place: half for place, half in halves.items() if np.isfinite(half)}
    if not halves:
        return ""
    name, head = max(halves, key=lambda place: halves[place])
    return (f"95% intervals of scores are at most ±{halves[name, head]:.3f} ({name} of {head}; "
            "without distance and alone).")


def describe_visible(scores: TextScores) -> str:
    """How many queries of a text have an induction target, and what uniform attention scores."""
    alike = len(set(scores.visible)) == 1               # the layers have the same window, or none
    lines = []
    for layer, visible in enumerate(scores.visible[:1] if alike else scores.visible):
        where = "" if alike else f"Layer {layer}: "
        lines.append(f"{where}{visible.fraction:.0%} of the queries see a token that followed an "
                     "earlier copy of theirs; uniform attention puts "
                     f"{visible.uniform:.3f} on such tokens.")
    return "\n".join(textwrap.fill(line, 100, subsequent_indent="  ") for line in lines)


# --- sentences ------------------------------------------------------------------------------------

def findings(examination: Examination) -> str:
    """What repeating is worth to the model, and which heads that gain depends on."""
    verdict = examination.verdict
    measured, evidence = verdict.measured, verdict.mechanism.evidence
    lines = [f"First-copy loss on random tokens: {measured.loss_first:.2f} nats per token, "
             f"second-copy loss: {measured.loss_second:.2f}.",
             f"By period, the {describe_by_period(measured)}.",
             "On rows that no fixed look-back can meet (the aperiodic probe), the model predicts "
             f"{describe_behaviour(verdict.behaviour)}."]
    if evidence.roles:
        lines.append(f"Attention to what followed an earlier copy there: "
                     f"{describe_roles(evidence.roles)}.")
    if evidence.knockout:
        lines.append(f"Of these attention edges: {describe_knockout(evidence.knockout)}.")
    if evidence.ablation:
        lines.append(f"Mean-ablating {listed(evidence.attending)} "
                     f"{describe_ablation(evidence.ablation)}.")
    if evidence.previous_token:
        lines.append(describe_previous_token(evidence.previous_token))
    if strongest := strongest_paths(evidence.paths):
        lines.append("The paths that matter most (rise of the loss of known tokens, in nats): "
                     f"{strongest}.")
    if examination.composition:
        lines.append(describe_composition(examination.composition))
    return "\n".join(textwrap.fill(line, 100, subsequent_indent="  ") for line in lines)


def describe_by_period(measured: Measured) -> str:
    """The prefix matching of the strongest head by period. A head that looks back by a fixed
    distance reaches 1 on some periods and 0 on the others."""
    score = measured.scores["prefix_matching"]
    layer, index = (score == score.max()).nonzero()[0].tolist()
    by_period = ", ".join(f"{period}: {values[layer, index]:.2f}"
                          for period, values in sorted(measured.by_period.items()))
    return f"prefix matching of {Head(layer, index)} is {by_period}"


def describe_behaviour(finding: BehaviourFinding) -> str:
    begun, bare = finding.begun, finding.bare
    return (f"{with_interval(begun.accuracy, percent)} of the known tokens behind the begin token, "
            f"{with_interval(bare.accuracy, percent)} without it (a random token of the block: "
            f"{begun.chance:.0%})")


def describe_roles(roles: list[HeadRole]) -> str:
    """L1H3 0.94 (copies), L1H0 0.31 (suppresses); the strongest MOST_ROLES."""
    text = ", ".join(f"{role.head} {role.prefix_matching:.2f} ({describe_role(role)})"
                     for role in roles[:MOST_ROLES])
    return text if len(roles) <= MOST_ROLES else f"{text}, and {len(roles) - MOST_ROLES} more"


def describe_role(role: HeadRole) -> str:
    return "copies or suppresses nothing" if role.role == "neither" else role.role


def describe_knockout(knockouts: KnockoutPair) -> str:
    """Removing them removes 100% of the repeat gain behind the begin token, 98% without it; …"""
    if all(knockout.gain_removed is None for knockout in knockouts):
        changes = " and ".join(f"{knockout.known:+z.2f}" for knockout in knockouts)
        return (f"repeating gains nothing that could be removed; known tokens cost {changes} nats "
                "(behind the begin token and without it)")
    text = (f"removing them removes {on_each_kind(knockouts, 'gain_removed')}; as many random "
            f"edges remove {on_each_kind(knockouts, 'by_random')}")
    if any(knockout.by_misreading is not None for knockout in knockouts):
        text += "; reading other tokens over them removes "
        text += on_each_kind(knockouts, "by_misreading")
    return text


def on_each_kind(knockouts: KnockoutPair, field: str) -> str:
    """A fraction of the repeat gain, on rows behind the begin token and on rows without it."""
    begun, bare = (getattr(knockout, field) for knockout in knockouts)
    parts = []
    if begun is not None:
        parts.append(f"{with_interval(begun, percent)} of the repeat gain behind the begin token")
    if bare is not None:
        parts.append(f"{with_interval(bare, percent)} of it without that token")
    return ", ".join(parts)


def describe_ablation(effect: Effect) -> str:
    text = f"{rises(effect.known)} and changes that of the first copy by {effect.first_copy:+z.2f}"
    if effect.gain_removed is not None:
        text += f": {with_interval(effect.gain_removed, percent)} of the repeat gain"
    return text


def rises(nats: float) -> str:
    """A change of the loss in words: raises the loss of known tokens by 2.10 nats."""
    amount = nats
    verb = "lowers" if nats < 0 else "raises"
    if nats < 0:
        amount = Estimate(-nats, -nats.high, -nats.low) if isinstance(nats, Estimate) else -nats
    return f"{verb} the loss of known tokens by {with_interval(amount)} nats"


def describe_previous_token(heads: PreviousTokenHeads) -> str:
    into = heads.into
    return (f"Mean-ablating {listed(heads.heads)} (previous token ≥ {PREVIOUS_TOKEN_HEAD}) "
            f"{rises(heads.total)}; with all attention patterns fixed: "
            f"{heads.patterns_kept:+z.2f}; only on the direct path into the induction heads' keys: "
            f"{into['k']:+z.2f}, queries: {into['q']:+z.2f}, values: {into['v']:+z.2f}.")


def strongest_paths(paths: list[Path], most: int = 5) -> str:
    """L0H2 → keys of L1H3 +2.41, …; only those of at least 0.1 nats."""
    strong = sorted((path for path in paths if path.rise >= 0.1), key=lambda path: -path.rise)
    return ", ".join(f"{path.sender} → {INPUT_NAMES[path.into]} of {path.receiver} "
                     f"{path.rise:+z.2f}" for path in strong[:most])


def describe_composition(composition: KeyComposition) -> str:
    head, earlier = composition.head, composition.earlier
    return (f"By the weights, the keys of {head} read the output of {earlier} most (K-composition "
            f"{composition.k:+z.2f} relative to chance). Its queries match their own token, as "
            f"{earlier} copies it to a key, {composition.qk_trace:.1f} standard deviations more "
            "than other tokens (at distance 0).")


def transitions(records: list[Record]) -> str:
    """When prefix matching rose and the in-context-learning score fell, and whether either faded;
    empty if neither did."""
    lines = []
    for change, transition in (("Prefix matching rose to", model_transition(records)),
                               ("The ICL score fell by", icl_transition(records))):
        if transition:
            onset, end = transition.onset, transition.end
            line = (f"{change} {transition.height:.2f} between {onset / 1e6:.2f} and "
                    f"{end / 1e6:.2f} M tokens (steps {step_at(records, onset):,} to "
                    f"{step_at(records, end):,})")
            if transition.faded is not None:
                line += (f",\n  and faded at {transition.faded / 1e6:.2f} M (step "
                         f"{step_at(records, transition.faded):,}): {transition.final:.2f} at the "
                         "end")
            lines.append(f"{line}.")
    return "\n".join(lines)


def heads_summary(latest: Record) -> str | None:
    """The best head and the losses on random tokens, from the newest value of each metric; None if
    the heads were never measured."""
    scores = scores_by_head(latest, "prefix_matching")
    if not scores:
        return None
    best = max(scores, key=lambda head: scores[head])
    summary = f"{best} has prefix matching {scores[best]:.2f} (1: a perfect induction head)"
    if ACCURACY in latest:
        summary += (f"; {latest[ACCURACY]:.0%} of repeated random tokens predicted, "
                    f"{latest[ACCURACY_BARE]:.0%} without the begin token in front")
    return summary


def two_digits(value: float) -> str:
    """0.93; never −0.00."""
    return f"{value:z.2f}"


def with_interval(value: float, form: Callable[[float], str] = two_digits) -> str:
    """0.93 (0.91 to 0.95); only the number if it has no interval, or one too narrow to be seen."""
    text = form(value)
    if not isinstance(value, Estimate) or not value.has_interval:
        return text
    low, high = form(value.low), form(value.high)
    return text if low == high == text else f"{text} ({low} to {high})"


def percent(fraction: float) -> str:
    """97%; never −0%."""
    return f"{fraction:.0%}".replace("-0%", "0%")


def listed(heads: list[Head]) -> str:
    return ", ".join(map(str, heads))


def thousandths(nats: float) -> str:
    """+0.123"""
    return f"{nats:+z.3f}"


def plural(n: int, noun: str) -> str:
    """1 run, 2 runs."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def spread(values: Sequence[float], form: Callable[[float], str] = two_digits) -> str:
    """Their range, 0.91 to 0.95, or one number if both ends are equal as printed."""
    low, high = form(min(values)), form(max(values))
    return low if low == high else f"{low} to {high}"
