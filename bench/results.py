"""What benches run on, what they print meanwhile, and where they write their figures."""

import json
import os
import platform
import sys
from pathlib import Path

import torch

from files import atomic_write

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
DTYPE = torch.bfloat16 if GPU else torch.float32


def device(threads: int) -> str:
    """The device's name; for a CPU with the number of threads in use."""
    return torch.cuda.get_device_name() if GPU else f"{platform.machine()}, {threads} thread(s)"


def meanwhile(text: str, end: str = "") -> None:
    """Print what is being done over the last such line, if this is a terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end=end, file=sys.stderr, flush=True)


def folder() -> Path:
    """bench/results, or $BENCH_RESULTS."""
    path = Path(os.environ.get("BENCH_RESULTS", Path(__file__).parent / "results"))
    path.mkdir(parents=True, exist_ok=True)
    return path


def write(name: str, figures: dict) -> None:
    """Write `figures` and the machine they were measured on to NAME.json."""
    about = {"machine": platform.platform(), "python": platform.python_version(),
             "torch": torch.__version__}
    with atomic_write(folder() / f"{name}.json", "w") as file:
        json.dump(about | figures, file, indent=1)
