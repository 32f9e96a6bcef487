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

from kernels.attention import check_shapes, positive_scale, use_triton
from kernels.reference import visible

REACH = 8               # the offset profile looks so many positions to both sides of the induction target
PLAIN = 6               # statistics before the profile in the tensor that the kernel fills


class HeadStatistics(NamedTuple):
    """float32, one number per query row: (B, H, T), of a pattern A and tokens x.

    The induction target of row i is the key after the latest earlier place of its token: the largest j ≤ i with
    x_{j−1} = x_i. Where there is none, the profile is zero; so is every entry of keys that row i does not see, and the
    previous token of the first. With segments, tokens match within a document only.
    """

    prefix_matching: Tensor     # Σ A[i, j] over all j ≤ i with x_{j−1} = x_i
    duplicate_token: Tensor     # Σ A[i, j] over j < i with x_j = x_i
    previous_token: Tensor      # A[i, i − 1]
    first_token: Tensor         # A[i, 0]
    entropy: Tensor             # −Σ A ln A, in nats
    distance: Tensor            # Σ (i − j) A[i, j], in tokens
    offset_profile: Tensor      # (B, H, T, 2 · REACH + 1): A[i, target + o] for o = −REACH … REACH


@torch.no_grad()
def head_statistics(q: Tensor, k: Tensor, lse: Tensor, tokens: Tensor, *, window: int | None = None, segments: Tensor | None = None,
                    scale: float | None = None, backend: str = "auto", precision: str = "tf32x3") -> HeadStatistics:
    """The statistics of causal attention with queries q (B, H, T, D), the last T of the S keys k (B, K, S, D).

    lse (B, H, T) float32 is what `attention(…, return_lse=True)` gave for them; tokens (B, S) are non-negative ids; window,
    segments and scale are those of that call. backend: triton · torch (rows in chunks, any device) · auto.
    Raises ValueError for shapes that do not agree and for what a backend cannot serve.
    """
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"head_statistics: backend={backend!r} is not one of auto, torch, triton")
    check_shapes("head_statistics", q, k, k, window, precision)
    (B, H, T, _), S = q.shape, k.shape[2]
    if T > S:
        raise ValueError(f"head_statistics: {T} queries cannot be the last of {S} keys: T ≤ S")
    if lse.shape != (B, H, T) or tokens.shape != (B, S) or (segments is not None and segments.shape != (B, S)):
        raise ValueError(f"head_statistics: lse must be {(B, H, T)}, tokens and segments {(B, S)}, got {tuple(lse.shape)}, "
                         f"{tuple(tokens.shape)} and {None if segments is None else tuple(segments.shape)}")
    q, scale = positive_scale(q, scale)
    before, targets = tokens_before(tokens, segments), induction_targets(tokens, segments)
    if use_triton("head_statistics", backend, q, k, lse, tokens, segments):
        from kernels.head_statistics_triton import statistics
        filled = statistics(q, k, lse, tokens, before, targets, window, segments, scale, precision)
    else:
        filled = _in_chunks(q, k, lse, tokens, before, targets, window, segments, scale)
    return HeadStatistics._make([*filled[:PLAIN], filled[PLAIN:].movedim(0, -1)])


def tokens_before(tokens: Tensor, segments: Tensor | None = None) -> Tensor:
    """The token before each of (B, S), −1 at the start of the sequence and of a document."""
    before = F.pad(tokens[:, :-1], (1, 0), value=-1)
    return before if segments is None else before.masked_fill(F.pad(segments.diff(dim=1) != 0, (1, 0)), -1)


def induction_targets(tokens: Tensor, segments: Tensor | None = None) -> Tensor:
    """For each token of (B, S) the position after its latest earlier place in its document, −1 where there is none: (B, S)."""
    if segments is not None:                            # the same token of another document is another one
        least = segments.amin()
        tokens = tokens.long() * (segments.amax() - least + 1) + segments - least
    ids, order = tokens.sort(dim=1, stable=True)                                # equal tokens side by side, in order of position
    again = F.pad(ids[:, 1:] == ids[:, :-1], (1, 0))
    earlier = F.pad(order[:, :-1], (1, 0))
    return torch.empty_like(order).scatter_(1, order, torch.where(again, earlier + 1, -1))


def _in_chunks(q, k, lse, tokens, before, targets, window, segments, scale, entries: int = 2 ** 22) -> Tensor:
    """(PLAIN + 2 · REACH + 1, B, H, T), holding about `entries` numbers of the pattern at a time."""
    (B, H, T, _), (_, K, S, _) = q.shape, k.shape
    filled = q.new_empty(PLAIN + 2 * REACH + 1, B, H, T, dtype=torch.float32)
    q, keys = q.unflatten(1, (K, H // K)).float() * scale, k[:, :, None].float().mT            # (B, K, H/K, T, D), (B, K, 1, D, S)
    key = torch.arange(S, device=q.device)
    chunk = max(1, entries // max(1, B * H * S))
    for t in range(0, T, chunk):
        rows = slice(t, min(t + chunk, T))
        position = torch.arange(S - T + rows.start, S - T + rows.stop, device=q.device)
        sees = visible(T, S, window=window, segments=segments, rows=rows, device=q.device).float()
        sees = sees if sees.dim() == 2 else sees[:, :, None]                                    # (t, S) or (B, 1, 1, t, S)
        # Clamped: the score of a key that is not seen may exceed lse by far, and inf · 0 is NaN.
        log = (q[..., rows, :] @ keys).sub_(lse.unflatten(1, (K, H // K))[..., rows, None]).clamp_(max=0)
        pattern, log = log.exp().mul_(sees).flatten(1, 2), log.flatten(1, 2)                    # (B, H, t, S)
        token, target = tokens[:, position, None], targets[:, position]                         # (B, t, 1), (B, t)
        follows, repeats = token == before[:, None], (token == tokens[:, None]) & (key < position[:, None])     # (B, t, S)
        gap = (position[0] - key).float()                   # from the chunk's first row, so that large positions cost no digits
        filled[0, ..., rows] = torch.einsum("bhts,bts->bht", pattern, follows.float())
        filled[1, ..., rows] = torch.einsum("bhts,bts->bht", pattern, repeats.float())
        filled[2, ..., rows] = _entries(pattern, position[None] - 1)
        filled[3, ..., rows] = pattern[..., 0]
        filled[4, ..., rows] = -(pattern * log).sum(-1)
        filled[5, ..., rows] = pattern @ gap + pattern.sum(-1) * (position - position[0])
        for o in range(-REACH, REACH + 1):
            filled[PLAIN + REACH + o, ..., rows] = _entries(pattern, (target + o).masked_fill(target < 0, -1))
    return filled


def _entries(pattern: Tensor, keys: Tensor) -> Tensor:
    """A[i, keys_i] of rows of a pattern (B, H, t, S), for keys (B or 1, t), 0 where those are outside it: (B, H, t)."""
    S = pattern.shape[-1]
    index = keys.clamp(0, S - 1)[:, None, :, None].expand(*pattern.shape[:3], 1)
    return pattern.gather(-1, index)[..., 0].masked_fill(((keys < 0) | (keys >= S))[:, None], 0)
