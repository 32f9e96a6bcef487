"""Where benches leave their figures."""

import json
import os
import platform
from pathlib import Path

import torch

from files import whole_file


def folder() -> Path:
    """bench/results, or $BENCH_RESULTS."""
    path = Path(os.environ.get("BENCH_RESULTS", Path(__file__).parent / "results"))
    path.mkdir(parents=True, exist_ok=True)
    return path


def write(name: str, figures: dict) -> None:
    """`figures` and the machine they were measured on, as NAME.json."""
    about = {"machine": platform.platform(), "python": platform.python_version(), "torch": torch.__version__}
    with whole_file(folder() / f"{name}.json", "w") as file:
        json.dump(about | figures, file, indent=1)
