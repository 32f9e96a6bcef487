"""How a token knows its position."""

from math import ceil, floor, log, pi

import torch
from torch import Tensor

from model.config import RopeScaling


def rope_table(n_ctx: int, size: int, base: float, scaling: RopeScaling | None = None) -> Tensor:
    """Cosines and signed sines of every position, for `rotate`: (2, C, size) float32 (Su et al.
    2021, eq. 34). `size`: how many components of each head are rotated."""
    frequencies = _frequencies(size, base)
    if scaling is not None:
        frequencies = scaled(frequencies, base, scaling)
    angles = _angles(n_ctx, frequencies)                                        # (C, size / 2)
    cos, sin = angles.cos(), angles.sin()
    table = torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)])
    if scaling is not None and scaling.kind == "yarn":
        table *= scaling.attention_factor or 0.1 * log(scaling.factor) + 1
    return table.float()


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate each pair (x_i, x_{i+D/2}) of x (…, T, D) by its position's angle; `table`
    (2, …, T, D) is rope_table's.

    Pairs are half-split, as in Hugging Face's Llama. The product of a rotated q and k then depends
    only on their distance. If the table is narrower than x, the rest of x stays as it is.
    """
    cos, signed_sin = table
    size = cos.shape[-1]
    if size < x.shape[-1]:
        return torch.cat([rotate(x[..., :size], table), x[..., size:]], dim=-1)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * cos + wide.roll(size // 2, dims=-1) * signed_sin).to(x.dtype)


def scaled(frequencies: Tensor, base: float, scaling: RopeScaling) -> Tensor:
    """RoPE's frequencies (size / 2,) for a longer context.

    linear divides all by `factor` (Chen et al. 2023). llama3 and yarn keep the fast pairs, divide
    the slow ones, and interpolate between: llama3 by how often a pair turns in the original context
    (Llama 3.1's reference code), yarn by the pair's index (Peng et al. 2023, section 3.2, in the
    form of its reference code).
    """
    slower = frequencies / scaling.factor
    if scaling.kind == "linear":
        return slower
    assert scaling.original_n_ctx is not None       # RopeScaling.conflicts has checked it
    if scaling.kind == "llama3":
        turns = scaling.original_n_ctx * frequencies / (2 * pi)
        kept = (turns - scaling.slow_turns) / (scaling.fast_turns - scaling.slow_turns)
    else:
        pairs = len(frequencies)
        first = _pair_that_turns(scaling.fast_turns, pairs, base, scaling.original_n_ctx)
        last = _pair_that_turns(scaling.slow_turns, pairs, base, scaling.original_n_ctx)
        if scaling.truncate:
            first, last = floor(first), ceil(last)
        first, last = max(first, 0), min(last, 2 * pairs - 1)       # the bounds of the reference
        index = torch.arange(pairs, dtype=frequencies.dtype, device=frequencies.device)
        span = last - first if last != first else 0.001             # as in the reference code
        kept = 1 - ((index - first) / span).clamp(0, 1)
    kept = kept.clamp(0, 1)
    return kept * frequencies + (1 - kept) * slower


def _pair_that_turns(turns: float, pairs: int, base: float, n_ctx: int) -> float:
    """The index, a real number, of the pair that turns `turns` times in n_ctx positions."""
    return pairs * log(n_ctx / (turns * 2 * pi)) / log(base)


def _frequencies(size: int, base: float) -> Tensor:
    """The angle of each pair from one position to the next: (size / 2,) float64."""
    return base ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)


def _angles(n_ctx: int, frequencies: Tensor) -> Tensor:
    """Position times frequency of each pair: (C, pairs) float64. bf16 could not tell position 511
    from 512."""
    return torch.arange(n_ctx, dtype=torch.float64)[:, None] * frequencies


def sinusoidal_table(n_ctx: int, d_model: int) -> Tensor:
    """The fixed position vectors of Vaswani et al. 2017, section 3.5: (C, E) float32, sines before
    cosines."""
    angles = _angles(n_ctx, _frequencies(d_model, 10000.0))
    return torch.cat([angles.sin(), angles.cos()], dim=-1).float()
