"""The kernels compiled for devices that need not be here, and what the compiler made of it: `python -m kernels.ahead_of_time`.

For each tile in the table of kernels/launch.py: registers a thread, bytes spilled to memory, shared memory, and on Hopper
whether the matrix instructions run asynchronously (wgmma) or the compiler had to wait for each ("serialised"). The
kernels are started just as on a GPU, up to the launch itself, so this is the code that would run.
"""

import argparse
import json
import os
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from kernels import launch
from kernels.launch import SMALLER, Tile

# name → the rows of the table it reads, triton's target, shared memory of a program in bytes
TARGETS = {
    "sm_80": ("ampere", GPUTarget("cuda", 80, 32), 166_912),
    "sm_86": ("ampere", GPUTarget("cuda", 86, 32), 101_376),
    "sm_90": ("hopper", GPUTarget("cuda", 90, 32), 232_448),
    "sm_100": ("hopper", GPUTarget("cuda", 100, 32), 232_448),
    "gfx942": ("cdna", GPUTarget("hip", "gfx942", 64), 65_536),
}
KERNELS = ("forward", "backward_q", "backward_kv", "decode_part", "statistics_rows")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MASKS = {"causal": (True, None, False), "window": (True, 100, False), "segments": (True, None, True), "full": (False, None, False),
         "positions": (True, 100, False)}          # decode_part alone: slots in any order


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
    spilled: int            # bytes a thread, written and read again
    shared: int             # bytes a program
    wgmma: int              # asynchronous matrix instructions
    serialised: bool

    @property
    def fits(self) -> bool:
        return self.shared <= TARGETS[self.target][2]


class NoDevice:
    """What triton asks of a driver before it launches: which device it would be."""

    def __init__(self, name: str):
        self.name = name

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.name][1]

    def get_current_device(self) -> int:
        return list(TARGETS).index(self.name)           # triton keeps compiled kernels by it

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_kernel(target: str, kernel: str, dtype: str, D: int, masks: str = "causal", tile: Tile | None = None) -> Compiled:
    """`kernel` as `target` would run it on such tensors, with the table's tile unless one is given."""
    from kernels import decode, flash, head_statistics_triton
    causal, window, segmented = MASKS[masks]
    q, k = torch.zeros(1, 128, 4, D, dtype=DTYPES[dtype]).transpose(1, 2), torch.zeros(1, 128, 2, D, dtype=DTYPES[dtype]).transpose(1, 2)
    lse, ids = torch.zeros(1, 4, 128), torch.zeros(1, 128, dtype=torch.long)
    positions = (ids[:, :1], ids) if masks == "positions" else (None, None)
    rest = (causal, window, ids.int() if segmented else None, D ** -0.5, "tf32x3")
    calls = {
        "forward": lambda: flash.flash_attention(q, k, k, *rest),
        "backward_q": lambda: flash.flash_attention_backward(q, q, k, k, q, lse, *rest),
        "backward_kv": lambda: flash.flash_attention_backward(q, q, k, k, q, lse, *rest),
        "decode_part": lambda: decode.decode(q[:, :, :1], k, k, *positions, window, *rest[3:]),
        "statistics_rows": lambda: head_statistics_triton.statistics(q, k, lse, ids, ids, ids, *rest[1:]),
    }
    family, _, _ = TARGETS[target]
    found: list[tuple[Any, Tile]] = []

    def compile_only(self, *arguments, grid, warmup, **named):
        binary = launched(self, *arguments, grid=grid, warmup=True, **named)
        if self.__name__ == kernel:
            found.append((binary, Tile(named["ROWS"], named["COLUMNS"], named["num_warps"], named["num_stages"])))

    kept, launched = (launch.family, launch.tiles), JITFunction.run
    triton.runtime.driver.set_active(NoDevice(target))
    launch.family, JITFunction.run = (lambda device: family), compile_only
    if tile:
        launch.tiles = lambda *_: [tile]
    try:
        calls[kernel]()
    finally:
        (launch.family, launch.tiles), JITFunction.run = kept, launched
    (binary, used), = found
    return Compiled(target, kernel, dtype, D, masks, used, **resources(binary))


def resources(binary) -> dict:
    """What the assembler says of a compiled kernel."""
    if "amdgcn" in binary.asm:
        text = binary.asm["amdgcn"]
        registers, spilled = (int(re.findall(rf"\.{name}:\s+(\d+)", text)[0]) for name in ("vgpr_count", "private_segment_fixed_size"))
        return {"registers": registers, "spilled": spilled, "shared": binary.metadata.shared, "wgmma": 0, "serialised": False}
    from triton.backends.nvidia.compiler import get_ptxas
    ptx = binary.asm["ptx"]
    arch = re.findall(r"\.target (sm_\w+)", ptx)[0]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        assembler = get_ptxas(int(re.findall(r"\d+", arch)[0])).path
        log = subprocess.run([assembler, "-v", f"--gpu-name={arch}", path, "-o", Path(folder, "kernel")],
                             capture_output=True, text=True, check=True).stderr
    return {"registers": int(re.findall(r"Used (\d+) registers", log)[0]), "spilled": sum(map(int, re.findall(r"(\d+) bytes spill", log))),
            "shared": binary.metadata.shared, "wgmma": ptx.count("wgmma.mma_async"), "serialised": "serialized" in log}


def compile_all(cases: list[tuple]) -> list[Compiled]:
    """compile_kernel of each case, on all cores."""
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("spawn")) as pool:
        return list(pool.map(compile_kernel, *zip(*cases), chunksize=4))


def cases(targets: list[str], dtypes: list[str], masks: list[str], sizes: list[int] | None = None, smaller: bool = False) -> list[tuple]:
    """Every row of the table, or those of some head sizes; with `smaller` also the tiles that take over where a row does not fit."""
    unknown = {"decode_part": ("full", "segments"), "statistics_rows": ("full", "positions")}       # masks that a kernel does not have
    found = []
    for target, kernel, dtype, mask in product(targets, KERNELS, dtypes, masks):
        if mask not in unknown.get(kernel, ("positions",)):
            rows = [D for element, D in launch.TILES[TARGETS[target][0]][kernel] if element == DTYPES[dtype].itemsize]
            found += [(target, kernel, dtype, D, mask, tile) for D in rows if D in (sizes or rows)
                      for tile in (None, *(SMALLER if smaller else ()))]
    return found


def table(rows: list[Compiled]) -> str:
    """As Markdown."""
    columns = ("target", "kernel", "D up to", "dtype", "masks", "rows × columns", "warps", "stages", "registers", "spilled bytes",
               "shared KB", "wgmma")
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for r in rows:
        wgmma = "–" if not r.target.startswith("sm_90") else "serialised" if r.serialised else str(r.wgmma or "none")
        cells = (r.target, r.kernel, r.D, r.dtype, r.masks, f"{r.tile.rows} × {r.tile.columns}", r.tile.warps, r.tile.stages, r.registers,
                 r.spilled, f"{r.shared / 1024:.0f}{'' if r.fits else ' (too large)'}", wgmma)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser("python -m kernels.ahead_of_time", description=__doc__.split("\n")[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=["sm_80", "sm_90"], metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16", "fp32"], metavar="DTYPE", help=", ".join(DTYPES))
    parser.add_argument("--masks", nargs="+", choices=MASKS, default=["causal"], metavar="MASKS", help=", ".join(MASKS))
    parser.add_argument("--sizes", nargs="+", type=int, metavar="D", help="head sizes of the table (default: all)")
    parser.add_argument("--smaller", action="store_true", help="also the tiles for devices with little shared memory")
    parser.add_argument("--json", metavar="FILE", help="write the rows there too")
    args = parser.parse_args()
    chosen = cases(args.targets, args.dtypes, args.masks, args.sizes, args.smaller)
    if not chosen:
        parser.error("the table of kernels/launch.py has no such rows")
    rows = compile_all(chosen)
    print(f"triton {triton.__version__}\n\n{table(rows)}")
    if args.json:
        Path(args.json).write_text(json.dumps([asdict(r) | {"fits": r.fits} for r in rows], indent=1))


if __name__ == "__main__":
    main()
