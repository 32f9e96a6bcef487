"""kernels/flash_gluon.py against the definition in float64: on a Hopper GPU, or else simulated.

What the compiler makes of it, for which no GPU is needed, tests/test_ahead_of_time.py checks.
"""

from contextlib import nullcontext
from dataclasses import fields, replace
from itertools import cycle

import gluon_machine
import pytest
import torch
from attention_cases import (
    CASES,
    DEVICE,
    LAYOUTS,
    Case,
    any_case,
    assert_as_good,
    exact_and_plain,
    placed,
)
from gluon_machine import Barrier, Misuse, Product, changed
from gluon_machine import Tile as SharedTile
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import flash, flash_gluon, launch
from kernels.flash import flash_attention
from kernels.flash_gluon import forward_gluon, launch_gluon
from kernels.launch import TILES, Tile, gpu_family, readable
from kernels.problem import Problem

# Small and with unequal sides, so that tests of a hundred positions cross many borders. Only the
# simulator can run it: a warpgroup multiplies 64 rows.
SMALL = Tile(32, 16, 4, 2) if DEVICE == "cpu" else None
MANY_IDS = Case(20, 9000, 16, documents=40)     # 141 blocks; the kernel looks at 128 at once
SIMULATED = pytest.mark.skipif(DEVICE != "cpu", reason="about the simulator")


@pytest.fixture(autouse=True)
def device(monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setattr(launch, "start", gluon_machine.start)
        monkeypatch.setitem(launch.forced, "forward_gluon", SMALL)
    elif gpu_family(torch.device(DEVICE, 0)) != "hopper":
        pytest.skip("needs a Hopper GPU")


@pytest.mark.parametrize("shape", [(2, 4, 100, 64), (1, 4, 100, 64), (1, 1, 1, 16)])
def test_a_descriptor_is_what_gluon_makes_with_its_checks(shape):
    B, H, T, D = shape
    tensor = torch.zeros(B, T, H, D, dtype=torch.bfloat16, device=DEVICE).transpose(1, 2)
    made = flash_gluon.described(tensor, 64, 128)
    checked = flash_gluon.TensorDescriptor(tensor, made.shape, made.strides, [1, 1, 64, 128],
                                           made.layout)
    for field in fields(checked):
        assert getattr(made, field.name) is getattr(checked, field.name) or (
            list(getattr(made, field.name)) == list(getattr(checked, field.name)))
    assert made.shape == tensor.shape
    assert all(stride == own for n, stride, own in zip(shape, made.strides, tensor.stride())
               if n > 1)
    # Gluon takes 10 µs to work a layout out, and every call has three tensors.
    assert flash_gluon.described(tensor, 64, 128).layout is made.layout


def run(case: Case, q, k, v, tile: Tile | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """out, in the case's layout, and lse by the kernel, which must write nothing else."""
    q, k, v = readable(q, k, v)
    out = placed(torch.full(q.shape, torch.nan, dtype=q.dtype), case.layout)
    around_lse = torch.full((q.shape[0] * q.shape[1] * q.shape[2] + 256,), torch.nan, device=DEVICE)
    lse = around_lse[128:-128].view(q.shape[:3])
    problem = Problem(q, k, **case.masks(), scale=case.scale or case.D ** -0.5)
    with launch.tile_for("forward_gluon", tile) if tile else nullcontext():
        launch_gluon(problem, v, out, lse)
    size = out.untyped_storage().nbytes() // out.itemsize
    for memory, inside in ((out.as_strided((size,), (1,), 0), out), (around_lse, lse)):
        written, within = (int((~numbers.isnan()).sum()) for numbers in (memory, inside))
        assert written == within, f"{written - within} numbers outside are written: {case}"
    return out, lse


def check(case: Case, tile: Tile | None = None) -> None:
    tensors = case.tensors()
    exact, plain = exact_and_plain(case, *tensors)
    out, lse = run(case, *tensors[:3], tile)
    assert_as_good(out, exact[0], plain[0], f"out of {case}")
    assert_as_good(lse, exact[1], exact[1].float(), f"lse of {case}")     # float32 for any inputs
    if DEVICE != "cpu":                         # there programs run at once, in any order
        again = run(case, *tensors[:3], tile)
        assert torch.equal(out, again[0]) and torch.equal(lse, again[1]), f"other bits: {case}"


# --- numbers ---

@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("case", [*CASES, MANY_IDS], ids=str)
def test_cases(case, dtype):
    check(replace(case, dtype=dtype), SMALL)


@pytest.mark.gpu
@pytest.mark.parametrize("dims", [16, 32, 64, 128, 256])
def test_every_row_of_the_table(dims):
    """Lengths around one tile, more tiles than buffers, every mask, and columns past D."""
    table = TILES["hopper"]["forward_gluon"]
    tile = table[min(key for key in table if key[1] >= dims)]
    rows, columns, stages = tile.rows, tile.columns, tile.stages
    long = columns * (stages + 2)
    dtypes, layouts = cycle(("bf16", "fp16")), cycle(LAYOUTS)
    for case in (
        Case(1, 1, dims), Case(rows - 1, rows - 1, dims), Case(rows, rows, dims),
        Case(rows + 1, rows + 1, dims), Case(1, columns, dims), Case(1, columns + 1, dims),
        Case(2, long + 1, dims, groups=2, causal=False), Case(rows, columns * stages, dims - 3),
        Case(rows + 1, long + 3, dims, window=2 * columns + 5), Case(9, long, dims, window=columns),
        Case(rows + 7, long + 3, dims, documents=3),
    ):
        check(replace(case, dtype=next(dtypes), layout=next(layouts)), tile)


@pytest.mark.gpu
@settings(max_examples=40 if DEVICE == "cpu" else 8, deadline=None)      # each compiled there
@given(any_case(longest=140, dtypes=("bf16", "fp16")), st.integers(1, 4))
def test_whatever_is_drawn(case, stages):
    check(case, SMALL and SMALL._replace(stages=stages))


@SIMULATED                                      # a GPU would compile for two seconds an example
@pytest.mark.grid
@settings(max_examples=500, deadline=None, derandomize=False)
@given(any_case(longest=140, dtypes=("bf16", "fp16")), st.integers(1, 4))
def test_whatever_is_drawn_at_length(case, stages):
    check(case, SMALL and SMALL._replace(stages=stages))


@pytest.mark.grid
@pytest.mark.parametrize("masks", ["causal", "window", "segments", "full"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("D", [16, 32, 64, 100, 128, 256])
@pytest.mark.parametrize("T", [500, 1024, 1111])
def test_many_tiles(T, D, dtype, masks):
    check(Case(T, T, D, groups=2, dtype=dtype, causal=masks != "full",
               window=300 if masks == "window" else None,
               documents=4 if masks == "segments" else 0))


@pytest.mark.gpu
def test_queries_that_see_nothing():
    """They get out 0 and lse −inf, as from `forward`. The operator never has such queries."""
    q, k = (torch.randn(1, 1, length, 16).bfloat16().to(DEVICE) for length in (5, 3))
    out, lse = torch.empty_like(q), torch.empty(1, 1, 5, device=DEVICE)
    launch_gluon(Problem(q, k, scale=0.25), k, out, lse)
    assert (out[:, :, :2] == 0).all() and (lse[:, :, :2] == -torch.inf).all()
    assert torch.equal(out[:, :, 2], k[:, :, 0]) and lse[:, :, 2:].isfinite().all()


# --- faults that a device may sometimes forgive, and the simulator must not ---

K_WAIT = "            mbarrier.wait(k_here.index(buffer), i // STAGES & 1)\n"
V_WAIT = "            mbarrier.wait(v_here.index(before), (i - 1) // STAGES & 1)\n"
V_COPY = "v_here.index(before), v_tiles.index(before),\n"
# fault → (what the simulator says of it, the function that has it, changes that make it)
FAULTS = {
    "a key tile is not waited for": ("is arriving", "forward_gluon",
        (K_WAIT, "")),
    "a value tile is not waited for": ("is arriving", "forward_gluon",
        (V_WAIT, "")),
    "the wait is for the phase before": ("is arriving", "forward_gluon",
        (K_WAIT, K_WAIT.replace("&", "+ 1 &"))),
    "the wait is always for phase 0": ("is arriving", "forward_gluon",
        (K_WAIT, K_WAIT.replace("i // STAGES & 1", "0"))),
    "the wait is for a second tile of q": ("for ever", "forward_gluon",
        ("mbarrier.wait(k_here.index(0), 0)", "mbarrier.wait(q_here, 1)")),
    "no tile is fetched ahead": ("for ever", "forward_gluon",
        ("ahead = i + STAGES", "ahead = tiles + 1")),
    "a product still reads the buffer": ("may still read", "forward_gluon",
        ("acc = warpgroup_mma_wait(0, deps=[new_acc])", "acc = new_acc.result")),
    "another warp still reads the buffer": ("may still read", "forward_gluon",
        ("            thread_barrier()", "            pass")),
    "values go to the wrong buffer": ("another copy into the tile", "forward_gluon",
        (V_COPY, V_COPY.replace("v_tiles.index(before)", "v_tiles.index(buffer)"))),
    "a barrier is not initialised": ("no count", "allocate",
        ("    mbarrier.init(q_here, count=1)\n", "")),
    "a barrier is not made visible": ("no fence", "allocate",
        ("    fence_async_shared()", "    pass")),
    "a barrier counts two arrivals": ("for ever", "allocate",
        ("init(q_here, count=1)", "init(q_here, count=2)")),
    "a copy ends after the program": ("copies under way", "forward_gluon",
        ("expect(k, k_here.index(buffer), ahead < tiles)", "expect(k, k_here.index(buffer))"),
        ("k_tiles.index(buffer),\n                 ahead < tiles)", "k_tiles.index(buffer))")),
    "a product ends after the program": ("products under way", "forward_gluon",
        ("index(buffer).reshape([COLUMNS, DIMS]), acc)",
         "index(buffer).reshape([COLUMNS, DIMS]), acc, is_async=True).result")),
}


@SIMULATED
@pytest.mark.parametrize("fault", FAULTS)
def test_the_simulator_finds(fault, monkeypatch):
    message, function, *changes = FAULTS[fault]
    wrong = changed(getattr(flash_gluon, function), *changes)
    monkeypatch.setattr(flash_gluon, function, wrong)
    with pytest.raises(Misuse, match=message):
        check(Case(64, 200, 16, dtype="bf16"), SMALL)


@SIMULATED
@pytest.mark.parametrize("factor", ["2 *", "-1 +"])
def test_the_simulator_counts_bytes(factor, monkeypatch):
    wrong = changed(flash_gluon.expect, ("tensor.block_type", f"{factor} tensor.block_type"))
    monkeypatch.setattr(flash_gluon, "expect", wrong)
    with pytest.raises(Misuse, match="bytes are expected"):
        check(Case(64, 200, 16, dtype="bf16"), SMALL)


@SIMULATED
@pytest.mark.parametrize("change", [
    ("scores = warpgroup_mma_wait(1, deps=[new_scores])",
     "scores = warpgroup_mma_wait(2, deps=[new_scores])"),
    ("acc = warpgroup_mma_wait(0, deps=[new_acc])", "acc = warpgroup_mma_wait(1, deps=[new_acc])"),
], ids=["scores", "acc"])
def test_a_result_read_too_early_is_nan(change, monkeypatch):
    case = Case(32, 48, 16, dtype="bf16", causal=False)
    q, k, v, _ = case.tensors()
    assert run(case, q, k, v, SMALL)[0].isfinite().all()
    # 4 stages, so that no tile is fetched again: a product under way would be noticed first.
    monkeypatch.setattr(flash_gluon, "forward_gluon", changed(forward_gluon, change))
    assert run(case, q, k, v, SMALL._replace(stages=4))[0].isnan().all()


@SIMULATED
def test_the_simulators_parts():
    barrier, tile = Barrier(), SharedTile([2], torch.bfloat16)
    barrier.init(1)
    barrier.wait(1)                             # the phase before the first is over
    barrier.expect(4)
    with pytest.raises(Misuse, match="not waited for"):
        barrier.expect(4)
    barrier.copies.append((tile, torch.ones(2, dtype=torch.bfloat16)))
    assert tile.data.isnan().all()
    barrier.wait(0)
    assert (tile.data == 1).all()
    barrier.wait(0)                             # over by now
    with pytest.raises(Misuse, match="for ever"):
        barrier.wait(1)
    with pytest.raises(TypeError):              # a product under way is no tensor
        Product(torch.ones(2), []) + 1


@pytest.mark.gpu
def test_the_switch(monkeypatch):
    """The operator uses it for 2 bytes on Hopper, and nowhere else; KERNELS_GLUON=0: never."""
    launched = []
    monkeypatch.delenv("KERNELS_GLUON", raising=False)
    monkeypatch.setattr(flash, "gluon_launcher", flash.gluon_launcher.__wrapped__)
    monkeypatch.setattr(launch, "gpu_family", lambda device: "hopper")
    monkeypatch.setattr(flash, "launch", lambda kernel, *_, **named: launched.append("forward"))
    monkeypatch.setattr(flash_gluon, "launch",
                        lambda kernel, *_, **named: launched.append("forward_gluon"))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        q = torch.zeros(1, 1, 3, 16, dtype=dtype, device=DEVICE)
        flash_attention(q, q, q, True, None, None, 0.25)
    half = q.half()
    monkeypatch.setenv("KERNELS_GLUON", "0")
    flash_attention(half, half, half, True, None, None, 0.25)
    monkeypatch.delenv("KERNELS_GLUON")
    monkeypatch.setattr(launch, "gpu_family", lambda device: "blackwell")
    flash_attention(half, half, half, True, None, None, 0.25)
    assert launched == ["forward_gluon", "forward_gluon", "forward", "forward", "forward"]
    assert "forward_gluon" not in TILES["blackwell"]
