"""Which heads attend to what followed the earlier copy, what each does with it, and what feeds
them: the evidence for the second question of a verdict (induction/verdict.py)."""

from typing import Literal, NamedTuple

import torch

from induction.ablation import (
    Effect,
    Path,
    ProgressBar,
    ablate_each_head,
    ablation_effect,
    losses_without,
    path_matrix,
    path_patch,
)
from induction.intervals import FRACTION, LEAST_UNITS, Estimate, row_sums
from induction.knockout import KnockoutPair, knock_out_each
from induction.probe_set import Probes
from induction.probes import Probe
from induction.scores import attention_scores
from kernels.planes import REACH
from model.gpt import GPT
from model.taps import Head, heads_of

ATTENDS = 0.02              # prefix matching on the aperiodic probe from which a head counts, if it
ATTENDS_RATIO = 2.0         # is also this many times its attention to the targets of other rows.
                            # Low, because much of a head's attention may go to a sink, and its
                            # work may be shared by many: the knockout tells which heads matter
MIN_COPYING = 0.1           # copying score from which a head copies, and below whose negative it
                            # suppresses
PREVIOUS_TOKEN_HEAD = 0.25  # previous-token score from which a head counts as one
MOST_RECEIVERS = 4          # heads whose inputs are patched one by one, the strongest
MOST_PATHS = 64             # pairs of sender and receiver
PATH_TOKENS = 1024          # of rows of each kind: the paths of a pair take 15 forward passes

Role = Literal["copies", "suppresses", "neither"]


class HeadRole(NamedTuple):
    """A head that attends to induction targets, and what it does with what it reads there."""

    head: Head
    prefix_matching: Estimate   # on the aperiodic probe
    copying: float
    eigenvalues: float          # Σ Re λ / Σ |λ| of its OV circuit
    alone: Estimate             # rise of the loss of known tokens without this head, in nats

    @property
    def role(self) -> Role:
        """By the head's own weights. A head that does neither may work through later layers."""
        if self.copying >= MIN_COPYING and self.eigenvalues > 0:
            return "copies"
        if self.copying <= -MIN_COPYING and self.eigenvalues < 0:
            return "suppresses"
        return "neither"


class Peak(NamedTuple):
    """Where around the induction target a head attends most."""

    head: Head
    offset: int                 # in tokens from the induction target
    weight: float


class PreviousTokenHeads(NamedTuple):
    """What previous-token heads below the strongest induction head are worth to it: the rise of the
    loss of known tokens, in nats, when they are mean-ablated."""

    heads: list[Head]
    total: Estimate
    patterns_kept: Estimate     # with every attention pattern fixed
    into: dict[str, Estimate]   # only on the direct path into the induction heads' "q", "k" or "v"


class MechanismEvidence(NamedTuple):
    roles: list[HeadRole]               # heads that attend to induction targets, strongest first
    uniform: float                      # prefix matching of uniform attention on the same probe
    peak: Peak                          # of the head that attends most around the target
    knockout: KnockoutPair | None       # the induction edges of these heads; None without heads
    everywhere: KnockoutPair            # the induction edges of all heads
    ablation: Effect | None             # these heads as a whole
    previous_token: PreviousTokenHeads | None
    paths: list[Path]                   # from the heads below into each of the strongest

    @property
    def attending(self) -> list[Head]:
        return [role.head for role in self.roles]

    @property
    def suppressing(self) -> list[Head]:
        return [role.head for role in self.roles if role.role == "suppresses"]


def mechanism_evidence(model: GPT, probes: Probes, copying: torch.Tensor, eigenvalues: torch.Tensor,
                       progress: ProgressBar = iter) -> MechanismEvidence:
    """All of it, on the aperiodic probe, rows behind the begin token and without it together;
    `copying` and `eigenvalues` (L, H) are those scores of all heads."""
    probe = probes.aperiodic.both
    attention = attention_scores(model, probe.tokens, probe.queries, probe.first_copy)
    prefix_matching = attention.scores["prefix_matching"]
    uniform = max(layer.fraction * layer.uniform for layer in attention.visible)
    threshold = (ATTENDS_RATIO * attention_elsewhere(model, probe)).clamp(min=ATTENDS)
    attending = sorted((head for head in heads_of(model.config)
                        if prefix_matching[head] >= threshold[head]),
                       key=lambda head: -prefix_matching[head])
    profile = attention.offset_profile
    everywhere = knock_out_each(model, heads_of(model.config), probes.aperiodic, probes.vocabulary)
    if not attending:
        return MechanismEvidence([], uniform, highest_peak(profile), None, everywhere, None, None,
                                 [])
    n_rows = max(LEAST_UNITS, PATH_TOKENS // probe.tokens.shape[1])
    few = probes.aperiodic.rows(slice(n_rows)).both
    alone = ablate_each_head(model, few.batch, few.known, few.resampling, progress)
    matching = attention.rows["prefix_matching"]
    roles = [HeadRole(head, probe.resampling.mean(matching.of_head(head), FRACTION),
                      copying[head].item(),
                      eigenvalues[head].item(), alone[head]) for head in attending]
    previous_token = previous_token_heads(model, attention.scores["previous_token"], attending,
                                          probe)
    knockout = knock_out_each(model, attending, probes.aperiodic, probes.vocabulary,
                              misreading=True)
    return MechanismEvidence(
        roles, uniform, peak_of(attending[0], profile), knockout,
        everywhere, ablation_effect(model, attending, probe), previous_token,
        paths_into(model, attending, alone, few, progress))


def attention_elsewhere(model: GPT, probe: Probe) -> torch.Tensor:
    """Prefix matching for the targets of the next row, which are at as many and as distant places:
    (L, H). It is that of a head which looks back by fixed distances, or evenly."""
    return attention_scores(model, probe.tokens, probe.queries.roll(-1, 0),
                            targets_of=probe.tokens.roll(-1, 0)).scores["prefix_matching"]


def highest_peak(profile: torch.Tensor) -> Peak:
    """The highest attention of any head on a position around the induction target; profile
    (L, H, 2 · REACH + 1)."""
    peaks = profile.max(-1).values                                      # (L, H)
    layer, index = (peaks == peaks.max()).nonzero()[0].tolist()
    return peak_of(Head(layer, index), profile)


def peak_of(head: Head, profile: torch.Tensor) -> Peak:
    return Peak(head, int(profile[head].argmax()) - REACH, profile[head].max().item())


def paths_into(model: GPT, receivers: list[Head], alone: dict[Head, Estimate], probe: Probe,
               progress: ProgressBar = iter) -> list[Path]:
    """Every path from a lower head into the queries, keys and values of the strongest receivers.

    In a large model only from the senders that are missed most when they are ablated alone.
    """
    receivers = receivers[:MOST_RECEIVERS]
    senders = [head for head in alone if head.layer < max(r.layer for r in receivers)]
    most = max(1, MOST_PATHS // len(receivers))
    if len(senders) > most:
        missed = sorted(senders, key=lambda head: -abs(alone[head]))[:most]
        senders = [head for head in senders if head in missed]
    return path_matrix(model, probe, senders, receivers, progress)


def previous_token_heads(model: GPT, score: torch.Tensor, heads: list[Head],
                         probe: Probe) -> PreviousTokenHeads | None:
    """Ablate the previous-token heads below the strongest of `heads`; None if there are none.
    `score` (L, H) is the previous-token score in the first copy.

    What remains of the effect with the patterns kept is what they carry themselves; the rest is
    where they make later heads attend. On the direct path into the keys it is K-composition (Elhage
    et al. 2021): they tell each key which token precedes it.
    """
    layer = heads[0].layer if heads else 0
    senders = [head for head in heads_of(model.config)
               if head.layer < layer and score[head] >= PREVIOUS_TOKEN_HEAD]
    if not senders:
        return None
    receivers = [head for head in heads if head.layer == layer]

    def rise(losses: torch.Tensor) -> Estimate:
        return probe.resampling.difference(row_sums(losses, probe.known), intact)

    intact = row_sums(losses_without(model, probe.batch, []), probe.known)
    total = rise(losses_without(model, probe.batch, senders))
    kept = rise(losses_without(model, probe.batch, senders, patterns_kept=True))
    into = {part: rise(path_patch(model, probe.batch, senders, receivers, part))
            for part in ("q", "k", "v")}
    return PreviousTokenHeads(senders, total, kept, into)
