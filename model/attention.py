"""Causal self-attention: projections, grouped queries, positions, cache."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.attention import attention
from kernels.reference import attention_pattern
from model.config import ModelConfig
from model.kv_cache import KVCache
from model.layers import Linear, RMSNorm, for_decoding, joined, joined_for_decoding
from model.position import rotate
from model.taps import Taps


@dataclass
class Context:
    """What one forward pass tells every layer besides the residual stream."""

    taps: Taps                          # who looks at activations
    rotation: Tensor | None = None      # rope_table at the tokens' positions: (2, T, D) or, ragged, (2, B, 1, T, D); D or rope_dims
    segments: Tensor | None = None      # (B, T): documents that must not see each other
    cache: KVCache | None = None
    backend: str = "auto"              # kernels.attention's, while training


class CausalSelfAttention(nn.Module):
    """Causal multi-head attention with H query heads sharing K key/value heads (Ainslie et al. 2023)."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        H, K, D, E = config.n_heads, config.kv_heads, config.head_size, config.d_model
        self.layer, self.d_head, self.window = layer, D, config.windows[layer]
        bias = config.biases
        self.w_q, self.w_k, self.w_v = (Linear(E, heads * D, bias["qkv"]) for heads in (H, K, K))
        self.w_o = Linear(H * D, E, bias["o"])
        self.w_qkv: tuple[Tensor, Tensor | None] | None = None              # the three as one, once `pack` has been called
        self.n_heads, self.n_kv_heads = H, K
        self.norm_q = RMSNorm(D, config.norm_eps) if config.qk_norm else None
        self.norm_k = RMSNorm(D, config.norm_eps) if config.qk_norm else None
        self.smear_alpha = nn.Parameter(torch.zeros(K)) if config.smear else None

    def forward(self, x: Tensor, context: Context) -> Tensor:
        H, K = self.n_heads, self.n_kv_heads
        qkv = joined(x, self.w_q, self.w_k, self.w_v, packed=self.w_qkv)                    # (B, T, (H + 2K) D)
        qk, v = qkv.unflatten(-1, (-1, self.d_head)).transpose(1, 2).split((H + K, K), dim=1)       # (B, heads, T, D)
        if self.norm_q is not None:
            q, k = qk.split((H, K), dim=1)
            qk = torch.cat([self.norm_q(q), self.norm_k(k)], dim=1)
        if self.smear_alpha is not None:
            q, k = qk.split((H, K), dim=1)
            qk = torch.cat([q, self.smear(k, context)], dim=1)
        if context.rotation is not None:
            qk = rotate(qk, context.rotation)
        q, k = qk.split((H, K), dim=1)                                                      # (B, H, T, D), (B, K, T, D)
        taps = context.taps
        q, k, v = taps("q", q, self.layer), taps("k", k, self.layer), taps("v", v, self.layer)
        z = taps("z", self.attend(q, k, v, context), self.layer)                            # (B, H, T, D)
        return taps("attn_out", self.w_o(z.transpose(1, 2).flatten(2)), self.layer)         # (B, T, E)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """Each query's average of the values (B, H, T, D): never through a pattern, unless a tap has replaced it."""
        taps = context.taps
        masks: dict[str, Any] = {"window": self.window, "segments": context.segments}
        if context.cache is not None:
            for part in ("lse", "pattern"):
                taps.refuse(part, "is not made in a pass with a cache (run the whole sequence)", self.layer)
            return context.cache.attend(self.layer, q, k, v)
        if taps.wants("pattern", self.layer):
            pattern = attention_pattern(q.float(), k.float(), **masks)[0].to(q.dtype)       # (B, H, T, T)
            as_made = pattern.clone()                           # a tap may edit in place, as it may everything else
            if not torch.equal(seen := taps("pattern", pattern, self.layer), as_made):
                taps.refuse("lse", "has no meaning beside a replaced pattern", self.layer)
                return seen @ v.repeat_interleave(self.n_heads // self.n_kv_heads, dim=1)
        if taps.wants("lse", self.layer):
            z, lse = attention(q, k, v, **masks, backend=context.backend, return_lse=True)
            taps("lse", lse, self.layer)
            return z
        return attention(q, k, v, **masks, backend=context.backend)

    def pack(self) -> None:
        """Lay the matrices out for decoding; the parameters must not change any more."""
        self.w_qkv = joined_for_decoding(self.w_q, self.w_k, self.w_v)
        self.w_o.weight.data = for_decoding(self.w_o.weight)

    def smear(self, k: Tensor, context: Context) -> Tensor:
        """k_j := σ(α) k_j + (1 − σ(α)) k_{j−1}, a learned α per key head (Olsson et al. 2022, "smeared keys")."""
        if context.cache is not None:
            previous = context.cache.previous_raw_keys(self.layer, k)
        else:
            previous = F.pad(k, (0, 0, 1, 0))[:, :, :-1]                                    # k_{−1} = 0
            if context.segments is not None:                                                # and at a document's start
                starts = F.pad(context.segments.diff(dim=1) != 0, (1, 0), value=True)
                previous = previous.masked_fill(starts[:, None, :, None], 0)
        own = self.smear_alpha.sigmoid().to(k.dtype)[:, None, None]
        return own * k + (1 - own) * previous
