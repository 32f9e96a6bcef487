"""Starting a kernel: with which tile sizes, on which device.

A short kernel ends before Python has started the next one. So what depends only on strides, dtypes
and masks is worked out once and kept as a `Plan`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import JITFunction
from triton.runtime.errors import OutOfResources
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.arguments import descriptor, for_pointers, for_tma

# A kernel is not compiled again if only these change.
VARYING = frozenset({"H", "K", "T", "S", "blocks", "window", "together", "chunk", "parts",
                     "queries"})
Grid = tuple[int, int, int]         # programs along each axis
Describe = Callable[[Tensor, int, int], TensorDescriptor]       # of tiles of so many rows, columns


# --- the table of tiles ---

class Tile(NamedTuple):
    rows: int           # queries that a program holds, or visits at a time
    columns: int        # keys, likewise
    warps: int
    stages: int         # depth of the pipeline: stages − 1 tiles are fetched ahead
    programs: int = 1   # that fit a multiprocessor at least: kernels/ahead_of_time.py counts them
    # Limit on registers per thread, if the compiler's own choice is a few too many for `programs`.
    maxnreg: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """The tile as triton's launch options."""
        options = {"num_warps": self.warps, "num_stages": self.stages}
        return options if self.maxnreg is None else options | {"maxnreg": self.maxnreg}


# family → kernel → (bytes of an element, D up to) → tile. Hopper's of 16 bits up to D = 128 are the
# fastest, or nearly, of some ten candidates each (`python -m bench.attention --tune`, on an H200):
# several programs fit a multiprocessor, so that softmax of one runs beside the products of another.
# The other rows were chosen by what the compiler says, by the same rule
# (`python -m kernels.ahead_of_time`; docs/kernels.md has the figures of every row): everything
# stays in registers, and Hopper does not wait for a matrix instruction before it issues the next. A
# float32 product is three tf32 products, which takes registers: at D = 256 even the smallest tile
# spills.
COMMON = {
    "forward": {(4, 64): Tile(32, 32, 4, 2, 2), (4, 128): Tile(32, 32, 8, 2),
                (4, 256): Tile(16, 16, 8, 2)},
    "backward_q": {(4, 64): Tile(32, 32, 8, 2), (4, 128): Tile(32, 32, 8, 1),
                   (4, 256): Tile(16, 16, 8, 2)},
    "backward_kv": {(4, 64): Tile(32, 32, 8, 2), (4, 128): Tile(32, 16, 8, 2),
                    (4, 256): Tile(16, 16, 8, 2)},
    "decode_part": {(4, 64): Tile(16, 64, 4, 2, 2), (4, 128): Tile(16, 32, 4, 3),
                    (4, 256): Tile(16, 16, 8, 2)},
    "statistics_rows": {(4, 64): Tile(32, 32, 8, 1), (4, 128): Tile(32, 16, 8, 2),
                        (4, 256): Tile(16, 16, 4, 1, 2)},
    "decode_combine": {(size, D): Tile(1, 16, 4, 1, 10) for size in (2, 4) for D in (64, 128, 256)},
    # If the targets of 16 rows follow each other, their 17 places each are among 32 adjacent keys.
    "statistics_places": {(size, D): Tile(16, 32, 4, 1, 2)
                          for size in (2, 4) for D in (64, 128, 256)},
}
TILES: dict[str, dict[str, dict[tuple[int, int], Tile]]] = {
    "hopper": {
        "forward": {(2, 64): Tile(64, 128, 4, 2, 2), (2, 128): Tile(64, 64, 4, 3, 2),
                    (2, 256): Tile(128, 64, 8, 2)},
        "backward_q": {(2, 64): Tile(128, 64, 8, 3, 2, 128), (2, 128): Tile(128, 64, 8, 3),
                       (2, 256): Tile(128, 32, 8, 2)},
        "backward_kv": {(2, 64): Tile(64, 64, 4, 2, 3, 168), (2, 128): Tile(64, 64, 4, 2, 2),
                        (2, 256): Tile(32, 64, 8, 2)},
        "decode_part": {(2, 64): Tile(16, 128, 4, 3, 3), (2, 128): Tile(16, 64, 4, 3, 2),
                        (2, 256): Tile(16, 64, 4, 3)},
        "statistics_rows": {(2, 64): Tile(64, 128, 4, 2, 2), (2, 128): Tile(64, 64, 4, 3, 3),
                            (2, 256): Tile(128, 32, 8, 2, 2)},
        # Beyond D = 64 the accumulators leave room for one program, of two warpgroups. 128 rows:
        # with 64 the matrix units at full speed would read 64 bytes of keys and values per cycle,
        # twice what the L2 cache delivers.
        "forward_gluon": {(2, 64): Tile(64, 128, 4, 2, 3, 168), (2, 128): Tile(64, 64, 4, 2, 2),
                          (2, 256): Tile(128, 64, 8, 2)},
    },
    "ampere": {
        "forward": {(2, 64): Tile(128, 64, 4, 3, 2), (2, 128): Tile(64, 64, 4, 2, 2),
                    (2, 256): Tile(64, 64, 8, 2)},
        "backward_q": {(2, 64): Tile(64, 32, 4, 3, 3), (2, 128): Tile(64, 32, 4, 2, 2),
                       (2, 256): Tile(64, 32, 8, 2)},
        "backward_kv": {(2, 64): Tile(32, 64, 4, 2, 2), (2, 128): Tile(32, 64, 4, 2, 2),
                        (2, 256): Tile(32, 64, 8, 2)},
        "decode_part": {(2, 64): Tile(16, 128, 4, 3, 2), (2, 128): Tile(16, 64, 4, 3),
                        (2, 256): Tile(16, 64, 4, 2)},
        "statistics_rows": {(2, 64): Tile(64, 64, 4, 2, 3, 168), (2, 128): Tile(64, 64, 4, 2, 2),
                            (2, 256): Tile(64, 64, 4, 2, 2)},
    },
    # Small and with unequal sides, so that tests of a hundred positions cross many borders.
    "interpreter": {name: {(4, 256): Tile(32, 16, 4, 1)} for name in COMMON}
                   | {"statistics_places": COMMON["statistics_places"]},
}
for rows_of in (TILES["hopper"], TILES["ampere"]):
    for name, common_rows in COMMON.items():
        rows_of[name] = rows_of.get(name, {}) | common_rows
TILES["cdna"] = {name: {key: tile._replace(maxnreg=None) for key, tile in rows.items()}
                 for name, rows in TILES["ampere"].items()}
TILES["blackwell"] = {name: dict(rows) for name, rows in TILES["hopper"].items()
                      if name != "forward_gluon"}                       # it has no wgmma
TILES["blackwell"]["statistics_rows"][2, 64] = Tile(128, 64, 8, 2, 2)   # Hopper's spills there
# For devices with little shared memory, tried in this order if the table's tile is too large.
SMALLER = (Tile(64, 32, 4, 2), Tile(32, 32, 4, 1), Tile(16, 16, 4, 1))
FIXED_TILES = ("decode_combine", "statistics_places")       # small, and no other sides would do
forced: dict[str, Tile] = {}        # kernel → its only tile, within `tile_for`
_too_large: set[tuple] = set()


@cache
def gpu_family(device: torch.device) -> str:
    """Which rows of TILES a device reads. On a CPU the interpreter runs the kernels."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return "cdna"
    capability = torch.cuda.get_device_capability(device)[0]
    if capability > 9:
        return "blackwell"
    return "hopper" if capability == 9 else "ampere"


def tiles(kernel: str, device_family: str, element: int, dims: int) -> list[Tile]:
    """The table's tile for elements of `element` bytes and D ≤ `dims`, then smaller ones."""
    if kernel in forced:
        return [forced[kernel]]
    table = TILES[device_family][kernel]
    best = table[min(key for key in table if key[0] >= element and key[1] >= dims)]
    if kernel in FIXED_TILES:
        return [best]
    return [best, *(t for t in SMALLER if t.rows * t.columns < best.rows * best.columns)]


@contextmanager
def tile_for(kernel: str, tile: Tile) -> Iterator[None]:
    """Within it `kernel` is launched with this tile and no other."""
    kept = dict(forced)
    forced[kernel] = tile
    plans.clear()
    try:
        yield
    finally:
        forced.clear()
        forced.update(kept)
        plans.clear()


def has_tiles(kernel: str, like: Tensor) -> bool:
    """Whether the table has tiles of a kernel for such tensors on their device."""
    table = TILES[gpu_family(like.device)].get(kernel, {})
    return any(element == like.itemsize for element, _ in table)


# --- a launch ---

GridOf = Callable[[Tile], Grid]     # larger tiles, fewer programs


def has_tma(like: Tensor) -> bool:
    """Whether TMA fetches tiles of such tensors.

    Not float32 tiles: through descriptors they spill a kilobyte per thread.
    """
    return like.itemsize == 2 and gpu_family(like.device) in ("hopper", "blackwell", "interpreter")


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. triton's own takes 2 µs."""
    return -(-a // b)


def readable(*tensors: Tensor) -> list[Tensor]:
    """(B, heads, positions, D) tensors of one dtype as kernels can read them: almost always
    unchanged."""
    made_readable = for_tma if has_tma(tensors[0]) else for_pointers
    return [made_readable(t) for t in tensors]


def query_grid(q: Tensor) -> GridOf:
    """A program for each tile of queries of each head of q (B, H, T, D)."""
    B, H, T, _ = q.shape
    return lambda tile: (B * H * cdiv(T, tile.rows), 1, 1)


class Plan(NamedTuple):
    """How calls with the same strides, dtypes and masks are started."""

    tile: Tile
    tma: bool
    constants: dict[str, Any]       # arguments that are the same for all of these calls
    compiled: Any                   # triton's compiled kernel; None under the interpreter


plans: dict[tuple, Plan] = {}
MOST_PLANS = 4096                   # prompts of ever new lengths have ever new strides


def launch(kernel: JITFunction, grid: GridOf, like: Tensor, /, *,
           columns: dict[str, Tensor] | None = None, rows: dict[str, Tensor] | None = None,
           allow_tma: bool = True, n_rows: int | None = None, describe: Describe = descriptor,
           **arguments: Any) -> None:
    """Start `kernel` on the `grid` of the first tile that fits, on the device of `like` (…, D).

    like          its device, dtype and D choose the tile
    rows          name → `readable` tensor, which programs read in tiles of ROWS positions
    columns       name → `readable` tensor, which programs read in tiles of COLUMNS positions
    allow_tma     whether rows and columns come through TMA, if there is one
    n_rows        rows of a tile, if the amount of work decides and not the table
    describe      makes a tensor descriptor for TMA
    arguments     the others; the kernel takes those that it has a name for

    Raises ValueError if no tile fits.
    """
    columns, rows = columns or {}, rows or {}
    arguments |= {f"{name}_strides": t.stride() for name, t in (rows | columns).items()}
    # All that a kernel is compiled for: triton specialises on whether 16 divides an address or a
    # number.
    device_family = gpu_family(like.device)
    key = (kernel.__name__, device_family, like.device, like.shape[-1], n_rows,
           *[(t.dtype, t.data_ptr() % 16) for t in (*rows.values(), *columns.values())],
           *[(value.dtype, value.data_ptr() % 16) if isinstance(value, Tensor) else value
             for name, value in arguments.items() if name not in VARYING])
    if device_family == "cdna":     # AMD's compiler also asks whether a tensor's storage has 2 GB
        key += tuple(value.untyped_storage().nbytes() >= 2 ** 31
                     for value in (*rows.values(), *columns.values(), *arguments.values())
                     if isinstance(value, Tensor))
    plan = plans.get(key)
    if plan is None:
        if len(plans) >= MOST_PLANS:
            plans.clear()
        plans[key] = first_launch(kernel, grid, like, rows, columns, allow_tma, n_rows, describe,
                                  arguments)
        return
    call = arguments | plan.constants | sources(rows, columns, plan, describe)
    start(kernel, like, grid(plan.tile), [call[name] for name in kernel.arg_names], plan.compiled)


def first_launch(kernel: JITFunction, grid: GridOf, like: Tensor, rows: dict[str, Tensor],
                 columns: dict[str, Tensor], allow_tma: bool, n_rows: int | None,
                 describe: Describe, arguments: dict[str, Any]) -> Plan:
    """`launch` with the first tile that fits; returns how to do it again."""
    device_family, D = gpu_family(like.device), like.shape[-1]
    dims = max(16, triton.next_power_of_2(D))
    tma = allow_tma and has_tma(like)
    # AMD's matrix units multiply float32 directly, NVIDIA's do not.
    precision = "ieee" if device_family == "cdna" else "tf32x3"
    constants = {"D": D, "DIMS": dims, "TMA": tma, "PRECISION": precision}
    if tma:
        constants |= {f"{name}_strides": None for name in rows | columns}
    for tile in tiles(kernel.__name__, device_family, like.itemsize, dims):
        tile = tile._replace(rows=n_rows or tile.rows)
        if (kernel.__name__, like.device, like.dtype, dims, tile) in _too_large:
            continue
        sizes = {"ROWS": tile.rows, "COLUMNS": tile.columns, "STAGES": tile.stages}
        plan = Plan(tile, tma, constants | sizes, None)
        call = arguments | plan.constants | sources(rows, columns, plan, describe)
        in_order = [call[name] for name in kernel.arg_names]
        try:
            compiled = start(kernel, like, grid(tile), in_order, **tile.options)
            return plan._replace(compiled=compiled)
        except OutOfResources:
            _too_large.add((kernel.__name__, like.device, like.dtype, dims, tile))
    raise ValueError(f"{kernel.__name__}: no tile fits {like.device} for D={D} in {like.dtype} "
                     "(backend='sdpa' serves it)")


def sources(rows: dict[str, Tensor], columns: dict[str, Tensor], plan: Plan,
            describe: Describe) -> dict[str, Any]:
    """The tensors as `load_tile` reads them: descriptors for TMA, or as they are."""
    if not plan.tma:
        return rows | columns
    tile, dims = plan.tile, plan.constants["DIMS"]
    return ({name: describe(t, tile.rows, dims) for name, t in rows.items()}
            | {name: describe(t, tile.columns, dims) for name, t in columns.items()})


def start(kernel: JITFunction, like: Tensor, grid: Grid, arguments: list[Any],
          compiled: Any = None, **options: Any) -> Any:
    """Start a kernel on the device of `like`; every launch ends here.

    Returns triton's compiled kernel, to be passed as `compiled` the next time. Multiply-adds are
    fused, as was the default before triton 3.10.
    """
    with torch.cuda.device_of(like):
        if compiled is None:
            return kernel[grid](*arguments, **options, enable_fp_fusion=True)
        compiled[grid](*arguments)
        return compiled


# --- the device ---

class Device(NamedTuple):
    multiprocessors: int
    l2_bytes: int


@cache
def about(device: torch.device) -> Device:
    """The sizes of a device that decide how work is divided.

    Without a GPU they are small, so that tests cross many borders.
    """
    if device.type != "cuda":
        return Device(4, 2 ** 16)
    properties = torch.cuda.get_device_properties(device)
    return Device(properties.multi_processor_count, properties.L2_cache_size)


def multiprocessors(device: torch.device) -> int:
    return about(device).multiprocessors


def heads_together(x: Tensor, positions: int, heads: int, sharing: int = 1) -> int:
    """How many of all `heads` to work on at a time: as many as fill half of the L2 cache.

    `sharing` heads read the same two tensors of `positions` positions, of x's dtype and D. At least
    the heads that share one pair of tensors.
    """
    bytes_read = 2 * positions * x.shape[-1] * x.itemsize
    return min(heads, sharing * max(1, about(x.device).l2_bytes // 2 // max(1, bytes_read)))
