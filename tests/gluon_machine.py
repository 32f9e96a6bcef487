"""A simulator of the part of a Hopper GPU that kernels/flash_gluon.py uses, one program at a time.

Triton's interpreter cannot run Gluon. Here the kernel's Python source runs with its names for
Triton replaced: `gl`, `tma`, `mbarrier` and the others are the functions below. Tensors are those
of torch, scalars those of Python, and layouts mean nothing (the compiler checks them).

Whatever a device does by itself happens as late as it can, and to rely on less is an error:

- TMA delivers a tile when the program waits for its barrier, not before;
- a matrix product reads shared memory and has no result until the program waits for it;
- warps pass a wait one by one, so memory may be overwritten only after `thread_barrier`.
"""

import builtins
import inspect
import math
from collections.abc import Callable, Sequence
from itertools import product
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

# On tiles this small threads cost more than they do: 3.5 s a case instead of 0.05 with busy cores.
torch.set_num_threads(1)


class Misuse(Exception):
    """What a device would answer with a wrong result, or never."""


# --- shared memory, barriers and products ---

class Tile:
    """A tile of shared memory. It holds NaN until the program has waited for its copy."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.data = torch.full(shape, torch.nan, dtype=dtype)
        self.state = "empty"                    # then "arriving", then "arrived"
        self.readers: list[Product] = []        # products that may still read it, in some warp

    def reshape(self, shape: Sequence[int]) -> "View":
        return View(self, self.data.view(shape))


class View:
    """A tile in another shape or order, as products take it."""

    def __init__(self, tile: Tile, data: Tensor) -> None:
        self.tile, self.data = tile, data

    def permute(self, order: Sequence[int]) -> "View":
        return View(self.tile, self.data.permute(order))


class Buffers:
    """Several tiles, or several barriers."""

    def __init__(self, members: list) -> None:
        self.members = members

    def index(self, n: int) -> Any:
        if not 0 <= n < len(self.members):
            raise Misuse(f"index: {n} of {len(self.members)} buffers")
        return self.members[n]


class Product:
    """A matrix product under way. Until the program has waited it is no tensor."""

    def __init__(self, result: Tensor, tiles: list[Tile]) -> None:
        self.result, self.tiles = result, tiles
        for tile in tiles:
            tile.readers.append(self)


class Barrier:
    """An mbarrier. A phase ends when all arrivals and all expected bytes have come."""

    def __init__(self) -> None:
        self.count: int | None = None           # of arrivals a phase, from `init`
        self.visible = False                    # to TMA: after a fence
        self.phase = 0
        self._begin_phase()

    def _begin_phase(self) -> None:
        self.arrivals = self.expected = 0
        self.copies: list[tuple[Tile, Tensor]] = []

    def init(self, count: int) -> None:
        self.count = count

    def expect(self, size: int) -> None:
        if self.count is None:
            raise Misuse("expect: the barrier has no count")
        if self.arrivals == self.count:
            raise Misuse("expect: the program has not waited for what the barrier expects already")
        self.arrivals += 1
        self.expected += size

    def wait(self, parity: int) -> None:
        """Return at once if the current phase has the other parity: the one before is over."""
        if self.count is None:
            raise Misuse("wait: the barrier has no count")
        if parity not in (0, 1):
            raise Misuse(f"wait: {parity} is no parity")
        if self.phase % 2 != parity:
            return
        sent = sum(data.nbytes for _, data in self.copies)
        if self.arrivals < self.count:
            raise Misuse("wait: for a phase that nothing completes, so for ever")
        if sent != self.expected:
            raise Misuse(f"wait: {self.expected} bytes are expected and {sent} on their way")
        for tile, data in self.copies:
            tile.data.copy_(data)
            tile.state = "arrived"
        self.phase += 1
        self._begin_phase()


# --- global memory ---

class Pointer:
    """An address, or a tensor of them, in the memory that a tensor is a view of."""

    def __init__(self, memory: Tensor, at: Tensor | int) -> None:
        self.memory, self.at = memory, at

    @classmethod
    def to(cls, tensor: Tensor) -> "Pointer":
        size = tensor.untyped_storage().nbytes() // tensor.itemsize
        return cls(tensor.as_strided((size,), (1,), 0), tensor.storage_offset())

    def __add__(self, more: Tensor | int) -> "Pointer":
        return Pointer(self.memory, self.at + more)

    def places(self, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        at = torch.as_tensor(self.at)
        mask = torch.ones_like(at, dtype=torch.bool) if mask is None else mask.expand(at.shape)
        if not ((at >= 0) & (at < len(self.memory)))[mask].all():
            raise Misuse("load or store: outside the tensor's memory")
        return at, mask


class Descriptor:
    """A tensor as TMA reads it, from what the host says of it."""

    def __init__(self, host: Any) -> None:
        base = host.base
        self.tensor = base.as_strided(host.shape, host.strides, base.storage_offset())
        self.box, self.dtype, self.layout = list(host.block_shape), base.dtype, host.layout
        self.block_type = SimpleNamespace(nbytes=math.prod(self.box) * base.itemsize)

    def read(self, start: Sequence[int]) -> Tensor:
        """The box that begins at `start`, with zeros where the tensor ends."""
        box = torch.zeros(self.box, dtype=self.dtype)
        taken, placed = [], []
        for begin, length, size in zip(start, self.box, self.tensor.shape):
            first, past = max(0, begin), max(0, begin, min(size, begin + length))
            taken.append(slice(first, past))
            placed.append(slice(first - begin, past - begin))
        box[tuple(placed)] = self.tensor[tuple(taken)]
        return box


# --- one program of a grid ---

class Program:
    """What a kernel can reach: its place in the grid, shared memory, copies and products."""

    def __init__(self, index: tuple[int, ...], grid: tuple[int, ...], warps: int) -> None:
        self.index, self.grid, self.warps = index, grid, warps
        self.barriers: list[Barrier] = []
        self.running: list[Product] = []        # oldest first
        self.waited_for: list[Product] = []     # since the last `thread_barrier`

    def allocate_shared_memory(self, dtype: torch.dtype, shape: Sequence[int], layout: Any) -> Any:
        """Barriers [1] or [n, 1]; a tile of rank 4, or n of them."""
        if layout == "barriers":
            barriers = [Barrier() for _ in range(shape[0])]
            self.barriers += barriers
            return barriers[0] if len(shape) == 1 else Buffers(barriers)
        if len(shape) == 4:
            return Tile(shape, dtype)
        return Buffers([Tile(shape[1:], dtype) for _ in range(shape[0])])

    def fence_async_shared(self) -> None:
        for barrier in self.barriers:
            barrier.visible = barrier.count is not None

    def copy(self, source: Descriptor, start: Sequence[int], barrier: Barrier, tile: Tile,
             pred: bool = True) -> None:
        if not pred:
            return
        if not barrier.visible:
            raise Misuse("copy: no fence since the barrier's `init`")
        if tile.state == "arriving":
            raise Misuse("copy: another copy into the tile is on its way")
        if tile.readers:
            raise Misuse("copy: a product may still read the tile, in some warp at least")
        if (list(tile.data.shape), tile.data.dtype) != (source.box, source.dtype):
            raise Misuse("copy: tile and descriptor have different shapes or dtypes")
        tile.data.fill_(torch.nan)
        tile.state = "arriving"
        barrier.copies.append((tile, source.read(start)))

    def warpgroup_mma(self, a: View | Tensor, b: View, acc: Tensor, use_acc: bool = True,
                      is_async: bool = False) -> Product | Tensor:
        tiles = [operand.tile for operand in (a, b) if isinstance(operand, View)]
        for tile in tiles:
            if tile.state != "arrived":
                raise Misuse(f"product: of a tile that is {tile.state}")
        left, right = (x.data if isinstance(x, View) else x for x in (a, b))
        if left.dtype != right.dtype or left.itemsize != 2:
            raise Misuse(f"product: of {left.dtype} and {right.dtype}")
        result = left.float() @ right.float()
        if result.shape != acc.shape:
            raise Misuse(f"product: {tuple(result.shape)} does not fit {tuple(acc.shape)}")
        started = Product(result + acc if use_acc else result, tiles)
        self.running.append(started)
        return started if is_async else self.warpgroup_mma_wait(0, [started])

    def warpgroup_mma_wait(self, num_outstanding: int = 0, deps: Sequence[Product] = ()) -> Any:
        """The oldest products end first. What still runs reads as NaN."""
        while len(self.running) > num_outstanding:
            self.waited_for.append(self.running.pop(0))
        results = [torch.full_like(dep.result, torch.nan) if dep in self.running else dep.result
                   for dep in deps]
        return results[0] if len(results) == 1 else tuple(results)

    def thread_barrier(self) -> None:
        for ended in self.waited_for:
            for tile in ended.tiles:
                tile.readers.remove(ended)
        self.waited_for.clear()

    def end(self) -> None:
        if self.running:
            raise Misuse("end: of the program, with products under way")
        if any(barrier.arrivals or barrier.copies for barrier in self.barriers):
            raise Misuse("end: of the program, with copies under way")

    def names(self) -> dict[str, Any]:
        """What a kernel's names for Triton mean."""
        language = SimpleNamespace(
            **ARITHMETIC, program_id=self.index.__getitem__, num_programs=self.grid.__getitem__,
            num_warps=lambda: self.warps, allocate_shared_memory=self.allocate_shared_memory)
        barriers = SimpleNamespace(MBarrierLayout=lambda: "barriers", init=Barrier.init,
                                   expect=predicated(Barrier.expect), wait=predicated(Barrier.wait))
        return {"gl": language, "tl": language, "mbarrier": barriers,
                "tma": SimpleNamespace(async_copy_global_to_shared=self.copy),
                "warpgroup_mma": self.warpgroup_mma, "warpgroup_mma_wait": self.warpgroup_mma_wait,
                "thread_barrier": self.thread_barrier,
                "fence_async_shared": self.fence_async_shared}


def predicated(act: Callable) -> Callable:
    def act_if(barrier: Barrier, argument: int, pred: bool = True) -> None:
        if pred:
            act(barrier, argument)
    return act_if


# --- arithmetic, of torch's tensors and Python's numbers ---

def cdiv(a: int, b: int) -> int:
    if a < 0:
        raise Misuse("cdiv: of a negative number, which a device rounds the other way")
    return -(-a // b)


def elementwise(of_numbers: Callable, of_tensors: Callable) -> Callable:
    def compute(a: Any, b: Any) -> Any:
        if isinstance(a, Tensor) or isinstance(b, Tensor):
            return of_tensors(torch.as_tensor(a), torch.as_tensor(b))
        return of_numbers(a, b)
    return compute


def reduction(reduce: Callable) -> Callable:
    """Of a whole tensor to a number, or along an axis."""
    return lambda x, axis=None: reduce(x).item() if axis is None else reduce(x, axis)


def load(pointer: Pointer, mask: Tensor | None = None, other: float = 0) -> Tensor:
    at, mask = pointer.places(mask)
    return torch.where(mask, pointer.memory[at.where(mask, 0)], other)


def store(pointer: Pointer, values: Tensor, mask: Tensor | None = None) -> None:
    at, mask = pointer.places(mask)
    if len(at[mask].unique()) < int(mask.sum()):
        raise Misuse("store: of two numbers to one address")
    pointer.memory[at[mask]] = values[mask]             # of the same dtype, or torch objects


ARITHMETIC: dict[str, Any] = {
    "int64": torch.int64, "float32": torch.float32, "static_range": range, "cdiv": cdiv,
    "load": load, "store": store, "convert_layout": lambda x, layout: x,
    "cast": lambda x, dtype: x.to(dtype) if isinstance(x, Tensor) else x,
    "minimum": elementwise(min, torch.minimum), "maximum": elementwise(max, torch.maximum),
    "min": reduction(torch.amin), "max": reduction(torch.amax), "sum": reduction(torch.sum),
    "exp2": torch.exp2, "log": torch.log, "where": torch.where,
    "arange": lambda start, stop, layout=None: torch.arange(start, stop),
    "full": lambda shape, value, dtype, layout=None: torch.full(shape, value, dtype=dtype),
    "zeros": lambda shape, dtype, layout=None: torch.zeros(shape, dtype=dtype),
    "NVMMADistributedLayout": lambda *_: None, "DotOperandLayout": lambda *_: None,
    "SliceLayout": lambda *_: None, "BlockedLayout": lambda *_: None,
}


# --- a kernel's source under these names ---

def bound(function: Any, names: dict[str, Any]) -> FunctionType:
    """A kernel as a Python function to which `names` mean what they say, and so to its helpers."""
    python = function.fn
    scope = {"__builtins__": builtins, **names}
    for name in python.__code__.co_names:
        value = python.__globals__.get(name)
        if isinstance(value, tl.constexpr):
            scope[name] = value.value
        elif isinstance(value, type):           # a NamedTuple that holds several values
            scope[name] = value
        elif name not in names and hasattr(value, "fn") and value is not function:
            scope[name] = bound(value, names)
    return FunctionType(python.__code__, scope, python.__name__, python.__defaults__)


def simulated(argument: Any) -> Any:
    """A kernel's argument as the simulated programs take it."""
    if hasattr(argument, "block_shape"):        # a tensor descriptor
        return Descriptor(argument)
    if isinstance(argument, Tensor):
        return Pointer.to(argument)
    return argument


def start(kernel: Any, like: Tensor, grid: tuple[int, ...], arguments: list[Any], *,
          num_warps: int, **options: Any) -> None:
    """In place of `kernels.launch.start`: run every program of the grid to its end."""
    given = [simulated(value) for value in arguments]
    for index in product(*map(range, grid)):
        program = Program(index, grid, num_warps)
        bound(kernel, program.names())(*given)
        program.end()


def changed(kernel: Any, *changes: tuple[str, str]) -> SimpleNamespace:
    """The kernel with passages of its source replaced, each of which must be there exactly once."""
    source = inspect.getsource(kernel.fn)
    source = source[source.index("def "):]              # without the decorator
    for old, new in changes:
        assert source.count(old) == 1, f"{source.count(old)} times in the kernel: {old}"
        source = source.replace(old, new)
    scope = dict(kernel.fn.__globals__)
    exec(source, scope)
    name = kernel.fn.__name__
    return SimpleNamespace(fn=scope[name], __name__=name, arg_names=kernel.arg_names)
