"""What the compiler makes of the kernels, for devices that need not be here.

`python -m kernels.ahead_of_time` prints, for each tile in the table of kernels/launch.py: registers
per thread, bytes spilled to memory, shared memory, how many programs fit a multiprocessor, and on
Hopper whether the matrix instructions run asynchronously (wgmma) or the compiler had to wait for
each ("serialised"). The kernels are launched just as on a GPU, up to the driver, so this is the
code that would run.
"""

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas

from kernels import attention, decode, flash, flash_gluon, launch, statistics_triton
from kernels.launch import FIXED_TILES, SMALLER, Tile
from kernels.problem import Problem


class Target(NamedTuple):
    family: str             # the rows of the table that it reads
    triton: GPUTarget
    shared: int             # bytes of shared memory that a program may have
    warps: int              # that fit a multiprocessor


# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"
TARGETS = {
    "sm_80": Target("ampere", GPUTarget("cuda", 80, 32), 166_912, 64),
    "sm_86": Target("ampere", GPUTarget("cuda", 86, 32), 101_376, 48),
    "sm_90": Target("hopper", GPUTarget("cuda", 90, 32), 232_448, 64),
    "sm_100": Target("blackwell", GPUTarget("cuda", 100, 32), 232_448, 64),
    "gfx942": Target("cdna", GPUTarget("hip", "gfx942", 64), 65_536, 32),
}
REGISTERS = 65_536          # of a multiprocessor, in all of NVIDIA's
RESERVED = 1024             # bytes of shared memory that the system takes for each program
KERNELS = ("forward", "forward_gluon", "backward_q", "backward_kv", "decode_part", "decode_combine",
           "statistics_rows", "statistics_places")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Mask(NamedTuple):
    causal: bool = True
    window: int | None = None
    segmented: bool = False


MASKS = {
    "causal": Mask(), "window": Mask(window=100), "segments": Mask(segmented=True),
    "full": Mask(causal=False),
    # Only of decode_part: slots in any order; rows of any length.
    "positions": Mask(window=100), "lengths": Mask(),
}


@dataclass
class Compiled:
    """One kernel, compiled for one target."""

    target: str
    kernel: str
    dtype: str
    D: int
    masks: str
    tile: Tile
    registers: int
    spilled: int            # bytes per thread, written and read again
    shared: int             # bytes per program
    wgmma: int              # asynchronous matrix instructions
    serialised: bool
    overlapped: float       # fraction of exponentials beside a product, in the worst loop

    @property
    def fits(self) -> bool:
        return self.shared <= TARGETS[self.target].shared

    @property
    def programs(self) -> int:
        """How many run on a multiprocessor at a time; 0 if that is not known (AMD)."""
        target = TARGETS[self.target]
        if target.triton.backend != "cuda":
            return 0
        per_warp = -(-self.registers * 32 // 256) * 256     # registers are allocated by 256
        return min(REGISTERS // (per_warp * self.tile.warps), target.warps // self.tile.warps,
                   (target.shared + RESERVED) // (self.shared + RESERVED))


# Of a tile that the compiler refuses as too large.
REFUSED: dict[str, Any] = {"registers": 255, "spilled": 0, "shared": 2 ** 30, "wgmma": 0,
                           "serialised": False, "overlapped": 0.0}


class NoDevice:
    """A stand-in for triton's driver: everything is compiled and launched, but nothing runs.

    `launched` has the newest launches: the kernel's name and hash, the grid, and its arguments as
    triton's launcher gets them.
    """

    def __init__(self, name: str):
        self.name = name
        self.launched: deque[tuple] = deque(maxlen=8)
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.name].triton

    def get_current_device(self) -> int:
        return list(TARGETS).index(self.name)       # triton keeps compiled kernels by this number

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        def launcher(x: int, y: int, z: int, stream: int, function: int, packed: Any, about: Any,
                     enter: Any, exit: Any, *arguments: Any) -> None:
            self.launched.append((source.fn.__name__, metadata.hash, (x, y, z), *arguments))

        return launcher

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 2 ** 30}      # what is too large is compiled too, and reported

    def load_binary(self, name: str, binary: bytes, shared: int,
                    device: int) -> tuple[int, int, int, int, int]:
        return 1, 1, 0, 0, 1024                 # module, function, registers, spills, most threads


@contextmanager
def device(name: str) -> Iterator[NoDevice]:
    """Within it the kernels launch for that target, with tensors on the CPU.

    So do `attention` and the others with backend="triton".
    """
    kept, driver = (launch.gpu_family, attention.INTERPRETED), NoDevice(name)
    triton.runtime.driver.set_active(driver)
    launch.gpu_family, attention.INTERPRETED = (lambda device: TARGETS[name].family), True
    launch.plans.clear()
    try:
        yield driver
    finally:
        launch.gpu_family, attention.INTERPRETED = kept
        launch.plans.clear()


def compile_kernel(target: str, kernel: str, dtype: str, D: int, masks: str = "causal",
                   tile: Tile | None = None) -> Compiled:
    """`kernel` as `target` would run it, with the table's tile unless one is given."""
    causal, window, segmented = MASKS[masks]
    q = torch.zeros(1, 128, 4, D, dtype=DTYPES[dtype]).transpose(1, 2)
    k = torch.zeros(1, 128, 2, D, dtype=DTYPES[dtype]).transpose(1, 2)
    lse, ids = torch.zeros(1, 4, 128), torch.zeros(1, 128, dtype=torch.long)
    scale, segments = D ** -0.5, ids if segmented else None
    cache = torch.zeros(1, 2, 512, D, dtype=DTYPES[dtype])
    query_positions = ids[:, :1] if masks in ("positions", "lengths") else None
    key_positions = torch.zeros(1, 512, dtype=torch.long) if masks == "positions" else None
    problem = Problem(q, k, causal, window, segments, scale)
    calls = {
        "forward": lambda: flash.launch_forward(problem, k, torch.empty_like(q), lse),
        "forward_gluon": lambda: flash_gluon.launch_gluon(problem, k, torch.empty_like(q), lse),
        "backward": lambda: flash.flash_attention_backward(q, q, k, k, q, lse, causal, window,
                                                           segments, scale),
        "decode": lambda: decode.decode(q[:, :, :1], cache, cache, query_positions, key_positions,
                                        window, scale),
        "statistics": lambda: statistics_triton.statistics(q, k, lse, ids, ids, ids, window,
                                                           segments, scale),
    }
    call = calls.get(kernel) or calls[kernel.partition("_")[0]]
    with device(target), launch.tile_for(kernel, tile) if tile else nullcontext():
        try:
            call()
        except ValueError:              # the compiler itself counts what a Blackwell tile needs
            if tile is None:
                raise
            return Compiled(target, kernel, dtype, D, masks, tile, **REFUSED)
        plan, = (plan for key, plan in launch.plans.items() if key[0] == kernel)
    return Compiled(target, kernel, dtype, D, masks, plan.tile, **resources(plan.compiled))


def resources(binary: Any) -> dict[str, Any]:
    """What the assembler says of a compiled kernel."""
    if "amdgcn" in binary.asm:
        text = binary.asm["amdgcn"]
        registers, = re.findall(r"\.vgpr_count:\s+(\d+)", text)[:1]
        spilled, = re.findall(r"\.private_segment_fixed_size:\s+(\d+)", text)[:1]
        return {"registers": int(registers), "spilled": int(spilled),
                "shared": binary.metadata.shared, "wgmma": 0, "serialised": False,
                "overlapped": 0.0}
    ptx = binary.asm["ptx"]
    arch = re.findall(r"\.target (sm_\w+)", ptx)[0]
    assembler = get_ptxas(int(re.findall(r"\d+", arch)[0])).path
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        log = subprocess.run([assembler, "-v", f"--gpu-name={arch}", path,
                              "-o", Path(folder, "kernel")],
                             capture_output=True, text=True, check=True).stderr
    return {"registers": int(re.findall(r"Used (\d+) registers", log)[0]),
            "spilled": sum(map(int, re.findall(r"(\d+) bytes spill", log))),
            "shared": binary.metadata.shared, "wgmma": ptx.count("wgmma.mma_async"),
            "serialised": "serialized" in log, "overlapped": overlapped(binary.asm["cubin"])}


def overlapped(cubin: bytes) -> float:
    """The fraction of exponentials that run beside a product of the same warps.

    Of the loops in the machine code, the worst counts. A product and an exponential overlap if
    between them the program waits for all groups of wgmma but one, and waits for that one only
    after the exponentials. ptxas may put waits in another order than the source has them.
    """
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        code = subprocess.run([tool, "-c", path], capture_output=True, text=True, check=True).stdout
    # One letter for each instruction that matters: p product, e exponential, and for a wait the
    # number of products that it leaves running.
    letters = {"HGMMA": "p", "MUFU.EX2": "e"}
    marks = re.findall(r"HGMMA|MUFU\.EX2|WARPGROUP\.DEPBAR\.LE gsb0, 0x\d", code)
    line = "".join(letters.get(mark, mark[-1]) for mark in marks)
    fractions = []
    for beside, after in re.findall("1(e*)0(e*)", line):
        fractions.append(len(beside) / max(1, len(beside + after)))
    return min(fractions, default=0.0)


def compile_all(cases: list[tuple]) -> list[Compiled]:
    """compile_kernel of each case, on all cores."""
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("spawn")) as pool:
        return list(pool.map(compile_kernel, *zip(*cases), chunksize=4))


def cases(targets: list[str], dtypes: list[str], masks: list[str], sizes: list[int] | None = None,
          smaller: bool = False) -> list[tuple]:
    """Arguments of `compile_kernel` for every row of the table, or for those of some head sizes.

    With `smaller` also the tiles that are used if a row does not fit.
    """
    decoding = ("positions", "lengths")
    # kernel → the masks that it does not have
    without = {"decode_part": ("full", "segments"),
               "decode_combine": ("window", "segments", "full", *decoding),
               "statistics_rows": ("full", *decoding), "statistics_places": ("full", *decoding)}
    chosen = []
    for target, kernel, dtype, mask in product(targets, KERNELS, dtypes, masks):
        if mask in without.get(kernel, decoding):
            continue
        table = launch.TILES[TARGETS[target].family].get(kernel, {})
        tiles = (None, *SMALLER) if smaller and kernel not in FIXED_TILES else (None,)
        for element, D in table:
            if element == DTYPES[dtype].itemsize and (not sizes or D in sizes):
                chosen += [(target, kernel, dtype, D, mask, tile) for tile in tiles]
    return chosen


def table(rows: list[Compiled]) -> str:
    """As Markdown."""
    columns = ("target", "kernel", "D up to", "dtype", "masks", "rows × columns", "warps", "stages",
               "registers", "spilled bytes", "shared KB", "programs", "wgmma",
               "softmax beside products")
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for r in rows:
        wgmma = str(r.wgmma or "none")
        if not r.target.startswith("sm_90"):
            wgmma = "–"
        elif r.serialised:
            wgmma = "serialised"
        limit = f" (at most {r.tile.maxnreg})" if r.tile.maxnreg else ""
        too_large = "" if r.fits else " (too large)"
        cells = (r.target, r.kernel, r.D, r.dtype, r.masks, f"{r.tile.rows} × {r.tile.columns}",
                 r.tile.warps, r.tile.stages, f"{r.registers}{limit}", r.spilled,
                 f"{r.shared / 1024:.0f}{too_large}", r.programs or "–", wgmma,
                 f"{r.overlapped:.0%}" if r.wgmma else "–")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser("python -m kernels.ahead_of_time",
                                     description=__doc__.split("\n")[0])

    def choice(option: str, choices: dict, default: list[str]) -> None:
        parser.add_argument(option, nargs="+", choices=choices, default=default,
                            metavar=option.removeprefix("--").upper(), help=", ".join(choices))

    choice("--targets", TARGETS, ["sm_80", "sm_90"])
    choice("--dtypes", DTYPES, ["bf16", "fp32"])
    choice("--masks", MASKS, ["causal"])
    parser.add_argument("--sizes", nargs="+", type=int, metavar="D",
                        help="head sizes of the table (default: all)")
    parser.add_argument("--smaller", action="store_true",
                        help="also the tiles for devices with little shared memory")
    parser.add_argument("--json", metavar="FILE", help="write the rows there too")
    args = parser.parse_args()
    chosen = cases(args.targets, args.dtypes, args.masks, args.sizes, args.smaller)
    if not chosen:
        parser.error("the table of kernels/launch.py has no such rows")
    rows = compile_all(chosen)
    print(f"triton {triton.__version__}\n\n{table(rows)}")
    if args.json:
        records = [asdict(r) | {"fits": r.fits, "programs": r.programs} for r in rows]
        Path(args.json).write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
