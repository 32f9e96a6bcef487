"""kernels/attention.py against the formula written out in float64 loops, and its refusals."""

from math import exp, inf, log

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.attention import _chunked_lse, attention, decode
from kernels.problem import Problem
from kernels.reference import attention_pattern, reference_attention, visible


def by_hand(q, k, v, causal, window, segments, scale):
    """Vaswani et al. 2017, eq. 1, one number at a time."""
    B, H, T, D = q.shape
    K, S = k.shape[1:3]
    out = torch.zeros(B, H, T, D, dtype=torch.float64)
    lse = torch.full((B, H, T), -inf, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            for i in range(T):
                at = i + S - T
                keys = [j for j in range(S) if (not causal or j <= at)
                        and (window is None or j > at - window)
                        and (segments is None or segments[b, j] == segments[b, at])]
                scores = [float(q[b, h, i].double() @ k[b, h * K // H, j].double()) * scale
                          for j in keys]
                if keys:
                    top = max(scores)
                    total = sum(exp(s - top) for s in scores)
                    lse[b, h, i] = top + log(total)
                    for j, s in zip(keys, scores):
                        out[b, h, i] += exp(s - top) / total * v[b, h * K // H, j].double()
    return out, lse


@st.composite
def cases(draw):
    K, groups = draw(st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 2)]))
    S = draw(st.integers(1, 9))
    causal = draw(st.booleans())
    segmented = draw(st.booleans())
    T = draw(st.integers(1, S if causal or segmented else 9))
    window = draw(st.none() | st.integers(1, S + 2))
    segments = None
    if segmented:
        ids = st.lists(st.integers(0, 3), min_size=S, max_size=S)
        segments = torch.tensor([sorted(draw(ids)), sorted(draw(ids))])
    scale = draw(st.none() | st.just(0.3))
    return K * groups, K, T, S, causal, window, segments, scale, draw(st.integers(0, 99))


@settings(max_examples=150)
@given(cases())
def test_every_backend_is_the_formula(case):
    H, K, T, S, causal, window, segments, scale, seed = case
    torch.manual_seed(seed)
    D = 4
    q = torch.randn(2, T, H, D).transpose(1, 2)             # memory as a projection writes it
    k, v = torch.randn(2, S, K, D).transpose(1, 2), torch.randn(2, K, S, D)
    out, lse = by_hand(q, k, v, causal, window, segments, D ** -0.5 if scale is None else scale)
    masks = {"causal": causal, "window": window, "segments": segments, "scale": scale}
    for backend in ("reference", "sdpa", "auto"):
        assert torch.allclose(attention(q, k, v, backend=backend, **masks).double(), out, atol=2e-6)
        got, got_lse = attention(q, k, v, backend=backend, return_lse=True, **masks)
        assert torch.allclose(got.double(), out, atol=2e-6)
        assert torch.allclose(got_lse.double(), lse, atol=2e-6)
        assert got_lse.dtype == torch.float32 and got_lse.shape == (2, H, T)


def test_lse_off_the_cpu_is_the_formula_too():
    q, k = torch.randn(2, 4, 37, 8), torch.randn(2, 2, 50, 8)
    segments = torch.arange(50).expand(2, 50) // 20
    for masks in ({"window": 7}, {"causal": False, "segments": segments}):
        lse = _chunked_lse(Problem(q, k, **masks), chunk=8)
        assert torch.allclose(lse, attention_pattern(q, k, **masks)[1], atol=1e-5)


def test_backends_agree_on_gradients():
    grads = []
    for backend in ("reference", "sdpa"):
        torch.manual_seed(0)
        q, k, v = (torch.randn(2, heads, 19, 8, requires_grad=True) for heads in (4, 2, 2))
        attention(q, k, v, window=6, backend=backend).square().sum().backward()
        grads.append((q.grad, k.grad, v.grad))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*grads))


def test_a_token_changes_nothing_before_it():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 33, 8) for _ in range(3))
    before = attention(q, k, v)
    for tensor in (q, k, v):
        tensor[:, :, 20] += 1
    assert torch.equal(attention(q, k, v)[:, :, :20], before[:, :, :20])
    assert not torch.allclose(attention(q, k, v)[:, :, 20:], before[:, :, 20:])


def test_a_row_that_sees_nothing_is_zero():
    """Queries before the first key: the definition can express them, attention() refuses them."""
    q, k = torch.randn(1, 1, 3, 4), torch.randn(1, 1, 2, 4)
    pattern, lse = attention_pattern(q, k)
    assert pattern[0, 0, 0].tolist() == [0, 0] and lse[0, 0, 0] == -inf
    assert torch.isfinite(lse[0, 0, 1:]).all()
    assert visible(2, 2).tolist() == [[True, False], [True, True]]


def test_decode_takes_slots_in_any_order():
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 10, 8), torch.randn(1, 2, 10, 8)
    order = torch.randperm(10)
    for window in (None, 4):
        expected = attention(q, k, v, window=window)
        shuffled = decode(q, k[:, :, order], v[:, :, order], torch.tensor([[9]]), order[None],
                          window=window)
        assert torch.allclose(shuffled, expected, atol=1e-6)


@pytest.mark.parametrize(("change", "words"), [
    ({"backend": "fast"}, "reference"), ({"window": 0}, "at least 1"),
    ({"q": (1, 2, 6, 8)}, "6 queries"), ({"q": (1, 3, 4, 8)}, "divide"),
    ({"q": (2, 4, 8)}, r"\(B, H, T, D\)"), ({"segments": torch.zeros(1, 4)}, "segments"),
])
def test_what_cannot_be_served_is_named(change, words):
    q, k = torch.randn(change.pop("q", (1, 4, 5, 8))), torch.randn(1, 2, 5, 8)
    with pytest.raises(ValueError, match=words):
        attention(q, k, k, **change)


def test_one_query_of_rows_of_different_lengths_plain_and_compiled():
    """Each row gives what it gives alone. A position past the last slot sees all slots."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 4, 1, 16), torch.randn(3, 2, 10, 16), torch.randn(3, 2, 10, 16)
    positions = torch.tensor([[0], [6], [25]])
    rows = [reference_attention(q[b, None], k[b, None, :, :n], v[b, None, :, :n])[0]
            for b, n in enumerate((1, 7, 10))]
    expected = torch.cat(rows)
    with torch.no_grad():
        for function in (decode, torch.compile(decode, fullgraph=True)):
            assert torch.allclose(function(q, k, v, positions), expected, atol=1e-6)
        compiled = torch.compile(attention, fullgraph=True)
        assert torch.allclose(compiled(q, k, v), reference_attention(q, k, v)[0], atol=1e-6)
