"""What a model predicts: its losses on a probe, how often it is right, its ICL score on text."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from data.batches import Batch
from induction.probes import Pair, Probe
from model.cross_entropy import chunk_rows, cross_entropies
from model.gpt import GPT


class ProbeLosses(NamedTuple):
    """Mean losses on a probe, in nats per token."""

    first: float        # in the block, where tokens are random
    known: float        # of the targets that can be known

    @property
    def gain(self) -> float:
        """What repeating is worth to the model."""
        return self.first - self.known


@torch.no_grad()
def probe_losses(model: GPT, probe: Probe, final: Tensor) -> ProbeLosses:
    """Mean losses, from the last hidden state (B, T, E) of a pass over the probe."""
    targets = probe.tokens[:, 1:]
    losses = cross_entropies(final[:, :-1].flatten(0, 1), model.unembedding, targets.flatten())
    return mean_losses(losses.view(targets.shape), probe)


def mean_losses(losses: Tensor, probe: Probe) -> ProbeLosses:
    """Mean losses, from the losses (B, T − 1) of the probe's targets."""
    return ProbeLosses(mean_of(losses, probe.unknown), mean_of(losses, probe.known))


def repeat_gain(first: float, known: float, guessing: float) -> float:
    """What repeating is worth to a model, in nats: its loss in the block, minus its loss where
    tokens can be known. If guessing, ln of the number of tokens that are drawn, is better than the
    model in the block, it takes that place: a model that expects something else there, text or a
    repeat, does not gain what it overpays."""
    return min(first, guessing) - known


class Behaviour(NamedTuple):
    """How well a model predicts the tokens of a probe that can be known."""

    accuracy: float         # how often the likeliest token is the right one
    loss_first: float       # nats per token in the block
    loss_known: float
    chance: float           # accuracy of a random token of the block

    @property
    def gain(self) -> float:
        """What repeating is worth to the model, in nats."""
        return self.loss_first - self.loss_known


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
    known, right = rate(model, final[probe.known], targets[probe.known])
    first, _ = rate(model, final[probe.unknown], targets[probe.unknown])
    return Behaviour(right, first, known, probe.chance)


def rate(model: GPT, final: Tensor, targets: Tensor) -> tuple[float, float]:
    """(mean loss in nats, how often the likeliest token is the target), from last hidden states
    (N, E) and targets (N,). Only a part of the logits is held at a time."""
    losses, right = [], []
    rows = chunk_rows(model.unembedding)
    for x, target in zip(final.split(rows), targets.split(rows)):
        logits = model.unembed(x).float()
        losses.append(F.cross_entropy(logits, target, reduction="none"))
        right.append(logits.argmax(-1) == target)
    return torch.cat(losses).cpu().double().mean().item(), torch.cat(right).float().mean().item()


class TextLoss(NamedTuple):
    """Mean loss of the same tokens of text, in nats, with and without the token that begins a text
    in front of each window."""

    begun: float
    bare: float


@torch.no_grad()
def text_loss(model: GPT, text: Batch, begin: int) -> TextLoss | None:
    """The loss on windows of text (B, T) that do not begin with `begin` by themselves; None if all
    do."""
    tokens = text.tokens[text.tokens[:, 0] != begin]
    if len(tokens) == 0:
        return None
    shifted = torch.cat([torch.full_like(tokens[:, :1], begin), tokens[:, :-1]], dim=1)
    bare = model.losses(tokens[:, :-2], tokens[:, 1:-1])            # of tokens 1 … T − 2
    begun = model.losses(shifted[:, :-1], shifted[:, 1:])[:, 1:]    # of the same
    return TextLoss(begun.double().mean().item(), bare.double().mean().item())


def mean_of(losses: Tensor, counted: Tensor) -> float:
    """The mean of the losses (B, T) that `counted` (B, T) bool selects, summed in float64 on the
    CPU (some devices have no float64)."""
    return losses[counted].cpu().double().mean().item()


def icl_score(losses: Tensor) -> float | None:
    """In-context-learning score: mean loss late in the context minus mean loss early, in nats, from
    losses (N, T) on text. More negative means more in-context learning. None if T < 16.

    From T = 512 on: around token 500 minus around token 50 (Olsson et al. 2022), 17 tokens each
    because single tokens are noisy. Below: the last eighth minus the second sixteenth.
    """
    T, losses = losses.shape[1], losses.cpu().double()
    if T < 16:
        return None
    if T >= 512:
        early, late = losses[:, 41:58], losses[:, 491:508]
    else:
        early, late = losses[:, T // 16:T // 8], losses[:, -(T // 8):]
    return late.mean().item() - early.mean().item()
