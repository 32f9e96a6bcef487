"""`python -m bench.attention --tune`: times of candidates for the table in kernels/launch.py."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench.attention_shapes import CONTEXTS, random_tokens, tensors
from bench.results import DEVICE, GPU
from bench.timers import kernel_milliseconds
from kernels import launch
from kernels.decode import decode
from kernels.flash import flash_attention, flash_attention_backward, launch_forward
from kernels.flash_gluon import launch_gluon
from kernels.launch import Tile
from kernels.problem import Problem
from kernels.statistics import head_statistics

# kernel → D → tiles (rows, columns, warps, stages, programs, maxnreg): those of the table, and
# others of which several programs fit a multiprocessor or of which each product reads few bytes.
# Some spill a little: time decides.
Candidates = dict[str, dict[int, list[tuple[int, ...]]]]        # kernel → D → tiles' fields
CANDIDATES: Candidates = {
    "forward": {
        64: [(128, 64, 8, 3, 2, 128), (128, 64, 8, 3), (128, 64, 8, 2), (128, 64, 8, 4),
             (128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 4, 3), (128, 128, 4, 3), (64, 128, 4, 2),
             (64, 64, 4, 3), (64, 64, 4, 4), (256, 64, 8, 3)],
        128: [(128, 32, 8, 3, 2, 128), (128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 8, 2),
              (128, 64, 8, 3), (128, 64, 4, 3), (128, 64, 8, 4), (64, 64, 4, 2), (64, 64, 4, 3),
              (64, 128, 4, 2)],
    },
    "backward_q": {
        64: [(128, 64, 8, 2, 2, 128), (128, 64, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2),
             (64, 64, 4, 3), (64, 128, 4, 2), (128, 128, 8, 2), (128, 64, 4, 2), (64, 32, 4, 3),
             (128, 32, 4, 3)],
        128: [(128, 64, 8, 2), (64, 64, 4, 2), (128, 32, 8, 2), (64, 32, 4, 2), (128, 64, 8, 3),
              (64, 64, 4, 3), (64, 32, 4, 3), (128, 128, 8, 1), (128, 32, 8, 3)],
    },
    "backward_kv": {
        64: [(32, 128, 8, 2, 2, 128), (64, 64, 4, 2, 3, 168), (64, 128, 8, 2), (32, 64, 4, 2),
             (64, 64, 4, 2), (64, 64, 4, 3), (32, 64, 4, 3), (64, 128, 8, 3), (128, 128, 8, 2),
             (128, 64, 8, 2), (64, 128, 8, 2, 2, 128), (32, 128, 4, 2), (64, 64, 8, 2)],
        128: [(32, 64, 4, 2), (64, 64, 4, 2), (64, 128, 8, 2), (32, 64, 4, 3), (64, 64, 8, 2),
              (128, 64, 8, 2), (32, 128, 8, 2), (64, 128, 8, 1), (64, 64, 8, 3), (32, 128, 8, 3)],
    },
    "statistics_rows": {
        64: [(128, 64, 8, 2), (64, 64, 4, 2), (64, 128, 4, 2), (128, 64, 8, 3), (64, 64, 4, 3),
             (128, 128, 8, 2), (64, 32, 4, 3)],
        128: [(128, 64, 8, 2), (64, 64, 4, 2), (64, 128, 4, 2), (128, 64, 8, 3), (64, 64, 4, 3),
              (128, 32, 8, 3)],
    },
    "forward_gluon": {
        64: [(128, 64, 8, 3), (64, 128, 4, 2), (64, 64, 4, 3), (128, 128, 8, 2), (128, 128, 8, 3),
             (64, 64, 4, 2), (64, 128, 4, 3), (128, 64, 8, 2)],
        128: [(128, 128, 8, 2), (64, 64, 4, 2), (128, 64, 8, 2), (128, 64, 8, 3), (64, 128, 4, 2),
              (64, 64, 4, 3)],
    },
    "decode_part": {
        64: [(16, 128, 4, 3), (16, 64, 4, 3), (16, 64, 4, 5), (16, 128, 4, 2), (16, 128, 8, 3),
             (16, 256, 4, 2), (16, 256, 8, 2), (16, 32, 2, 4)],
        128: [(16, 64, 4, 3), (16, 32, 4, 4), (16, 64, 4, 2), (16, 64, 4, 4), (16, 64, 8, 3),
              (16, 128, 4, 2), (16, 128, 8, 2), (16, 128, 8, 3)],
    },
}
TINY_CANDIDATES: Candidates = {
    kernel: {16: [(32, 32, 4, 1), (16, 16, 4, 1)]}
    for kernel in ("forward", "backward_q", "backward_kv", "statistics_rows", "decode_part")}


def tune() -> Iterator[dict]:
    """Milliseconds of forward and backward with each candidate tile in place of the table's."""
    T = CONTEXTS[3 if GPU else 0]
    for kernel, by_size in (CANDIDATES if GPU else TINY_CANDIDATES).items():
        if kernel not in launch.TILES[launch.gpu_family(torch.device(DEVICE.type, 0))]:
            continue                                            # Gluon's is only for Hopper
        for D, tiles in by_size.items():
            q, k, v, grad = (t.detach() for t in tensors(T, D, 1))
            ids = random_tokens(T)
            for tile in [Tile(*numbers) for numbers in tiles]:
                name = (f"{kernel:16} D {D:3}  {tile.rows:3} × {tile.columns:3}  "
                        f"warps {tile.warps}  stages {tile.stages}")
                try:
                    with launch.tile_for(kernel, tile):
                        ms = kernel_milliseconds(timed_call(kernel, q, k, v, grad, ids))
                except Exception as error:      # too large for the device, or for the compiler
                    print(f"{name}  {type(error).__name__}", flush=True)
                else:
                    print(f"{name}  {ms:.3f} ms", flush=True)
                    yield {"kernel": kernel, "D": D, "T": T, "tile": tile, "ms": ms}


def timed_call(kernel: str, q: Tensor, k: Tensor, v: Tensor, grad: Tensor,
               ids: Tensor) -> Callable[[], object]:
    """A call whose time depends on one kernel's tile (the backward kernels run together)."""
    scale = q.shape[-1] ** -0.5
    out, lse = flash_attention(q, k, v, True, None, None, scale)
    problem = Problem(q, k, scale=scale)
    if kernel == "forward":
        return lambda: launch_forward(problem, v, out, lse)
    if kernel == "forward_gluon":
        return lambda: launch_gluon(problem, v, out, lse)
    if kernel == "decode_part":
        k, v = k.contiguous(), v.contiguous()       # a cache's memory
        return lambda: decode(q[:, :, -1:], k, v, None, None, None, scale)
    if kernel == "statistics_rows":
        return lambda: head_statistics(q, k, lse, ids, backend="triton")
    return lambda: flash_attention_backward(grad, q, k, v, out, lse, True, None, None, scale)
