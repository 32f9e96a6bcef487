"""What benches are measured on, what they say meanwhile, and where they leave their figures."""

import json
import os
import platform
import sys
from pathlib import Path

import torch

from files import atomic_write

GPU = torch.cuda.is_available()
DEVICE, DTYPE = (torch.device("cuda"), torch.bfloat16) if GPU else (torch.device("cpu"), torch.float32)


def device(threads: int) -> str:
    """The device's name; a CPU's with the threads that are used of it."""
    return torch.cuda.get_device_name() if GPU else f"{platform.machine()}, {threads} thread(s)"


def meanwhile(text: str, end: str = "") -> None:
    """What is being done, in place of what was said last; on a terminal alone."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end=end, file=sys.stderr, flush=True)


def folder() -> Path:
    """bench/results, or $BENCH_RESULTS."""
    path = Path(os.environ.get("BENCH_RESULTS", Path(__file__).parent / "results"))
    path.mkdir(parents=True, exist_ok=True)
    return path


def write(name: str, figures: dict) -> None:
    """`figures` and the machine they were measured on, as NAME.json."""
    about = {"machine": platform.platform(), "python": platform.python_version(), "torch": torch.__version__}
    with atomic_write(folder() / f"{name}.json", "w") as file:
        json.dump(about | figures, file, indent=1)
