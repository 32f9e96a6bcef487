"""What breaks without a head: the causal side of what patterns suggest.

Rows (B, T + 1) are token ids; a model reads all but the last of each and is asked for all but the first.
"""

from collections.abc import Collection
from itertools import combinations
from math import comb
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from induction.probes import Repeats
from induction.scores import icl_score
from model.config import ModelConfig
from model.gpt import GPT
from model.taps import Head, heads_of, taps

Kind = Literal["zero", "mean", "resample"]


def losses_without(model: GPT, rows: Tensor, heads: Collection[Head], kind: Kind = "zero", *, patterns_kept: bool = False) -> Tensor:
    """The loss of each target (B, T) in nats while `heads` say nothing about their input.

    zero            they write nothing
    mean            they write their mean over all rows and positions
    resample        they write what they wrote on the next row (needs at least two rows)
    patterns_kept   all heads attend where they attend in the intact model; what is lost then is what the heads carry, and not where they
                    make others look. q and k are kept, so no pattern is held.
    """
    tokens, targets = rows[:, :-1], rows[:, 1:]
    layers = sorted({head.layer for head in heads})
    kept = ["L*.q", "L*.k"] if patterns_kept and layers else []
    needed = kept + [f"L{layer}.z" for layer in layers if kind != "zero"]
    intact: dict[str, Tensor] = {}
    if needed:
        with torch.no_grad(), taps(model, needed) as intact:
            model.hidden(tokens)
    replace = {f"L{layer}.z": _silenced([head.index for head in heads if head.layer == layer], kind, intact.get(f"L{layer}.z"))
               for layer in layers}
    with taps(model, replace | {name: _put(value) for name, value in intact.items() if not name.endswith(".z")}):
        return model.losses(tokens, targets)


def _silenced(indices: list[int], kind: Kind, intact: Tensor | None):
    def without(z: Tensor) -> Tensor:                               # (B, H, T, D)
        z = z.clone()
        if kind == "zero":
            z[:, indices] = 0
        elif kind == "mean":
            z[:, indices] = intact[:, indices].mean((0, 2), keepdim=True)
        else:
            z[:, indices] = intact[:, indices].roll(-1, 0)
        return z
    return without


def _put(value: Tensor):
    return lambda _: value


class Effect(NamedTuple):
    """What ablating changes, in nats; positive: worse."""

    second_copy: float              # of the loss inside the second copy of random tokens
    gain_removed: float             # the same as a share of what repeating is worth: loss in the first copy minus in the second
    icl: float | None               # of the ICL score on text
    validation: float | None        # of the loss on text


def effect(model: GPT, heads: Collection[Head], probe: Repeats, text: Tensor | None = None, kind: Kind = "zero", *,
           patterns_kept: bool = False) -> Effect:
    """What the model loses without `heads`, on repeated random tokens and on rows of text (N, T + 1), if given."""
    def second_copy(losses: Tensor) -> float:
        return losses[probe.second_copy].double().mean().item()

    intact, without = (losses_without(model, probe.tokens, some, kind, patterns_kept=patterns_kept) for some in ((), heads))
    lost, gain = second_copy(without) - second_copy(intact), intact[probe.first_copy].double().mean().item() - second_copy(intact)
    on_text = (None, None)
    if text is not None:
        before, after = (losses_without(model, text, some, kind, patterns_kept=patterns_kept) for some in ((), heads))
        score = icl_score(before)
        on_text = None if score is None else icl_score(after) - score, (after.double() - before.double()).mean().item()
    return Effect(lost, lost / gain if gain else 0.0, *on_text)


def matched_sets(config: ModelConfig, heads: Collection[Head], most: int = 10, seed: int = 0) -> list[tuple[Head, ...]]:
    """Up to `most` other sets to compare with: as many heads of each layer, none of `heads`. Where a layer has too few others, all of
    them; none where it has no other at all."""
    found: list[tuple[Head, ...]] = [()]
    draw = np.random.default_rng(seed)
    for layer in sorted({head.layer for head in heads}):
        others = [head for head in heads_of(config) if head.layer == layer and head not in heads]
        size = min(len(others), sum(head.layer == layer for head in heads))
        if comb(len(others), size) <= 100:
            choices = list(combinations(others, size))
        else:
            choices = [tuple(others[i] for i in sorted(draw.choice(len(others), size, replace=False))) for _ in range(most)]
        found = [one + two for one in found for two in choices]
        if len(found) > most:
            found = [found[i] for i in sorted(draw.choice(len(found), most, replace=False))]
    return [one for one in found if one]


def path_patch(model: GPT, rows: Tensor, sender: Head, receiver: Head, by: Literal["q", "k", "v"], kind: Kind = "zero") -> Tensor:
    """The loss of each target (B, T) when `receiver` alone sees the residual stream without `sender`, in its queries, keys or values,
    and on the direct path alone: everything between them is as in the intact model (Wang et al. 2022, "Interpretability in the Wild",
    path patching). Keys and values are shared by a group of query heads, which all see the change.

    Raises ValueError unless the sender's layer comes before the receiver's.
    """
    if sender.layer >= receiver.layer:
        raise ValueError(f"path_patch: {sender} does not come before {receiver}")
    tokens, targets, name = rows[:, :-1], rows[:, 1:], f"L{receiver.layer}.{by}"
    between = [f"L{layer}.{part}" for layer in range(sender.layer, receiver.layer)
               for part in ("z", *(["mlp_out"] if model.config.mlp != "none" else []))]
    with torch.no_grad():
        with taps(model, [*between, name]) as intact:
            model.hidden(tokens)
        silenced = _silenced([sender.index], kind, intact[f"L{sender.layer}.z"])(intact[f"L{sender.layer}.z"])
        held = {part: _put(intact[part]) for part in between} | {f"L{sender.layer}.z": _put(silenced)}
        with taps(model, held | {name: None}) as direct:
            model.hidden(tokens)
    slot = receiver.index if by == "q" else receiver.key_head(model.config)
    patched = intact[name].clone()
    patched[:, slot] = direct[name][:, slot]
    with taps(model, {name: _put(patched)}):
        return model.losses(tokens, targets)
