"""How a token knows where it is."""

from math import ceil, floor, log, pi

import torch
from torch import Tensor

from model.config import RopeScaling


def rope_table(n_ctx: int, size: int, base: float, scaling: RopeScaling | None = None) -> Tensor:
    """What `rotate` multiplies by at every position: cosines, and signed sines, (2, C, size) float32 (Su et al. 2021, eq. 34).

    `size`: how many numbers of each head are turned.
    """
    frequencies = _frequencies(size, base)
    angles = _angles(n_ctx, frequencies if scaling is None else scaled(frequencies, base, scaling))
    cos, sin = angles.cos(), angles.sin()
    table = torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)])
    if scaling is not None and scaling.kind == "yarn":
        table *= scaling.attention_factor or 0.1 * log(scaling.factor) + 1
    return table.float()


def scaled(frequencies: Tensor, base: float, scaling: RopeScaling) -> Tensor:
    """The frequencies (size / 2,) of rope for a longer context. Between the pairs that stay and those that are `factor` times slower,
    llama3 goes over by how often a pair turns in the original context (Llama 3.1's reference code), yarn by the pair's place (Peng et
    al. 2023, section 3.2, in its reference code's form)."""
    slower = frequencies / scaling.factor
    if scaling.kind == "linear":
        return slower
    assert scaling.original_n_ctx is not None       # RopeScaling has seen to it
    if scaling.kind == "llama3":
        turns = scaling.original_n_ctx * frequencies / (2 * pi)
        stays = ((turns - scaling.slow_turns) / (scaling.fast_turns - scaling.slow_turns)).clamp(0, 1)
        return stays * frequencies + (1 - stays) * slower
    pairs = len(frequencies)
    # The pair that turns so many times in the original context, as a real number; bounds are in halves of pairs, as there.
    first, last = (pairs * log(scaling.original_n_ctx / (turns * 2 * pi)) / log(base) for turns in (scaling.fast_turns, scaling.slow_turns))
    if scaling.truncate:
        first, last = floor(first), ceil(last)
    first, last = max(first, 0), min(last, 2 * pairs - 1)
    place = torch.arange(pairs, dtype=frequencies.dtype, device=frequencies.device)
    stays = 1 - ((place - first) / (last - first or 0.001)).clamp(0, 1)
    return stays * frequencies + (1 - stays) * slower


def _frequencies(size: int, base: float) -> Tensor:
    """What each pair turns by from one position to the next: (size / 2,) float64."""
    return base ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)


def _angles(n_ctx: int, frequencies: Tensor) -> Tensor:
    """Position times frequency of each pair: (C, pairs) float64; bf16 could not tell position 511 from 512."""
    return torch.arange(n_ctx, dtype=torch.float64)[:, None] * frequencies


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i+D/2}) of x (…, T, D) by its position's angle; `table` (2, …, T, D) is rope_table's.

    Half-split pairs, as in Llama's Hugging Face layout. The scores of q and k then depend on their distance alone. Where the table is
    narrower than x, the rest of x stays as it is.
    """
    cos, signed_sin = table
    if (size := cos.shape[-1]) < x.shape[-1]:
        return torch.cat([rotate(x[..., :size], table), x[..., size:]], dim=-1)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * cos + wide.roll(x.shape[-1] // 2, dims=-1) * signed_sin).to(x.dtype)


def sinusoidal_table(n_ctx: int, d_model: int) -> Tensor:
    """The fixed position vectors of Vaswani et al. 2017, section 3.5: (C, E) float32, the sines before the cosines."""
    angles = _angles(n_ctx, _frequencies(d_model, 10000.0))
    return torch.cat([angles.sin(), angles.cos()], dim=-1).float()
