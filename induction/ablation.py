"""What the model loses without a head: the causal counterpart of the attention scores.

To ablate heads is to replace what they write, z (B, H, T, D), before W_O adds it to the stream.
"""

from collections.abc import Callable, Collection, Iterable
from itertools import combinations
from math import comb
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.batches import Batch
from induction.probes import Repeats
from induction.scores import icl_score, mean_of
from model.config import ModelConfig
from model.gpt import GPT
from model.taps import Head, TapFunction, heads_of, taps

Method = Literal["zero", "mean", "resample"]
Replacement = Callable[[Tensor], Tensor]        # a tap that replaces the activation
ProgressBar = Callable[[Iterable], Iterable]       # wraps an iterable to show a progress bar


def losses_without(model: GPT, batch: Batch, heads: Collection[Head], method: Method = "zero", *,
                   patterns_kept: bool = False) -> Tensor:
    """The loss of each target (B, T), in nats, with `heads` ablated.

    zero            they write zeros
    mean            they write their mean over all rows and positions
    resample        they write what they wrote on the next row (needs at least two rows)
    patterns_kept   every head attends as in the intact model. The loss that remains is caused by
                    what the ablated heads carry, not by where they make later heads attend. q and k
                    are fixed to their intact values, so no pattern is held.
    """
    layers = sorted({head.layer for head in heads})
    fixed = ["L*.q", "L*.k"] if patterns_kept and layers else []
    replaced = [f"L{layer}.z" for layer in layers if method != "zero"]
    intact = activations(model, batch, fixed + replaced) if fixed or replaced else {}
    replacements: dict[str, TapFunction | None] = {}
    for layer in layers:
        indices = [head.index for head in heads if head.layer == layer]
        name = f"L{layer}.z"
        replacements[name] = ablation_tap(indices, method, intact.pop(name, None))
    for name, value in intact.items():                  # what is left are q and k
        replacements[name] = replace_by(value)
    with taps(model, replacements):
        return model.losses(*batch)


def ablate_each_head(model: GPT, batch: Batch, counted: Tensor,
                     progress: ProgressBar = iter) -> dict[Head, float]:
    """For each head the rise in loss, in nats, when only that head is mean-ablated, over the
    targets that `counted` (B, T) bool selects. One forward pass per head."""
    means: dict[int, Tensor] = {}                       # layer → (1, H, 1, D)

    def note_mean(layer: int) -> TapFunction:
        def on_z(z: Tensor) -> None:
            means[layer] = z.mean((0, 2), keepdim=True)
        return on_z

    with taps(model, {f"L{layer}.z": note_mean(layer) for layer in range(model.config.n_layers)}):
        intact = mean_of(model.losses(*batch), counted)
    rises = {}
    for head in progress(heads_of(model.config)):
        with taps(model, {f"L{head.layer}.z": replace_heads([head.index], means[head.layer])}):
            rises[head] = mean_of(model.losses(*batch), counted) - intact
    return rises


@torch.no_grad()
def activations(model: GPT, batch: Batch, names: list[str]) -> dict[str, Tensor]:
    """The named activations of the intact model."""
    with taps(model, names) as acts:
        model.hidden(batch.tokens, segments=batch.segments)
    return acts


def ablation_tap(indices: list[int], method: Method, intact: Tensor | None) -> Replacement:
    """A tap on z (B, H, T, D) that ablates some heads; `intact` is z in the intact model, which the
    method "zero" does not need."""
    if method == "zero":
        return lambda z: replace_heads(indices, torch.zeros_like(z))(z)
    assert intact is not None
    if method == "mean":
        return replace_heads(indices, intact.mean((0, 2), keepdim=True))
    return replace_heads(indices, intact.roll(-1, 0))


def replace_heads(indices: list[int], other: Tensor) -> Replacement:
    """A tap that takes some heads of (B, H, T, D) from `other`."""
    def replace(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, indices] = other[:, indices]
        return x
    return replace


def replace_by(value: Tensor) -> Replacement:
    """A tap that replaces the whole activation."""
    return lambda _: value


# --- what a set of heads is worth -----------------------------------------------------------------

class Effect(NamedTuple):
    """What an ablation changes, in nats; positive is worse."""

    second_copy: float              # rise of the loss in the second copy of random tokens
    gain_removed: float             # the same as a fraction of the repeat gain, the loss in the
                                    # first copy minus the loss in the second
    icl: float | None               # change of the ICL score on text
    validation: float | None        # rise of the loss on text


def ablation_effect(model: GPT, heads: Collection[Head], probe: Repeats, text: Batch | None = None,
                    method: Method = "zero", *, patterns_kept: bool = False) -> Effect:
    """What the model loses without `heads`, on repeated random tokens and, if given, on text."""
    def losses(batch: Batch, ablated: Collection[Head]) -> Tensor:
        return losses_without(model, batch, ablated, method, patterns_kept=patterns_kept)

    intact, without = losses(probe.batch, ()), losses(probe.batch, heads)
    first, second = mean_of(intact, probe.first_copy), mean_of(intact, probe.second_copy)
    rise, gain = mean_of(without, probe.second_copy) - second, first - second
    gain_removed = rise / gain if gain else 0.0
    if text is None:
        return Effect(rise, gain_removed, None, None)
    before, after = losses(text, ()).cpu(), losses(text, heads).cpu()
    icl_before, icl_after = icl_score(before), icl_score(after)
    icl = None if icl_before is None or icl_after is None else icl_after - icl_before
    return Effect(rise, gain_removed, icl, (after.double() - before.double()).mean().item())


def matched_sets(config: ModelConfig, heads: Collection[Head], most: int = 10,
                 seed: int = 0) -> list[tuple[Head, ...]]:
    """Up to `most` other sets to compare with: none of `heads`, but as many heads of each layer.

    If a layer has too few others, a set has all of them. No sets if no layer has others.
    """
    sets: list[tuple[Head, ...]] = [()]
    draw = np.random.default_rng(seed)
    for layer in sorted({head.layer for head in heads}):
        others = [head for head in heads_of(config) if head.layer == layer and head not in heads]
        size = min(len(others), sum(head.layer == layer for head in heads))
        if comb(len(others), size) <= 100:
            choices = list(combinations(others, size))
        else:
            draws = [draw.choice(len(others), size, replace=False) for _ in range(2 * most)]
            choices = sorted({tuple(others[i] for i in sorted(indices)) for indices in draws})
        sets = [lower + chosen for lower in sets for chosen in choices]
        if len(sets) > most:
            sets = [sets[i] for i in sorted(draw.choice(len(sets), most, replace=False))]
    return [chosen for chosen in sets if chosen]


# --- from one head to another ---------------------------------------------------------------------

def path_patch(model: GPT, batch: Batch, senders: Collection[Head], receivers: Collection[Head],
               into: Literal["q", "k", "v"], method: Method = "zero") -> Tensor:
    """The loss of each target (B, T) if only the queries (or keys, or values) of `receivers` see
    the residual stream without `senders`, and only along the direct path: every head and MLP
    between them writes what it writes in the intact model.

    Path patching: Wang et al. 2022, "Interpretability in the Wild". Keys and values
    are shared by a group of query heads, which all see the change. Raises ValueError unless all
    receivers are in one layer and all senders in layers before it.
    """
    receiver_layers = {head.layer for head in receivers}
    if len(receiver_layers) != 1 or any(head.layer >= min(receiver_layers) for head in senders):
        raise ValueError(f"path_patch: {', '.join(map(str, senders))} → "
                         f"{', '.join(map(str, receivers))}: receivers must be in one layer, "
                         "senders in layers before it")
    layer = receiver_layers.pop()
    name = f"L{layer}.{into}"
    parts = ["z"] if model.config.mlp == "none" else ["z", "mlp_out"]
    between = [f"L{n}.{part}" for n in range(min(head.layer for head in senders), layer)
               for part in parts]
    intact = activations(model, batch, [*between, name])

    # 1. Without the senders, everything between held: this is what the receivers' input becomes.
    held: dict[str, TapFunction | None] = {part: replace_by(intact[part]) for part in between}
    for n in {head.layer for head in senders}:
        z = intact[f"L{n}.z"]
        indices = [head.index for head in senders if head.layer == n]
        held[f"L{n}.z"] = replace_by(ablation_tap(indices, method, z)(z))
    with torch.no_grad(), taps(model, held | {name: None}) as direct:
        model.hidden(batch.tokens, segments=batch.segments)

    # 2. The intact model, with that input for the receivers only.
    slots = sorted({head.index if into == "q" else head.key_head(model.config)
                    for head in receivers})
    patched = replace_heads(slots, direct[name])(intact[name])
    with taps(model, {name: replace_by(patched)}):
        return model.losses(*batch)
