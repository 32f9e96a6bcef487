"""Did induction heads form in a run? Three questions, kept apart, and the answer to each.

    behaviour   Does the model predict repeated tokens, on rows that no fixed look-back can meet,
                behind the token that begins a text and without it?
    mechanism   Which heads attend to what followed the earlier copy, and is the prediction gone
                when just these attention edges are removed?
    transfer    Does it work for periods and tokens that training never repeated, and on text?

A pattern on its own shows what was averaged, not what was used. induction/mechanism.py gathers the
evidence on heads, report/verdict_page.py puts a verdict into words.
"""

from math import log
from typing import Literal, NamedTuple

from torch import Tensor

from data.batches import Batch
from induction.ablation import ProgressBar
from induction.behaviour import (
    Behaviour,
    InContextLearning,
    TextLoss,
    behaviour,
    in_context_learning,
    losses_in_parts,
    repeat_gain,
    text_loss,
)
from induction.intervals import NONNEGATIVE, Estimate
from induction.knockout import Knockout, TextKnockout, knock_out_on_text
from induction.mechanism import MechanismEvidence, mechanism_evidence
from induction.phase import INDUCTION_HEAD, Transition
from induction.probe_set import Probes
from induction.probes import Pair
from induction.scores import Measured, copying_eigenvalues, measure
from model.gpt import GPT
from model.taps import Head, heads_of

MIN_ACCURACY = 0.5      # of the known tokens of the aperiodic probe, on rows of both kinds
MIN_GAIN = 0.5          # nats: loss of known tokens below that of the first copy, and of guessing
WEAK_RATIO = 2.0        # accuracy, relative to a random token of the block, from which a model that
                        # fails the above still predicts something
MAX_CHANCE = 0.15       # accuracy of a random token of the block above which a context is too short
                        # for the aperiodic probe: some look-backs meet it
MIN_REMOVED = 0.5       # fraction of the repeat gain that removing the induction edges must remove,
                        # and reading other tokens over them too
TEXT_TOKENS = 2 ** 14   # of held-out text on which edges are removed, and the begin token is tried
MAX_RANDOM = 0.25       # fraction that removing as many random edges may remove


BehaviourAnswer = Literal["yes", "only with begin token", "only without begin token", "weak", "no",
                          "not shown"]
MechanismAnswer = Literal["yes", "only with begin token", "only without begin token", "another",
                          "attention only", "no", "not shown"]
TransferAnswer = Literal["yes", "no", "not shown"]
Answer = Literal["yes", "partly", "no", "not shown"]


# --- the three answers ----------------------------------------------------------------------------

class BehaviourFinding(NamedTuple):
    """On the aperiodic probe."""

    answer: BehaviourAnswer
    begun: Behaviour            # rows behind the token that begins a text
    bare: Behaviour             # the same rows without it
    guessing: float             # loss of a model that knows only which tokens are drawn, in nats

    @property
    def accuracy(self) -> Estimate:
        """On the worse of both kinds of rows."""
        return min(self.begun.accuracy, self.bare.accuracy)

    @property
    def on(self) -> tuple[bool, bool]:
        """Whether it predicts on rows behind the begin token, and on rows without it."""
        return (self.answer in ("yes", "only with begin token"),
                self.answer in ("yes", "only without begin token"))


class MechanismFinding(NamedTuple):
    answer: MechanismAnswer
    evidence: MechanismEvidence


class TransferFinding(NamedTuple):
    """What was never trained, counted, and whether the behaviour is there too."""

    periods: TransferAnswer
    by_period: dict[int, Estimate]      # period → accuracy on the worse of both kinds of rows
    trained: Estimate | None            # accuracy on trained periods, if there are any
    tokens: TransferAnswer
    unseen: BehaviourFinding | None     # aperiodic rows of tokens that training never repeated
    text: TextKnockout | None           # the induction edges on held-out text
    text_loss: TextLoss | None          # with the begin token in front of it, and without
    icl: InContextLearning | None       # loss by position on held-out text
    windows: int                        # of held-out text, on which the last is


class RepeatLosses(NamedTuple):
    """In nats per token."""

    first: Estimate         # of the first copy
    second: Estimate
    gain: Estimate


class Verdict(NamedTuple):
    run: str
    condition: str              # the same for runs that differ only by their seed
    control: bool               # one layer, trained to its end, that cannot form induction heads
    probes: Probes
    measured: Measured          # on the periodic probe, behind the begin token
    eigenvalues: Tensor         # (L, H) Σ Re λ / Σ |λ| of each head's OV circuit
    behaviour: BehaviourFinding
    mechanism: MechanismFinding
    transfer: TransferFinding
    transition: Transition | None       # in tokens

    def __repr__(self) -> str:
        behaviour, transfer = self.behaviour, self.transfer
        heads = self.mechanism.evidence.attending
        names = ", ".join(map(str, heads[:8])) + (" …" if len(heads) > 8 else "")
        return (f"Verdict({self.run}: induction heads formed: {self.answer};\n"
                f"  behaviour: {behaviour.answer} (accuracy {behaviour.accuracy:.2f}); mechanism: "
                f"{self.mechanism.answer} (heads that attend: {names or 'none'});\n"
                f"  transfer to periods: {transfer.periods}, to tokens: {transfer.tokens})")

    @property
    def answer(self) -> Answer:
        """Did induction heads form? Yes only if the behaviour is there and they do it."""
        behaviour, mechanism = self.behaviour.answer, self.mechanism.answer
        if "not shown" in (behaviour, mechanism):
            return "not shown"
        if behaviour in ("weak", "no") or mechanism in ("another", "attention only", "no"):
            return "no"
        return "yes" if behaviour == mechanism == "yes" else "partly"

    @property
    def heads(self) -> list[Head]:
        """All heads of the model."""
        n_layers, n_heads = self.measured.scores["prefix_matching"].shape
        return [Head(layer, index) for layer in range(n_layers) for index in range(n_heads)]

    @property
    def repeat_losses(self) -> RepeatLosses:
        """Of both copies of the periodic probe, behind the begin token."""
        (first, second), rows = self.measured.losses, self.probes.scored.resampling
        return RepeatLosses(rows.mean(first, NONNEGATIVE), rows.mean(second, NONNEGATIVE),
                            rows.difference(first, second))

    @property
    def one_layer(self) -> bool:
        """Whether the model has a single layer."""
        return len(self.measured.offset_profile) == 1

    @property
    def best(self) -> float:
        """Prefix matching of the strongest head, on the periodic probe."""
        return self.measured.scores["prefix_matching"].max().item()

    @property
    def control_fails(self) -> bool:
        """Whether this is a control, and what it must not show is there: then the probe can be met
        without induction heads."""
        return self.control and any(self.behaviour.on)


# --- how they are found ---------------------------------------------------------------------------

def judge(run: str, condition: str, control: bool, model: GPT, probes: Probes,
          transition: Transition | None, text: Batch | None = None,
          progress: ProgressBar = iter) -> Verdict:
    """The verdict on one model; `transition` is that of its run, `text` held-out text."""
    measured = measure(model, probes.scored, probes.unrepeated)
    behaviour_finding = find_behaviour(model, probes.aperiodic, probes.vocabulary)
    eigenvalues = copying_eigenvalues(model)
    evidence = mechanism_evidence(model, probes, measured.scores["copying"], eigenvalues, progress)
    answer = mechanism_answer(behaviour_finding, evidence)
    heads = evidence.attending or heads_of(model.config)
    return Verdict(
        run=run, condition=condition, control=control, probes=probes, measured=measured,
        eigenvalues=eigenvalues,
        behaviour=behaviour_finding, mechanism=MechanismFinding(answer, evidence),
        transfer=find_transfer(model, probes, behaviour_finding, heads, text),
        transition=transition)


def find_behaviour(model: GPT, rows: Pair, vocabulary: int) -> BehaviourFinding:
    """What the model predicts, beside guessing among `vocabulary` tokens."""
    begun, bare = behaviour(model, rows.begun), behaviour(model, rows.bare)
    guessing = log(vocabulary)

    def predicts(b: Behaviour) -> bool:
        return bool(b.accuracy >= MIN_ACCURACY
                    and repeat_gain(b.loss_first, b.loss_known, guessing) >= MIN_GAIN)

    def predicts_some(b: Behaviour) -> bool:
        return b.accuracy >= WEAK_RATIO * b.chance and b.gain > 0

    answer: BehaviourAnswer = "no"
    if begun.chance > MAX_CHANCE:
        answer = "not shown"
    elif predicts(begun) and predicts(bare):
        answer = "yes"
    elif predicts(begun):
        answer = "only with begin token"
    elif predicts(bare):
        answer = "only without begin token"
    elif predicts_some(begun) or predicts_some(bare):
        answer = "weak"
    return BehaviourFinding(answer, begun, bare, guessing)


def mechanism_answer(finding: BehaviourFinding, evidence: MechanismEvidence) -> MechanismAnswer:
    """Whether induction heads do what the model does, where it does it.

    Heads that attend as induction heads do without any behaviour are attention only. A behaviour
    that outlives the removal of their edges has another mechanism, and so has one for which it does
    not matter which token they read.
    """
    if finding.answer == "not shown":
        return "not shown"
    looks_right = any(role.prefix_matching >= INDUCTION_HEAD for role in evidence.roles)
    knockouts = evidence.knockout or (None, None)
    causes = [cause(knockout) for knockout in knockouts]
    if finding.answer == "weak" and "yes" in causes:
        return "yes"
    if finding.answer in ("no", "weak"):
        return "attention only" if looks_right else "no"
    wanted = [answer for answer, predicts in zip(causes, finding.on) if predicts]
    if "not shown" in wanted:
        return "not shown"
    if set(wanted) == {"yes"}:
        return "yes"
    if "yes" in wanted:
        return "only with begin token" if causes[0] == "yes" else "only without begin token"
    return "another"


def cause(knockout: Knockout | None) -> Literal["yes", "another", "not shown"]:
    """Whether the heads that attend to induction targets do it, on one kind of rows."""
    if knockout is None or knockout.gain_removed is None:
        return "another"
    assert knockout.by_random is not None and knockout.by_misreading is not None
    if knockout.by_random > MAX_RANDOM:
        return "not shown"
    removed = min(knockout.gain_removed, knockout.by_misreading)
    return "yes" if removed >= MIN_REMOVED else "another"


def find_transfer(model: GPT, probes: Probes, finding: BehaviourFinding, heads: list[Head],
                  text: Batch | None) -> TransferFinding:
    """Whether the behaviour is there for what training never repeated, on the kinds of rows on
    which it is there at all. A behaviour that is nowhere transfers to nothing. Not shown without
    synthetic repeats: text repeats its tokens, at all distances."""
    def on_known_kinds(rows: Pair) -> Estimate:
        """Accuracy on the worse of the kinds of rows on which the behaviour is."""
        kinds = [probe for probe, predicts in zip(rows, finding.on) if predicts]
        return min(behaviour(model, probe).accuracy for probe in kinds or rows)

    by_period = {}
    for period in probes.scored.periods.unique().tolist():
        by_period[period] = on_known_kinds(probes.periodic.rows(probes.scored.periods == period))
    trained = None if probes.trained is None else on_known_kinds(probes.trained)
    unseen = None
    if probes.unseen_tokens is not None:
        unseen = find_behaviour(model, probes.unseen_tokens, probes.vocabulary)

    periods: TransferAnswer = "not shown"
    tokens: TransferAnswer = "not shown"
    if probes.history_known and probes.repeats_trained and finding.answer != "not shown":
        there = any(finding.on)
        if probes.never_trained:
            periods = "yes" if there and min(by_period.values()) >= MIN_ACCURACY else "no"
        if unseen is not None and unseen.answer != "not shown":
            kept = all(new for new, old in zip(unseen.on, finding.on) if old)
            tokens = "yes" if there and kept else "no"
    on_text, loss, icl, windows = None, None, None, 0
    if text is not None:
        windows, length = text.tokens.shape
        icl = in_context_learning(losses_in_parts(model, *text[:2]))
        few = max(64, TEXT_TOKENS // length)
        some_text = Batch(text.tokens[:few], text.targets[:few])
        on_text = knock_out_on_text(model, heads, some_text)
        loss = text_loss(model, some_text, begin=int(probes.scored.tokens[0, 0]))
    return TransferFinding(periods, by_period, trained, tokens, unseen, on_text, loss,
                           icl, windows)
