"""How benches that compile for a minute do so side by side and still measure one after the other.

`bench.gpu` starts them together. Each compiles and then waits until its file is there.
"""

import os
import time
from pathlib import Path

VARIABLE = "BENCH_GO_FILE"          # names the file; without it nothing waits


def go_file(folder: Path, name: str) -> Path:
    """The file that the bench `name` waits for."""
    return folder / "side_by_side" / f"{name}.go"


def compiled_file(go: Path) -> Path:
    """The file that says that the bench which waits for `go` has compiled."""
    return go.with_suffix(".compiled")


def wait_for_turn() -> None:
    """Call it when everything is compiled, before anything is timed."""
    name = os.environ.get(VARIABLE)
    if not name:
        return
    go = Path(name)
    compiled_file(go).touch()
    while not go.exists():
        time.sleep(0.05)
