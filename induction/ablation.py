"""What breaks without a head: the causal side of what patterns suggest."""

from collections.abc import Callable, Collection
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
from model.taps import Head, heads_of, taps

Kind = Literal["zero", "mean", "resample"]


def losses_without(model: GPT, batch: Batch, heads: Collection[Head], kind: Kind = "zero", *, patterns_kept: bool = False) -> Tensor:
    """The loss of each target (B, T) in nats while `heads` say nothing about their input.

    zero            they write nothing
    mean            they write their mean over all rows and positions
    resample        they write what they wrote on the next row (needs at least two rows)
    patterns_kept   all heads attend where they attend in the intact model; what is lost then is what the heads carry, and not where they
                    make others look. q and k are kept, so no pattern is held.
    """
    layers = sorted({head.layer for head in heads})
    kept = ["L*.q", "L*.k"] if patterns_kept and layers else []
    needed = kept + [f"L{layer}.z" for layer in layers if kind != "zero"]
    intact = _intact(model, batch, needed) if needed else {}
    replace = {f"L{layer}.z": _silenced([head.index for head in heads if head.layer == layer], kind, intact.pop(f"L{layer}.z", None))
               for layer in layers}
    with taps(model, replace | {name: _put(value) for name, value in intact.items()}):
        return model.losses(*batch)


def alone(model: GPT, batch: Batch, counted: Tensor, progress: Callable = iter) -> dict[Head, float]:
    """What each head's mean in its place costs, that head alone, in nats over the targets that `counted` (B, T) bool names.

    One pass a head; `progress` wraps the heads, for a bar.
    """
    z, heads = {}, heads_of(model.config)

    def note_mean(layer: int):
        def at(value: Tensor) -> None:
            z[layer] = value.mean((0, 2), keepdim=True)                     # (1, H, 1, D)
        return at

    with taps(model, {f"L{layer}.z": note_mean(layer) for layer in range(model.config.n_layers)}):
        intact = mean_of(model.losses(*batch), counted)
    found = {}
    for head in progress(heads):
        with taps(model, {f"L{head.layer}.z": _with([head.index], z[head.layer])}):
            found[head] = mean_of(model.losses(*batch), counted) - intact
    return found


@torch.no_grad()
def _intact(model: GPT, batch: Batch, names: list[str]) -> dict[str, Tensor]:
    with taps(model, names) as cache:
        model.hidden(batch.tokens, segments=batch.segments)
    return cache


def _silenced(indices: list[int], kind: Kind, intact: Tensor | None):
    """A tap on z (B, H, T, D) that takes from some heads what they say; `intact`: z as it was."""
    if intact is None or kind == "zero":
        return lambda z: _with(indices, torch.zeros_like(z))(z)
    return _with(indices, intact.mean((0, 2), keepdim=True) if kind == "mean" else intact.roll(-1, 0))


def _with(indices: list[int], other: Tensor):
    def put(z: Tensor) -> Tensor:
        z = z.clone()
        z[:, indices] = other[:, indices]
        return z
    return put


def _put(value: Tensor):
    return lambda _: value


class Effect(NamedTuple):
    """What ablating changes, in nats; positive: worse."""

    second_copy: float              # of the loss inside the second copy of random tokens
    gain_removed: float             # the same as a share of what repeating is worth: loss in the first copy minus in the second
    icl: float | None               # of the ICL score on text
    validation: float | None        # of the loss on text


def effect(model: GPT, heads: Collection[Head], probe: Repeats, text: Batch | None = None, kind: Kind = "zero", *,
           patterns_kept: bool = False) -> Effect:
    """What the model loses without `heads`, on repeated random tokens and on text, if given."""
    intact, without = (losses_without(model, probe.batch, some, kind, patterns_kept=patterns_kept) for some in ((), heads))
    first, second = mean_of(intact, probe.first_copy), mean_of(intact, probe.second_copy)
    lost, gain = mean_of(without, probe.second_copy) - second, first - second
    on_text: tuple[float | None, float | None] = (None, None)
    if text is not None:
        before, after = (losses_without(model, text, some, kind, patterns_kept=patterns_kept).cpu() for some in ((), heads))
        score, score_after = icl_score(before), icl_score(after)
        on_text = None if score is None or score_after is None else score_after - score, (after.double() - before.double()).mean().item()
    return Effect(lost, lost / gain if gain else 0.0, *on_text)


def matched_sets(config: ModelConfig, heads: Collection[Head], most: int = 10, seed: int = 0) -> list[tuple[Head, ...]]:
    """Up to `most` other sets to compare with: as many heads of each layer, none of `heads`. Where a layer has too few others, all of
    them; no set where there is no other in any of the layers."""
    found: list[tuple[Head, ...]] = [()]
    draw = np.random.default_rng(seed)
    for layer in sorted({head.layer for head in heads}):
        others = [head for head in heads_of(config) if head.layer == layer and head not in heads]
        size = min(len(others), sum(head.layer == layer for head in heads))
        if comb(len(others), size) <= 100:
            choices = list(combinations(others, size))
        else:
            choices = sorted({tuple(others[i] for i in sorted(draw.choice(len(others), size, replace=False))) for _ in range(2 * most)})
        found = [one + two for one in found for two in choices]
        if len(found) > most:
            found = [found[i] for i in sorted(draw.choice(len(found), most, replace=False))]
    return [one for one in found if one]


def path_patch(model: GPT, batch: Batch, senders: Collection[Head], receivers: Collection[Head], by: Literal["q", "k", "v"],
               kind: Kind = "zero") -> Tensor:
    """The loss of each target (B, T) when `receivers` alone see the residual stream without `senders`, in their queries, keys or values,
    and on the direct path alone: everything between is as in the intact model (Wang et al. 2022, "Interpretability in the Wild",
    path patching). Keys and values are shared by a group of query heads, which all see the change.

    Raises ValueError unless the receivers are of one layer and all senders of layers before it.
    """
    at = {head.layer for head in receivers}
    if len(at) != 1 or any(head.layer >= min(at) for head in senders):
        raise ValueError(f"path_patch: {', '.join(map(str, senders))} → {', '.join(map(str, receivers))}: receivers must be of one layer, "
                         "senders of layers before it")
    layer = at.pop()
    name, first = f"L{layer}.{by}", min(head.layer for head in senders)
    between = [f"L{n}.{part}" for n in range(first, layer) for part in ("z", *(["mlp_out"] if model.config.mlp != "none" else []))]
    intact = _intact(model, batch, [*between, name])
    held = {part: _put(intact[part]) for part in between}
    for n in {head.layer for head in senders}:
        z = intact[f"L{n}.z"]
        held[f"L{n}.z"] = _put(_silenced([head.index for head in senders if head.layer == n], kind, z)(z))
    with torch.no_grad(), taps(model, held | {name: None}) as direct:
        model.hidden(batch.tokens, segments=batch.segments)
    slots = sorted({head.index if by == "q" else head.key_head(model.config) for head in receivers})
    with taps(model, {name: _put(_with(slots, direct[name])(intact[name]))}):
        return model.losses(*batch)
