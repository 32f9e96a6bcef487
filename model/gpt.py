"""A decoder-only transformer, read top to bottom: tokens → embedding → L blocks → logits.

Letters of the shapes: B batch, T positions, H query heads, K key/value heads, D head size, E model
width, F MLP width, V vocabulary, L layers, C context length.
"""

from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.attention import CausalSelfAttention, Context
from model.config import ModelConfig
from model.cross_entropy import cross_entropies, summed_cross_entropy
from model.kv_cache import KVCache
from model.layers import (
    NORMS,
    Joined,
    Linear,
    apply_joined,
    for_decoding,
    join_for_decoding,
    new_embedding,
)
from model.position import rope_table, sinusoidal_table
from model.taps import TapSet, refuse, run_eagerly, taps_of


class GPT(nn.Module):
    """tokens (B, T) → logits (B, T, V). Parameters are float32.

    compute_dtype           dtype of activations
    attention_backend       one of `kernels.attention`'s
    recompute_activations   keep only a block's input for the backward pass (Chen et al. 2016)
    """

    rope: Tensor                # position tables, from make_tables
    sinusoids: Tensor

    def __init__(self, config: ModelConfig, seed: int = 0):
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("model.vocab_size is not set: it comes from the tokenizer")
        self.config = config
        self.compute_dtype = torch.float32
        self.attention_backend = "auto"
        self.recompute_activations = False
        self.tapped: dict[int, tuple[TapSet, ...]] = {}     # taps by thread: model/taps.py
        self.embed = new_embedding(config.vocab_size, config.d_model)
        self.embed_position = None
        if config.position == "learned":
            self.embed_position = new_embedding(config.n_ctx, config.d_model)
        blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.blocks = cast("Sequence[Block]", blocks)
        self.norm_final = NORMS[config.norm](config.d_model, config.norm_eps)
        self.lm_head = None
        if not config.tied_embeddings:
            self.lm_head = Linear(config.d_model, config.vocab_size)
        if not self.embed.weight.is_meta:
            self.make_tables()
            self.init_weights(seed)

    def allocate(self, device: torch.device | str) -> "GPT":
        """Allocate a model that was made on the meta device; parameter values are set later.

        nn.Module.to_empty does the same, but loads sympy first. Returns the model.
        """
        self._apply(lambda p: torch.empty(p.shape, dtype=p.dtype, device=device))
        self.make_tables()
        return self

    def make_tables(self) -> None:
        """Make the fixed position tables. A model on the meta device has none yet."""
        config, device = self.config, self.embed.weight.device
        with torch.device(device):
            if config.position == "rope":
                table = rope_table(config.n_ctx, config.rope_size, config.rope_base,
                                   config.rope_scaling)
                self.register_buffer("rope", table, persistent=False)
            if config.position == "sinusoidal":
                # Scaled to the size of the embedding, so that neither drowns the other.
                scale = config.embedding_std * 2 ** 0.5
                table = sinusoidal_table(config.n_ctx, config.d_model) * scale
                self.register_buffer("sinusoids", table, persistent=False)

    @torch.no_grad()
    def init_weights(self, seed: int,
                     fill: Callable[[Tensor, Tensor], object] = Tensor.copy_) -> None:
        """The initial distribution of every parameter, in one place. Raises ValueError for a
        parameter that is not listed. `fill(p, values)` sets a parameter."""
        random = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            part = name.removesuffix(".weight").rsplit(".", 1)[-1]
            if part in ("embed", "embed_position"):
                std = self.config.embedding_std
            elif part in ("w_q", "w_k", "w_v", "w_gate", "w_up"):
                std = p.shape[1] ** -0.5                    # unit variance in, unit variance out
            elif part in ("w_o", "w_down"):
                std = 0.0 if self.config.zero_init else p.shape[1] ** -0.5
            elif part == "lm_head":
                std = 0.0                                   # the first loss is ln V
            elif part == "gain":
                fill(p, torch.ones(p.shape))
                continue
            elif part in ("bias", "smear_alpha"):           # α = 0: half this key, half the last
                fill(p, torch.zeros(p.shape))
                continue
            else:
                raise ValueError(f"init_weights: no initial distribution for {name}")
            fill(p, torch.randn(p.shape, generator=random) * std)

    def forward(self, tokens: Tensor, *, cache: KVCache | None = None,
                lengths: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) for the token after each of `tokens` (B, T). See `hidden`."""
        return self.unembed(self.hidden(tokens, cache=cache, lengths=lengths, segments=segments))

    def hidden(self, tokens: Tensor, *, cache: KVCache | None = None,
               lengths: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
        """The residual stream after the last block and norm: (B, T, E).

        cache      the sequences to continue; `tokens` are appended to it
        lengths    (B,) with a cache: how many of each row's tokens are real, the rest is padding
                   on the right
        segments   (B, T) without a cache: document numbers; tokens see only their own document
        Raises ValueError if the positions of equally long rows run past n_ctx. For ragged rows the
        caller has to check.
        """
        if self.tapped and torch.compiler.is_compiling():   # a tap may run any Python
            return run_eagerly(self.hidden, tokens, cache=cache, lengths=lengths,
                               segments=segments)
        T = tokens.shape[1]
        positions = slice(0, T) if cache is None else cache.begin(T, lengths)
        if isinstance(positions, slice) and positions.stop > self.config.n_ctx:
            raise ValueError(f"{positions.stop} tokens are more than model.n_ctx="
                             f"{self.config.n_ctx}")
        x = self.embed(tokens)                                                      # (B, T, E)
        context = Context(taps_of(self), segments=segments, cache=cache,
                          backend=self.attention_backend)
        match self.config.position:
            case "rope":
                cos_sin = self.rope[:, self._index(positions)]          # (2, T or (B, T), D)
                ragged = cos_sin.dim() == 4
                context.rotation = cos_sin[:, :, None] if ragged else cos_sin
            case "learned":
                x = x + self.embed_position.weight[self._index(positions)]
            case "sinusoidal":
                x = x + self.sinusoids[self._index(positions)]
        x = context.taps("embed", x.to(self.compute_dtype))
        recompute = self.recompute_activations and torch.is_grad_enabled()
        for block in self.blocks:
            if recompute:
                x = checkpoint(block, x, context, use_reentrant=False)
            else:
                x = block(x, context)
        if cache is not None:
            cache.end()
        return context.taps("final", self.norm_final(x))

    def unembed(self, x: Tensor) -> Tensor:
        """(…, E) → logits (…, V)."""
        return taps_of(self)("logits", F.linear(x, self.unembedding.to(x.dtype)))

    @property
    def unembedding(self) -> Tensor:
        """W_U (V, E): the head's matrix, or the embedding's if they are tied."""
        return self.embed.weight if self.lm_head is None else self.lm_head.weight

    def loss(self, tokens: Tensor, targets: Tensor, segments: Tensor | None = None) -> Tensor:
        """Cross-entropy in nats, *summed* over the (B, T) targets, so that accumulating gradients
        over micro-batches equals one big batch."""
        refuse(self, "logits", "are never held by the loss (call model(tokens))")
        x = self.hidden(tokens, segments=segments)
        return summed_cross_entropy(x.flatten(0, 1), self.unembedding, targets.flatten())

    @torch.no_grad()
    def losses(self, tokens: Tensor, targets: Tensor, segments: Tensor | None = None) -> Tensor:
        """Cross-entropy in nats of each of the (B, T) targets, float32, without gradients."""
        refuse(self, "logits", "are never held by the loss (call model(tokens))")
        x = self.hidden(tokens, segments=segments)
        losses = cross_entropies(x.flatten(0, 1), self.unembedding, targets.flatten())
        return losses.view_as(targets)

    @torch.no_grad()
    def pack(self) -> "GPT":
        """Lay out all weights for decoding one token at a time. The parameters must not change
        afterwards. Returns the model."""
        for block in self.blocks:
            block.attn.pack()
            if block.mlp is not None:
                block.mlp.pack()
        owner = self.embed if self.lm_head is None else self.lm_head
        owner.weight.data = for_decoding(owner.weight)
        return self

    def _index(self, positions: slice | Tensor) -> slice | Tensor:
        """Positions as an index into a table of C rows. The padding of ragged rows may run past
        C; no one sees what it reads."""
        if isinstance(positions, slice):
            return positions
        return positions.clamp(max=self.config.n_ctx - 1)                           # (B, T)


class Block(nn.Module):
    """Attention reads from other positions, the MLP computes at each position; both add to the
    residual stream."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.parallel = layer, config.parallel
        norm = NORMS[config.norm]
        self.norm_attn = norm(config.d_model, config.norm_eps)
        self.attn = CausalSelfAttention(config, layer)
        self.norm_mlp = None if config.mlp == "none" else norm(config.d_model, config.norm_eps)
        self.mlp = None if config.mlp == "none" else MLP(config)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        before = context.taps("resid_pre", x, self.layer)                           # (B, T, E)
        x = before + self.attn(self.norm_attn(before), context)
        if self.mlp is not None:
            mlp_out = self.mlp(self.norm_mlp(before if self.parallel else x))
            x = x + context.taps("mlp_out", mlp_out, self.layer)
        return context.taps("resid_post", x, self.layer)


class MLP(nn.Module):
    """Two matrices with a nonlinearity between them: SwiGLU (Shazeer 2020), GELU, exact or by tanh
    (Hendrycks and Gimpel 2016), or ReLU² (So et al. 2021)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        d_model, d_mlp, bias = config.d_model, config.mlp_size, config.biases["mlp"]
        self.nonlinearity = config.mlp
        self.w_gate = Linear(d_model, d_mlp, bias) if config.mlp == "swiglu" else None
        self.w_up, self.w_down = Linear(d_model, d_mlp, bias), Linear(d_mlp, d_model, bias)
        self.w_gate_up: Joined | None = None                # both as one, after `pack`

    def forward(self, x: Tensor) -> Tensor:
        match self.nonlinearity:
            case "swiglu":
                assert self.w_gate is not None
                gate_up = apply_joined(x, self.w_gate, self.w_up, packed=self.w_gate_up)
                gate, up = gate_up.chunk(2, dim=-1)                                 # (B, T, F)
                h = F.silu(gate) * up
            case "gelu":
                h = F.gelu(self.w_up(x))
            case "gelu_tanh":
                h = F.gelu(self.w_up(x), approximate="tanh")
            case "relu2":
                h = F.relu(self.w_up(x)).square()
        return self.w_down(h)                                                       # (B, T, E)

    def pack(self) -> None:
        """Lay the matrices out for decoding. The parameters must not change afterwards."""
        if self.w_gate is not None:
            self.w_gate_up = join_for_decoding(self.w_gate, self.w_up)
        else:
            self.w_up.weight.data = for_decoding(self.w_up.weight)
        self.w_down.weight.data = for_decoding(self.w_down.weight)
