"""How a token knows where it is."""

import torch
from torch import Tensor


def rope_table(n_ctx: int, d_head: int, base: float) -> Tensor:
    """What `rotate` multiplies by at every position: cosines, and signed sines, (2, C, D) float32 (Su et al. 2021, eq. 34)."""
    angles = _angles(n_ctx, d_head, base)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)]).float()


def _angles(n_ctx: int, size: int, base: float) -> Tensor:
    """Position times frequency of each pair: (C, size / 2) float64; bf16 could not tell position 511 from 512."""
    frequencies = base ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    return torch.arange(n_ctx, dtype=torch.float64)[:, None] * frequencies


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i+D/2}) of x (…, T, D) by its position's angle; the rest is `table` (2, …, T, D) of rope_table.

    Half-split pairs, as in Llama's Hugging Face layout. The scores of q and k then depend on their distance alone.
    """
    cos, signed_sin = table
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * cos + wide.roll(x.shape[-1] // 2, dims=-1) * signed_sin).to(x.dtype)


def sinusoidal_table(n_ctx: int, d_model: int) -> Tensor:
    """The fixed position vectors of Vaswani et al. 2017, section 3.5: (C, E) float32, the sines before the cosines."""
    angles = _angles(n_ctx, d_model, 10000.0)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).float()
