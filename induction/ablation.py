"""What the model loses without a head: the causal counterpart of the attention scores.

To ablate heads is to replace what they write, z (B, H, T, D), before W_O adds it to the stream.
induction/knockout.py removes single attention edges instead.
"""

import re
from collections.abc import Callable, Collection, Iterable
from typing import Literal, NamedTuple, get_args

from errors import UserError

import numpy as np
import torch
from torch import Tensor

from data.batches import Batch
from induction.behaviour import ProbeLosses, losses_by_row, repeat_gain
from induction.intervals import NONNEGATIVE, Estimate, Resampling, row_sums
from induction.probes import Probe
from model.config import ModelConfig
from model.gpt import GPT
from model.taps import Head, TapFunction, heads_of, taps

Method = Literal["mean", "zero", "resample"]
Replacement = Callable[[Tensor], Tensor]        # a tap that replaces the activation
ProgressBar = Callable[[Iterable], Iterable]       # wraps an iterable to show a progress bar
SMALLEST_GAIN = 0.1     # nats; the fraction of a smaller repeat gain that is removed says nothing


def losses_without(model: GPT, batch: Batch, heads: Collection[Head], method: Method = "mean", *,
                   patterns_kept: bool = False, real: Tensor | None = None,
                   donors: Tensor | None = None) -> Tensor:
    """The loss of each target (B, T), in nats, with `heads` ablated.

    mean            they write their mean over all rows and positions; with `real` (B, T) bool over
                    the positions it selects, which leaves out padding
    zero            they write zeros
    resample        they write what they wrote on another row: row r takes that of donors[r] (B,);
                    without donors, of the next row
    patterns_kept   every head attends as in the intact model. The loss that remains is caused by
                    what the ablated heads carry, not by where they make later heads attend. q and k
                    are fixed to their intact values, so no pattern is held.
    """
    layers = by_layer(heads)
    fixed = ["L*.q", "L*.k"] if patterns_kept and layers else []
    replaced = [f"L{layer}.z" for layer in layers if method != "zero"]
    intact = activations(model, batch, fixed + replaced) if fixed or replaced else {}
    replacements: dict[str, TapFunction | None] = {}
    for layer, indices in layers.items():
        name = f"L{layer}.z"
        z = intact.pop(name, None)
        replacements[name] = ablation_tap(indices, method, z, real=real, donors=donors)
    for name, value in intact.items():                  # what is left are q and k
        replacements[name] = replace_by(value)
    with taps(model, replacements):
        return model.losses(*batch)


def ablate_each_head(model: GPT, batch: Batch, counted: Tensor, rows: Resampling,
                     progress: ProgressBar = iter,
                     real: Tensor | None = None) -> dict[Head, Estimate]:
    """For each head the rise in loss, in nats, when only that head is mean-ablated, over the
    targets that `counted` (B, T) bool selects; its mean is over the positions that `real` selects,
    or over all. One forward pass per head."""
    means: dict[int, Tensor] = {}                       # layer → (1, H, 1, D)

    def note_mean(layer: int) -> TapFunction:
        def on_z(z: Tensor) -> None:
            means[layer] = mean_output(z, real)
        return on_z

    with taps(model, {f"L{layer}.z": note_mean(layer) for layer in range(model.config.n_layers)}):
        intact = row_sums(model.losses(*batch), counted)
    rises = {}
    for head in progress(heads_of(model.config)):
        with taps(model, {f"L{head.layer}.z": replace_heads([head.index], means[head.layer])}):
            rises[head] = rows.difference(row_sums(model.losses(*batch), counted), intact)
    return rises


def chosen_heads(names: str | None, config: ModelConfig, option: str = "heads ") -> list[Head]:
    """The heads that names such as L0H1,L1 choose (L1: the whole layer); all without names.

    `option` is what the user wrote before the names, for the error. Raises UserError for a name
    that the model does not have.
    """
    every = heads_of(config)
    if names is None:
        return every
    chosen: list[Head] = []
    for name in names.replace(",", " ").split() or [names]:
        match = re.fullmatch(r"L(\d+)(?:H(\d+))?", name)
        heads = [head for head in every if match and head.layer == int(match[1])
                 and match[2] in (None, str(head.index))]
        if not heads:
            raise UserError(f"{option}{name}: no such head; the model has {every[0]} to "
                            f"{every[-1]}\n"
                            "  name some of them, as L0H1,L1 (L1: all heads of layer 1)")
        chosen += [head for head in heads if head not in chosen]
    return chosen


def by_layer(heads: Collection[Head]) -> dict[int, list[int]]:
    """The indices of heads in each layer."""
    indices: dict[int, list[int]] = {}
    for head in heads:
        indices.setdefault(head.layer, []).append(head.index)
    return indices


def mean_output(z: Tensor, real: Tensor | None = None) -> Tensor:
    """What each head writes on average, over all positions of z (B, H, T, D) or over those that
    `real` (B, T) selects: (1, H, 1, D)."""
    if real is None:
        return z.mean((0, 2), keepdim=True)
    weight = real.to(z.dtype) / real.sum()
    return torch.einsum("bhtd,bt->hd", z, weight)[None, :, None]


@torch.no_grad()
def activations(model: GPT, batch: Batch, names: list[str]) -> dict[str, Tensor]:
    """The named activations of the intact model."""
    with taps(model, names) as acts:
        model.hidden(batch.tokens, segments=batch.segments)
    return acts


def ablation_tap(indices: list[int], method: Method, intact: Tensor | None, *,
                 real: Tensor | None = None, donors: Tensor | None = None) -> Replacement:
    """A tap on z (B, H, T, D) that ablates some heads; `intact` is z in the intact model, which the
    method "zero" does not need. `real` and `donors` as in losses_without."""
    if method == "zero":
        return lambda z: replace_heads(indices, torch.zeros_like(z))(z)
    assert intact is not None
    if method == "mean":
        return replace_heads(indices, mean_output(intact, real))
    return replace_heads(indices, intact.roll(-1, 0) if donors is None else intact[donors])


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

    known: Estimate                 # rise of the loss where tokens can be known
    first_copy: Estimate            # rise of the loss in the first copy
    gain_removed: Estimate | None   # 1 − g′/g, with g the repeat gain (loss in the first copy minus
                                    # loss where tokens can be known), g′ without the heads; None if
                                    # g is less than SMALLEST_GAIN


def ablation_effect(model: GPT, heads: Collection[Head], probe: Probe, method: Method = "mean", *,
                    patterns_kept: bool = False) -> Effect:
    """What the model loses without `heads` on repeated random tokens."""
    before, after, removed = compare(model, heads, probe, method, patterns_kept)
    rows = probe.resampling
    return Effect(rows.difference(after.known, before.known),
                  rows.difference(after.first, before.first), removed)


def compare(model: GPT, heads: Collection[Head], probe: Probe, method: Method,
            patterns_kept: bool = False) -> tuple[ProbeLosses, ProbeLosses, Estimate | None]:
    """The losses with and without `heads`, and what of the repeat gain is removed."""
    donors = same_period_donors(probe) if method == "resample" else None
    before = losses_by_row(losses_without(model, probe.batch, ()), probe)
    after = losses_by_row(losses_without(model, probe.batch, heads, method, donors=donors,
                                         patterns_kept=patterns_kept), probe)
    removed = None
    if before.first.mean - before.known.mean >= SMALLEST_GAIN:
        removed = probe.resampling.estimate(gain_removed, *before, *after)
    return before, after, removed


class Ablation(NamedTuple):
    """What a model predicts on repeated random tokens with some heads ablated. Losses in nats per
    token."""

    heads: list[Head]
    kind: Method
    first: Estimate                 # loss in the first copy, intact
    second: Estimate                # loss in the second copy, intact
    first_ablated: Estimate
    second_ablated: Estimate
    gain_removed: Estimate | None   # of the repeat gain (Effect)

    def __repr__(self) -> str:
        part = ""
        if self.gain_removed is not None:
            part = f", {self.gain_removed:.0%} of the repeat gain removed"
        return (f"Ablation({self.kind} of {', '.join(map(str, self.heads)) or 'no heads'}: loss in "
                f"the second copy {self.second:.3f} → {self.second_ablated:.3f},\n"
                f"  in the first {self.first:.3f} → {self.first_ablated:.3f} nats{part})")


def ablate(model: GPT, heads: Collection[Head], probe: Probe, kind: Method = "mean") -> Ablation:
    """Losses on a periodic probe with and without some heads. Raises UserError for an unknown
    kind of ablation."""
    if kind not in get_args(Method):
        raise UserError(f"kind={kind!r} is not a kind of ablation\n"
                        f"  there are {', '.join(get_args(Method))}")
    before, after, removed = compare(model, heads, probe, kind)
    first, second, first_ablated, second_ablated = (
        probe.resampling.mean(losses, NONNEGATIVE) for losses in (*before, *after))
    return Ablation(list(heads), kind, first, second, first_ablated, second_ablated, removed)


def gain_removed(first: np.ndarray, known: np.ndarray, first_after: np.ndarray,
                 known_after: np.ndarray) -> np.ndarray:
    """1 − g′/g: the fraction of a repeat gain g that is gone, from mean losses."""
    return 1 - repeat_gain(first_after, known_after) / repeat_gain(first, known)


def same_period_donors(probe: Probe) -> Tensor:
    """For each row of a periodic probe the next one with the same period: what heads write there is
    about other tokens, at the same distance. For aperiodic rows the next row. (B,).

    Raises ValueError if a period has a single row.
    """
    donors = torch.empty(len(probe.periods), dtype=torch.long, device=probe.periods.device)
    for period in probe.periods.unique():
        rows = (probe.periods == period).nonzero().flatten()
        if len(rows) == 1:
            raise ValueError(f"resample: period {int(period)} has a single row in this probe, so "
                             "there is no other to take from (use more rows)")
        donors[rows] = rows.roll(-1)
    return donors


# --- from one head to another ---------------------------------------------------------------------

Input = Literal["q", "k", "v"]
INPUTS: tuple[Input, ...] = ("q", "k", "v")


def path_patch(model: GPT, batch: Batch, senders: Collection[Head], receivers: Collection[Head],
               into: Input, method: Method = "mean") -> Tensor:
    """The loss of each target (B, T) if only the queries (or keys, or values) of `receivers` see
    the residual stream without `senders`, and only along the direct path: every head and MLP
    between them writes what it writes in the intact model.

    Path patching: Wang et al. 2022, "Interpretability in the Wild". Heads that share keys and
    values with a receiver go on reading the intact ones. Raises ValueError unless all receivers are
    in one layer and all senders in layers before it.
    """
    if not senders:
        return model.losses(*batch)
    paths = Paths(model, batch, senders, receivers, method)
    return paths.losses(receivers, into)


class Paths:
    """What the heads of one layer would read without some earlier heads, on the direct path."""

    def __init__(self, model: GPT, batch: Batch, senders: Collection[Head],
                 receivers: Collection[Head], method: Method = "mean"):
        layers = {head.layer for head in receivers}
        if len(layers) != 1 or any(head.layer >= min(layers) for head in senders):
            raise ValueError(f"path_patch: {', '.join(map(str, senders))} → "
                             f"{', '.join(map(str, receivers))}: receivers must be in one layer, "
                             "senders in layers before it")
        self.model, self.batch, self.layer = model, batch, layers.pop()
        parts = ["z"] if model.config.mlp == "none" else ["z", "mlp_out"]
        between = [f"L{n}.{part}" for n in range(min(head.layer for head in senders), self.layer)
                   for part in parts]
        intact = activations(model, batch, [*between, f"L{self.layer}.z"])
        self.intact_z = intact.pop(f"L{self.layer}.z")
        held: dict[str, TapFunction | None] = {name: replace_by(value)
                                               for name, value in intact.items()}
        for n, indices in by_layer(senders).items():
            z = intact[f"L{n}.z"]
            held[f"L{n}.z"] = replace_by(ablation_tap(indices, method, z)(z))
        inputs = {f"L{self.layer}.{part}": None for part in INPUTS}
        with torch.no_grad(), taps(model, held | inputs) as without:
            model.hidden(batch.tokens, segments=batch.segments)
        self.without = without
        self.outputs: dict[Input, Tensor] = {}

    def losses(self, receivers: Collection[Head], into: Input) -> Tensor:
        """The loss of each target (B, T) if only `into` of `receivers` is without the senders."""
        if into not in self.outputs:            # what all heads of the layer write with that input
            name, written = f"L{self.layer}.{into}", f"L{self.layer}.z"
            with torch.no_grad(), taps(self.model, {name: replace_by(self.without[name]),
                                                    written: None}) as acts:
                self.model.hidden(self.batch.tokens, segments=self.batch.segments)
            self.outputs[into] = acts[written]
        z = replace_heads([head.index for head in receivers], self.outputs[into])(self.intact_z)
        with taps(self.model, {f"L{self.layer}.z": replace_by(z)}):
            return self.model.losses(*self.batch)


class Path(NamedTuple):
    """From one head into the queries, keys or values of a later one."""

    sender: Head
    receiver: Head
    into: Input
    rise: Estimate          # of the loss, in nats, without this path


def path_matrix(model: GPT, probe: Probe, senders: Collection[Head], receivers: Collection[Head],
                progress: ProgressBar = iter) -> list[Path]:
    """The rise of the loss of a probe's known tokens for every single path from a sender into the
    queries, keys or values of a receiver in a later layer."""
    batch, rows = probe.batch, probe.resampling
    intact = row_sums(model.losses(*batch), probe.known)
    paths: list[Path] = []
    for sender in progress(senders):
        for layer in sorted({head.layer for head in receivers if head.layer > sender.layer}):
            inside = [head for head in receivers if head.layer == layer]
            routes = Paths(model, batch, [sender], inside)
            for receiver in inside:
                for into in INPUTS:
                    without = row_sums(routes.losses([receiver], into), probe.known)
                    rise = rows.difference(without, intact)
                    paths.append(Path(sender, receiver, into, rise))
    return paths
