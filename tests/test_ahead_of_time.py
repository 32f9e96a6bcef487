"""What the compiler makes of the kernels, for devices that are not here.

By the real command, in a process without the interpreter.
"""

import json

import pytest
from commands import ROOT, command

from kernels.launch import TILES, Tile

# Kernels with enough rows for wgmma.
WIDE = ("forward", "forward_gluon", "backward_q", "backward_kv", "statistics_rows")
SPILLING_WITH_SEGMENTS = (("backward_kv", True), ("statistics_rows", False))     # (…, D > 64)
NAMED = ("target", "kernel", "dtype", "D", "masks", "tile", "registers", "spilled")


def compiled(tmp_path, *arguments: object) -> list[dict]:
    done = command("-m kernels.ahead_of_time", "--json", tmp_path / "rows.json", *arguments,
                   env={"TRITON_INTERPRET": "0"})       # a new interpreter, not a fork with triton
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    return json.loads((tmp_path / "rows.json").read_text())


def check(rows: list[dict]) -> None:
    for row in rows:
        name = " ".join(str(row[key]) for key in NAMED)
        kernel, masks = row["kernel"], row["masks"]
        assert row["fits"], f"{name}: {row['shared']} bytes of shared memory"
        assert row["programs"] >= Tile(*row["tile"]).programs, (
            f"{name}: {row['programs']} programs fit a multiprocessor")
        allowed = 0
        if row["dtype"] == "fp32":      # three tf32 products: at D = 256 every tile spills
            allowed = {64: 64, 128: 64, 256: 1400}[row["D"]]
        elif masks == "segments" and (kernel, row["D"] > 64) in SPILLING_WITH_SEGMENTS:
            allowed = 170               # the compares of segments need a few more registers
        elif kernel == "backward_kv":
            allowed = 8                 # two registers: on an H200 faster than tiles without
        assert row["spilled"] <= allowed, name
        if row["target"] == "sm_90" and row["dtype"] != "fp32" and kernel in WIDE:
            # Only Gluon's softmax runs beside a product; that is what it is for.
            assert row["overlapped"] == (kernel == "forward_gluon"), name
            assert row["wgmma"] > 0, name
            # Without any mask triton 3.7 and 3.9 serialise backward_kv; 3.6 does not.
            if (kernel, masks) != ("backward_kv", "full"):
                assert not row["serialised"], name


@pytest.mark.long
@pytest.mark.parametrize("sizes", [
    [64], pytest.param([32, 128, 256], marks=pytest.mark.grid)], ids=str)
def test_every_tile_of_the_table(tmp_path, sizes):
    rows = compiled(tmp_path, "--sizes", *sizes)
    expected = 0
    for family in ("ampere", "hopper"):
        for table in TILES[family].values():
            expected += sum(D in sizes for _, D in table)
    assert len(rows) == expected
    check(rows)


@pytest.mark.grid
@pytest.mark.parametrize("masks", ["causal", "window", "segments", "full", "positions", "lengths"])
def test_every_tile_with_every_mask(tmp_path, masks):
    check(compiled(tmp_path, "--dtypes", "bf16", "fp16", "fp32", "--masks", masks))


@pytest.mark.grid
def test_other_targets(tmp_path):
    """They compile, and if a tile does not fit, a smaller one does."""
    fitting: dict[tuple, bool] = {}
    for row in compiled(tmp_path, "--targets", "sm_86", "sm_100", "gfx942", "--smaller"):
        key = (row["target"], row["kernel"], row["dtype"], row["D"])
        fitting[key] = fitting.get(key, False) or row["fits"]
    assert fitting and all(fitting.values()), fitting


def test_the_page_has_the_table():
    """docs/kernels.md shows the tiles that kernels/launch.py holds."""
    page = (ROOT / "docs" / "kernels.md").read_text()
    for target, family in (("sm_80", "ampere"), ("sm_90", "hopper")):
        for kernel, table in TILES[family].items():
            for (element, D), tile in table.items():
                dtype = {2: "bf16", 4: "fp32"}[element]
                row = (f"| {target} | {kernel} | {D} | {dtype} | causal "
                       f"| {tile.rows} × {tile.columns} | {tile.warps} | {tile.stages} |")
                assert row in page
