"""Does the model need the attention edge from a token to what followed its earlier copy?

To knock out an edge is to set one entry of a head's pattern to zero and to renormalise its row.
Everything else that the head does stays. So this tests the claim that makes a head an induction
head, and not the head as a whole (attention knockout: Geva et al. 2023, "Dissecting Recall of
Factual Associations in Auto-Regressive Language Models").
"""

from collections.abc import Callable, Collection, Mapping
from math import log
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.batches import Batch
from induction.ablation import SMALLEST_GAIN, activations, by_layer
from induction.behaviour import ProbeLosses, losses_by_row, repeat_gain
from induction.intervals import Estimate, Resampling, row_sums
from induction.probes import Pair, Probe
from induction.scores import visible_matches
from kernels.reference import visible
from model.gpt import GPT
from model.taps import Head, TapFunction, taps

# Which edges (query i, key j) of a layer: tokens (B, T) and its window → (B, T, T) bool.
EdgesOf = Callable[[Tensor, int | None], Tensor]
# Of one layer's patterns at a time: 64 MB in float32, of which about seven copies are alive.
PATTERN_ELEMENTS = 2 ** 24


def induction_edges(tokens: Tensor, window: int | None = None) -> Tensor:
    """The edges from each query to its induction targets: every j ≤ i with x_{j−1} = x_i, of
    tokens (B, T), that a layer with this window sees. (B, T, T) bool."""
    follows = torch.zeros(*tokens.shape, tokens.shape[1], dtype=torch.bool, device=tokens.device)
    follows[:, :, 1:] = tokens[:, :, None] == tokens[:, None, :-1]
    return follows & visible(*follows.shape[1:], window=window, device=tokens.device)


def random_edges(edges: Tensor, window: int | None = None, seed: int = 0) -> Tensor:
    """As many other edges of each query, drawn from the keys it sees: (B, T, T) bool. A query with
    too few others has all of them. None leads to the first token: many heads rest there, and
    without that edge the others get all their attention, which is no random change."""
    draw = torch.Generator().manual_seed(seed)
    order = torch.rand(edges.shape, generator=draw).to(edges.device)
    others = visible(*edges.shape[1:], window=window, device=edges.device) & ~edges
    others[:, :, 0] = False
    rank = order.masked_fill(~others, 2.0).argsort(-1).argsort(-1)      # 0: the first drawn
    return others & (rank < edges.sum(-1, keepdim=True))


def random_induction_edges(tokens: Tensor, window: int | None = None) -> Tensor:
    """As many edges of each query as it has induction edges, but others: (B, T, T) bool."""
    return random_edges(induction_edges(tokens, window), window)


def losses_without_edges(model: GPT, batch: Batch, edges_of: EdgesOf,
                         heads: Collection[Head]) -> Tensor:
    """The loss of each target (B, T), in nats, without some edges of the patterns of `heads`:
    those that `edges_of` selects in a layer with a window, (tokens (B, T), window) → (B, T, T)
    bool. A row that loses all its edges attends to nothing. Few rows at a time: patterns are
    (B, H, T, T)."""
    losses = []
    for part in batch.split(rows_at_once(model, batch)):
        edges = edges_by_layer(model, part, edges_of, heads)
        with taps(model, {f"L{layer}.pattern": without_edges(edges[layer], indices)
                          for layer, indices in by_layer(heads).items()}):
            losses.append(model.losses(*part))
    return torch.cat(losses)


def edges_by_layer(model: GPT, batch: Batch, edges_of: EdgesOf,
                   heads: Collection[Head]) -> dict[int, Tensor]:
    """The edges (B, T, T) of each layer that has some of `heads`; made once for each window."""
    windows = {head.layer: model.config.windows[head.layer] for head in heads}
    made = {window: edges_of(batch.tokens, window) for window in set(windows.values())}
    return {layer: made[window] for layer, window in windows.items()}


def rows_at_once(model: GPT, batch: Batch) -> int:
    T = batch.tokens.shape[1]
    return max(1, PATTERN_ELEMENTS // (model.config.n_heads * T * T))


def without_edges(edges: Tensor, indices: list[int]) -> TapFunction:
    """A tap on a pattern (B, H, T, T) that removes `edges` (B, T, T) bool from some heads."""
    def remove(pattern: Tensor) -> Tensor:
        pattern = pattern.clone()
        left = pattern[:, indices].float().masked_fill(edges[:, None], 0)   # half floats have no
        left = left / left.sum(-1, keepdim=True).clamp(min=1e-30)           # number this small
        pattern[:, indices] = left.to(pattern.dtype)
        return pattern
    return remove


def losses_misreading(model: GPT, batch: Batch, edges_of: EdgesOf,
                      heads: Collection[Head]) -> Tensor:
    """The loss of each target (B, T), in nats, if `heads` attend as they do, but read other tokens
    over some edges: what stands at the same position of the next row."""
    layers, rows, losses = by_layer(heads), rows_at_once(model, batch), []
    others = Batch(batch.tokens.roll(-1, 0), batch.targets)
    for part, other in zip(batch.split(rows), others.split(rows)):
        other_values = activations(model, other, [f"L{layer}.v" for layer in layers])
        edges = edges_by_layer(model, part, edges_of, heads)
        with taps(model, [f"L{layer}.{name}" for layer in layers for name in ("pattern", "v")]
                  ) as acts:
            with taps(model, {
                    f"L{layer}.z": misread(acts, other_values, edges[layer], layer, indices)
                    for layer, indices in layers.items()}):
                losses.append(model.losses(*part))
    return torch.cat(losses)


def misread(acts: dict[str, Tensor], other_values: Mapping[str, Tensor], edges: Tensor,
            layer: int, indices: list[int]) -> TapFunction:
    """A tap on z (B, H, T, D): over `edges` (B, T, T) some heads of a layer read other values. Its
    pattern and values in this pass are in `acts`."""
    def replace(z: Tensor) -> Tensor:
        change = other_values[f"L{layer}.v"] - acts.pop(f"L{layer}.v")          # (B, K, T, D)
        change = change.repeat_interleave(z.shape[1] // change.shape[1], dim=1)[:, indices]
        over_edges = acts.pop(f"L{layer}.pattern")[:, indices] * edges[:, None]
        z = z.clone()
        z[:, indices] += over_edges @ change
        return z
    return replace


class Knockout(NamedTuple):
    """What removing the induction edges of some heads does, beside as many random other edges. Of
    the repeat gain fractions are removed, at most 1; None if there is none to remove."""

    heads: list[Head]
    gain: Estimate                      # what repeating is worth before, in nats
    gain_removed: Estimate | None       # by removing the induction edges
    by_random: Estimate | None          # by removing as many random edges
    by_misreading: Estimate | None      # by keeping the patterns and reading other tokens over the
                                        # induction edges: they carry tokens only if this is large;
                                        # None if not asked for
    known: Estimate                     # rise of the loss of known tokens, in nats


class KnockoutPair(NamedTuple):
    """Of the same heads, on rows behind the begin token and on rows without it."""

    begun: Knockout
    bare: Knockout


def knock_out_each(model: GPT, heads: Collection[Head], probes: Pair, vocabulary: int,
                   misreading: bool = False) -> KnockoutPair:
    """`knock_out` on both kinds of rows: their gains can differ in sign."""
    return KnockoutPair(*(knock_out(model, heads, probe, vocabulary, misreading)
                          for probe in probes))


def knock_out(model: GPT, heads: Collection[Head], probe: Probe, vocabulary: int,
              misreading: bool = False) -> Knockout:
    """Remove the induction edges of `heads` on a probe of `vocabulary` different tokens, then as
    many random others; with `misreading` also read other tokens over them."""
    batch, rows, guessing = probe.batch, probe.resampling, log(vocabulary)
    intact = losses_by_row(model.losses(*batch), probe)
    targets, others = (
        losses_by_row(losses_without_edges(model, batch, edges_of, heads), probe)
        for edges_of in (induction_edges, random_induction_edges))
    by_misreading = None
    if misreading:
        misread_losses = losses_misreading(model, batch, induction_edges, heads)
        by_misreading = removed(losses_by_row(misread_losses, probe), intact, rows, guessing)

    def gain(first: np.ndarray, known: np.ndarray) -> np.ndarray:
        return repeat_gain(first, known, guessing)

    return Knockout(
        list(heads), rows.estimate(gain, *intact), removed(targets, intact, rows, guessing),
        removed(others, intact, rows, guessing), by_misreading,
        rows.difference(targets.known, intact.known))


def removed(after: ProbeLosses, intact: ProbeLosses, rows: Resampling,
            guessing: float) -> Estimate | None:
    """The fraction of the repeat gain that is gone, at most 1; None if there was hardly any."""
    def fraction(first: np.ndarray, known: np.ndarray, first_after: np.ndarray,
                 known_after: np.ndarray) -> np.ndarray:
        left = np.maximum(repeat_gain(first_after, known_after, guessing), 0)   # NaN stays NaN
        return 1 - left / repeat_gain(first, known, guessing)

    if repeat_gain(intact.first.mean, intact.known.mean, guessing) < SMALLEST_GAIN:
        return None
    return rows.estimate(fraction, *intact, *after, limits=(-np.inf, 1.0))


class TextKnockout(NamedTuple):
    """What the induction edges of some heads are worth on text, in nats per token."""

    matched: Estimate       # rise of the loss of tokens whose query has an induction target
    by_random: Estimate     # the same for as many random other edges
    fraction: float         # of the tokens that have one


def knock_out_on_text(model: GPT, heads: Collection[Head], text: Batch) -> TextKnockout | None:
    """Remove the induction edges of `heads` on text (B, T), and then as many random others. None if
    no token has an induction target that one of the heads sees."""
    windows = [model.config.windows[head.layer] for head in heads]
    widest = None if None in windows else max(window for window in windows if window)
    matched = visible_matches(text.tokens, widest) > 0                          # (B, T)
    if not matched.any():
        return None
    intact = row_sums(model.losses(*text), matched)
    rows = Resampling.of_rows(len(text.tokens))

    def rise(edges_of: EdgesOf) -> Estimate:
        return rows.difference(
            row_sums(losses_without_edges(model, text, edges_of, heads), matched), intact)

    return TextKnockout(rise(induction_edges), rise(random_induction_edges),
                        matched.double().mean().item())
