"""Starting a kernel: with which tile sizes, on which device.

A short call is over before Python has started the next one, so what depends on strides, dtypes and masks alone is worked
out once and kept as a `Plan`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from kernels.tiles import TensorDescriptor, descriptor, for_copy_engine, for_pointers

# A kernel is not compiled anew when only these change.
VARYING = frozenset({"H", "K", "T", "S", "blocks", "window", "together", "chunk", "parts", "queries"})


class Tile(NamedTuple):
    rows: int           # queries that a program holds, or visits at a time
    columns: int        # keys, likewise
    warps: int
    stages: int         # depth of the pipeline: stages − 1 tiles are on their way while one is worked on
    programs: int = 1   # that fit a multiprocessor at least: kernels/ahead_of_time.py counts them
    maxnreg: int | None = None      # the most registers a thread may have: where the compiler's whim would cost a program

    @property
    def options(self) -> dict[str, int]:
        """As triton takes them."""
        options = {"num_warps": self.warps, "num_stages": self.stages}
        return options if self.maxnreg is None else options | {"maxnreg": self.maxnreg}


# family → kernel → (bytes of an element, D up to) → tile. The compiler keeps everything of each in registers and, on Hopper, does
# not wait for each matrix instruction before it issues the next: `python -m kernels.ahead_of_time` measures that, and
# docs/kernels.md has the figures of every row. Of such tiles one is chosen of which several programs fit a multiprocessor, so
# that softmax of one runs beside the products of another, unless it then had to read more than the L2 cache gives.
# float32 is three tf32 products a product, which takes registers: at D = 256 even the smallest spills. None has been timed yet;
# `python -m bench.attention --tune` does.
COMMON = {
    "forward": {(4, 64): Tile(32, 32, 4, 2, 2), (4, 128): Tile(32, 32, 8, 2), (4, 256): Tile(16, 16, 8, 2)},
    "backward_q": {(4, 64): Tile(32, 32, 8, 2), (4, 128): Tile(32, 32, 8, 1), (4, 256): Tile(16, 16, 8, 2)},
    "backward_kv": {(4, 64): Tile(32, 32, 8, 2), (4, 128): Tile(32, 16, 8, 2), (4, 256): Tile(16, 16, 8, 2)},
    "decode_part": {(4, 64): Tile(16, 64, 4, 2, 2), (4, 128): Tile(16, 32, 4, 3), (4, 256): Tile(16, 16, 8, 2)},
    "statistics_rows": {(4, 64): Tile(32, 32, 8, 1), (4, 128): Tile(32, 16, 8, 2), (4, 256): Tile(16, 16, 4, 1, 2)},
    "decode_whole": {(size, D): Tile(1, 16, 4, 1, 10) for size in (2, 4) for D in (64, 128, 256)},
    # 16 rows have their 17 places each among 32 keys in a row.
    "statistics_places": {(size, D): Tile(16, 32, 4, 1, 2) for size in (2, 4) for D in (64, 128, 256)},
}
TILES: dict[str, dict[str, dict[tuple[int, int], Tile]]] = {
    "hopper": {
        "forward": {(2, 64): Tile(128, 64, 8, 3, 2, 128), (2, 128): Tile(128, 32, 8, 3, 2, 128), (2, 256): Tile(128, 64, 8, 2)},
        "backward_q": {(2, 64): Tile(128, 64, 8, 2, 2, 128), (2, 128): Tile(128, 64, 8, 2), (2, 256): Tile(128, 32, 8, 2)},
        "backward_kv": {(2, 32): Tile(64, 64, 8, 2, 2, 128), (2, 64): Tile(32, 128, 8, 2, 2, 128),
                        (2, 128): Tile(32, 64, 4, 2, 2), (2, 256): Tile(32, 64, 8, 2)},
        "decode_part": {(2, 64): Tile(16, 128, 4, 3, 3), (2, 128): Tile(16, 64, 4, 3, 2), (2, 256): Tile(16, 64, 4, 3)},
        "statistics_rows": {(2, 64): Tile(128, 64, 8, 2, 2), (2, 128): Tile(128, 64, 8, 2, 2), (2, 256): Tile(128, 32, 8, 2, 2)},
        # Beyond D = 64 the accumulators leave room for one program, of two warpgroups. 128 rows: with 64 the matrix units at full
        # speed would read 64 bytes of keys and values a cycle, twice what the L2 cache gives.
        "forward_gluon": {(2, 64): Tile(128, 64, 8, 3, 2), (2, 128): Tile(128, 128, 8, 2), (2, 256): Tile(128, 64, 8, 2)},
    },
    "ampere": {
        "forward": {(2, 64): Tile(128, 64, 4, 3, 2), (2, 128): Tile(64, 64, 4, 2, 2), (2, 256): Tile(64, 64, 8, 2)},
        "backward_q": {(2, 64): Tile(64, 32, 4, 3, 3), (2, 128): Tile(64, 32, 4, 2, 2), (2, 256): Tile(64, 32, 8, 2)},
        "backward_kv": {(2, 64): Tile(32, 64, 4, 2, 2), (2, 128): Tile(32, 64, 4, 2, 2), (2, 256): Tile(32, 64, 8, 2)},
        "decode_part": {(2, 64): Tile(16, 128, 4, 3, 2), (2, 128): Tile(16, 64, 4, 3), (2, 256): Tile(16, 64, 4, 2)},
        "statistics_rows": {(2, 64): Tile(64, 64, 4, 2, 3, 168), (2, 128): Tile(64, 64, 4, 2, 2), (2, 256): Tile(64, 64, 4, 2, 2)},
    },
    # Small and of unequal sides, so that tests of a hundred positions cross many borders.
    "interpreter": {name: {(4, 256): Tile(32, 16, 4, 1)} for name in COMMON} | {"statistics_places": COMMON["statistics_places"]},
}
for table in (TILES["hopper"], TILES["ampere"]):
    table |= {kernel: table.get(kernel, {}) | COMMON[kernel] for kernel in COMMON}
TILES["cdna"] = {kernel: {key: tile._replace(maxnreg=None) for key, tile in rows.items()} for kernel, rows in TILES["ampere"].items()}
TILES["blackwell"] = {kernel: table for kernel, table in TILES["hopper"].items() if kernel != "forward_gluon"}      # it has no wgmma
SMALLER = (Tile(64, 32, 4, 2), Tile(32, 32, 4, 1), Tile(16, 16, 4, 1))      # for devices with little shared memory
_too_large: set[tuple] = set()


@cache
def family(device: torch.device) -> str:
    """Which rows of TILES a device reads. On a CPU the interpreter runs the kernels."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return "cdna"
    capability = torch.cuda.get_device_capability(device)[0]
    return "blackwell" if capability > 9 else "hopper" if capability == 9 else "ampere"


def tiles(kernel: str, device_family: str, element: int, dims: int) -> list[Tile]:
    """The table's tile for elements of so many bytes and heads of up to `dims`, then ever smaller ones."""
    table = TILES[device_family][kernel]
    best = table[min(key for key in table if key[0] >= element and key[1] >= dims)]
    if kernel in ("decode_whole", "statistics_places"):             # small already, and of sides that belong together
        return [best]
    return [best, *(t for t in SMALLER if t.rows * t.columns < best.rows * best.columns)]


@contextmanager
def tile_for(kernel: str, tile: Tile) -> Iterator[None]:
    """Within it `kernel` is launched with this tile and no other."""
    global tiles
    table = tiles
    tiles = lambda name, *rest: [tile] if name == kernel else table(name, *rest)       # noqa: E731
    plans.clear()
    try:
        yield
    finally:
        tiles = table
        plans.clear()


def has_tiles(kernel: str, like: Tensor) -> bool:
    """Whether the table has tiles of a kernel for such tensors on their device."""
    return any(element == like.itemsize for element, _ in TILES[family(like.device)].get(kernel, {}))


def has_copy_engine(like: Tensor) -> bool:
    """Whether tiles of such tensors come through it. Not float32's: that way they spill a kilobyte a thread."""
    return like.itemsize == 2 and family(like.device) in ("hopper", "blackwell", "interpreter")


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. triton's own takes 2 µs."""
    return -(-a // b)


def readable(*tensors: Tensor) -> list[Tensor]:
    """(B, heads, positions, D) tensors as the kernels can read them: almost always as they are."""
    return [for_copy_engine(t) if has_copy_engine(t) else for_pointers(t) for t in tensors]


class Plan(NamedTuple):
    """How calls of the same strides, dtypes and masks are started."""

    tile: Tile
    tma: bool
    constants: dict[str, Any]               # arguments that are the same for all of them
    compiled: Any                           # triton's compiled kernel; None under the interpreter


plans: dict[tuple, Plan] = {}
MOST_PLANS = 4096                           # prompts of ever new lengths have ever new strides


def launch(kernel, grid: Callable[[Tile], tuple[int, int, int]], like: Tensor, /, *, columns: dict[str, Tensor] | None = None,
           rows: dict[str, Tensor] | None = None, copy_engine: bool = True, n_rows: int | None = None,
           describe: Callable[[Tensor, int, int], TensorDescriptor] = descriptor, **arguments) -> None:
    """Start `kernel` on the `grid` of the first tile that fits, on the device and in the dtype of `like` (…, D).

    rows, columns: `readable` tensors that it reads a tile's rows, or columns, at a time: through the copy engine where
    there is one and `copy_engine` allows it, as `describe` tells it. n_rows: rows of a tile, where the work and not the table
    says. Of the other arguments a kernel gets those that it has a name for. Raises ValueError where no tile fits.
    """
    columns, rows = columns or {}, rows or {}
    arguments |= {f"{name}_strides": t.stride() for name, t in (rows | columns).items()}
    # All that a kernel is compiled for: of addresses and numbers triton asks whether 16 divides them.
    key = (kernel.__name__, family(like.device), like.device, like.shape[-1], n_rows,
           *[(t.dtype, t.data_ptr() % 16) for t in (*rows.values(), *columns.values())],
           *[(value.dtype, value.data_ptr() % 16) if isinstance(value, Tensor) else value
             for name, value in arguments.items() if name not in VARYING])
    if key[1] == "cdna":                                            # and on AMD's, whether its storage has 2 GB
        key += tuple(t.untyped_storage().nbytes() >= 2 ** 31 for t in (*rows.values(), *columns.values(), *arguments.values())
                     if isinstance(t, Tensor))
    plan = plans.get(key)
    if plan is None:
        if len(plans) >= MOST_PLANS:
            plans.clear()
        plans[key] = first_launch(kernel, grid, like, rows, columns, copy_engine, n_rows, describe, arguments)
        return
    call = arguments | plan.constants | sources(rows, columns, plan, describe)
    start(kernel, like, grid(plan.tile), [call[name] for name in kernel.arg_names], plan.compiled)


def first_launch(kernel, grid, like, rows, columns, copy_engine, n_rows, describe, arguments) -> Plan:
    """Launch with the first tile that fits; and how it was done."""
    device_family, D = family(like.device), like.shape[-1]
    dims, tma = max(16, triton.next_power_of_2(D)), copy_engine and has_copy_engine(like)
    constants = {"D": D, "DIMS": dims, "TMA": tma}
    if device_family == "cdna":
        constants["PRECISION"] = "ieee"                 # its matrix units multiply float32 as it is
    if tma:
        constants |= {f"{name}_strides": None for name in rows | columns}
    for tile in tiles(kernel.__name__, device_family, like.itemsize, dims):
        tile = tile._replace(rows=n_rows or tile.rows)
        plan = Plan(tile, tma, constants | {"ROWS": tile.rows, "COLUMNS": tile.columns, "STAGES": tile.stages}, None)
        if (kernel.__name__, like.device, like.dtype, dims, tile) in _too_large:
            continue
        try:
            call = arguments | plan.constants | sources(rows, columns, plan, describe)
            call = [call[name] for name in kernel.arg_names]
            return plan._replace(compiled=start(kernel, like, grid(tile), call, **tile.options))
        except OutOfResources:
            _too_large.add((kernel.__name__, like.device, like.dtype, dims, tile))
    raise ValueError(f"{kernel.__name__}: no tile fits {like.device} for D={D} in {like.dtype} (backend='sdpa' serves it)")


def sources(rows: dict[str, Tensor], columns: dict[str, Tensor], plan: Plan, describe: Callable) -> dict[str, Any]:
    """The tensors as `load_tile` reads them."""
    if not plan.tma:
        return rows | columns
    tile, dims = plan.tile, plan.constants["DIMS"]
    return ({name: describe(t, tile.rows, dims) for name, t in rows.items()}
            | {name: describe(t, tile.columns, dims) for name, t in columns.items()})


def start(kernel, like: Tensor, grid: tuple[int, int, int], arguments: list, compiled=None, **options):
    """Every kernel starts here, on the device of `like` → triton's compiled kernel, which may be given the next time.

    Multiply-adds are fused, as was the default before triton 3.10.
    """
    with torch.cuda.device_of(like):
        if compiled is None:
            return kernel[grid](*arguments, **options, enable_fp_fusion=True)
        compiled[grid](*arguments)
        return compiled


class Device(NamedTuple):
    multiprocessors: int
    l2_bytes: int


@cache
def about(device: torch.device) -> Device:
    """What of a device decides how work is divided. Small numbers without one, so that tests cross many borders."""
    if device.type != "cuda":
        return Device(4, 2 ** 16)
    properties = torch.cuda.get_device_properties(device)
    return Device(properties.multi_processor_count, properties.L2_cache_size)


def multiprocessors(device: torch.device) -> int:
    return about(device).multiprocessors


def heads_together(x: Tensor, positions: int, heads: int, sharing: int = 1) -> int:
    """How many of all `heads` to go through at a time: those whose reading fills half of the L2 cache, at least one's.

    `sharing` heads read the same two tensors of so many positions, of x's dtype and D.
    """
    one = 2 * positions * x.shape[-1] * x.itemsize
    return min(heads, sharing * max(1, about(x.device).l2_bytes // 2 // max(1, one)))
