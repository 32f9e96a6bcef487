"""Tensors and masks in the form in which kernels take them."""

from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.problem import Problem
from kernels.tiles import SEGMENT_BLOCK


def kernel_arguments(problem: Problem) -> dict[str, Any]:
    """The shapes, masks and scale of a call, under the names that the kernels give them."""
    q, k, causal, window, segments, scale = problem
    S = k.shape[2]
    if window is not None and window >= S:
        window = None                               # every query sees as far back as there are keys
    least = most = None
    blocks = 0
    if segments is not None:
        # Ids of 64 bits would take registers that wide tiles do not have.
        segments = segments.to(torch.int32).contiguous()
        least, most = segment_ends(segments)
        blocks = least.shape[1]
    return {"segments": segments, "least": least, "most": most, "blocks": blocks,
            "H": q.shape[1], "K": k.shape[1], "T": q.shape[2], "S": S, "window": window or 0,
            "scale": scale, "CAUSAL": causal, "WINDOW": window is not None,
            "SEGMENTS": segments is not None}


def segment_ends(segments: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and the largest id in each SEGMENT_BLOCK positions of segments (B, S).

    (B, blocks) each.
    """
    padding = segments[:, -1:].expand(-1, -segments.shape[1] % SEGMENT_BLOCK.value)
    blocks = torch.cat([segments, padding], 1).unflatten(1, (-1, SEGMENT_BLOCK.value))
    return blocks.amin(-1), blocks.amax(-1)


def for_tma(tensor: Tensor) -> Tensor:
    """The tensor itself if TMA can read it, else a copy that it can read.

    It reads tensors whose columns are adjacent and whose other strides are multiples of 16 bytes.
    A projection writes such memory if 8 divides D.
    """
    size, (batch, head, position, column) = tensor.itemsize, tensor.stride()
    # The usual case. Testing it first saves 1 µs per tensor against leaving out dimensions of 1.
    aligned = (tensor.data_ptr() | (batch | head | position) * size) % 16 == 0
    if column == 1 and min(batch, head, position) > 0 and aligned:
        return tensor
    apart = [stride * size for stride, n in zip((batch, head, position), tensor.shape) if n > 1]
    if (column == 1 and tensor.data_ptr() % 16 == 0
            and all(stride > 0 and stride % 16 == 0 for stride in apart)):
        return tensor
    D, per_16_bytes = tensor.shape[3], 16 // size
    copy = tensor.new_empty(*tensor.shape[:3], -(-D // per_16_bytes) * per_16_bytes)[..., :D]
    return copy.copy_(tensor)


def descriptor(tensor: Tensor, rows: int, dims: int) -> TensorDescriptor:
    """A (B, heads, positions, D) tensor for TMA, read `rows` positions at a time.

    Made without triton's checks, which take 3 µs for each of a call's up to nine descriptors:
    `for_tma` has checked the same.
    """
    made = object.__new__(TensorDescriptor)
    made.__dict__ = descriptor_fields(tensor, rows, dims)
    return made


def descriptor_fields(tensor: Tensor, rows: int, dims: int) -> dict[str, Any]:
    """The attributes of a descriptor."""
    shape, strides = tensor.shape, tensor.stride()
    if 1 in shape:                          # the stride of a dimension of 1 may have any value
        strides = (*[16 if n == 1 else stride for n, stride in zip(shape, strides)][:3], 1)
    return {"base": tensor, "shape": shape, "strides": strides, "block_shape": [1, 1, rows, dims]}


def for_pointers(tensor: Tensor) -> Tensor:
    """The tensor itself, or a copy if a tile would span more than 32-bit offsets can address."""
    return tensor if max(tensor.stride()[2:]) * 256 < 2 ** 31 else tensor.contiguous()
