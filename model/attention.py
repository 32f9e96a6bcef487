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
from model.layers import Joined, Linear, RMSNorm, apply_joined, for_decoding, join_for_decoding
from model.position import rotate
from model.taps import Taps


@dataclass
class Context:
    """What one forward pass gives every layer, in addition to the residual stream."""

    taps: Taps                          # who reads or replaces activations
    # rope_table at the tokens' positions: (2, T, R), for ragged rows (2, B, 1, T, R), where R is
    # rope_dims, or D without it.
    rotation: Tensor | None = None
    segments: Tensor | None = None      # (B, T): documents that must not see each other
    cache: KVCache | None = None        # when sampling
    backend: str = "auto"               # of kernels.attention, without a cache


class CausalSelfAttention(nn.Module):
    """Causal multi-head attention with H query heads sharing K key/value heads (Ainslie et al.
    2023)."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        H, K, D, E = config.n_heads, config.kv_heads, config.head_size, config.d_model
        self.layer, self.d_head, self.window = layer, D, config.windows[layer]
        self.n_heads, self.n_kv_heads = H, K
        bias = config.biases
        self.w_q = Linear(E, H * D, bias["qkv"])
        self.w_k = Linear(E, K * D, bias["qkv"])
        self.w_v = Linear(E, K * D, bias["qkv"])
        self.w_o = Linear(H * D, E, bias["o"])
        self.w_qkv: Joined | None = None                    # all three as one, after `pack`
        self.norm_q = RMSNorm(D, config.norm_eps) if config.qk_norm else None
        self.norm_k = RMSNorm(D, config.norm_eps) if config.qk_norm else None
        self.smear_alpha = nn.Parameter(torch.zeros(K)) if config.smear else None

    def forward(self, x: Tensor, context: Context) -> Tensor:
        H, K, D, taps = self.n_heads, self.n_kv_heads, self.d_head, context.taps
        qkv = apply_joined(x, self.w_q, self.w_k, self.w_v, packed=self.w_qkv)
        by_head = qkv.unflatten(-1, (H + 2 * K, D)).transpose(1, 2)             # (B, H + 2K, T, D)
        qk, v = by_head.split((H + K, K), dim=1)        # q and k stay one tensor: one rotation
        if self.norm_q is not None:
            q, k = qk.split((H, K), dim=1)
            qk = torch.cat([self.norm_q(q), self.norm_k(k)], dim=1)
        if self.smear_alpha is not None:
            q, k = qk.split((H, K), dim=1)
            qk = torch.cat([q, self.smear(k, context)], dim=1)
        if context.rotation is not None:
            qk = rotate(qk, context.rotation)
        q, k = qk.split((H, K), dim=1)                              # (B, H, T, D), (B, K, T, D)
        q, k, v = taps("q", q, self.layer), taps("k", k, self.layer), taps("v", v, self.layer)
        z = taps("z", self.attend(q, k, v, context), self.layer)                # (B, H, T, D)
        out = self.w_o(z.transpose(1, 2).flatten(2))                            # (B, T, E)
        return taps("attn_out", out, self.layer)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """Each query's average of the values it sees, z_i = Σ_j softmax_j(q_i·k_j / √D) v_j:
        (B, H, T, D).

        The pattern is only made if a tap asks for it, and only used if the tap changed it: a tap
        that reads must not change a bit of the result.
        """
        taps, layer = context.taps, self.layer
        if context.cache is not None:
            for part in ("lse", "pattern"):
                taps.refuse(part, "is not made in a pass with a cache (run the whole sequence)",
                            layer)
            return context.cache.attend(layer, q, k, v)
        masks: dict[str, Any] = {"window": self.window, "segments": context.segments}
        if taps.wants("pattern", layer):
            pattern = attention_pattern(q.float(), k.float(), **masks)[0].to(q.dtype)
            original = pattern.clone()                      # a tap may edit the pattern in place
            pattern = taps("pattern", pattern, layer)                           # (B, H, T, T)
            if not torch.equal(pattern, original):
                taps.refuse("lse", "has no meaning beside a replaced pattern", layer)
                group = self.n_heads // self.n_kv_heads
                return pattern @ v.repeat_interleave(group, dim=1)
        if taps.wants("lse", layer):
            z, lse = attention(q, k, v, **masks, backend=context.backend, return_lse=True)
            taps("lse", lse, layer)
            return z
        return attention(q, k, v, **masks, backend=context.backend)

    def smear(self, k: Tensor, context: Context) -> Tensor:
        """k_j := σ(α) k_j + (1 − σ(α)) k_{j−1}, with a learned α per key head (Olsson et al. 2022,
        "smeared keys")."""
        if context.cache is not None:
            previous = context.cache.previous_raw_keys(self.layer, k)
        else:
            previous = F.pad(k, (0, 0, 1, 0))[:, :, :-1]                        # k_{−1} = 0
            if context.segments is not None:                # likewise at the start of a document
                starts = F.pad(context.segments.diff(dim=1) != 0, (1, 0), value=True)
                previous = previous.masked_fill(starts[:, None, :, None], 0)
        gate = self.smear_alpha.sigmoid().to(k.dtype)[:, None, None]
        return gate * k + (1 - gate) * previous

    def pack(self) -> None:
        """Lay the matrices out for decoding. The parameters must not change afterwards."""
        self.w_qkv = join_for_decoding(self.w_q, self.w_k, self.w_v)
        self.w_o.weight.data = for_decoding(self.w_o.weight)
