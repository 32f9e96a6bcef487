"""Did induction heads form? What speaks for it and against it, run by run, and no more than that.

Heads are called induction heads here when their patterns say so on periods never trained, what they write raises what they read, *and*
the model repeats worse without them. A pattern alone shows what was averaged, not what was used.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

from torch import Tensor

from data.batches import Batch
from induction.ablation import Effect, effect, losses_without, matched_sets, path_patch
from induction.phase import FORMED, Transition
from induction.probes import Probes
from induction.scores import Measured, copying_eigenvalues, mean_of, measure
from kernels.planes import REACH
from model.gpt import GPT
from model.taps import Head, heads_of

CONTROL = 0.15          # the most that a one-layer control may reach
COPIES = 3.0            # how many times its share by chance the token read must have of what is raised
REMOVED = 0.5           # the share of what repeating is worth that must go with the heads
BEYOND = 2.0            # how many times what matched sets of other heads are worth
PREVIOUS = 0.25         # the previous-token score from which a head counts as looking one back


class Finding(NamedTuple):
    question: str
    figures: str
    speaks: bool | None         # for induction heads, against them, or neither


class CausalSet(NamedTuple):
    """What a set of heads is worth, beside matched sets of others; all of them replaced by their means."""

    heads: list[Head]
    lost: Effect
    others: list[float]         # the share of the gain that each matched set takes away
    sizes: set[int]             # of the matched sets

    @property
    def beside(self) -> float | None:
        """The mean of `others`, None where there are none."""
        return sum(self.others) / len(self.others) if self.others else None


class Aim(NamedTuple):
    """What earlier heads that look one token back are worth to induction heads, in nats of the second copy; replaced by their means."""

    heads: list[Head]
    full: float                 # altogether
    kept: float                 # with every pattern kept as it was
    by: dict[str, float]        # on the direct path into the induction heads' q, k or v alone


Answer = Literal["yes", "no", "not shown"]


class Verdict(NamedTuple):
    run: str
    kind: str                   # runs of one kind differ by their seed alone
    control: bool               # one layer, trained to its end, that could only meet the probe without induction
    answer: Answer
    measured: Measured
    moved: Transition | None
    cause: CausalSet | None
    aim: Aim | None
    unseen: float | None        # prefix matching on tokens that training never repeated
    findings: list[Finding]

    @property
    def best(self) -> float:
        return self.measured.scores["prefix_matching"].max().item()


def induction_set(model: GPT, measured: Measured) -> list[Head]:
    """The heads whose pattern is that of induction heads, the strongest first."""
    score = measured.scores["prefix_matching"]
    return sorted((head for head in heads_of(model.config) if score[head] >= FORMED), key=lambda head: -score[head])


def causal_set(model: GPT, heads: list[Head], probes: Probes, text: Batch | None = None, progress: Callable = iter) -> CausalSet:
    """Ablate `heads` together (one of several that do the same is hardly missed), and matched sets of others; `progress` wraps those."""
    others = matched_sets(model.config, heads)
    return CausalSet(heads, effect(model, heads, probes.held_out, text, "mean"),
                     [effect(model, some, probes.held_out, kind="mean").gain_removed for some in progress(others)],
                     set(map(len, others)))


def aim(model: GPT, measured: Measured, heads: list[Head], probes: Probes) -> Aim | None:
    """Ablate the previous-token heads below the strongest of `heads`; None where there are none.

    What their loss costs with the patterns kept is what they carry themselves; the rest is where they make later heads look. On the
    direct path into the keys alone it is K-composition (Elhage et al. 2021): they tell each key what stood before it.
    """
    score, layer = measured.scores["previous_token"], heads[0].layer if heads else 0
    found = [head for head in heads_of(model.config) if head.layer < layer and score[head] >= PREVIOUS]
    if not found:
        return None
    probe, receivers = probes.held_out, [head for head in heads if head.layer == layer]

    intact = mean_of(losses_without(model, probe.batch, []), probe.second_copy)

    def cost(losses: Tensor) -> float:
        return mean_of(losses, probe.second_copy) - intact

    full, kept = (cost(losses_without(model, probe.batch, found, "mean", patterns_kept=keep)) for keep in (False, True))
    return Aim(found, full, kept, {part: cost(path_patch(model, probe.batch, found, receivers, part, "mean")) for part in ("q", "k", "v")})


def examine(run: str, kind: str, control: bool, model: GPT, probes: Probes, moved: Transition | None, text: Batch | None = None) -> Verdict:
    """Weigh one run; `moved` is its transition in tokens, if it had one, `text` held-out text."""
    measured = measure(model, probes.held_out, probes.unrepeated)
    heads, score = induction_set(model, measured), measured.scores["prefix_matching"]
    strongest = max(heads_of(model.config), key=lambda head: score[head].item())
    gain = measured.loss_first - measured.loss_second
    findings = [
        Finding(f"Do heads attend to what followed before, on {'periods never trained' if probes.never_trained else 'trained periods'}?",
                f"prefix matching {score[strongest]:.2f} ({strongest}), {len(heads)} of {len(heads_of(model.config))} heads ≥ {FORMED}",
                bool(heads)),
        _on_trained_periods(model, probes, score[strongest].item()),
        Finding("Is repeating worth something there?", f"first copy {measured.loss_first:.2f} nats, second {measured.loss_second:.2f}",
                None if gain > 0 else False),
        _offsets(measured, strongest, bool(heads))]
    cause, aimed, unseen = None, None, None
    if heads:
        cause, aimed = causal_set(model, heads, probes, text), aim(model, measured, heads, probes)
        findings += [_copies(model, measured, strongest, probes.unrepeated.shape[1] - 1), *_causes(cause)]
    if aimed:
        findings.append(Finding("Are they aimed by heads that look one token back?",
                                f"without {_listed(aimed.heads)} the second copy costs {aimed.full:+.2f} nats; with every pattern kept "
                                f"{aimed.kept:+.2f}; on the direct path into their keys {aimed.by['k']:+.2f}, queries "
                                f"{aimed.by['q']:+.2f}, values {aimed.by['v']:+.2f}", None))
    if probes.unseen_tokens is not None:
        there = measure(model, probes.unseen_tokens, probes.unrepeated)
        unseen = there.scores["prefix_matching"].max().item()
        findings.append(Finding("On tokens that training never repeated?", f"prefix matching {unseen:.2f}, first copy "
                                f"{there.loss_first:.2f} nats, second {there.loss_second:.2f}", None))
    speak = [finding.speaks for finding in findings if finding.speaks is not None]
    answer: Answer = "no" if not all(speak) else "yes" if probes.never_trained else "not shown"
    return Verdict(run, kind, control, answer, measured, moved, cause, aimed, unseen, findings)


def _on_trained_periods(model: GPT, probes: Probes, best: float) -> Finding:
    question = "Or only on periods it was trained on, by counting back?"
    if probes.trained is None:
        return Finding(question, "training repeated nothing on purpose", None)
    if not probes.never_trained:
        return Finding(question, "cannot be told: every period that fits was trained on (name some in data.repeats.held_out_periods)", None)
    trained = measure(model, probes.trained, probes.unrepeated)
    there = trained.scores["prefix_matching"].max().item()
    return Finding(question, f"trained periods {there:.2f} (second copy {trained.loss_second:.2f} nats), held-out {best:.2f}",
                   False if there >= FORMED and best < 0.5 * there else None)


def _offsets(measured: Measured, head: Head, matches: bool) -> Finding:
    """Attention around the target, of the strongest head; where no head matches, of whichever peaks highest."""
    profile = measured.offset_profile
    if not matches:
        flat = int(profile.flatten(0, 1).max(-1).values.argmax())
        head = Head(flat // profile.shape[1], flat % profile.shape[1])
    at = int(profile[head].argmax()) - REACH
    figures = f"{head} peaks {'on it' if at == 0 else f'{at:+d} tokens from it'} with {profile[head].max():.2f}"
    if not matches and measured.loss_second < 0.5 * measured.loss_first:
        figures += "; the copy is predicted all the same: another circuit than the standard one is at work"
    return Finding("Where around the target do they look?", figures, at == 0 if matches else None)


def _copies(model: GPT, measured: Measured, head: Head, n: int) -> Finding:
    copies, eigen = measured.scores["copying"][head].item(), copying_eigenvalues(model)[head].item()
    times = (copies + 1) / 2 * n
    return Finding("Does what the strongest writes raise what it reads?", f"{times:.1f} times as much as another token would get by chance "
                   f"(copying {copies:.2f}, by chance {2 / n - 1:.2f}), eigenvalues {eigen:.2f}", times >= COPIES and eigen > 0)


def _causes(found: CausalSet) -> list[Finding]:
    lost = found.lost
    findings = [Finding("Does the model need them?", f"with {_listed(found.heads)} at their means the second copy costs "
                        f"{lost.second_copy:+.2f} nats, {lost.gain_removed:.0%} of what repeating is worth", lost.gain_removed >= REMOVED)]
    if (mean := found.beside) is not None:
        sizes = "" if found.sizes == {len(found.heads)} else f" (of {min(found.sizes)} heads, not {len(found.heads)}: there are no more)"
        findings.append(Finding("More than other heads of the same layers?", f"{len(found.others)} other sets{sizes}: "
                                f"{_range(found.others, '{:.0%}')}, mean {mean:.0%}", lost.gain_removed >= BEYOND * max(mean, 0)))
    else:
        findings.append(Finding("More than other heads of the same layers?", "there is none to compare with", None))
    if lost.validation is not None:
        findings.append(Finding("And on held-out text?", f"validation loss {lost.validation:+.3f} nats"
                                + ("" if lost.icl is None else f", ICL score {lost.icl:+.3f}"), None))
    return findings


def _listed(heads: list[Head]) -> str:
    return ", ".join(map(str, heads))


def _range(values: list[float], form: str = "{:.2f}") -> str:
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low} to {high}"


def page(verdicts: list[Verdict]) -> str:
    """Markdown: the answer, then the evidence of each run, then what it cannot say."""
    lines = ["# Did induction heads form?", ""]
    for kind in dict.fromkeys(verdict.kind for verdict in verdicts):
        runs = [verdict for verdict in verdicts if verdict.kind == kind]
        yes = [verdict for verdict in runs if verdict.answer == "yes"]
        when = sorted(verdict.moved.onset / 1e6 for verdict in yes if verdict.moved)
        lines.append(f"**{'Yes' if len(yes) == len(runs) else 'In some' if yes else runs[0].answer.capitalize()}: in {len(yes)} of "
                     f"{len(runs)} run{'s'[:len(runs) > 1]} of {kind}**"
                     + (f", from {_range(when)} M tokens on" if when else "")
                     + f"; the strongest head's prefix matching is {_range([verdict.best for verdict in runs])}.")
    lines += ["", _control([verdict for verdict in verdicts if verdict.control])]
    if others := [verdict.run for verdict in verdicts if len(verdict.measured.offset_profile) == 1 and not verdict.control]:
        lines.append("No controls, though of one layer (unfinished; or smeared keys, or a single period, which can meet the probe too): "
                     f"{', '.join(others)}.")
    lines.append("")
    for verdict in verdicts:
        lines += [f"## {verdict.run}: {verdict.answer}", ""]
        if verdict.moved:
            marks = ", ".join(f"{level:g} at {at / 1e6:.2f}" for level, at in verdict.moved.crossings.items() if at is not None)
            lines += [f"Prefix matching rose between {verdict.moved.onset / 1e6:.2f} and {verdict.moved.end / 1e6:.2f} M tokens "
                      f"(10% to 90% of its way to {verdict.moved.final:.2f}; {marks} M).", ""]
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
