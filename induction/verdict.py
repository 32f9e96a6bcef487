"""Did induction heads form in a run? The evidence, and the answer that follows from it.

A head counts as an induction head here if its pattern says so on periods never trained, its output
raises the tokens it reads, *and* the model predicts repeats worse without it. A pattern on its own
shows what was averaged, not what was used. report/verdict_page.py puts a verdict into words.
"""

from typing import Literal, NamedTuple

from torch import Tensor

from data.batches import Batch
from induction.ablation import (
    Effect,
    ProgressBar,
    ablation_effect,
    losses_without,
    matched_sets,
    path_patch,
)
from induction.phase import INDUCTION_HEAD, Transition
from induction.probes import Probes
from induction.scores import Measured, copying_eigenvalues, mean_of, measure
from kernels.planes import REACH
from model.gpt import GPT
from model.taps import Head, heads_of

PREVIOUS_TOKEN_HEAD = 0.25      # previous-token score from which a head counts as one
MIN_COPYING_RATIO = 3.0         # share of the token read in what is raised, relative to chance
MIN_HELD_OUT_RATIO = 0.5        # prefix matching on held-out periods, as a fraction of trained ones
MIN_GAIN_REMOVED = 0.5          # fraction of the repeat gain that ablating the heads must remove
MIN_RATIO_TO_OTHERS = 2.0       # the same, relative to matched sets of other heads
MAX_CONTROL = 0.15              # prefix matching that a one-layer control may reach
MAX_LOSS_RATIO = 0.5            # second-copy loss over first-copy loss below which a model copies


# --- what the evidence is made of -----------------------------------------------------------------

class SetAblation(NamedTuple):
    """The effect of mean-ablating a set of heads, and of matched sets of other heads."""

    heads: list[Head]
    effect: Effect
    others: list[float]         # fraction of the repeat gain that each matched set removes
    other_sizes: set[int]       # how many heads a matched set has

    @property
    def others_mean(self) -> float | None:
        return sum(self.others) / len(self.others) if self.others else None


class PreviousTokenHeads(NamedTuple):
    """What previous-token heads below the induction heads are worth to them: the rise of the
    second-copy loss, in nats, when they are mean-ablated."""

    heads: list[Head]
    total: float
    patterns_kept: float        # with every attention pattern fixed
    into: dict[str, float]      # only on the direct path into the induction heads' "q", "k" or "v"


class Copying(NamedTuple):
    """Whether the strongest head raises the token it reads."""

    score: float
    chance: float               # the score of a head that ignores what it reads
    ratio: float                # share of the token read in what is raised, relative to chance
    eigenvalues: float          # Σ Re λ / Σ |λ|


class Peak(NamedTuple):
    """Where around the induction target a head attends most."""

    head: Head
    offset: int                 # in tokens from the induction target
    weight: float


class Criteria(NamedTuple):
    """Each is True if it supports induction heads, False if it speaks against them, None if it
    decides nothing or was not measured."""

    matches_prefixes: bool
    beyond_trained_periods: bool | None
    repeats_help: bool | None
    peaks_on_target: bool | None
    copies: bool | None = None
    needed: bool | None = None
    needed_more_than_others: bool | None = None


Answer = Literal["yes", "no", "not shown"]


class Verdict(NamedTuple):
    run: str
    condition: str              # the same for runs that differ only by their seed
    control: bool               # one layer, trained to its end, that cannot form induction heads
    answer: Answer
    criteria: Criteria
    probes: Probes
    measured: Measured          # on held-out periods; on trained ones if there are no others
    trained: Measured | None    # on trained periods, if the probe is held out
    unseen: Measured | None     # on tokens that training never repeated
    transition: Transition | None       # in tokens
    heads: list[Head]           # the induction heads by their pattern, the strongest first
    strongest: Head             # by prefix matching, whether it is an induction head or not
    peak: Peak
    copying: Copying | None     # this and the next two only if there are induction heads
    ablation: SetAblation | None
    previous_token: PreviousTokenHeads | None

    @property
    def one_layer(self) -> bool:
        """Whether the model has a single layer."""
        return len(self.measured.offset_profile) == 1

    @property
    def best(self) -> float:
        """Prefix matching of the strongest head."""
        return self.measured.scores["prefix_matching"][self.strongest].item()


# --- how it is gathered ---------------------------------------------------------------------------

def judge(run: str, condition: str, control: bool, model: GPT, probes: Probes,
          transition: Transition | None, text: Batch | None = None) -> Verdict:
    """The verdict on one model; `transition` is that of its run, `text` held-out text."""
    measured = measure(model, probes.scored, probes.unrepeated)
    prefix_matching = measured.scores["prefix_matching"]
    heads = induction_heads(model, measured)
    strongest = max(heads_of(model.config), key=lambda head: prefix_matching[head].item())
    peak = peak_of(strongest if heads else highest_peak(measured), measured)
    trained, unseen = None, None
    if probes.trained is not None and probes.never_trained:
        trained = measure(model, probes.trained, probes.unrepeated)
    if probes.unseen_tokens is not None:
        unseen = measure(model, probes.unseen_tokens, probes.unrepeated)

    criteria = Criteria(
        matches_prefixes=bool(heads),
        beyond_trained_periods=beyond_trained_periods(measured, trained),
        repeats_help=None if measured.loss_first > measured.loss_second else False,
        peaks_on_target=peak.offset == 0 if heads else None)
    copying, ablation, previous_token = None, None, None
    if heads:
        copying = copying_of(model, strongest, measured, probes.unrepeated)
        ablation = ablate_set(model, heads, probes, text)
        previous_token = previous_token_heads(model, measured, heads, probes)
        removed, others = ablation.effect.gain_removed, ablation.others_mean
        criteria = criteria._replace(
            copies=copying.ratio >= MIN_COPYING_RATIO and copying.eigenvalues > 0,
            needed=removed >= MIN_GAIN_REMOVED,
            needed_more_than_others=(None if others is None else
                                     removed >= MIN_RATIO_TO_OTHERS * max(others, 0)))
    return Verdict(
        run=run, condition=condition, control=control, answer=answer_of(criteria, probes),
        criteria=criteria, probes=probes, measured=measured, trained=trained, unseen=unseen,
        transition=transition, heads=heads, strongest=strongest, peak=peak, copying=copying,
        ablation=ablation, previous_token=previous_token)


def answer_of(criteria: Criteria, probes: Probes) -> Answer:
    """The answer is no if any criterion speaks against it, and not shown if only trained periods
    were probed."""
    if any(criterion is False for criterion in criteria):
        return "no"
    return "yes" if probes.never_trained else "not shown"


def induction_heads(model: GPT, measured: Measured) -> list[Head]:
    """The heads with the pattern of an induction head, the strongest first."""
    score = measured.scores["prefix_matching"]
    heads = [head for head in heads_of(model.config) if score[head] >= INDUCTION_HEAD]
    return sorted(heads, key=lambda head: -score[head])


def beyond_trained_periods(measured: Measured, trained: Measured | None) -> bool | None:
    """False if heads match prefixes on trained periods and much less on held-out ones: then they
    attend by position, not by content."""
    if trained is None:
        return None
    best_held_out = measured.scores["prefix_matching"].max().item()
    best_trained = trained.scores["prefix_matching"].max().item()
    if best_trained >= INDUCTION_HEAD and best_held_out < MIN_HELD_OUT_RATIO * best_trained:
        return False
    return None


def highest_peak(measured: Measured) -> Head:
    """The head that attends most to any position around the induction target."""
    profile = measured.offset_profile                                   # (L, H, 2 · REACH + 1)
    peaks = profile.max(-1).values                                      # (L, H)
    layer, index = (peaks == peaks.max()).nonzero()[0].tolist()
    return Head(layer, index)


def peak_of(head: Head, measured: Measured) -> Peak:
    profile = measured.offset_profile[head]
    return Peak(head, int(profile.argmax()) - REACH, profile.max().item())


def copying_of(model: GPT, head: Head, measured: Measured, unrepeated: Tensor) -> Copying:
    score, n = measured.scores["copying"][head].item(), unrepeated.shape[1] - 1
    eigenvalues = copying_eigenvalues(model)[head].item()
    share = (score + 1) / 2                         # of what is raised, on the token read
    return Copying(score, chance=2 / n - 1, ratio=share * n, eigenvalues=eigenvalues)


def ablate_set(model: GPT, heads: list[Head], probes: Probes, text: Batch | None = None,
               progress: ProgressBar = iter) -> SetAblation:
    """Ablate `heads` together (redundant heads are hardly missed one by one), then matched sets of
    other heads; `progress` wraps those."""
    others = matched_sets(model.config, heads)
    effect = ablation_effect(model, heads, probes.scored, text, "mean")
    removed = [ablation_effect(model, other, probes.scored, method="mean").gain_removed
               for other in progress(others)]
    return SetAblation(heads, effect, removed, {len(other) for other in others})


def previous_token_heads(model: GPT, measured: Measured, heads: list[Head],
                         probes: Probes) -> PreviousTokenHeads | None:
    """Ablate the previous-token heads below the strongest of `heads`; None if there are none.

    What remains of the effect with the patterns kept is what they carry themselves; the rest is
    where they make later heads attend. On the direct path into the keys it is K-composition (Elhage
    et al. 2021): they tell each key which token precedes it.
    """
    score, layer = measured.scores["previous_token"], heads[0].layer if heads else 0
    senders = [head for head in heads_of(model.config)
               if head.layer < layer and score[head] >= PREVIOUS_TOKEN_HEAD]
    if not senders:
        return None
    probe, receivers = probes.scored, [head for head in heads if head.layer == layer]

    def second_copy(losses: Tensor) -> float:
        return mean_of(losses, probe.second_copy)

    intact = second_copy(losses_without(model, probe.batch, []))
    total = second_copy(losses_without(model, probe.batch, senders, "mean"))
    kept = second_copy(losses_without(model, probe.batch, senders, "mean", patterns_kept=True))
    into = {}
    for part in ("q", "k", "v"):
        losses = path_patch(model, probe.batch, senders, receivers, part, "mean")
        into[part] = second_copy(losses) - intact
    return PreviousTokenHeads(senders, total - intact, kept - intact, into)
