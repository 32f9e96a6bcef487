"""kernels/flash.py against the definition in float64: on a GPU, or else in triton's interpreter."""

from dataclasses import replace
from itertools import cycle, product

import pytest
import torch
import triton
import triton.language as tl
from attention_cases import (
    CASES,
    DEVICE,
    LAYOUTS,
    Case,
    any_case,
    assert_as_good,
    exact_and_plain,
)
from hypothesis import given, settings
from triton.runtime.errors import OutOfResources

from kernels import arguments, launch
from kernels.attention import attention
from kernels.flash import flash_attention, flash_attention_backward
from kernels.tiles import program_place

NAMES = ("out", "lse", "dq", "dk", "dv")


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that no kernel wrote holds NaN: PyTorch fills new tensors with it in this mode."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def pointers(monkeypatch):
    """As on a device without TMA, with that device's larger tiles."""
    if DEVICE == "cpu":
        monkeypatch.setattr(launch, "gpu_family", lambda device: "ampere")


def run(case: Case, q, k, v, grad) -> list[torch.Tensor]:
    """out, lse, dq, dk, dv by the kernels."""
    rest = (*case.masks().values(), case.scale or case.D ** -0.5)
    out, lse = flash_attention(q, k, v, *rest)
    return [out, lse, *flash_attention_backward(grad, q, k, v, out, lse, *rest)]


def check(case: Case) -> None:
    tensors = case.tensors()
    exact, plain = exact_and_plain(case, *tensors)
    got = run(case, *tensors)
    for name, g, e, p in zip(NAMES, got, exact, plain):
        assert_as_good(g, e, p, f"{name} of {case}")
    # lse is float32 for any inputs.
    assert_as_good(got[1], exact[1], exact[1].float(), f"lse of {case}")
    if DEVICE != "cpu":                         # there programs run at once, in any order
        again = run(case, *tensors)
        assert all(torch.equal(a, b) for a, b in zip(got, again)), f"other bits: {case}"


# Lengths around tiles of 16, 32, 64 and 128 positions; some head sizes are no powers of two.
LENGTHS = (1, 15, 16, 17, 63, 65, 77, 127, 129, 130)
SIZES = (16, 32, 48, 64, 80, 96, 128, 256)
GROUPS = (1, 2, 3, 8)


def grid():
    """Every length × head size × group × window, with dtypes and layouts in turn."""
    dtypes, layouts = cycle(("bf16", "fp32", "fp16")), cycle(LAYOUTS)
    for T, D, groups in product(LENGTHS, SIZES, GROUPS):
        for window in dict.fromkeys((None, 1, 7, max(1, T - 1), T + 5)):
            yield Case(T, T, D, groups=groups, window=window, dtype=next(dtypes),
                       layout=next(layouts))


@pytest.mark.grid
@pytest.mark.parametrize("case", list(grid()), ids=lambda c: (
    f"T{c.T}-D{c.D}-G{c.groups}-W{c.window}-{c.dtype}-{c.layout}"))
def test_grid(case):
    check(case)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cases(case, dtype):
    check(replace(case, dtype=dtype))


@pytest.mark.parametrize("case", [
    Case(140, 140, 32, groups=2, dtype="bf16"), Case(100, 200, 64, window=30, dtype="fp16"),
    Case(130, 130, 20, documents=3, dtype="bf16"), Case(60, 60, 16, layout="columns"),
    Case(200, 70, 16, causal=False, dtype="bf16"),
], ids=str)
def test_without_tma(case, pointers):
    check(case)


@settings(max_examples=15)
@given(any_case(longest=80))
def test_whatever_is_drawn(case):
    check(case)


@pytest.mark.grid
@settings(max_examples=400, derandomize=False)
@given(any_case(longest=80))
def test_whatever_is_drawn_at_length(case):
    check(case)


@pytest.mark.parametrize("window", [None, 9])
def test_a_token_changes_nothing_before_it(window):
    """Bit for bit: in out and lse, and in gradients of what comes before."""
    case = Case(70, 70, 16, groups=2, window=window)
    q, k, v, grad = case.tensors()
    out, lse, *_ = run(case, q, k, v, grad)
    for changed in (q, k, v):
        changed[:, :, 40] += 1
    grad[:, :, :40] = 0                                 # only queries from 40 on have a gradient
    new_out, new_lse, dq, dk, dv = run(case, q, k, v, grad)
    assert torch.equal(out[:, :, :40], new_out[:, :, :40])
    assert torch.equal(lse[:, :, :40], new_lse[:, :, :40])
    assert not torch.equal(out[:, :, 40:], new_out[:, :, 40:])
    assert (dq[:, :, :40] == 0).all()
    if window:
        unseen = slice(40 - window + 1)
        assert (dk[:, :, unseen] == 0).all() and (dv[:, :, unseen] == 0).all()


def test_a_window_longer_than_the_keys_is_none():
    full, windowed = Case(50, 50, 16), Case(50, 50, 16, window=50)
    tensors = full.tensors()
    assert all(torch.equal(a, b) for a, b in zip(run(full, *tensors), run(windowed, *tensors)))


@pytest.mark.parametrize("size", [1e4, 0.0])
def test_extreme_and_equal_scores(size):
    """Scores of ±size: with 1e4 each row picks one key, with 0 it averages."""
    case = Case(40, 40, 16, scale=1.0)
    q, k, v, grad = case.tensors()
    q.zero_()
    k.zero_()
    q[..., 0] = size
    k[..., 0] = torch.where(torch.arange(40, device=DEVICE) == 7, 1.0, -1.0)
    out, lse = run(case, q, k, v, grad)[:2]
    if size:
        assert torch.allclose(out[:, :, 7:], v[:, :, 7:8].expand_as(out[:, :, 7:]), atol=1e-6)
        assert torch.allclose(lse[:, :, 7:], torch.tensor(1e4, device=DEVICE))
    else:
        n_keys = torch.arange(1, 41, device=DEVICE)
        assert torch.allclose(out, v.cumsum(2) / n_keys[:, None], atol=1e-6)
        assert torch.allclose(lse, n_keys.log().expand_as(lse), atol=1e-6)
    assert all(t.isfinite().all() for t in run(case, q, k, v, grad))


def test_no_keys_and_no_queries():
    q, none = torch.randn(1, 2, 3, 16, device=DEVICE), torch.randn(1, 1, 0, 16, device=DEVICE)
    out, lse = flash_attention(q, none, none, False, None, None, 0.25)
    assert (out == 0).all() and (lse == -torch.inf).all()
    dq, dk, _ = flash_attention_backward(out, q, none, none, out, lse, False, None, None, 0.25)
    assert (dq == 0).all() and dk.shape == none.shape
    assert attention(q[:, :, :0], q[:, :1], q[:, :1], backend="triton").shape == (1, 2, 0, 16)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scales_that_are_not_positive(scale, dtype):
    case = Case(30, 30, 16, groups=2, scale=scale, dtype=dtype)
    q, k, v, grad = case.tensors()
    inputs = [t.clone().requires_grad_() for t in (q, k, v)]
    out, lse = attention(*inputs, scale=scale, backend="triton", return_lse=True)
    results = (out, lse, *torch.autograd.grad(out, inputs, grad))
    for got, exact, plain in zip(results, *exact_and_plain(case, q, k, v, grad)):
        assert_as_good(got, exact, plain)


def test_layouts_that_only_look_odd():
    """Strides of 0, as the gradient of a sum has them; any strides of dimensions of 1."""
    case = Case(20, 20, 16, dtype="bf16")
    q, k, v, grad = case.tensors()
    exact, plain = exact_and_plain(case, q, k, v, torch.ones_like(grad))
    odd = [t.as_strided(t.shape, (1, 3, *t.stride()[2:])) for t in (q, k, v)]   # B = 1 and one head
    ones = torch.ones((), dtype=q.dtype, device=DEVICE).expand_as(grad)
    for name, g, e, p in zip(NAMES, run(case, *odd, ones), exact, plain):
        assert_as_good(g, e, p, name)
    if DEVICE == "cpu":
        assert launch.readable(*odd)[0] is odd[0]                       # nothing is copied for it
    wide = torch.empty_strided((1, 1, 4, 4), (1, 1, 2 ** 24, 1), device="meta")
    assert arguments.for_pointers(wide).is_contiguous() and arguments.for_pointers(q) is q


@triton.jit
def places(out, tiles, together):
    place, tile = program_place(tiles, together)
    tl.store(out + tl.program_id(0), place * 10 + tile)


@pytest.mark.gpu
def test_programs_go_through_a_few_heads_at_a_time():
    """The first tiles of the heads that share the cache, then their second ones.

    The last group may be smaller.
    """
    out = torch.zeros(15, dtype=torch.int32, device=DEVICE)
    places[(15, 1, 1)](out, 3, 2)
    assert out.tolist() == [0, 10, 1, 11, 2, 12, 20, 30, 21, 31, 22, 32, 40, 41, 42]
    # Without a device L2 has 64 KB: 32 KB of keys and values.
    q = torch.empty(1, 8, 100, 64, dtype=torch.float16)
    assert launch.heads_together(q, 100, 8) == 1
    assert launch.heads_together(q, 9, 99) == 14
    assert launch.heads_together(q, 9, 99, 4) == 56
    assert launch.heads_together(q, 1, 8) == 8      # at most all: places are counted in 32 bits


def test_plans_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(launch, "MOST_PLANS", 2)
    monkeypatch.setattr(launch, "plans", {})
    for T in (20, 21, 20, 22, 21):                      # with other strides each time
        check(Case(T, T, 16, B=2, layout="heads"))
        assert 0 < len(launch.plans) <= 2


def test_gradients_by_finite_differences():
    """torch's own gradcheck, as tight as float32 accumulators allow."""
    q, k, v = (torch.randn(1, heads, 9, 16, device=DEVICE, requires_grad=True)
               for heads in (2, 1, 1))

    def call(q, k, v):
        return attention(q, k, v, window=5, backend="triton")

    assert torch.autograd.gradcheck(call, (q, k, v), fast_mode=True, eps=1e-2, atol=2e-3, rtol=1e-2,
                                    nondet_tol=0)


def test_a_tile_that_does_not_fit_gives_way_to_a_smaller_one(monkeypatch):
    """What triton raises when a program wants more shared memory than there is."""
    tried, start = [], launch.start

    def small_device(kernel, like, grid, arguments, compiled=None, **options):
        named = dict(zip(kernel.arg_names, arguments))
        tried.append(named["ROWS"] * named["COLUMNS"])
        if tried[-1] > 32 * 32:
            raise OutOfResources(tried[-1], 32 * 32, "shared memory")
        return start(kernel, like, grid, arguments, compiled, **options)

    monkeypatch.setattr(launch, "start", small_device)
    monkeypatch.setattr(launch, "_too_large", set())
    monkeypatch.setattr(launch, "plans", {})
    monkeypatch.setattr(launch, "gpu_family", lambda device: "ampere")
    case = Case(30, 30, 16, dtype="fp16")
    q, k, v, _ = case.tensors()
    out = attention(q, k, v, backend="triton", return_lse=True)[0].clone()
    flash_attention(q, k, v, True, None, None, 0.25)
    assert_as_good(out, *[r[0] for r in exact_and_plain(case, *case.tensors())])
    assert tried[0] > tried[-1]
    assert tried.count(max(tried)) == 1             # a size that failed is not tried again
    monkeypatch.setattr(launch, "SMALLER", ())
    monkeypatch.setattr(launch, "_too_large", set())
    monkeypatch.setattr(launch, "plans", {})
    with pytest.raises(ValueError, match="backend='sdpa'"):
        flash_attention(q, k, v, True, None, None, 0.25)
