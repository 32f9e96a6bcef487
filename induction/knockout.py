"""Does the model need the attention edge from a token to what followed its earlier copy?

To knock out an edge is to set one entry of a head's pattern to zero and to renormalise its row.
Everything else that the head does stays. So this tests the claim that makes a head an induction
head, and not the head as a whole (attention knockout: Geva et al. 2023, "Dissecting Recall of
Factual Associations in Auto-Regressive Language Models").
"""

from collections.abc import Callable, Collection
from typing import NamedTuple

import torch
from torch import Tensor

from data.batches import Batch
from induction.ablation import gain_removed
from induction.behaviour import mean_losses, mean_of
from induction.probes import Probe
from induction.scores import visible_matches
from model.gpt import GPT
from model.taps import Head, TapFunction, taps

PATTERN_ELEMENTS = 2 ** 27      # of one layer's patterns at a time: 512 MB in float32


def induction_edges(tokens: Tensor) -> Tensor:
    """The edges from each query to its induction targets: every j ≤ i with x_{j−1} = x_i, of
    tokens (B, T). (B, T, T) bool."""
    follows = torch.zeros(*tokens.shape, tokens.shape[1], dtype=torch.bool, device=tokens.device)
    follows[:, :, 1:] = tokens[:, :, None] == tokens[:, None, :-1]
    return follows.tril()


def random_edges(edges: Tensor, seed: int = 0) -> Tensor:
    """As many other edges of each query, drawn from the keys it sees: (B, T, T) bool. A query with
    too few others has all of them."""
    draw = torch.Generator().manual_seed(seed)
    order = torch.rand(edges.shape, generator=draw).to(edges.device)
    others = torch.ones_like(edges).tril() & ~edges
    rank = order.masked_fill(~others, 2.0).argsort(-1).argsort(-1)      # 0: the first drawn
    return others & (rank < edges.sum(-1, keepdim=True))


def random_induction_edges(tokens: Tensor) -> Tensor:
    """As many edges of each query as it has induction edges, but others: (B, T, T) bool."""
    return random_edges(induction_edges(tokens))


def losses_without_edges(model: GPT, batch: Batch, edges_of: Callable[[Tensor], Tensor],
                         heads: Collection[Head]) -> Tensor:
    """The loss of each target (B, T), in nats, without some edges of the patterns of `heads`:
    those that `edges_of` selects, tokens (B, T) → (B, T, T) bool. A row that loses all its edges
    attends to nothing. Few rows at a time: patterns are (B, H, T, T)."""
    indices_by_layer: dict[int, list[int]] = {}
    for head in heads:
        indices_by_layer.setdefault(head.layer, []).append(head.index)
    T = batch.tokens.shape[1]
    rows = max(1, PATTERN_ELEMENTS // (model.config.n_heads * T * T))
    losses = []
    for part in batch.split(rows):
        edges = edges_of(part.tokens)
        with taps(model, {f"L{layer}.pattern": without_edges(edges, indices)
                          for layer, indices in indices_by_layer.items()}):
            losses.append(model.losses(*part))
    return torch.cat(losses)


def without_edges(edges: Tensor, indices: list[int]) -> TapFunction:
    """A tap on a pattern (B, H, T, T) that removes `edges` (B, T, T) bool from some heads."""
    def remove(pattern: Tensor) -> Tensor:
        pattern = pattern.clone()
        left = pattern[:, indices].masked_fill(edges[:, None], 0)
        pattern[:, indices] = left / left.sum(-1, keepdim=True).clamp(min=1e-30)
        return pattern
    return remove


class Knockout(NamedTuple):
    """What removing the induction edges of some heads does, beside as many random other edges."""

    heads: list[Head]
    gain_removed: float | None          # fraction of the repeat gain, 1 − g′/g; None if there is
                                        # none to remove
    by_random: float | None             # the same for the random edges
    known: float                        # rise of the loss of known tokens, in nats
    known_by_random: float
    first_copy: float                   # rise of the loss in the first copy


def knock_out(model: GPT, heads: Collection[Head], probe: Probe) -> Knockout:
    """Remove the induction edges of `heads` on a probe, and then as many random others."""
    batch = probe.batch
    intact = mean_losses(model.losses(*batch), probe)
    targets = mean_losses(losses_without_edges(model, batch, induction_edges, heads), probe)
    others = mean_losses(losses_without_edges(model, batch, random_induction_edges, heads), probe)
    return Knockout(list(heads), gain_removed(intact.gain, targets.gain),
                    gain_removed(intact.gain, others.gain), targets.known - intact.known,
                    others.known - intact.known, targets.first - intact.first)


class TextKnockout(NamedTuple):
    """What the induction edges of some heads are worth on text, in nats per token."""

    matched: float          # rise of the loss of tokens whose query has an induction target
    by_random: float        # the same for as many random other edges
    fraction: float         # of the tokens that have one


def knock_out_on_text(model: GPT, heads: Collection[Head], text: Batch) -> TextKnockout:
    """Remove the induction edges of `heads` on text (B, T), and then as many random others."""
    matched = visible_matches(text.tokens, None) > 0                            # (B, T)
    intact = model.losses(*text)

    def rise(edges_of: Callable[[Tensor], Tensor]) -> float:
        return mean_of(losses_without_edges(model, text, edges_of, heads) - intact, matched)

    return TextKnockout(rise(induction_edges), rise(random_induction_edges),
                        matched.double().mean().item())
