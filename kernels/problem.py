"""The arguments that every way to compute an attention pattern takes, under one name."""

from typing import NamedTuple

from torch import Tensor


class Problem(NamedTuple):
    """An attention call without its values: queries, keys, and which keys each query sees.

    `attention` in kernels/attention.py says what the fields mean. Our kernels need a scale above 0.
    """

    q: Tensor                           # (B, H, T, D)
    k: Tensor                           # (B, K, S, D)
    causal: bool = True
    window: int | None = None
    segments: Tensor | None = None      # (B, S)
    scale: float | None = None          # 1/√D unless given
