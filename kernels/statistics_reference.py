"""The head scores by definition, on the dense pattern: kernels/statistics.py is tested against it.

Each function takes a pattern A (B, H, T, T), A[…, i, j] = how much query i attends to key j, and
the tokens x (B, T), and returns one number per query: (B, H, T). All hold T × T numbers, so they
are for short sequences, for tests and for plots. With fewer queries than keys, A (B, H, T, S), the
queries are the last T of the S positions. To keep documents apart see `tokens_by_document`.

Definitions: Olsson et al. 2022, "In-context learning and induction heads".
"""

import torch
from torch import Tensor

from kernels.planes import REACH


def prefix_matching(A: Tensor, tokens: Tensor) -> Tensor:
    """Σ A[i, j] over all j ≤ i with x_{j−1} = x_i: 1 for a perfect induction head."""
    return (A * follows_same_token(A, tokens)).sum(-1)


def latest_match(A: Tensor, tokens: Tensor) -> Tensor:
    """A[i, j] at the largest j ≤ i with x_{j−1} = x_i, the induction target; 0 if there is none."""
    return entry(A, induction_target(A, tokens))


def current_token(A: Tensor) -> Tensor:
    """A[i, i]."""
    return entry(A, query_positions(A))


def previous_token(A: Tensor) -> Tensor:
    """A[i, i − 1]; 0 for the first position."""
    return entry(A, query_positions(A) - 1)


def duplicate_token(A: Tensor, tokens: Tensor) -> Tensor:
    """Σ A[i, j] over all j < i with x_j = x_i."""
    key = torch.arange(A.shape[-1], device=A.device)
    same = tokens_of_queries(A, tokens)[..., None] == tokens[:, None, None]     # (B, 1, T, S)
    return (A * (same & (key < query_positions(A)[:, None]))).sum(-1)


def first_token(A: Tensor) -> Tensor:
    """A[i, 0]."""
    return A[..., 0]


def entropy(A: Tensor) -> Tensor:
    """−Σ A[i, j] ln A[i, j], in nats. The score divides it by ln(number of keys that i sees)."""
    return torch.special.entr(A).sum(-1)


def distance(A: Tensor) -> Tensor:
    """Σ (i − j) A[i, j], in tokens."""
    key = torch.arange(A.shape[-1], device=A.device)
    return (A * (query_positions(A)[:, None] - key)).sum(-1)


def offset_profile(A: Tensor, tokens: Tensor, reach: int = REACH) -> Tensor:
    """A[i, target + o] for o = −reach … reach, 0 if there is no target.

    (B, H, T, 2 · reach + 1)
    """
    target = induction_target(A, tokens)
    columns = []
    for offset in range(-reach, reach + 1):
        columns.append(entry(A, torch.where(target < 0, -1, target + offset)))
    return torch.stack(columns, -1)


# --- what they share ---

def query_positions(A: Tensor) -> Tensor:
    """Where each row of A is among the keys: (T,)."""
    T, S = A.shape[-2:]
    return torch.arange(S - T, S, device=A.device)


def tokens_of_queries(A: Tensor, tokens: Tensor) -> Tensor:
    """(B, 1, T)."""
    return tokens[:, None, query_positions(A)]


def follows_same_token(A: Tensor, tokens: Tensor) -> Tensor:
    """Whether j ≤ i and x_{j−1} = x_i: (B, 1, T, S) bool. The first key follows nothing."""
    key = torch.arange(A.shape[-1], device=A.device)
    matches = tokens_of_queries(A, tokens)[..., None] == tokens.roll(1, dims=-1)[:, None, None]
    return matches & (key > 0) & (key <= query_positions(A)[:, None])


def induction_target(A: Tensor, tokens: Tensor) -> Tensor:
    """The largest j ≤ i with x_{j−1} = x_i, or −1: (B, 1, T)."""
    key = torch.arange(A.shape[-1], device=A.device)
    return torch.where(follows_same_token(A, tokens), key, -1).amax(-1)


def entry(A: Tensor, keys: Tensor) -> Tensor:
    """A[i, keys_i], 0 where keys_i is outside 0 … S − 1: (B, H, T)."""
    S = A.shape[-1]
    index = keys.clamp(0, S - 1).expand(A.shape[:-1])[..., None]
    return A.gather(-1, index)[..., 0] * ((keys >= 0) & (keys < S))


def tokens_by_document(tokens: Tensor, segments: Tensor) -> Tensor:
    """Ids, equal if both token and document are: no token then matches one in another document."""
    return tokens * (segments.amax() + 1) + segments
