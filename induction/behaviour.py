"""What a model predicts: its losses on a probe, how often it is right, its ICL score on text."""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.batches import Batch
from induction.intervals import FRACTION, NONNEGATIVE, Estimate, Resampling, RowSums, row_sums
from induction.probes import Pair, Probe
from model.cross_entropy import chunk_rows, cross_entropies
from model.gpt import GPT

PASS_TOKENS = 2 ** 14       # in a forward pass over text


class ProbeLosses(NamedTuple):
    """Losses on a probe, in nats, row by row."""

    first: RowSums      # in the block, where tokens are random
    known: RowSums      # of the targets that can be known


@torch.no_grad()
def probe_losses(model: GPT, probe: Probe, final: Tensor) -> ProbeLosses:
    """From the last hidden state (B, T, E) of a pass over the probe."""
    targets = probe.tokens[:, 1:]
    losses = cross_entropies(final[:, :-1].flatten(0, 1), model.unembedding, targets.flatten())
    return losses_by_row(losses.view(targets.shape), probe)


def losses_by_row(losses: Tensor, probe: Probe) -> ProbeLosses:
    """From the losses (B, T − 1) of the probe's targets."""
    return ProbeLosses(row_sums(losses, probe.unknown), row_sums(losses, probe.known))


def repeat_gain(first: np.ndarray | float, known: np.ndarray | float,
                guessing: float = np.inf) -> np.ndarray:
    """What repeating is worth to a model, in nats: its mean loss in the block, minus its mean loss
    where tokens can be known. If `guessing`, ln of the number of tokens that are drawn, is better
    than the model in the block, it takes that place: a model that expects something else there,
    text or a repeat, does not gain what it overpays."""
    return np.minimum(first, guessing) - known


@dataclass(frozen=True)
class Behaviour:
    """How well a model predicts the tokens of a probe that can be known. Intervals are computed
    when they are asked for: the live measurement does without."""

    probe: Probe
    losses: ProbeLosses         # of each row
    right: RowSums              # how often the likeliest known token is the right one

    @property
    def chance(self) -> float:
        """Accuracy of a random token of the block."""
        return self.probe.chance

    @cached_property
    def rows(self) -> Resampling:
        return self.probe.resampling

    @cached_property
    def accuracy(self) -> Estimate:
        return self.rows.mean(self.right, FRACTION)

    @cached_property
    def loss_first(self) -> Estimate:
        """Nats per token in the block."""
        return self.rows.mean(self.losses.first, NONNEGATIVE)

    @cached_property
    def loss_known(self) -> Estimate:
        return self.rows.mean(self.losses.known, NONNEGATIVE)

    @cached_property
    def gain(self) -> Estimate:
        """What repeating is worth to the model, in nats."""
        return self.rows.difference(self.losses.first, self.losses.known)


@torch.no_grad()
def behaviour(model: GPT, probe: Probe) -> Behaviour:
    """What the model predicts on a probe. One forward pass without taps."""
    return behaviour_from(model, probe, model.hidden(probe.tokens))


@torch.no_grad()
def behaviour_of_both(model: GPT, pair: Pair) -> tuple[Behaviour, Behaviour]:
    """What the model predicts on the rows behind the begin token and on those without it, in one
    pass."""
    begun, bare = model.hidden(torch.cat([pair.begun.tokens, pair.bare.tokens])).chunk(2)
    return behaviour_from(model, pair.begun, begun), behaviour_from(model, pair.bare, bare)


def behaviour_from(model: GPT, probe: Probe, final: Tensor) -> Behaviour:
    """`behaviour`, from the last hidden state (B, T, E) of a pass over the probe."""
    final, targets = final[:, :-1], probe.tokens[:, 1:]
    losses, right = predictions(model, final[probe.known], targets[probe.known])
    known, accuracy = by_row(losses, probe.known), by_row(right, probe.known)
    losses, _ = predictions(model, final[probe.unknown], targets[probe.unknown])
    first = by_row(losses, probe.unknown)
    return Behaviour(probe, ProbeLosses(first, known), accuracy)


def predictions(model: GPT, final: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(loss in nats, whether the likeliest token is the target) (N,) each, from last hidden states
    (N, E) and targets (N,). Only a part of the logits is held at a time."""
    losses, right = [], []
    rows = chunk_rows(model.unembedding)
    for x, target in zip(final.split(rows), targets.split(rows)):
        logits = model.unembed(x).float()
        losses.append(F.cross_entropy(logits, target, reduction="none"))
        right.append(logits.argmax(-1) == target)
    return torch.cat(losses), torch.cat(right)


def by_row(values: Tensor, counted: Tensor) -> RowSums:
    """The values (N,) of the places that `counted` (B, T) bool selects, in its order."""
    full = torch.zeros(counted.shape, dtype=torch.float64)
    counted = counted.cpu()
    full[counted] = values.cpu().double()
    return row_sums(full, counted)


class TextLoss(NamedTuple):
    """Mean loss of the same tokens of text, in nats, with and without the token that begins a text
    in front of each window."""

    begun: Estimate
    bare: Estimate
    difference: Estimate        # begun − bare


@torch.no_grad()
def text_loss(model: GPT, text: Batch, begin: int) -> TextLoss | None:
    """The loss on windows of text (B, T) that do not begin with `begin` by themselves; None if all
    do."""
    tokens = text.tokens[text.tokens[:, 0] != begin]
    if len(tokens) == 0:
        return None
    shifted = torch.cat([torch.full_like(tokens[:, :1], begin), tokens[:, :-1]], dim=1)
    # Of tokens 1 … T − 2, both times.
    bare = all_targets(losses_in_parts(model, tokens[:, :-2], tokens[:, 1:-1]))
    begun = all_targets(losses_in_parts(model, shifted[:, :-1], shifted[:, 1:])[:, 1:])
    windows = Resampling.of_rows(len(tokens))
    return TextLoss(windows.mean(begun, NONNEGATIVE), windows.mean(bare, NONNEGATIVE),
                    windows.difference(begun, bare))


def losses_in_parts(model: GPT, tokens: Tensor, targets: Tensor) -> Tensor:
    """The losses (B, T) of many windows, a few in each forward pass."""
    rows = max(1, PASS_TOKENS // tokens.shape[1])
    return torch.cat([model.losses(*part)
                      for part in zip(tokens.split(rows), targets.split(rows))])


def all_targets(losses: Tensor) -> RowSums:
    """Of losses (B, T) the sum of each row."""
    return row_sums(losses, torch.ones(losses.shape, dtype=torch.bool))


# --- loss by position -----------------------------------------------------------------------------

class PositionLoss(NamedTuple):
    """The mean loss of the targets from position `start` to `stop` − 1 of a context, in nats."""

    start: int
    stop: int
    loss: Estimate
    change: Estimate            # minus that of the first positions of the list, window by window


class InContextLearning(NamedTuple):
    """What a model gains from the context, on text."""

    score: Estimate | None      # `icl_score`; None if the context is too short
    positions: list[PositionLoss]


def in_context_learning(losses: Tensor) -> InContextLearning:
    """Loss by position, from losses (N, T) on N windows of text. Intervals are over windows, those
    of differences paired. Positions are grouped by powers of √2, at least one each."""
    losses, windows = losses.cpu(), Resampling.of_rows(len(losses))

    def between(start: int, stop: int) -> RowSums:
        return all_targets(losses[:, start:stop])

    T = losses.shape[1]
    edges = sorted({round(2 ** (n / 2)) - 1 for n in range(64) if 2 ** (n / 2) < 0.8 * T} | {T})
    positions, first = [], between(edges[0], edges[1])
    for start, stop in pairwise(edges):
        rows = between(start, stop)
        positions.append(PositionLoss(start, stop, windows.mean(rows, NONNEGATIVE),
                                      windows.difference(rows, first)))
    score = None
    if spans := icl_spans(T):
        early, late = (between(span.start, span.stop) for span in spans)
        score = windows.difference(late, early)
    return InContextLearning(score, positions)


def icl_spans(T: int) -> tuple[slice, slice] | None:
    """The early and the late positions that `icl_score` compares; None if T < 16."""
    if T < 16:
        return None
    if T >= 512:
        return slice(41, 58), slice(491, 508)
    return slice(T // 16, T // 8), slice(T - T // 8, T)


def icl_score(losses: Tensor) -> float | None:
    """In-context-learning score: mean loss late in the context minus mean loss early, in nats, from
    losses (N, T) on text. More negative means more in-context learning. None if T < 16.

    From T = 512 on: around token 500 minus around token 50 (Olsson et al. 2022), 17 tokens each
    because single tokens are noisy. Below: the last eighth minus the second sixteenth.
    """
    spans, losses = icl_spans(losses.shape[1]), losses.cpu().double()
    if spans is None:
        return None
    early, late = spans
    return losses[:, late].mean().item() - losses[:, early].mean().item()
