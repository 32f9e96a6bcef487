"""Reading and replacing activations by name, while a model runs.

    with taps(model, ["L0.pattern", "L*.z"]) as cache:                  # read: a wildcard, a list of them, or a function of the name
        model(tokens)
    cache["L0.pattern"]                                                 # (B, H, T, T)

    with taps(model, {"L1.z": lambda z: z.index_fill(1, torch.tensor([3]), 0)}):        # replace: what the function returns goes on
        model(tokens)                                                   # as if L1H3 wrote nothing

    embed                           (B, T, E)       tokens and learned or sinusoidal positions: what block 0 reads
    L1.resid_pre  L1.resid_post     (B, T, E)       the residual stream before and after a block
    L1.q  L1.k  L1.v                (B, H or K, T, D)   as attention gets them: normed, smeared, turned to their positions
    L1.lse                          (B, H, T)       float32, natural log of what each row's softmax was divided by; read only
    L1.pattern                      (B, H, T, T)    made only where it is tapped; replaced, it is what averages the values
    L1.z                            (B, H, T, D)    each head's average of its values, before W_O
    L1.attn_out  L1.mlp_out         (B, T, E)       what the parts add to the residual stream
    final                           (B, T, E)       after the last norm
    logits                          (B, T, V)       of model(tokens); model.loss never holds them

Reading changes no bit of what is computed. A block's taps are seen by its own thread alone, and are gone when it is left.
"""

import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from threading import get_ident
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from model.config import ModelConfig

if TYPE_CHECKING:
    from model.gpt import GPT

Function = Callable[[Tensor], Tensor | None]


class Head(NamedTuple):
    """A query head, written L1H3."""

    layer: int
    index: int                  # type: ignore[assignment]      # hides a tuple's method, which nobody asks a head for

    def __str__(self) -> str:
        return f"L{self.layer}H{self.index}"

    def key_head(self, config: ModelConfig) -> int:
        """The key/value head that it reads, one of K."""
        return self.index // (config.n_heads // config.kv_heads)


def heads_of(config: ModelConfig) -> list[Head]:
    """All query heads, layer by layer."""
    return [Head(layer, index) for layer in range(config.n_layers) for index in range(config.n_heads)]


def names(config: ModelConfig) -> list[str]:
    """The names of a model's activations, in the order in which they are computed."""
    parts = ["resid_pre", "q", "k", "v", "pattern", "lse", "z", "attn_out", *(["mlp_out"] if config.mlp != "none" else []), "resid_post"]
    return ["embed", *(f"L{layer}.{part}" for layer in range(config.n_layers) for part in parts), "final", "logits"]


@contextmanager
def taps(model: "GPT", what: str | Sequence[str] | Callable[[str], bool] | dict[str, Function | None]) -> Iterator[dict[str, Tensor]]:
    """Look at activations of every forward pass that this thread makes inside the block; yields them by name, the newest pass's.

    what    a name, a wildcard (`L*.q`), a list of those, or a function that says of each name whether it is meant.
            Or a dict from names or wildcards to functions of the activation: what one returns replaces it (None: nothing does).
            Blocks can be nested: an inner one gets what an outer one has replaced.
    Raises ValueError for a name that no activation has, and when a replacement is of another shape or dtype.
    """
    block, thread = _Block(_functions(model.config, what)), get_ident()
    outer = model.tapped.get(thread, ())
    model.tapped[thread] = (*outer, block)
    try:
        yield block.cache
    finally:
        if outer:
            model.tapped[thread] = outer
        else:
            del model.tapped[thread]


def _functions(config: ModelConfig, what) -> dict[str, list[Function]]:
    """Which activations are meant, and what is to be done with each."""
    known = names(config)
    found: dict[str, list[Function]] = {}
    if callable(what):
        found = {name: [] for name in known if what(name)}
        if not found:
            raise ValueError("taps: the function names none of the activations " + ", ".join(known))
        return found
    asked = what if isinstance(what, dict) else dict.fromkeys([what] if isinstance(what, str) else what)
    for pattern, function in asked.items():
        matching = [name for name in known if fnmatchcase(name, pattern)]
        if not matching:
            near = difflib.get_close_matches(pattern, known, 1, 0.3)
            raise ValueError(f"taps: no activation of this model is named {pattern!r}"
                             + (f"; did you mean {near[0]}?" if near else f" ({', '.join(known)})"))
        for name in matching:
            found.setdefault(name, []).extend([] if function is None else [function])
    return found


class _Block:
    """One `with taps(…)`."""

    def __init__(self, functions: dict[str, list[Function]]):
        self.functions = functions
        self.cache: dict[str, Tensor] = {}

    def passes(self, name: str, x: Tensor) -> Tensor:
        for function in self.functions[name]:
            new = function(x)
            if new is None:
                continue
            if name.endswith(".lse"):
                raise ValueError(f"taps: {name} can only be read (replace q, k or the pattern)")
            if new.shape != x.shape or new.dtype != x.dtype:
                raise ValueError(f"taps: {name} is {tuple(x.shape)} {x.dtype}, its replacement {tuple(new.shape)} {new.dtype}")
            x = new
        self.cache[name] = x
        return x


class Taps:
    """What a forward pass calls at each activation: the identity, unless somebody looks."""

    def __init__(self, blocks: tuple[_Block, ...] = ()):
        self.blocks = blocks

    def __call__(self, part: str, x: Tensor, layer: int | None = None) -> Tensor:
        return self._pass(part if layer is None else f"L{layer}.{part}", x) if self.blocks else x

    def _pass(self, name: str, x: Tensor) -> Tensor:
        for block in self.blocks:
            if name in block.functions:
                x = block.passes(name, x)
        return x

    def wants(self, part: str, layer: int | None = None) -> bool:
        """Whether somebody looks at an activation that is only made on demand."""
        return any((part if layer is None else f"L{layer}.{part}") in block.functions for block in self.blocks)

    def refuse(self, part: str, reason: str, layer: int | None = None) -> None:
        """ValueError where somebody looks at an activation that this pass does not make."""
        if self.wants(part, layer):
            raise ValueError(f"taps: {part if layer is None else f'L{layer}.{part}'} {reason}")


NO_TAPS = Taps()


def taps_of(model: "GPT") -> Taps:
    """This thread's taps on a model."""
    return Taps(model.tapped.get(get_ident(), ())) if model.tapped else NO_TAPS


def eagerly(function: Callable, *arguments, **options):
    """Call `function` from compiled code without compiling it. The compiled code is guarded by `tapped` being empty, so an
    untapped pass has no trace of taps, and one that is looked at runs whatever Python the taps are."""
    from model.uncompiled import call  # it loads the compiler: a second that nobody else should wait
    return call(function, *arguments, **options)


def refuse(model: "GPT", part: str, reason: str) -> None:
    """ValueError where somebody looks at an activation that what is called never makes."""
    if model.tapped:
        eagerly(lambda: taps_of(model).refuse(part, reason))
