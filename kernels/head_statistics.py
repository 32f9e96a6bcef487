"""What each attention head looks at, row by row, from (q, k, lse, tokens): in one pass over the pattern that nobody holds.

A row of the pattern is A[i, j] = exp(scale · q_i·k_j − lse_i), so with lse at hand any part of it can be made again, used and
forgotten. Sums over all keys (token matches, entropy, distance) are taken tile by tile, as flash attention takes its own;
entries at known places (the previous token, the first, around the induction target) are single products q_i·k_j.
Definitions: Olsson et al. 2022, "In-context learning and induction heads". Memory grows with T.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention import positive_scale, use_triton
from kernels.reference import visible

REACH = 8               # the offset profile looks so many positions to both sides of the induction target
SUMS = 6                # statistics before the profile in the tensor that the kernel fills


class HeadStatistics(NamedTuple):
    """float32, one number per query row: (B, H, T), of a pattern A and tokens x.

    The induction target of row i is the key after the latest earlier place of its token: the largest j ≤ i with
    x_{j−1} = x_i. Where there is none, the profile is zero.
    """

    prefix_matching: Tensor     # Σ A[i, j] over all j ≤ i with x_{j−1} = x_i
    duplicate_token: Tensor     # Σ A[i, j] over j < i with x_j = x_i
    previous_token: Tensor      # A[i, i − 1]
    first_token: Tensor         # A[i, 0]
    entropy: Tensor             # −Σ A ln A, in nats
    distance: Tensor            # Σ (i − j) A[i, j], in tokens
    offset_profile: Tensor      # (B, H, T, 2 · REACH + 1): A[i, target + o] for o = −REACH … REACH


def head_statistics(q: Tensor, k: Tensor, lse: Tensor, tokens: Tensor, *, window: int | None = None, segments: Tensor | None = None,
                    scale: float | None = None, backend: str = "auto", precision: str = "tf32x3") -> HeadStatistics:
    """The statistics of causal attention with queries q (B, H, T, D), the last T of the S keys k (B, K, S, D).

    lse (B, H, T) is what `attention(…, return_lse=True)` gave for them; tokens (B, S) are non-negative ids; window,
    segments and scale are those of that call. backend: triton · torch (rows in chunks, any device) · auto.
    Raises ValueError for shapes that do not agree and for what a backend cannot serve.
    """
    (B, H, T, D), (_, K, S, _) = q.shape, k.shape
    if k.shape[0] != B or k.shape[3] != D or H % K or T > S:
        raise ValueError(f"head_statistics: q (B, H, T, D) and k (B, K, S, D) with K dividing H and T ≤ S expected, "
                         f"got q {tuple(q.shape)} and k {tuple(k.shape)}")
    if lse.shape != (B, H, T) or tokens.shape != (B, S):
        raise ValueError(f"head_statistics: lse must be {(B, H, T)} and tokens {(B, S)}, got {tuple(lse.shape)} and {tuple(tokens.shape)}")
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"head_statistics: backend={backend!r} is not one of auto, torch, triton")
    q, scale = positive_scale(q, scale)
    if use_triton("head_statistics", backend, q, k):
        from kernels.head_statistics_triton import statistics
        filled = statistics(q, k, lse, tokens, induction_targets(tokens), window, segments, scale, precision)
    else:
        filled = _in_chunks(q, k, lse, tokens, induction_targets(tokens), window, segments, scale)
    return HeadStatistics(*filled[:SUMS], filled[SUMS:].movedim(0, -1))


def induction_targets(tokens: Tensor) -> Tensor:
    """For each token of (B, S) the position after its latest earlier place, −1 where there is none: (B, S)."""
    ids, order = tokens.sort(dim=1, stable=True)                                # equal tokens side by side, in order of position
    again = F.pad(ids[:, 1:] == ids[:, :-1], (1, 0))
    earlier = F.pad(order[:, :-1], (1, 0))
    return torch.empty_like(order).scatter_(1, order, torch.where(again, earlier + 1, -1))


@torch.no_grad()
def _in_chunks(q, k, lse, tokens, targets, window, segments, scale, entries: int = 2 ** 22) -> Tensor:
    """(SUMS + 2 · REACH + 1, B, H, T), holding about `entries` numbers of the pattern at a time."""
    (B, H, T, D), (_, K, S, _) = q.shape, k.shape
    filled = q.new_empty(SUMS + 2 * REACH + 1, B, H, T, dtype=torch.float32)
    q, keys = q.unflatten(1, (K, H // K)).float() * scale, k[:, :, None].float().mT            # (B, K, H/K, T, D), (B, K, 1, D, S)
    key, before = torch.arange(S, device=q.device), F.pad(tokens[:, :-1], (1, 0), value=-1)
    chunk = max(1, entries // max(1, B * H * S))
    for t in range(0, T, chunk):
        rows = slice(t, min(t + chunk, T))
        position = torch.arange(S - T + rows.start, S - T + rows.stop, device=q.device)
        sees = visible(T, S, window=window, segments=segments, rows=rows, device=q.device)
        sees = sees if sees.dim() == 2 else sees[:, :, None]                                    # (t, S) or (B, 1, 1, t, S)
        pattern = (q[..., rows, :] @ keys).sub_(lse.unflatten(1, (K, H // K))[..., rows, None]).exp_().masked_fill_(~sees, 0).flatten(1, 2)
        token = tokens[:, position, None]                                                       # (B, t, 1)
        repeats, follows = (token == tokens[:, None]) & (key < position[:, None]), token == before[:, None]

        def at(keys: Tensor) -> Tensor:
            """A[i, keys_i] for keys (B or 1, t), 0 outside the sequence → (B, H, t)."""
            inside = (keys >= 0) & (keys < S)
            index = keys.clamp(0, S - 1)[:, None, :, None].expand(B, H, -1, 1)
            return pattern.gather(-1, index)[..., 0].masked_fill(~inside[:, None], 0)

        target = targets[:, position]
        known = [at(position[None] - 1), pattern[..., 0]]
        profile = [at((target + o).masked_fill(target < 0, -1)) for o in range(-REACH, REACH + 1)]
        filled[0, ..., rows] = (pattern * follows[:, None]).sum(-1)
        filled[1, ..., rows] = (pattern * repeats[:, None]).sum(-1)
        filled[2:4, ..., rows] = torch.stack(known)
        filled[5, ..., rows] = (pattern * (position[:, None] - key)).sum(-1)
        filled[SUMS:, ..., rows] = torch.stack(profile)
        filled[4, ..., rows] = torch.special.entr(pattern).sum(-1)
    return filled
