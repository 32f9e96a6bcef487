"""Attention by its definition: the truth that every faster backend is tested against."""

from math import inf

import torch
from torch import Tensor


def visible(T: int, S: int, *, causal: bool = True, window: int | None = None,
            segments: Tensor | None = None, rows: slice = slice(None),
            device: torch.device | str = "cpu") -> Tensor:
    """Which keys each query sees: (T, S) bool, or (B, 1, T, S) with `segments` (B, S).

    The T queries are the last T of the S positions. Query i sees key j when j ≤ i + S − T (causal),
    j > i + S − T − window, and their segments agree. `rows` selects some of the T queries.
    """
    query = torch.arange(S - T, S, device=device)[rows, None]
    key = torch.arange(S, device=device)
    sees = torch.ones(len(query), S, dtype=torch.bool, device=device)
    if causal:
        sees = sees & (key <= query)
    if window is not None:
        sees = sees & (key > query - window)
    if segments is not None:
        sees = sees & (segments[:, None, S - T:, None][:, :, rows] == segments[:, None, None, :])
    return sees


def attention_pattern(q: Tensor, k: Tensor, *, causal: bool = True, window: int | None = None,
                      segments: Tensor | None = None,
                      scale: float | None = None) -> tuple[Tensor, Tensor]:
    """softmax(q kᵀ · scale) over the keys that each query sees (Vaswani et al. 2017, eq. 1).

    q (B, H, T, D), k (B, K, S, D) → the pattern (B, H, T, S), in which each row is a distribution
    over the keys it sees (all zeros if it sees none), and lse (B, H, T), the natural log of the sum
    that each row was divided by.
    """
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)    # H/K query heads share a key head
    if scale is None:                       # unscaled, variance grows with D and softmax saturates
        scale = q.shape[-1] ** -0.5
    scores = q @ k.mT * scale                                                   # (B, H, T, S)
    sees = visible(q.shape[2], k.shape[2], causal=causal, window=window, segments=segments,
                   device=q.device)
    scores = scores.masked_fill(~sees, -inf)
    lse = scores.logsumexp(dim=-1)                                              # (B, H, T)
    return torch.exp(scores - lse.masked_fill(lse == -inf, 0)[..., None]), lse


def reference_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True,
                        window: int | None = None, segments: Tensor | None = None,
                        scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Each query's weighted mean of the values it sees, (B, H, T, D), and lse (B, H, T).

    It holds the T × S pattern; the faster backends never do.
    """
    pattern, lse = attention_pattern(q, k, causal=causal, window=window, segments=segments,
                                     scale=scale)
    return pattern @ v.repeat_interleave(q.shape[1] // v.shape[1], dim=1), lse
