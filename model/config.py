"""The shape of a network."""

from math import ceil
from typing import Annotated, Literal

from pydantic import Field

from settings.validate import Conflicts, Settings, Size

Positive = Annotated[float, Field(gt=0)]


class RopeScaling(Settings):
    """How rope's rotation is slowed, for contexts longer than a model was first trained on."""

    kind: Literal["linear", "llama3", "yarn"]   # linear: all pairs slower (Chen et al. 2023);
                                                # llama3: only the slow pairs (Llama 3.1); yarn: the
                                                # slow pairs by another rule, and larger scores
                                                # (Peng et al. 2023)
    factor: Annotated[float, Field(ge=1)]       # how many times slower
    original_n_ctx: Size | None = None          # the context before; llama3 and yarn need it
    fast: Positive | None = None                # pairs with at least this many turns in
                                                # original_n_ctx are unchanged; null: 4 for
                                                # llama3, 32 for yarn
    slow: Positive | None = None                # pairs with at most this many turns are `factor`
                                                # times slower; null: 1
    attention_factor: Positive | None = None    # yarn: multiplies rotated queries and keys; null:
                                                # 0.1 ln(factor) + 1
    truncate: bool = True                       # yarn: round the two bounds outwards to whole pairs

    def conflicts(self) -> Conflicts:
        if self.kind != "linear" and self.original_n_ctx is None:
            yield ("original_n_ctx", "kind"), ("model.rope_scaling.original_n_ctx is missing: "
                                               f"kind: {self.kind} needs it (for example 8192)")
        if self.fast_turns <= self.slow_turns:
            yield ("fast", "slow"), (f"model.rope_scaling.fast={self.fast_turns} must be more than "
                                     f"slow={self.slow_turns}")

    @property
    def fast_turns(self) -> float:
        return self.fast or (32.0 if self.kind == "yarn" else 4.0)

    @property
    def slow_turns(self) -> float:
        return self.slow or 1.0


class ModelConfig(Settings):
    """A decoder-only transformer. Capital letters are those of the shape comments in the code."""

    n_layers: Annotated[int, Field(gt=0, le=2 ** 12)] = 4   # L blocks
    n_heads: Size = 4                           # H query heads
    n_kv_heads: Size | None = None              # K key/value heads, each shared by H/K queries;
                                                # null: H
    d_model: Size = 128                         # E residual stream
    d_head: Size | None = None                  # D head size; null: d_model / n_heads
    d_mlp: Size | None = None                   # F MLP width; null: 4 d_model (swiglu: 8/3)
    mlp: Literal["swiglu", "gelu", "gelu_tanh", "relu2", "none"] = "swiglu"
                                                # gelu_tanh: GPT-2's approximation; none: attention
                                                # only
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"   # layernorm: with centring and a bias
    bias: Literal["none", "qkv", "attention", "mlp", "all"] = "none"
                                                # which matrices add one; attention: q, k, v and o
    parallel: bool = False                      # attention and MLP of a block read the same
                                                # residual stream (GPT-J, Pythia)
    n_ctx: Size = 256                           # C longest sequence
    position: Literal["rope", "learned", "sinusoidal", "none"] = "rope"
    rope_base: Positive = 10000.0
    rope_dims: Size | None = None               # rope rotates only these first numbers of each
                                                # head; null: all
    rope_scaling: RopeScaling | None = None     # for longer contexts
    qk_norm: bool = False                       # RMSNorm on every query and key before positions
    window: Size | list[Size | None] | None = None  # keys a query sees; a list repeats over layers
    smear: bool = False                         # mix each key with the one before it (a control,
                                                # never a default)
    tied_embeddings: bool = False
    zero_init: bool = True                      # every block starts as the identity: the matrices
                                                # that write to the residual stream start at zero.
                                                # Learns text faster, forms induction heads later
                                                # (docs/experiments.md)
    embedding_std: Positive = 0.02              # of token and position embeddings at the start.
                                                # Unless zero_init, the first blocks add about 0.2:
                                                # smaller embeddings are lost in that and heads
                                                # compose otherwise
    vocab_size: Size | None = None              # V; null: the tokenizer's
    norm_eps: Positive = 1e-6

    def conflicts(self) -> Conflicts:
        if self.n_heads % self.kv_heads:
            divisors = [str(k) for k in range(1, self.n_heads + 1) if self.n_heads % k == 0]
            yield ("n_kv_heads", "n_heads"), (
                f"model.n_kv_heads={self.kv_heads} must divide model.n_heads={self.n_heads} "
                f"(try {', '.join(divisors)})")
        if self.d_head is None and self.d_model % self.n_heads:
            # rope rotates pairs of numbers, so a head must have an even size
            pairs = self.position == "rope" and not self.rope_dims
            multiple = 2 * self.n_heads if pairs else self.n_heads
            nearest = max(1, round(self.d_model / multiple)) * multiple
            yield ("n_heads", "d_model"), (
                f"model.n_heads={self.n_heads} must divide model.d_model={self.d_model} "
                f"(try d_model={nearest}, or set d_head)")
        elif self.position == "rope":
            yield from self._rope_conflicts()
        if self.position == "sinusoidal" and self.d_model % 2:
            yield ("d_model", "position"), (f"model.d_model={self.d_model} is odd, "
                                            "but position: sinusoidal needs pairs")
        for key in ("rope_dims", "rope_scaling"):
            if getattr(self, key) and self.position != "rope":
                yield (key, "position"), (f"model.{key} is for position: rope, but position is "
                                          f"{self.position} (leave it out)")
        if self.mlp == "none" and self.parallel:
            yield ("parallel", "mlp"), ("model.parallel=true needs an MLP, but model.mlp is none "
                                        "(leave it out)")
        if self.mlp == "none" and self.bias in ("mlp", "all"):
            yield ("bias", "mlp"), (f"model.bias={self.bias} needs an MLP, but model.mlp is none "
                                    "(try bias=attention)")
        if self.window == []:
            yield ("window",), "model.window=[] lists no window (null means no window)"

    def _rope_conflicts(self) -> Conflicts:
        if self.rope_dims and (self.rope_dims % 2 or self.rope_dims > self.head_size):
            yield ("rope_dims", "d_head", "d_model", "n_heads", "position"), (
                f"model.rope_dims={self.rope_dims} must be even and at most "
                f"the {self.head_size} numbers of a head")
        elif not self.rope_dims and self.head_size % 2:
            yield ("d_head", "d_model", "n_heads", "position"), (
                f"model.d_head={self.head_size} is odd, but position: rope rotates pairs "
                f"(try d_head={self.head_size + 1}, or another position)")

    # The values that null stands for.

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def head_size(self) -> int:
        return self.d_head or self.d_model // self.n_heads

    @property
    def rope_size(self) -> int:
        return self.rope_dims or self.head_size

    @property
    def biases(self) -> dict[str, bool]:
        """Which matrices add a bias."""
        return {"qkv": self.bias in ("qkv", "attention", "all"),
                "o": self.bias in ("attention", "all"),
                "mlp": self.bias in ("mlp", "all")}

    @property
    def mlp_size(self) -> int:
        if self.mlp == "none":
            return 0
        if self.d_mlp:
            return self.d_mlp
        if self.mlp == "swiglu":
            return ceil(8 * self.d_model / 3 / 64) * 64         # a multiple of 64, for matrix units
        return 4 * self.d_model

    @property
    def windows(self) -> list[int | None]:
        """The window of each layer: a list in the config repeats until every layer has one."""
        pattern = self.window if isinstance(self.window, list) else [self.window]
        return [pattern[layer % len(pattern)] for layer in range(self.n_layers)]
