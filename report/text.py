"""What heads.py prints: tables and sentences, as strings."""

import json
import textwrap
from collections.abc import Mapping

from induction.examine import HeadScores, KeyComposition, ProbeExamination
from induction.history import icl_transition, model_transition, step_at
from induction.metrics import LOSS_FIRST, LOSS_SECOND, scores_by_head
from induction.phase import INDUCTION_HEAD, Transition
from induction.scores import SCORES
from induction.verdict import PREVIOUS_TOKEN_HEAD, PreviousTokenHeads, SetAblation
from model.taps import Head
from training.logger import Record

SHORT = {"prefix_matching": "prefix", "latest_match": "latest", "previous_token": "previous",
         "duplicate_token": "duplicate", "first_token": "first", "copying_eigenvalues": "eigen"}

EXPLANATIONS = SCORES | {"copying_eigenvalues": "the same as copying, from the head's weights"}


def head_table(table: HeadScores, text: str, formed: Mapping[Head, Transition]) -> str:
    """One row per head, and a legend. `text` says on what the loss was measured; `formed` has the
    transitions of the heads that became induction heads, if the run recorded any."""
    columns = {SHORT.get(name, name): values for name, values in table.scores.items()}
    width = max(10, 2 + max(len(name) for name in columns))
    header = "head   " + "".join(f"{name:>{width}}" for name in columns) + f"{'alone':>10}"
    if formed:
        header += f"{'formed':>10}"
    lines = [header]
    for head, rise in table.ablated.items():
        line = f"{head!s:7}"
        line += "".join(f"{values[head].item():{width}.3f}" for values in columns.values())
        line += f"{rise:+10.3f}"
        if head in formed:
            onset, faded = formed[head].onset, formed[head].faded
            line += f"{onset / 1e6:8.2f} M"
            if faded is not None:
                line += f", faded at {faded / 1e6:.2f} M"
        lines.append(line)
    return "\n".join([*lines, "", *legend(list(table.scores), text, bool(formed))])


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


def scores_as_json(table: HeadScores) -> str:
    """{"L0H0": {"prefix_matching": …, …, "alone": …}, …}"""
    heads = {str(head): {name: values[head].item() for name, values in table.scores.items()}
             | {"alone": rise} for head, rise in table.ablated.items()}
    return json.dumps(heads, indent=1)


# --- sentences ------------------------------------------------------------------------------------

def findings(examination: ProbeExamination) -> str:
    """What repeating is worth to the model, and which heads that gain depends on."""
    measured = examination.measured
    lines = [f"First-copy loss on random tokens: {measured.loss_first:.2f} nats per token, "
             f"second-copy loss: {measured.loss_second:.2f}."]
    if examination.ablation:
        lines.append(describe_ablation(examination.ablation))
    if examination.previous_token:
        lines.append(describe_previous_token(examination.previous_token))
    if examination.composition:
        lines.append(describe_composition(examination.composition))
    return "\n".join(lines)


def rises(nats: float) -> str:
    """A change of the second-copy loss in words: raises second-copy loss by 2.10 nats."""
    verb = "lowers" if nats < 0 else "raises"
    return f"{verb} second-copy loss by {abs(nats):.2f} nats"


def describe_ablation(ablation: SetAblation) -> str:
    sentence = (f"Mean-ablating {listed(ablation.heads)} (prefix matching ≥ {INDUCTION_HEAD}) "
                f"{rises(ablation.effect.second_copy)},\n"
                f"  {ablation.effect.gain_removed:.0%} of the repeat gain")
    if ablation.others_mean is not None:
        sentence += f"; ablating other heads of the same layers: {ablation.others_mean:.0%}"
    return f"{sentence}."


def describe_previous_token(heads: PreviousTokenHeads) -> str:
    into = heads.into
    return (f"Mean-ablating {listed(heads.heads)} (previous token ≥ {PREVIOUS_TOKEN_HEAD}) "
            f"{rises(heads.total)};\n"
            f"  with all attention patterns fixed: {heads.patterns_kept:+.2f}; only on the direct "
            f"path into the induction heads' keys: {into['k']:+.2f},\n"
            f"  queries: {into['q']:+.2f}, values: {into['v']:+.2f}.")


def describe_composition(composition: KeyComposition) -> str:
    head, earlier = composition.head, composition.earlier
    return (f"By the weights, the keys of {head} read the output of {earlier} most (K-composition "
            f"{composition.k:+.2f} relative to chance).\n"
            f"  Its queries match their own token, as {earlier} copies it to a key, "
            f"{composition.qk_trace:.1f} standard deviations\n"
            "  more than other tokens (at distance 0).")


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
    return (f"{best} has prefix matching {scores[best]:.2f} (1: a perfect induction head); loss on "
            f"random tokens {latest[LOSS_FIRST]:.2f} nats, repeated {latest[LOSS_SECOND]:.2f}")


def listed(heads: list[Head]) -> str:
    return ", ".join(map(str, heads))
