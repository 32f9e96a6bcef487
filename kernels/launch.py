"""Starting a kernel: with which tile sizes, on which device."""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from kernels.tiles import for_copy_engine, for_pointers, source

VARYING = ["H", "K", "T", "S", "blocks", "window"]          # a kernel is not compiled anew when only these change


class Tile(NamedTuple):
    rows: int           # queries that a program holds, or visits at a time
    columns: int        # keys, likewise
    warps: int
    stages: int         # depth of the pipeline: stages − 1 tiles are on their way while one is worked on


# family → kernel → (bytes of an element, D up to) → tile. Each is the largest found for which the compiler keeps everything in
# registers and, on Hopper, does not wait for each matrix instruction: `python -m kernels.ahead_of_time` measures that, and
# docs/kernels.md has the figures of every row. float32 is three tf32 products a product, which takes registers: at D = 256
# even the smallest spills. None has been timed yet; `python -m bench.attention --tune` does.
FP32 = {
    "forward": {(4, 64): Tile(32, 32, 4, 2), (4, 128): Tile(32, 32, 8, 2), (4, 256): Tile(16, 16, 8, 2)},
    "backward_q": {(4, 64): Tile(32, 32, 8, 2), (4, 128): Tile(32, 32, 8, 1), (4, 256): Tile(16, 16, 8, 2)},
    "backward_kv": {(4, 64): Tile(32, 32, 8, 2), (4, 128): Tile(32, 16, 8, 2), (4, 256): Tile(16, 16, 8, 2)},
    "decode_part": {(4, 64): Tile(16, 64, 4, 2), (4, 128): Tile(16, 32, 4, 3), (4, 256): Tile(16, 16, 8, 2)},
    "statistics_rows": {(4, 64): Tile(32, 32, 8, 1), (4, 128): Tile(32, 16, 8, 2), (4, 256): Tile(16, 16, 4, 1)},
}
TILES: dict[str, dict[str, dict[tuple[int, int], Tile]]] = {
    "hopper": {
        "forward": {(2, 64): Tile(128, 128, 8, 2), (2, 128): Tile(128, 128, 8, 2), (2, 256): Tile(128, 64, 8, 2)},
        "backward_q": {(2, 64): Tile(128, 64, 8, 2), (2, 128): Tile(128, 64, 8, 2), (2, 256): Tile(128, 32, 8, 2)},
        "backward_kv": {(2, 32): Tile(64, 64, 8, 2), (2, 64): Tile(64, 128, 8, 2), (2, 128): Tile(64, 128, 8, 2),
                        (2, 256): Tile(32, 64, 8, 2)},
        "decode_part": {(2, 64): Tile(16, 128, 4, 3), (2, 128): Tile(16, 64, 4, 3), (2, 256): Tile(16, 64, 4, 3)},
        "statistics_rows": {(2, 64): Tile(128, 64, 8, 2), (2, 128): Tile(128, 64, 8, 2), (2, 256): Tile(128, 64, 8, 2)},
    },
    "ampere": {
        "forward": {(2, 64): Tile(128, 64, 4, 3), (2, 128): Tile(128, 64, 8, 3), (2, 256): Tile(64, 64, 8, 2)},
        "backward_q": {(2, 64): Tile(128, 64, 8, 2), (2, 128): Tile(128, 32, 8, 2), (2, 256): Tile(64, 32, 8, 2)},
        "backward_kv": {(2, 64): Tile(32, 128, 8, 2), (2, 128): Tile(64, 64, 8, 2), (2, 256): Tile(32, 64, 8, 2)},
        "decode_part": {(2, 64): Tile(16, 128, 4, 3), (2, 128): Tile(16, 64, 4, 3), (2, 256): Tile(16, 64, 4, 2)},
        "statistics_rows": {(2, 64): Tile(128, 64, 8, 2), (2, 128): Tile(128, 64, 8, 2), (2, 256): Tile(64, 64, 4, 2)},
    },
    # Small and of unequal sides, so that tests of a hundred positions cross many borders.
    "interpreter": {name: {(4, 256): Tile(32, 16, 4, 1)} for name in FP32},
}
TILES |= {name: {kernel: table | FP32[kernel] for kernel, table in TILES[name].items()} for name in ("hopper", "ampere")}
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
    """The table's tile for elements of so many bytes and heads of up to `dims`, then ever smaller ones."""
    table = TILES[device_family][kernel]
    best = table[min(key for key in table if key[0] >= element and key[1] >= dims)]
    return [best, *(t for t in SMALLER if t.rows * t.columns < best.rows * best.columns)]


def has_copy_engine(like: Tensor) -> bool:
    """Whether tiles of such tensors come through it. Not float32's: that way they spill a kilobyte a thread."""
    return like.itemsize == 2 and family(like.device) in ("hopper", "interpreter")


def readable(*tensors: Tensor) -> list[Tensor]:
    """(B, heads, positions, D) tensors as the kernels can read them: almost always as they are."""
    return [for_copy_engine(t) if has_copy_engine(t) else for_pointers(t) for t in tensors]


def launch(kernel, grid: Callable[[Tile], tuple[int, ...]], like: Tensor, /, *, columns: dict[str, Tensor],
           rows: dict[str, Tensor] | None = None, copy_engine: bool = True, n_rows: int | None = None, **arguments) -> None:
    """Start `kernel` on the `grid` of the first tile that fits, on the device and in the dtype of `like` (…, D).

    rows, columns: `readable` tensors that it reads a tile's rows, or columns, at a time: through the copy engine where
    there is one and `copy_engine` allows it. n_rows: rows of a tile, where the work and not the table says. Raises ValueError
    where no tile fits.
    """
    device_family, D, rows = family(like.device), like.shape[-1], rows or {}
    dims, tma = max(16, triton.next_power_of_2(D)), copy_engine and has_copy_engine(like)
    if device_family == "cdna":
        arguments["PRECISION"] = "ieee"                 # its matrix units multiply float32 as it is
    arguments |= {f"{name}_strides": None if tma else t.stride() for name, t in (rows | columns).items()}
    for tile in tiles(kernel.__name__, device_family, like.itemsize, dims):
        tile = tile._replace(rows=n_rows or tile.rows)
        if (kernel.__name__, like.device, like.dtype, dims, tile) in _too_large:
            continue
        sources = {name: source(t, tile.rows, dims, tma) for name, t in rows.items()}
        sources |= {name: source(t, tile.columns, dims, tma) for name, t in columns.items()}
        try:
            start(kernel, like, grid(tile), **sources, **arguments, D=D, DIMS=dims, ROWS=tile.rows, COLUMNS=tile.columns, TMA=tma,
                  num_warps=tile.warps, num_stages=tile.stages)
            return
        except OutOfResources:
            _too_large.add((kernel.__name__, like.device, like.dtype, dims, tile))
    raise ValueError(f"{kernel.__name__}: no tile fits {like.device} for D={D} in {like.dtype} (backend='sdpa' serves it)")


def start(kernel, like: Tensor, grid: tuple[int, ...], **arguments) -> None:
    """Every kernel starts here, on the device of `like`. Multiply-adds are fused, as was the default before triton 3.10.

    Raises ValueError for more tiles of positions than a grid counts: from 1 million positions on in float32, 2 million else.
    """
    if max(grid[1:], default=0) > 65535:
        raise ValueError(f"{kernel.__name__}: {max(grid[1:])} tiles of positions are more than a grid has (65535); use fewer positions")
    with torch.cuda.device_of(like):
        kernel[grid](**arguments, enable_fp_fusion=True)
