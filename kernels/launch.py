"""Starting a kernel: with which tile sizes, on which device."""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from kernels.tiles import for_copy_engine, source

VARYING = ["H", "K", "T", "S", "blocks", "window"]          # a kernel is not compiled anew when only these change


class Tile(NamedTuple):
    rows: int           # queries that a program holds, or visits at a time
    columns: int        # keys, likewise
    warps: int
    stages: int         # tiles on their way while one is worked on


# family → kernel → (bytes of an element, D up to) → tile. Each is the largest found that the compiler keeps in registers
# (of several, the one with fewer programs for the same work): beside it the registers a thread and the shared memory that
# `python -m kernels.ahead_of_time` measured, causal, triton 3.7.1. float32 is computed as three tf32 products, which takes
# registers; only at D = 256 does it spill, by the bytes given. None has been timed yet: `python -m bench.attention --tune`.
FP32 = {
    "forward": {(4, 64): Tile(32, 32, 4, 2), (4, 128): Tile(32, 32, 8, 2), (4, 256): Tile(16, 16, 8, 2)},
    "backward_q": {(4, 64): Tile(32, 32, 8, 2), (4, 128): Tile(32, 32, 8, 1), (4, 256): Tile(16, 16, 8, 2)},
    "backward_kv": {(4, 64): Tile(32, 32, 8, 2), (4, 128): Tile(32, 16, 8, 2), (4, 256): Tile(16, 16, 8, 2)},
    "decode_part": {(4, 64): Tile(16, 64, 4, 2), (4, 128): Tile(16, 32, 4, 3), (4, 256): Tile(16, 32, 8, 2)},
    "statistics_rows": {(4, 64): Tile(32, 32, 8, 1), (4, 128): Tile(32, 16, 8, 2), (4, 256): Tile(16, 16, 4, 1)},
}
TILES: dict[str, dict[str, dict[tuple[int, int], Tile]]] = {
    "hopper": {
        "forward": {(2, 64): Tile(128, 128, 8, 2), (2, 128): Tile(128, 128, 8, 2), (2, 256): Tile(128, 64, 8, 2)},
        "backward_q": {(2, 64): Tile(128, 64, 8, 2), (2, 128): Tile(128, 64, 8, 2), (2, 256): Tile(128, 32, 8, 2)},
        "backward_kv": {(2, 64): Tile(64, 128, 8, 2), (2, 128): Tile(64, 64, 8, 2), (2, 256): Tile(32, 64, 8, 2)},
        "decode_part": {(2, 64): Tile(16, 128, 4, 3), (2, 128): Tile(16, 64, 4, 3), (2, 256): Tile(16, 64, 4, 3)},
        "statistics_rows": {(2, 64): Tile(128, 64, 8, 2), (2, 128): Tile(128, 64, 8, 2), (2, 256): Tile(128, 64, 8, 2)},
    },
    "ampere": {
        "forward": {(2, 64): Tile(128, 64, 4, 3), (2, 128): Tile(128, 64, 8, 3), (2, 256): Tile(64, 64, 8, 2)},
        "backward_q": {(2, 64): Tile(128, 64, 8, 2), (2, 128): Tile(128, 32, 8, 2), (2, 256): Tile(64, 32, 8, 2)},
        "backward_kv": {(2, 64): Tile(32, 128, 8, 2), (2, 128): Tile(64, 64, 8, 2), (2, 256): Tile(32, 64, 8, 2)},
        "decode_part": {(2, 64): Tile(16, 128, 4, 3), (2, 128): Tile(16, 64, 4, 3), (2, 256): Tile(16, 64, 4, 3)},
        "statistics_rows": {(2, 64): Tile(128, 64, 8, 2), (2, 128): Tile(128, 64, 8, 2), (2, 256): Tile(64, 64, 4, 2)},
    },
    # Small and of unequal sides, so that tests of a hundred positions cross many borders.
    "interpreter": {name: {(4, 256): Tile(32, 16, 4, 1)} for name in FP32},
}
for device_family in ("hopper", "ampere"):
    TILES[device_family] = {name: table | FP32[name] for name, table in TILES[device_family].items()}
TILES["cdna"] = TILES["ampere"]
SMALLER = (Tile(64, 32, 4, 2), Tile(32, 32, 4, 1), Tile(16, 16, 4, 1))      # for devices with little shared memory
_too_large: set[tuple] = set()


@cache
def family(device: torch.device) -> str:
    """Which rows of TILES a device reads. On a CPU the interpreter runs the kernels."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return "cdna"
    return "hopper" if torch.cuda.get_device_capability(device)[0] >= 9 else "ampere"


def tiles(kernel: str, device_family: str, element: int, dims: int) -> list[Tile]:
    """The tile measured to be best for elements of so many bytes and heads of up to `dims`, then ever smaller ones."""
    table = TILES[device_family][kernel]
    best = table[min(key for key in table if key[0] >= element and key[1] >= dims)]
    return [best, *(t for t in SMALLER if t.rows * t.columns < best.rows * best.columns)]


def launch(kernel, grid: Callable[[Tile], tuple[int, ...]], like: Tensor, /, *, rows: dict[str, Tensor] = {}, columns: dict[str, Tensor] = {},
           copy_engine: bool = True, max_rows: int = 1024, **arguments) -> None:
    """Start `kernel` on the `grid` of the best tile that fits, on the device and in the dtype of `like` (…, D).

    rows, columns: (B, heads, positions, D) tensors that it reads a tile's rows, or columns, at a time: through the copy
    engine where the device has one and `copy_engine` allows it.
    """
    device_family, D = family(like.device), like.shape[-1]
    dims = max(16, triton.next_power_of_2(D))
    tma = copy_engine and device_family in ("hopper", "interpreter") and like.itemsize == 2     # fp32 through it spills a kilobyte
    if device_family == "cdna":
        arguments["PRECISION"] = "ieee"                 # its matrix units multiply float32 as it is
    if tma:
        rows, columns = ({name: for_copy_engine(t) for name, t in group.items()} for group in (rows, columns))
    arguments |= {f"{name}_strides": t.stride() for name, t in (rows | columns).items()}
    for tile in tiles(kernel.__name__, device_family, like.itemsize, dims):
        tile = tile._replace(rows=min(tile.rows, max_rows))
        if (kernel.__name__, like.device, like.dtype, dims, tile) in _too_large:
            continue
        sources = {name: source(t, tile.rows, dims, tma) for name, t in rows.items()}
        sources |= {name: source(t, tile.columns, dims, tma) for name, t in columns.items()}
        try:
            start(kernel, grid(tile), **sources, **arguments, D=D, DIMS=dims, ROWS=tile.rows, COLUMNS=tile.columns, TMA=tma,
                  num_warps=tile.warps, num_stages=tile.stages)
            return
        except OutOfResources:
            _too_large.add((kernel.__name__, like.device, like.dtype, dims, tile))
    raise ValueError(f"attention: no tile of {kernel.__name__} fits {like.device} for D={D} in {like.dtype}; backend='sdpa' serves it")


def start(kernel, grid: tuple[int, ...], **arguments) -> None:
    """Every kernel starts here. Multiply-adds are fused, which newer versions of triton want said."""
    kernel[grid](**arguments, enable_fp_fusion=True)
