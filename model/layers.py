"""The parts of the network: matrices, embeddings, norms. And how matrices that read the same input
become one product."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """x wᵀ + b. The weight is kept in float32 and cast to the dtype of x at every use: no autocast,
    nothing hidden."""

    def __init__(self, n_in: int, n_out: int, bias: bool = False):
        super().__init__(n_in, n_out, bias)

    def forward(self, x: Tensor) -> Tensor:
        return affine(x, self.weight, self.bias)


def affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x wᵀ + b in the dtype of x."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def new_embedding(rows: int, size: int) -> nn.Embedding:
    """An embedding whose values are set later. nn.Embedding draws them, which on the meta device
    would load PyTorch's compiler: a second at every start."""
    return nn.Embedding.from_pretrained(torch.empty(rows, size), freeze=False)


# --- norms ------------------------------------------------------------------------------------

class RMSNorm(nn.Module):
    """x / rms(x), times a gain per channel (Zhang and Sennrich 2019, eq. 4)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.gain.shape, self.gain.to(x.dtype), self.eps)


class LayerNorm(nn.Module):
    """(x − mean) / deviation, times a gain and plus a bias per channel (Ba et al. 2016)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.gain, self.bias = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        gain, bias = self.gain.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(x, self.gain.shape, gain, bias, self.eps)


NORMS: dict[str, type[RMSNorm] | type[LayerNorm]] = {"rmsnorm": RMSNorm, "layernorm": LayerNorm}


# --- several matrices as one ------------------------------------------------------------------

class Joined(NamedTuple):
    """Matrices that read the same input, stacked as one."""

    weight: Tensor              # (sum of outputs, inputs)
    bias: Tensor | None


def join(*matrices: Linear) -> Joined:
    bias = None if matrices[0].bias is None else torch.cat([m.bias for m in matrices])
    return Joined(torch.cat([m.weight for m in matrices]), bias)


def apply_joined(x: Tensor, *matrices: Linear, packed: Joined | None = None) -> Tensor:
    """The outputs of several matrices, side by side: (…, inputs) → (…, sum of outputs).

    One large product is faster than several small ones, and each matrix stays a parameter of its
    own. `packed`: the matrices already joined, if they are.
    """
    dtype = matrices[0].weight.dtype
    gathered_in_16_bits = dtype == x.dtype and dtype != torch.float32
    if packed is None and gathered_in_16_bits:
        # FSDP gathered these weights only for this block. The backward pass would keep a joined
        # copy of them.
        return torch.cat([matrix(x) for matrix in matrices], dim=-1)
    weight, bias = join(*matrices) if packed is None else packed
    return affine(x, weight, bias)


def join_for_decoding(*matrices: Linear) -> Joined:
    """The matrices joined, and laid out for products with one vector."""
    weight, bias = join(*matrices)
    return Joined(for_decoding(weight), bias)


def for_decoding(matrix: Tensor) -> Tensor:
    """The same matrix, column-major in memory: a product with one vector then reads it 1.5 times
    as fast on a CPU."""
    return matrix.detach().mT.contiguous().mT
