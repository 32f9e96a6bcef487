"""kernels/decode.py: a few queries against a cache, whose keys are split over programs."""

from dataclasses import replace

import pytest
import torch
from attention_cases import DEVICE, Case, assert_as_good, placed
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import decode as decode_kernels
from kernels import launch
from kernels.attention import FEW_QUERIES, attention, decode
from kernels.reference import reference_attention

CASES = [Case(1, 300, 16), Case(1, 17, 20, B=2, K=2, groups=3),
         Case(3, 500, 32, K=2, groups=2, window=40), Case(9, 400, 16, groups=8),
         Case(1, 1, 64), Case(5, 700, 48, B=2, layout="sparse")]


def exact(q, k, v, query_positions, key_positions, window):
    """The definition in float64: a query sees the last `window` keys at positions up to its own."""
    query, key = query_positions[:, None, :, None], key_positions[:, None, None, :]
    sees = (key >= 0) & (key <= query)
    if window:
        sees = sees & (key > query - window)
    groups = q.shape[1] // k.shape[1]
    k, v = (t.double().repeat_interleave(groups, 1) for t in (k, v))
    scores = (q.double() @ k.mT * q.shape[-1] ** -0.5).masked_fill(~sees, -torch.inf)
    lse = scores.logsumexp(-1)
    return torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0)[..., None]) @ v, lse


def tensors(case: Case):
    return case.tensors()[:3]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_decoding_is_the_end_of_prefill(case, dtype):
    case = replace(case, dtype=dtype)
    q, k, v = tensors(case)
    want, want_lse = reference_attention(q.double(), k.double(), v.double(), window=case.window)
    plain, _ = reference_attention(q, k, v, window=case.window)
    out, lse = decode_kernels.decode(q, k, v, None, None, case.window, case.D ** -0.5)
    assert_as_good(out, want, plain)
    assert_as_good(lse, want_lse, want_lse.float())
    if case.T * case.groups <= FEW_QUERIES:             # for so few attention() calls the same
        assert torch.equal(attention(q, k, v, window=case.window, backend="triton"), out)


def check_slots(data) -> None:
    """Ragged rows, rings that have wrapped, empty slots, queries that see nothing."""
    S, T = data.draw(st.integers(1, 300)), data.draw(st.integers(1, 5))
    case = Case(T, S, data.draw(st.integers(1, 40)), B=data.draw(st.integers(1, 3)),
                K=data.draw(st.integers(1, 2)), groups=data.draw(st.integers(1, 4)),
                window=data.draw(st.none() | st.integers(1, S)), seed=data.draw(st.integers(0, 99)))
    q, k, v = tensors(case)
    draw = torch.Generator().manual_seed(case.seed)
    orders = [torch.randperm(S, generator=draw) for _ in range(case.B)]
    key_positions = torch.stack(orders).to(DEVICE)
    empty = torch.rand(case.B, S, generator=draw) < data.draw(st.sampled_from((0, 0.3, 1)))
    key_positions[empty.to(DEVICE)] = -1
    ordered = data.draw(st.booleans())
    if ordered:         # slot j holds position j; slots past a row's queries hold anything
        key_positions = torch.arange(S, device=DEVICE).expand(case.B, S)
    first = torch.randint(-2, S + 5, (case.B, 1), generator=draw).to(DEVICE)
    query_positions = first + torch.arange(T, device=DEVICE)
    if ordered:
        for row, position in enumerate(query_positions[:, -1].tolist()):
            past = max(0, position + 1)
            k[row, :, past:] = v[row, :, past:] = torch.nan
    out, lse = decode_kernels.decode(q, k, v, query_positions, None if ordered else key_positions,
                                     case.window, case.D ** -0.5)
    want, want_lse = exact(q, k.nan_to_num(), v.nan_to_num(), query_positions, key_positions,
                           case.window)
    assert_as_good(out, want, want.float(), str(case))
    assert_as_good(lse, want_lse, want_lse.float(), str(case))


@settings(max_examples=15)
@given(st.data())
def test_slots_in_any_order(data):
    check_slots(data)


@pytest.mark.grid
@settings(max_examples=200, derandomize=False)
@given(st.data())
def test_slots_in_any_order_at_length(data):
    check_slots(data)


@pytest.mark.parametrize("programs", [0, 2, 32])
def test_the_split_changes_only_rounding(monkeypatch, programs):
    case = Case(2, 600, 16, groups=2)
    q, k, v = tensors(case)
    monkeypatch.setattr(launch, "about", lambda device: launch.Device(programs, 0))
    out, lse = decode_kernels.decode(q, k, v, None, None, None, 0.25)
    want, want_lse = reference_attention(q.double(), k.double(), v.double())
    assert torch.allclose(out.double(), want, atol=1e-6)
    assert torch.allclose(lse.double(), want_lse, atol=1e-6)


@pytest.mark.parametrize("window", [None, 32])
def test_what_slots_hold_that_nobody_sees(monkeypatch, window):
    """NaN in empty slots, past the row's length and before the window has no effect.

    With the tiles of a GPU too.
    """
    q, k, v = (placed(torch.randn(1, heads, n, 16), "heads")
               for heads, n in ((2, 1), (1, 256), (1, 256)))
    positions = torch.arange(256, device=DEVICE)[None].clone()
    positions[:, 128:] = positions[:, 100:105] = -1
    at = torch.tensor([[127]], device=DEVICE)
    want, _ = exact(q, k, v, at, positions, window)
    unseen = (positions[0] < 0) | (positions[0] <= 127 - (window or 256))
    k[:, :, unseen] = v[:, :, unseen] = torch.nan
    families = ("interpreter", "ampere") if DEVICE == "cpu" else (launch.gpu_family(q.device),)
    for family in families:
        monkeypatch.setattr(launch, "gpu_family", lambda device, family=family: family)
        got, _ = decode_kernels.decode(q, k, v, at, positions, window, 0.25)
        assert torch.allclose(got.double(), want, atol=1e-6)
        public = decode(q, k, v, at, positions, window=window, backend="triton")
        assert torch.equal(public, got)


@pytest.mark.parametrize(("change", "words"), [
    ({"backend": "reference"}, "auto, sdpa, triton"), ({"window": 0}, "at least 1"),
    ({"key_positions": torch.zeros(1, 5)}, "key_positions"),
    ({"k": torch.zeros(2, 3, 5, 8), "v": torch.zeros(2, 3, 5, 8)}, "divide"),
])
def test_what_cannot_be_served_is_named(change, words):
    arguments = {"q": torch.zeros(2, 4, 1, 8), "k": torch.zeros(2, 2, 5, 8),
                 "v": torch.zeros(2, 2, 5, 8), "query_positions": torch.zeros(2, 1),
                 "key_positions": torch.zeros(2, 5)} | change
    with pytest.raises(ValueError, match=words):
        decode(**arguments)
