"""Did induction heads form? What speaks for it and against it, run by run, and no more than that.

A head is called an induction head here when its pattern says so on periods never trained, what it writes copies what it reads, *and*
the model repeats worse without such heads, beyond what other heads of the same layers are worth. A pattern alone shows what was averaged,
not what was used.
"""

from typing import NamedTuple

from torch import Tensor

from induction.ablation import Effect, effect, matched_sets
from induction.phase import FORMED, Transition
from induction.probes import Probes
from induction.scores import Measured, copying_eigenvalues, measure
from kernels.head_statistics import REACH
from model.gpt import GPT
from model.taps import Head, heads_of

CONTROL = 0.15          # the most that a one-layer control may reach
REMOVED = 0.5           # the share of what repeating is worth that must go with the heads
PREVIOUS = 0.25         # the previous-token score from which a head counts as looking one back
BEYOND = 2.0            # how many times what matched sets of other heads are worth


class Finding(NamedTuple):
    question: str
    figures: str
    speaks: bool | None         # for induction heads, against them, or neither


class Verdict(NamedTuple):
    run: str
    kind: str                   # runs of one kind differ by their seed alone
    control: bool               # one layer that could only meet the probe without induction
    heads: list[Head]           # those that look like induction heads, the strongest first
    best: float                 # prefix matching of the strongest head of all
    formed: bool
    moved: Transition | None
    findings: list[Finding]


class CausalSet(NamedTuple):
    """What a set of heads is worth, beside matched sets of others; all of them replaced by their means."""

    heads: list[Head]
    lost: Effect
    others: list[float]         # the share of the gain that each matched set takes away


class Aim(NamedTuple):
    """What earlier heads that look one token back are worth: altogether, and with every pattern kept as it was."""

    heads: list[Head]
    full: Effect
    kept: Effect


def induction_set(model: GPT, measured: Measured) -> list[Head]:
    """The heads whose pattern is that of induction heads, the strongest first."""
    score = measured.scores["prefix_matching"]
    return sorted((head for head in heads_of(model.config) if score[head] >= FORMED), key=lambda head: -score[head])


def causal_set(model: GPT, heads: list[Head], probes: Probes, text: Tensor | None = None) -> CausalSet:
    """Ablate `heads` together (one of several that do the same is hardly missed), and matched sets of others."""
    others = [effect(model, some, probes.held_out, kind="mean").gain_removed for some in matched_sets(model.config, heads)]
    return CausalSet(heads, effect(model, heads, probes.held_out, text, "mean"), others)


def aim(model: GPT, measured: Measured, heads: list[Head], probes: Probes) -> Aim | None:
    """Ablate the previous-token heads below `heads` (K-composition: they tell each key what stood before it; Elhage et al. 2021). What
    their loss costs with the patterns kept is what they carry themselves; the rest is where they make later heads look."""
    score = measured.scores["previous_token"]
    below = [head for head in heads_of(model.config) if heads and head.layer < heads[0].layer]
    if not below:
        return None
    found = [head for head in below if score[head] >= PREVIOUS] or [max(below, key=lambda head: score[head].item())]
    return Aim(found, *(effect(model, found, probes.held_out, kind="mean", patterns_kept=kept) for kept in (False, True)))


def examine(run: str, kind: str, control: bool, model: GPT, probes: Probes, moved: Transition | None,
            text: Tensor | None = None) -> Verdict:
    """Weigh one run; `moved` is its transition in tokens, if it had one, `text` rows (N, T + 1) of held-out text."""
    measured = measure(model, probes.held_out, probes.unrepeated)
    heads, best = induction_set(model, measured), measured.scores["prefix_matching"].max().item()
    strongest = max(heads_of(model.config), key=lambda head: measured.scores["prefix_matching"][head].item())
    gain = measured.loss_first - measured.loss_second
    findings = [
        Finding("Do heads attend to what followed before, on periods never trained?",
                f"prefix matching {best:.2f} ({strongest}), {len(heads)} of {len(heads_of(model.config))} heads ≥ {FORMED}", bool(heads)),
        _on_trained_periods(model, probes, best),
        Finding("Is repeating worth something there?", f"first copy {measured.loss_first:.2f} nats, second {measured.loss_second:.2f}",
                None if gain > 0 else False),
        _offsets(measured, strongest, bool(heads), gain)]
    if heads:
        copies = [measured.scores["copying"][head].item() for head in heads]
        eigen = [copying_eigenvalues(model)[head].item() for head in heads]
        blind = 2 / (probes.unrepeated.shape[1] - 1) - 1
        findings.append(Finding("Does what they write raise what they read?",
                                f"copying {_range(copies)} (a head that ignores its input: {blind:.2f}), eigenvalues {_range(eigen)}",
                                max(copies) > blind and max(eigen) > 0))
        findings += _causes(causal_set(model, heads, probes, text))
        if aimed := aim(model, measured, heads, probes):
            findings.append(Finding("Are they aimed by heads that look one token back?",
                                    f"with {', '.join(map(str, aimed.heads))} at their means the second copy costs "
                                    f"{aimed.full.second_copy:+.2f} nats; "
                                    f"with every pattern kept as it was, {aimed.kept.second_copy:+.2f}", None))
    if probes.unseen_tokens is not None:
        unseen = measure(model, probes.unseen_tokens, probes.unrepeated)
        findings.append(Finding("On tokens that training never repeated?", f"prefix matching {unseen.scores['prefix_matching'].max():.2f}, "
                                f"second copy {unseen.loss_second:.2f} nats", None))
    needed = [finding.speaks for finding in findings if finding.speaks is not None]
    return Verdict(run, kind, control, heads, best, bool(heads) and all(needed), moved, findings)


def _on_trained_periods(model: GPT, probes: Probes, best: float) -> Finding:
    question = "Or only on periods it was trained on, by counting back?"
    if probes.trained is None:
        return Finding(question, "training repeated nothing on purpose", None)
    trained = measure(model, probes.trained, probes.unrepeated)
    there = trained.scores["prefix_matching"].max().item()
    return Finding(question, f"trained periods {there:.2f} (second copy {trained.loss_second:.2f} nats), held-out {best:.2f}",
                   False if there >= FORMED and best < 0.5 * there else None)


def _offsets(measured: Measured, head: Head, matches: bool, gain: float) -> Finding:
    """Attention around the target, of the strongest head; where no head matches, of whichever peaks highest."""
    profile = measured.offset_profile
    if not matches:
        flat = profile.flatten(0, 1).max(-1).values.argmax().item()
        head = Head(flat // profile.shape[1], flat % profile.shape[1])
    at = int(profile[head].argmax()) - REACH
    figures = f"{head} peaks {'on it' if at == 0 else f'{at:+d} tokens from it'} with {profile[head].max():.2f}"
    if not matches and gain > 1 and profile[head].max() >= FORMED:
        figures += "; the copy is predicted all the same: another circuit than the standard one is at work"
    return Finding("Where around the target do they look?", figures, at == 0 if matches else None)


def _causes(found: CausalSet) -> list[Finding]:
    others = sum(found.others) / len(found.others) if found.others else None
    beside = "no other head in those layers to compare with" if others is None else \
        f"{len(found.others)} matched sets of other heads: {_range(found.others, '{:.0%}')}, mean {others:.0%}"
    lost = found.lost
    findings = [Finding("Does the model need them?", f"with {', '.join(map(str, found.heads))} at their means the second copy costs "
                        f"{lost.second_copy:+.2f} nats, {lost.gain_removed:.0%} of what repeating is worth; {beside}",
                        lost.gain_removed >= REMOVED and (others is None or lost.gain_removed >= BEYOND * max(others, 0)))]
    if lost.validation is not None:
        findings.append(Finding("And on held-out text?", f"validation loss {lost.validation:+.3f} nats"
                                + ("" if lost.icl is None else f", ICL score {lost.icl:+.3f}"), None))
    return findings


def _range(values: list[float], form: str = "{:.2f}") -> str:
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low} to {high}"


def page(verdicts: list[Verdict]) -> str:
    """Markdown: the answer, then the evidence of each run, then what it cannot say."""
    lines = ["# Did induction heads form?", ""]
    for kind in dict.fromkeys(verdict.kind for verdict in verdicts):
        runs = [verdict for verdict in verdicts if verdict.kind == kind]
        yes = [verdict for verdict in runs if verdict.formed]
        when = sorted(verdict.moved.onset / 1e6 for verdict in yes if verdict.moved)
        lines.append(f"**{'Yes' if len(yes) == len(runs) else 'No' if not yes else 'In some'}: in {len(yes)} of {len(runs)} "
                     f"run{'s'[:len(runs) > 1]} of {kind}**"
                     + (f", from {_range(when)} M tokens on" if when else "")
                     + f"; the strongest head's prefix matching is {_range([verdict.best for verdict in runs])}.")
    lines += ["", _control([verdict for verdict in verdicts if verdict.control]), ""]
    for verdict in verdicts:
        lines += [f"## {verdict.run}: {'yes' if verdict.formed else 'no'}", ""]
        if verdict.moved:
            marks = ", ".join(f"{level:g} at {at / 1e6:.2f}" for level, at in verdict.moved.crossings.items() if at is not None)
            lines += [f"Prefix matching rose between {verdict.moved.onset / 1e6:.2f} and {verdict.moved.end / 1e6:.2f} M tokens "
                      f"(10% to 90% of {verdict.moved.final:.2f}; {marks} M).", ""]
        lines += ["| question | measured | speaks |", "|---|---|---|"]
        lines += [f"| {f.question} | {f.figures} | {'–' if f.speaks is None else 'for' if f.speaks else '**against**'} |"
                  for f in verdict.findings]
        lines.append("")
    return "\n".join([*lines, "Attention weights show what was averaged, not what was used; ablation shows what this model loses on "
                      "this task, not what the head does elsewhere. The probe is random tokens: on text a head may do more, or other "
                      "things.", ""])


def _control(one_layer: list[Verdict]) -> str:
    if not one_layer:
        return "No one-layer control is among these runs; a claim about composition wants one."
    worst = max(verdict.best for verdict in one_layer)
    return (f"One-layer control: prefix matching at most {worst:.2f} in {len(one_layer)} run{'s'[:len(one_layer) > 1]}"
            + (", as it must be." if worst <= CONTROL else
               f" (more than {CONTROL}: the probe can be met without induction, so doubt the rest)."))
