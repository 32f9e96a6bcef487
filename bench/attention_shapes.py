"""What `bench.attention` and its `--tune` measure on: bf16, 16k tokens per batch, width 2048.

Without a GPU, tiny shapes in float32.
"""

import torch
from torch import Tensor

from bench.results import DEVICE, DTYPE, GPU

TOKENS, WIDTH = (16384, 2048) if GPU else (32, 32)
CONTEXTS = (512, 1024, 2048, 4096, 8192, 16384) if GPU else (16, 32)
HEAD_SIZES = (64, 128) if GPU else (16,)
GROUPS = (1, 4) if GPU else (1, 2)


def tensors(T: int, D: int, groups: int) -> list[Tensor]:
    """q, k, v and a gradient: (B, heads, T, D) over (B, T, heads, D) memory, as projections write.

    q, k and v require gradients.
    """
    B, H = TOKENS // T, WIDTH // D
    shapes = [(B, T, H, D), (B, T, H // groups, D), (B, T, H // groups, D), (B, T, H, D)]
    random = own_generator()
    q, k, v, grad = (torch.randn(shape, device=DEVICE, dtype=DTYPE, generator=random)
                     .transpose(1, 2) for shape in shapes)
    return [q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), grad]


def random_tokens(T: int) -> Tensor:
    """(B, T) ids of a batch."""
    return torch.randint(0, 500, (TOKENS // T, T), device=DEVICE, generator=own_generator())


def repeated_tokens(T: int) -> Tensor:
    """(B, T) ids: distinct ones, then the same again, as in probes of induction heads."""
    block = torch.rand(TOKENS // T, T // 2, device=DEVICE, generator=own_generator()).argsort()
    return block.repeat(1, 2)


def own_generator() -> torch.Generator:
    """Not PyTorch's default one, which is unusable after a capture that failed."""
    return torch.Generator(DEVICE).manual_seed(0)
