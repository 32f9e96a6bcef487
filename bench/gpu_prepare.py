"""`python -m bench.gpu --prepare`, without a GPU: wheels and compiled kernels for a GPU machine."""

import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import torch
import triton
from torch import Tensor

sys.path.append(str(Path(__file__).parent.parent / "tests"))        # for their cases, just below

import test_decode
import test_flash
import test_gluon
from attention_cases import DTYPES, Case

from bench.attention_tiles import CANDIDATES, timed_call
from kernels import ahead_of_time, launch
from kernels.decode import decode
from kernels.flash import flash_attention
from kernels.launch import Tile
from kernels.statistics_triton import statistics

# What the measurements import in addition to torch, triton and numpy, of which a GPU machine has
# builds of its own.
PACKAGES = ("pydantic", "pyyaml", "safetensors", "tiktoken", "tokenizers", "filelock", "matplotlib",
            "pillow", "scipy", "tqdm", "transformers", "pytest", "pytest-xdist", "pytest-timeout",
            "hypothesis")
NOT_TAKEN = ("torch", "triton", "numpy", "nvidia")


def prepare(folder: Path, target: str) -> None:
    """Fill the folder with wheels and with every kernel that the steps will launch on `target`.

    The kernels are compiled by this Python's triton.
    """
    root, wheels = Path(__file__).parent.parent, folder / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    print(f"Python {platform.python_version()}, triton {triton.__version__}: "
          "for a machine with the same versions", flush=True)
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check",
                    "--only-binary=:all:", "--constraint", root / "requirements.txt",
                    "--dest", wheels, *PACKAGES], check=True)
    for wheel in wheels.glob("*.whl"):
        if wheel.name.startswith(NOT_TAKEN):
            wheel.unlink()
    # Set before the processes below import triton. A kernel's source and intermediate code are of
    # no use on the other machine.
    os.environ |= {"TRITON_CACHE_DIR": str(folder / "triton"), "TRITON_STORE_BINARY_ONLY": "1"}
    cores = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(cores, get_context("spawn")) as pool:
        launches = sum(pool.map(compile_share, range(cores), [cores] * cores, [target] * cores))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{launches} launches compiled, {len(list(wheels.iterdir()))} wheels: "
          f"{folder} has {size / 2 ** 20:.0f} MB")


def compile_share(share: int, shares: int, target: str) -> int:
    """Make every `shares`-th call of the tests and benches, up to the driver; returns how many."""
    with ahead_of_time.device(target):
        launch.about = lambda device: launch.Device(      # type: ignore[assignment]
            132, 50 * 2 ** 20)
        calls = [*calls_of_tests(), *calls_of_benches()][share::shares]
        for call in calls:
            call()
    return len(calls)


def calls_of_tests() -> Iterator[Callable[[], object]]:
    """The cases of the steps `tests`, `memory_checker` and `grid`."""
    def flash(case: Case) -> None:
        test_flash.run(case, *case.tensors())

    def gluon(case: Case) -> None:
        test_gluon.run(case, *case.tensors()[:3])

    def one_query(case: Case) -> None:
        q, k, v = test_decode.tensors(case)
        decode(q, k, v, None, None, case.window, case.D ** -0.5)

    def heads(dtype: str) -> None:
        q = torch.zeros(2, 90, 4, 32, dtype=DTYPES[dtype]).transpose(1, 2)
        ids = torch.zeros(2, 90, dtype=torch.long)
        statistics(q, q[:, :2], torch.zeros(2, 4, 90), ids, ids, ids, None, None, 1.0)

    for dtype in DTYPES:
        yield partial(heads, dtype)
        yield from (partial(flash, replace(case, dtype=dtype)) for case in test_flash.CASES)
        yield from (partial(one_query, replace(case, dtype=dtype)) for case in test_decode.CASES)
        if dtype != "fp32":
            yield from (partial(gluon, replace(case, dtype=dtype)) for case in test_gluon.CASES)
    yield from (partial(flash, case) for case in test_flash.grid() if case.D in (64, 128))


def calls_of_benches() -> Iterator[Callable[[], object]]:
    """The candidate tiles, and the shapes of the other benches.

    bf16, causal or with a window, heads of 64 and 128.
    """
    def tensors(D: int, H: int = 4, T: int = 256) -> list[Tensor]:
        return [torch.zeros(1, T, H, D, dtype=torch.bfloat16).transpose(1, 2) for _ in range(3)]

    def candidate(kernel: str, D: int, tile: tuple) -> None:
        with launch.tile_for(kernel, Tile(*tile)):
            ids = torch.zeros(1, 256, dtype=torch.long)
            q, k, v = tensors(D)
            try:
                timed_call(kernel, q, k, v, q, ids)()
            except Exception as error:              # as on the GPU: the compiler refuses this tile
                print(f"{kernel} D {D} {tile}: {type(error).__name__}", flush=True)

    def windowed(D: int) -> None:
        flash_attention(*tensors(D), True, 100, None, D ** -0.5)

    def cache(D: int, groups: int, ragged: bool) -> None:
        k = torch.zeros(2, 4, 1024, D, dtype=torch.bfloat16)
        q = torch.zeros(2, 4 * groups, 1, D, dtype=torch.bfloat16)
        positions = torch.zeros(2, 1, dtype=torch.long) if ragged else None
        decode(q, k, k, positions, None, None, D ** -0.5)

    for kernel, by_size in CANDIDATES.items():
        if launch.has_tiles(kernel, tensors(64)[0]):
            for D, tiles in by_size.items():
                yield from (partial(candidate, kernel, D, tile) for tile in tiles)
    for D in (64, 128):
        yield partial(windowed, D)
        for groups, ragged in product((1, 4), (False, True)):
            yield partial(cache, D, groups, ragged)
