"""What the network is made of: matrices, embeddings and norms, and how matrices are laid out for decoding."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """A matrix, kept in float32 and used in the dtype of what it multiplies: no autocast, nothing hidden."""

    def __init__(self, n_in: int, n_out: int, bias: bool = False):
        super().__init__(n_in, n_out, bias=False)
        if bias:
            self.bias = nn.Parameter(torch.zeros(n_out))

    def forward(self, x: Tensor) -> Tensor:
        return affine(x, self.weight, self.bias)


def affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x wᵀ + b in the dtype of x."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def join(matrices: Sequence[Linear]) -> tuple[Tensor, Tensor | None]:
    """Matrices that read the same input as one, and their biases."""
    bias = None if matrices[0].bias is None else torch.cat([m.bias for m in matrices])
    return torch.cat([m.weight for m in matrices]), bias


def joined(x: Tensor, *matrices: Linear, packed: tuple[Tensor, Tensor | None] | None = None) -> Tensor:
    """Matrices that read the same input, applied as one product (…, sum of their outputs): one large one is faster than
    several small ones, and each stays a parameter of its own. `packed`: what `join` makes of them, where it is at hand."""
    if packed is None and matrices[0].weight.dtype == x.dtype != torch.float32:
        # In 16 bits weights are here for this block alone, gathered by FSDP; a joined copy would be kept for the backward pass.
        return torch.cat([matrix(x) for matrix in matrices], dim=-1)
    return affine(x, *(join(matrices) if packed is None else packed))


def joined_for_decoding(*matrices: Linear) -> tuple[Tensor, Tensor | None]:
    """Joined matrices laid out for decoding."""
    weight, bias = join(matrices)
    return for_decoding(weight), bias


def for_decoding(matrix: Tensor) -> Tensor:
    """The same matrix with its memory turned: a product with one vector then reads it 1.5 times as fast on a CPU."""
    return matrix.detach().mT.contiguous().mT


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
        return F.layer_norm(x, self.gain.shape, self.gain.to(x.dtype), self.bias.to(x.dtype), self.eps)


NORMS: dict[str, type[RMSNorm] | type[LayerNorm]] = {"rmsnorm": RMSNorm, "layernorm": LayerNorm}


def embedding(rows: int, size: int) -> nn.Embedding:
    """One whose values are still to come: to draw them on the meta device would load PyTorch's compiler, a second at every start."""
    return nn.Embedding.from_pretrained(torch.empty(rows, size), freeze=False)
