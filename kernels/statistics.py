"""What each attention head looks at, row by row, from (q, k, lse, tokens), in one pass.

A row of the pattern is A[i, j] = exp(scale · q_i·k_j − lse_i). So with lse known, any part of the
pattern can be computed again, used and forgotten, and memory grows with T, not with T × T. Sums
over all keys (token matches, entropy, distance) are taken tile by tile, as flash attention takes
its own; entries at known places (the previous token, the first, around the induction target) are
single products q_i·k_j. kernels/statistics_reference.py computes the same from the dense pattern.

Definitions: Olsson et al. 2022, "In-context learning and induction heads".
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention import HAS_TRITON, check_shapes, positive_scale, use_triton
from kernels.planes import PLANES, REACH, Plane
from kernels.problem import Problem
from kernels.reference import visible

if HAS_TRITON:
    from kernels import statistics_triton


class HeadStatistics(NamedTuple):
    """float32, one number per query row: (B, H, T), of a pattern A and tokens x.

    The induction target of row i is the key after the latest earlier place of its token: the
    largest j ≤ i with x_{j−1} = x_i. If there is none, the profile is zero; so is every entry of
    keys that row i does not see, and the previous token of the first position. With segments,
    tokens match only within a document.
    """

    prefix_matching: Tensor     # Σ A[i, j] over all j ≤ i with x_{j−1} = x_i
    duplicate_token: Tensor     # Σ A[i, j] over j < i with x_j = x_i
    current_token: Tensor       # A[i, i]
    previous_token: Tensor      # A[i, i − 1]
    first_token: Tensor         # A[i, 0]
    entropy: Tensor             # −Σ A ln A, in nats
    distance: Tensor            # Σ (i − j) A[i, j], in tokens
    offset_profile: Tensor      # (B, H, T, 2 · REACH + 1): A[i, target + o] for o = −REACH … REACH


@torch.no_grad()
def head_statistics(q: Tensor, k: Tensor, lse: Tensor, tokens: Tensor, *,
                    window: int | None = None, segments: Tensor | None = None,
                    scale: float | None = None, backend: str = "auto") -> HeadStatistics:
    """The statistics of causal attention, for queries that are the last T of the S keys.

    q (B, H, T, D), k (B, K, S, D), tokens (B, S), non-negative ids. lse (B, H, T) float32 is what
    `attention(…, return_lse=True)` returned for q and k; window, segments and scale are those of
    that call. backend: triton · torch (rows in chunks, on any device) · auto.

    Raises ValueError for shapes that do not agree and for what a backend cannot serve.
    """
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"head_statistics: backend={backend!r} is not one of auto, torch, triton")
    check_shapes("head_statistics", q, k, k, window)
    (B, H, T, _), S = q.shape, k.shape[2]
    if T > S:
        raise ValueError(f"head_statistics: {T} queries cannot be the last of {S} keys: T ≤ S")
    if lse.shape != (B, H, T) or tokens.shape != (B, S) or (
            segments is not None and segments.shape != (B, S)):
        segments_shape = None if segments is None else tuple(segments.shape)
        raise ValueError(f"head_statistics: lse must be {(B, H, T)}, tokens and segments {(B, S)}, "
                         f"got {tuple(lse.shape)}, {tuple(tokens.shape)} and {segments_shape}")
    q, scale = positive_scale(q, scale)
    before, targets = tokens_before(tokens, segments), induction_targets(tokens, segments)
    if use_triton("head_statistics", backend, q, k, lse, tokens, segments):
        planes = statistics_triton.statistics(q, k, lse, tokens, before, targets, window, segments,
                                              scale)
    else:
        problem = Problem(q, k, True, window, segments, scale)
        planes = _in_chunks(problem, lse, tokens, before, targets)
    return HeadStatistics(
        prefix_matching=planes[Plane.PREFIX_MATCHING],
        duplicate_token=planes[Plane.DUPLICATE_TOKEN],
        current_token=current_token(q, k, lse, scale),
        previous_token=planes[Plane.PREVIOUS_TOKEN],
        first_token=planes[Plane.FIRST_TOKEN],
        entropy=planes[Plane.ENTROPY],
        distance=planes[Plane.DISTANCE],
        offset_profile=planes[Plane.OFFSET_PROFILE:].movedim(0, -1))        # (B, H, T, offsets)


def current_token(q: Tensor, k: Tensor, lse: Tensor, scale: float) -> Tensor:
    """A[i, i], the weight of each query (B, H, T, D) on its own key: (B, H, T) float32."""
    groups = q.float().unflatten(1, (k.shape[1], -1))                       # (B, K, H/K, T, D)
    own_keys = k[:, :, None, -q.shape[2]:].float()                          # (B, K, 1, T, D)
    return ((groups * own_keys).sum(-1).flatten(1, 2) * scale - lse).clamp(max=0).exp()


def tokens_before(tokens: Tensor, segments: Tensor | None = None) -> Tensor:
    """The token before each of (B, S); −1 at the start of the sequence and of a document."""
    before = F.pad(tokens[:, :-1], (1, 0), value=-1)
    if segments is None:
        return before
    return before.masked_fill(F.pad(segments.diff(dim=1) != 0, (1, 0)), -1)


def induction_targets(tokens: Tensor, segments: Tensor | None = None) -> Tensor:
    """For each token of (B, S), the position after its latest earlier place in its document.

    −1 if there is none: (B, S).
    """
    if segments is not None:            # the same token in another document counts as another token
        least = segments.amin()
        tokens = tokens.long() * (segments.amax() - least + 1) + segments - least
    # A stable sort puts equal tokens side by side, in order of position.
    ids, order = tokens.sort(dim=1, stable=True)
    again = F.pad(ids[:, 1:] == ids[:, :-1], (1, 0))
    earlier = F.pad(order[:, :-1], (1, 0))
    return torch.empty_like(order).scatter_(1, order, torch.where(again, earlier + 1, -1))


def _in_chunks(problem: Problem, lse: Tensor, tokens: Tensor, before: Tensor, targets: Tensor,
               entries: int = 2 ** 22) -> Tensor:
    """(PLANES, B, H, T), from about `entries` numbers of the pattern at a time."""
    q, k, _, window, segments, scale = problem
    (B, H, T, _), (_, K, S, _) = q.shape, k.shape
    planes = q.new_empty(PLANES, B, H, T, dtype=torch.float32)
    q = q.unflatten(1, (K, H // K)).float() * scale                         # (B, K, H/K, T, D)
    keys = k[:, :, None].float().mT                                         # (B, K, 1, D, S)
    lse = lse.unflatten(1, (K, H // K))[..., None]                          # (B, K, H/K, T, 1)
    key = torch.arange(S, device=q.device)
    chunk = max(1, entries // max(1, B * H * S))
    for t in range(0, T, chunk):
        rows = slice(t, min(t + chunk, T))
        position = torch.arange(S - T + rows.start, S - T + rows.stop, device=q.device)
        sees = visible(T, S, window=window, segments=segments, rows=rows, device=q.device).float()
        sees = sees if sees.dim() == 2 else sees[:, :, None]        # (t, S) or (B, 1, 1, t, S)
        # Clamped: the score of a key that is not seen may exceed lse by far, and inf · 0 is NaN.
        log = (q[..., rows, :] @ keys).sub_(lse[..., rows, :]).clamp_(max=0)
        pattern, log = log.exp().mul_(sees).flatten(1, 2), log.flatten(1, 2)    # (B, H, t, S)
        token, target = tokens[:, position, None], targets[:, position]     # (B, t, 1), (B, t)
        follows = token == before[:, None]                                  # (B, t, S)
        repeats = (token == tokens[:, None]) & (key < position[:, None])    # (B, t, S)
        # From the chunk's first row, so that large positions cost no digits.
        gap = (position[0] - key).float()
        planes[Plane.PREFIX_MATCHING, ..., rows] = torch.einsum("bhts,bts->bht", pattern,
                                                                follows.float())
        planes[Plane.DUPLICATE_TOKEN, ..., rows] = torch.einsum("bhts,bts->bht", pattern,
                                                                repeats.float())
        planes[Plane.PREVIOUS_TOKEN, ..., rows] = _entries(pattern, position[None] - 1)
        planes[Plane.FIRST_TOKEN, ..., rows] = pattern[..., 0]
        planes[Plane.ENTROPY, ..., rows] = -(pattern * log).sum(-1)
        planes[Plane.DISTANCE, ..., rows] = (
            pattern @ gap + pattern.sum(-1) * (position - position[0]))
        for n, offset in enumerate(range(-REACH, REACH + 1)):
            planes[Plane.OFFSET_PROFILE + n, ..., rows] = _entries(
                pattern, (target + offset).masked_fill(target < 0, -1))
    return planes


def _entries(pattern: Tensor, keys: Tensor) -> Tensor:
    """A[i, keys_i] of the rows of a pattern (B, H, t, S), for keys (B or 1, t): (B, H, t).

    0 if keys_i is outside the pattern.
    """
    S = pattern.shape[-1]
    index = keys.clamp(0, S - 1)[:, None, :, None].expand(*pattern.shape[:3], 1)
    outside = ((keys < 0) | (keys >= S))[:, None]
    return pattern.gather(-1, index)[..., 0].masked_fill(outside, 0)
