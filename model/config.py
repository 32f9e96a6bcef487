"""The shape of a network."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from settings import Settings, Size


class ModelConfig(Settings):
    """A decoder-only transformer. Letters in brackets are those of the shape comments in the code."""

    n_layers: Annotated[int, Field(gt=0, le=2 ** 12)] = 4      # L
    n_heads: Size = 4                                  # H query heads
    n_kv_heads: Size | None = None                     # K key/value heads, each shared by H/K queries; null: H
    d_model: Size = 128                                # E residual stream
    d_head: Size | None = None                         # D; null: d_model / n_heads
    d_mlp: Size | None = None                          # F; null: 4 d_model, for swiglu 8/3 d_model
    mlp: Literal["swiglu", "gelu", "relu2", "none"] = "swiglu"          # none: attention only
    n_ctx: Size = 256                                  # C longest sequence
    position: Literal["rope", "learned", "sinusoidal", "none"] = "rope"
    rope_base: Annotated[float, Field(gt=0)] = 10000.0
    qk_norm: bool = False                              # RMSNorm on every query and key before positions
    window: Size | list[Size | None] | None = None     # keys a query sees; a list repeats over layers
    smear: bool = False                                # mix each key with the one before it (a control, never a default)
    tied_embeddings: bool = False
    zero_init: bool = True                             # every block starts as the identity: the matrices that write to the
                                                       # residual stream start at zero. Learns text faster, forms induction
                                                       # heads later (docs/experiments.md)
    embedding_std: Annotated[float, Field(gt=0)] = 0.02     # of tokens and positions at the start; in what the first blocks add
                                                       # (about 0.2 unless zero_init) small ones drown, and heads compose otherwise
    vocab_size: Size | None = None                     # V; null: the tokenizer's
    norm_eps: Annotated[float, Field(gt=0)] = 1e-6

    def conflicts(self) -> Iterator[tuple[tuple[str, ...], str]]:
        if self.n_heads % self.kv_heads:
            fits = ", ".join(str(k) for k in range(1, self.n_heads + 1) if self.n_heads % k == 0)
            yield ("n_kv_heads", "n_heads"), f"model.n_kv_heads={self.kv_heads} must divide model.n_heads={self.n_heads} (try {fits})"
        if self.d_head is None and self.d_model % self.n_heads:
            size = self.n_heads * (2 if self.position == "rope" else 1)         # rope turns pairs of numbers
            near = max(1, round(self.d_model / size)) * size
            yield ("n_heads", "d_model"), (f"model.n_heads={self.n_heads} must divide model.d_model={self.d_model} "
                                           f"(try d_model={near}, or set d_head)")
        elif self.position == "rope" and self.head_size % 2:
            yield ("d_head", "d_model", "n_heads", "position"), (
                f"model.d_head={self.head_size} is odd, and position: rope turns pairs of numbers "
                f"(try d_head={self.head_size + 1}, or another position)")
        if self.position == "sinusoidal" and self.d_model % 2:
            yield ("d_model", "position"), f"model.d_model={self.d_model} is odd, and position: sinusoidal needs pairs"
        if self.window == []:
            yield ("window",), "model.window=[] names no window (null means no window)"

    # What the nulls stand for.

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def head_size(self) -> int:
        return self.d_head or self.d_model // self.n_heads

    @property
    def mlp_size(self) -> int:
        if self.mlp == "none":
            return 0
        return self.d_mlp or (-(-8 * self.d_model // 3 // 64) * 64 if self.mlp == "swiglu" else 4 * self.d_model)

    @property
    def windows(self) -> list[int | None]:
        """The window of each layer: a list in the config repeats until every layer has one."""
        pattern = self.window if isinstance(self.window, list) else [self.window]
        return [pattern[layer % len(pattern)] for layer in range(self.n_layers)]
