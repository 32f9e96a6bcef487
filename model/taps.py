"""Reading and replacing activations by name, while a model runs.

    with taps(model, ["L0.pattern", "L*.z"]) as acts:       # read: names or wildcards
        model(tokens)
    acts["L0.pattern"]                                      # (B, H, T, T)

    def silence(z):                                         # replace: what the function returns
        return z.index_fill(1, torch.tensor([3]), 0)        # takes the activation's place
    with taps(model, {"L1.z": silence}):
        model(tokens)                                       # as if L1H3 wrote nothing

    embed                           (B, T, E)   what block 0 reads: tokens, and learned or
                                                sinusoidal positions
    L1.resid_pre  L1.resid_post     (B, T, E)   the residual stream before and after a block
    L1.q  L1.k  L1.v    (B, H or K, T, D)       as attention gets them: normed, smeared, rotated
    L1.lse                          (B, H, T)   float32, natural log of each row's softmax
                                                denominator; read only
    L1.pattern                      (B, H, T, T) made only if tapped, used only if replaced
    L1.z                            (B, H, T, D) each head's average of its values, before W_O
    L1.attn_out  L1.mlp_out         (B, T, E)   what attention and MLP add to the residual stream
    final                           (B, T, E)   after the last norm
    logits                          (B, T, V)   of model(tokens); model.loss never holds them

Reading changes no bit of the computation. Taps are seen only by the thread that set them, and are
gone when their block ends.
"""

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from threading import get_ident
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from model.config import ModelConfig

Result = TypeVar("Result")
TapFunction = Callable[[Tensor], Tensor | None]         # a returned tensor replaces the activation
TapTarget = str | Sequence[str] | Callable[[str], bool] | Mapping[str, TapFunction | None]


class Head(NamedTuple):
    """A query head, written L1H3."""

    layer: int
    index: int                  # type: ignore[assignment]      # hides tuple.index, unused here

    def __str__(self) -> str:
        return f"L{self.layer}H{self.index}"

    def key_head(self, config: ModelConfig) -> int:
        """The key/value head that it reads, one of K."""
        return self.index // (config.n_heads // config.kv_heads)


def heads_of(config: ModelConfig) -> list[Head]:
    """All query heads, layer by layer."""
    return [Head(layer, index)
            for layer in range(config.n_layers) for index in range(config.n_heads)]


def activation_names(config: ModelConfig) -> list[str]:
    """The names of a model's activations, in the order in which they are computed."""
    parts = ["resid_pre", "q", "k", "v", "pattern", "lse", "z", "attn_out", "mlp_out", "resid_post"]
    if config.mlp == "none":
        parts.remove("mlp_out")
    in_blocks = [f"L{layer}.{part}" for layer in range(config.n_layers) for part in parts]
    return ["embed", *in_blocks, "final", "logits"]


class Activations(dict[str, Tensor]):
    """Activations by name. Printed as names and shapes; those of one shape in all layers as one."""

    def __repr__(self) -> str:
        layers: dict[tuple[str, str], list[int]] = {}       # (part, shape and dtype) → layers
        lines = [f"{len(self)} activations"]
        for name, x in self.items():
            layer, dot, part = name.partition(".")
            described = f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}"
            if dot:
                layers.setdefault((part, described), []).append(int(layer[1:]))
            else:
                lines.append(f"  {name}  {described}")
        for (part, described), numbers in layers.items():
            if len(numbers) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1)):
                names = f"L{numbers[0]}.{part} … L{numbers[-1]}.{part}"
            else:
                names = ", ".join(f"L{layer}.{part}" for layer in numbers)
            lines.append(f"  {names}  {described}")
        return "\n".join(lines)


# --- for those who look -----------------------------------------------------------------------

class Tappable(Protocol):
    """A model with taps: model.gpt.GPT."""

    config: ModelConfig
    tapped: dict[int, tuple["TapSet", ...]]             # by thread, the outermost first


@contextmanager
def taps(model: Tappable, target: TapTarget) -> Iterator[Activations]:
    """Tap activations of every forward pass that this thread makes inside the block.

    Yields a dict of the newest pass's activations by name.

    target  a name, a wildcard (`L*.q`), a list of those, or a predicate of the name: read these.
            Or a dict from names or wildcards to functions of the activation: a tensor that such a
            function returns replaces it; None as function or as result does not.
            Blocks can be nested: the inner one gets what the outer one has replaced.
    Raises ValueError for a name that no activation has, and when a replacement has another shape or
    dtype.
    """
    tap_set, thread = TapSet(_functions_by_name(model.config, target)), get_ident()
    outer = model.tapped.get(thread, ())
    model.tapped[thread] = (*outer, tap_set)
    try:
        yield tap_set.activations
    finally:
        if outer:
            model.tapped[thread] = outer
        else:
            del model.tapped[thread]


def _functions_by_name(config: ModelConfig, target: TapTarget) -> dict[str, list[TapFunction]]:
    """The activations that are tapped, and the functions to call on each."""
    names = activation_names(config)
    if callable(target):
        functions: dict[str, list[TapFunction]] = {name: [] for name in names if target(name)}
        if not functions:
            raise ValueError("taps: the function selects none of the activations "
                             + ", ".join(names))
        return functions
    if isinstance(target, str):
        target = [target]
    by_pattern = target if isinstance(target, Mapping) else dict.fromkeys(target)
    functions = {}
    for pattern, function in by_pattern.items():
        matches = [name for name in names if fnmatchcase(name, pattern)]
        if not matches:
            near = difflib.get_close_matches(pattern, names, 1, 0.3)
            hint = f"; did you mean {near[0]}?" if near else f" ({', '.join(names)})"
            raise ValueError(f"taps: no activation of this model is named {pattern!r}{hint}")
        for name in matches:
            functions.setdefault(name, [])
            if function is not None:
                functions[name].append(function)
    return functions


class TapSet:
    """The taps of one `with taps(…)` block."""

    def __init__(self, functions: dict[str, list[TapFunction]]):
        self.functions = functions
        self.activations = Activations()

    def apply(self, name: str, x: Tensor) -> Tensor:
        """Call the functions on an activation; what goes on in its place."""
        for function in self.functions[name]:
            replacement = function(x)
            if replacement is None:
                continue
            if name.endswith(".lse"):
                raise ValueError(f"taps: {name} can only be read (replace q, k or the pattern)")
            if replacement.shape != x.shape or replacement.dtype != x.dtype:
                raise ValueError(f"taps: {name} is {tuple(x.shape)} {x.dtype}, its replacement "
                                 f"{tuple(replacement.shape)} {replacement.dtype}")
            x = replacement
        self.activations[name] = x
        return x


# --- for the forward pass ---------------------------------------------------------------------

class Taps:
    """What a forward pass calls at each activation: the identity, unless somebody taps it."""

    def __init__(self, tap_sets: tuple[TapSet, ...] = ()):
        self.tap_sets = tap_sets

    def __call__(self, part: str, x: Tensor, layer: int | None = None) -> Tensor:
        if not self.tap_sets:
            return x
        name = _name(part, layer)
        for tap_set in self.tap_sets:
            if name in tap_set.functions:
                x = tap_set.apply(name, x)
        return x

    def wants(self, part: str, layer: int | None = None) -> bool:
        """Whether somebody taps an activation that is only made on demand."""
        name = _name(part, layer)
        return any(name in tap_set.functions for tap_set in self.tap_sets)

    def refuse(self, part: str, reason: str, layer: int | None = None) -> None:
        """Raise ValueError if somebody taps an activation that this pass does not make."""
        if self.wants(part, layer):
            raise ValueError(f"taps: {_name(part, layer)} {reason}")


NO_TAPS = Taps()


def _name(part: str, layer: int | None) -> str:
    return part if layer is None else f"L{layer}.{part}"


def taps_of(model: Tappable) -> Taps:
    """This thread's taps on a model."""
    return Taps(model.tapped.get(get_ident(), ())) if model.tapped else NO_TAPS


def refuse(model: Tappable, part: str, reason: str) -> None:
    """Raise ValueError if somebody taps an activation that the called method never makes."""
    if model.tapped:
        run_eagerly(lambda: taps_of(model).refuse(part, reason))


def run_eagerly(function: Callable[..., Result], *arguments: Any, **options: Any) -> Result:
    """Call `function` from compiled code without compiling it.

    Compiled code is guarded by `tapped` being empty. So a pass without taps has no trace of them,
    and a tapped pass may run any Python.
    """
    return torch.compiler.disable(function)(*arguments, **options)
