"""What the compiler makes of the kernels, for devices that are not here: by the real command, in a process without the interpreter."""

import json

import pytest
from commands import ROOT, command

from kernels.launch import TILES, Tile

WIDE = ("forward", "forward_gluon", "backward_q", "backward_kv", "statistics_rows")     # of enough rows for wgmma


def compiled(tmp_path, *arguments: object) -> list[dict]:
    done = command("-m kernels.ahead_of_time", "--json", tmp_path / "rows.json", *arguments)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    return json.loads((tmp_path / "rows.json").read_text())


def check(rows: list[dict]) -> None:
    for row in rows:
        name = " ".join(str(row[key]) for key in ("target", "kernel", "dtype", "D", "masks", "tile", "registers", "spilled"))
        assert row["fits"], f"{name}: {row['shared']} bytes of shared memory"
        assert row["programs"] >= Tile(*row["tile"]).programs, f"{name}: {row['programs']} programs fit a multiprocessor"
        if row["dtype"] == "fp32":              # three tf32 products a product: at D = 256 nothing is small enough not to spill
            allowed = {64: 64, 128: 64, 256: 1400}[row["D"]]
        else:                                   # the compares of segments cost the wide backward a few registers
            allowed = 160 if row["kernel"] == "backward_kv" and row["masks"] == "segments" and row["D"] > 64 else 0
        assert row["spilled"] <= allowed, name
        if row["target"] == "sm_90" and row["dtype"] != "fp32" and row["kernel"] in WIDE:
            # Where nothing at all is masked, triton 3.7 and 3.9 serialise backward_kv; 3.6 does not.
            assert row["overlapped"] == (row["kernel"] == "forward_gluon"), name     # what it is for; the others' products wait
            assert row["wgmma"] > 0 and not (row["serialised"] and (row["kernel"], row["masks"]) != ("backward_kv", "full")), name


@pytest.mark.long
@pytest.mark.parametrize("sizes", [[64], pytest.param([32, 128, 256], marks=pytest.mark.grid)], ids=str)
def test_every_tile_of_the_table(tmp_path, sizes):
    rows = compiled(tmp_path, "--sizes", *sizes)
    assert len(rows) == sum(D in sizes for family in ("ampere", "hopper") for table in TILES[family].values() for _, D in table)
    check(rows)


@pytest.mark.grid
@pytest.mark.parametrize("masks", ["causal", "window", "segments", "full", "positions", "lengths"])
def test_every_tile_with_every_mask(tmp_path, masks):
    check(compiled(tmp_path, "--dtypes", "bf16", "fp16", "fp32", "--masks", masks))


@pytest.mark.grid
def test_other_targets(tmp_path):
    """They compile; and where a tile does not fit a smaller one does."""
    rows = compiled(tmp_path, "--targets", "sm_86", "sm_100", "gfx942", "--smaller")
    fitting = {(r["target"], r["kernel"], r["dtype"], r["D"]) for r in rows if r["fits"]}
    assert fitting == {(r["target"], r["kernel"], r["dtype"], r["D"]) for r in rows}


def test_the_page_has_the_table():
    """docs/kernels.md shows the tiles that kernels/launch.py holds."""
    page = (ROOT / "docs" / "kernels.md").read_text()
    for target, family in (("sm_80", "ampere"), ("sm_90", "hopper")):
        for kernel, table in TILES[family].items():
            for (element, D), tile in table.items():
                dtype = {2: "bf16", 4: "fp32"}[element]
                row = f"| {target} | {kernel} | {D} | {dtype} | causal | {tile.rows} × {tile.columns} | {tile.warps} | {tile.stages} |"
                assert row in page
