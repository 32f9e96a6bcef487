"""kernels/statistics.py against the dense reference, and on heads whose scores are known."""

from math import log

import pytest
import torch
from attention_cases import DEVICE, Case
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from kernels import statistics_reference as reference
from kernels.attention import attention
from kernels.planes import REACH
from kernels.reference import attention_pattern
from kernels.statistics import HeadStatistics, head_statistics, induction_targets

BACKENDS = ("torch", "triton")


def by_definition(pattern: torch.Tensor, tokens: torch.Tensor,
                  segments: torch.Tensor | None = None) -> HeadStatistics:
    """Every statistic from the dense pattern (B, H, T, S)."""
    if segments is not None:
        tokens = reference.tokens_by_document(tokens, segments)
    return HeadStatistics(
        reference.prefix_matching(pattern, tokens), reference.duplicate_token(pattern, tokens),
        reference.current_token(pattern), reference.previous_token(pattern),
        reference.first_token(pattern),
        reference.entropy(pattern), reference.distance(pattern),
        reference.offset_profile(pattern, tokens))


# --- the reference, on patterns worked out by hand ---

# The tokens a b a b a. Each row is a query; no two entries of the later rows are equal.
TOKENS = torch.tensor([[0, 1, 0, 1, 0]])
PATTERN = torch.tensor([[[[1.00, 0.00, 0.00, 0.00, 0.00],
                          [0.25, 0.75, 0.00, 0.00, 0.00],
                          [0.50, 0.20, 0.30, 0.00, 0.00],
                          [0.10, 0.20, 0.30, 0.40, 0.00],
                          [0.05, 0.10, 0.20, 0.25, 0.40]]]], dtype=torch.float64)
BY_HAND = {
    # After an earlier a come keys 1 and 3, after an earlier b comes key 2.
    "prefix_matching": [0, 0, 0.20, 0.30, 0.10 + 0.25],
    "latest_match": [0, 0, 0.20, 0.30, 0.25],
    "duplicate_token": [0, 0, 0.50, 0.20, 0.05 + 0.20],
    "current_token": [1, 0.75, 0.30, 0.40, 0.40],
    "previous_token": [0, 0.25, 0.20, 0.30, 0.25],
    "first_token": [1, 0.25, 0.50, 0.10, 0.05],
    "distance": [0, 0.25, 2 * 0.5 + 0.2, 3 * 0.1 + 2 * 0.2 + 0.3, 4 * 0.05 + 3 * 0.1 + 0.4 + 0.25],
}


@pytest.mark.parametrize("name", BY_HAND)
def test_the_reference_by_hand(name):
    takes_tokens = name in ("prefix_matching", "latest_match", "duplicate_token")
    arguments = (TOKENS,) if takes_tokens else ()
    values = getattr(reference, name)(PATTERN, *arguments)
    assert values.shape == (1, 1, 5) and values[0, 0].tolist() == pytest.approx(BY_HAND[name])
    # With only the last two queries, their two numbers are the same.
    last = getattr(reference, name)(PATTERN[:, :, 3:], *arguments)
    assert last[0, 0].tolist() == pytest.approx(BY_HAND[name][3:])


def test_the_references_entropy_and_profile_by_hand():
    uniform = torch.ones(1, 1, 4, 4).tril() / torch.arange(1, 5)[:, None]
    assert reference.entropy(uniform)[0, 0].tolist() == pytest.approx([0, log(2), log(3), log(4)])
    assert reference.entropy(torch.eye(3)[None, None]).abs().max() == 0
    profile = reference.offset_profile(PATTERN, TOKENS, reach=1)[0, 0]
    # The targets are keys 1, 2 and 3 of rows 2, 3 and 4. Rows 0 and 1 have none.
    assert profile.tolist() == [[0, 0, 0], [0, 0, 0], [0.5, 0.2, 0.3], [0.2, 0.3, 0.4],
                                [0.2, 0.25, 0.4]]


def test_the_reference_keeps_documents_apart():
    """a b | a b a: in the second document, only the last a has an earlier place, key 2."""
    ids = reference.tokens_by_document(TOKENS, torch.tensor([[0, 0, 1, 1, 1]]))
    assert (ids[0, :, None] == ids[0]).int().tolist() == [
        [1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 1, 0, 1], [0, 0, 0, 1, 0], [0, 0, 1, 0, 1]]
    assert reference.prefix_matching(PATTERN, ids)[0, 0].tolist() == [0, 0, 0, 0, 0.25]
    assert reference.duplicate_token(PATTERN, ids)[0, 0].tolist() == [0, 0, 0, 0, 0.20]


# --- the statistics against the reference ---

def agree(statistics: HeadStatistics, expected: HeadStatistics, tolerance: float,
          case: str = "") -> None:
    for name, a, b in zip(HeadStatistics._fields, statistics, expected):
        assert a.shape == b.shape and a.dtype == torch.float32, name
        scale = max(1, b.abs().max().item()) if name == "distance" else 1
        error = (a.double().cpu() - b).abs().max().item() if b.numel() else 0.0
        assert error <= tolerance * scale, f"{name} {case}: {error:.1e}"


@st.composite
def cases(draw):
    S = draw(st.integers(1, 70))
    return Case(T=draw(st.integers(1, S)), S=S, D=draw(st.sampled_from((4, 16, 24, 32))),
                B=draw(st.integers(1, 2)), K=draw(st.integers(1, 2)),
                groups=draw(st.integers(1, 3)), window=draw(st.none() | st.integers(1, S + 2)),
                documents=draw(st.sampled_from((0, 0, 3))), shuffled=draw(st.booleans()),
                layout=draw(st.sampled_from(("projection", "heads", "columns"))),
                seed=draw(st.integers(0, 99))), draw(st.integers(1, 9))


def check_statistics(backend: str, case: Case, vocabulary: int) -> None:
    q, k, _, _ = case.tensors()
    generator = torch.Generator().manual_seed(case.seed)
    tokens = torch.randint(0, vocabulary, (case.B, case.S), generator=generator)
    masks = {name: mask for name, mask in case.masks().items() if name != "causal"}
    segments = None if masks["segments"] is None else masks["segments"].cpu()
    pattern, lse = attention_pattern(q.double(), k.double(), **masks)
    statistics = head_statistics(q, k, lse.float(), tokens.to(DEVICE), **masks, backend=backend)
    agree(statistics, by_definition(pattern.cpu(), tokens, segments), 1e-5, str(case))


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=10)
@given(cases())
# Distances of 1 at positions of 67.
@example((Case(37, 67, 24, K=2, groups=2, window=2, seed=97), 1))
# Whole tiles end just at the first query, which is no duplicate of itself.
@example((Case(40, 55, 16), 1))
def test_statistics_are_their_definitions(backend, drawn):
    check_statistics(backend, *drawn)


@pytest.mark.grid
@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=200, derandomize=False)
@given(cases())
def test_statistics_are_their_definitions_at_length(backend, drawn):
    check_statistics(backend, *drawn)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_in_half_precision(backend, dtype):
    """Against the pattern of the same rounded q and k: only the float32 arithmetic differs."""
    case = Case(90, 90, 32, B=2, K=2, groups=2, dtype=dtype)
    q, k, v, _ = case.tensors()
    tokens = torch.randint(0, 9, (2, 90))
    _, lse = attention(q, k, v, return_lse=True, backend="triton")
    statistics = head_statistics(q, k, lse, tokens.to(DEVICE), backend=backend)
    pattern, _ = attention_pattern(q.double(), k.double())
    agree(statistics, by_definition(pattern.cpu(), tokens), 2e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_token_over_and_over_in_documents(backend):
    """Each row's target is its own position: half its profile is past the end, never to be read."""
    case = Case(40, 40, 16, documents=3)
    q, k, v, _ = case.tensors()
    segments = case.masks()["segments"]
    _, lse = attention(q, k, v, segments=segments, return_lse=True, backend="triton")
    tokens = torch.zeros(1, 40, dtype=torch.long)
    statistics = head_statistics(q.requires_grad_(), k, lse, tokens.to(DEVICE), segments=segments,
                                 backend=backend)
    pattern, _ = attention_pattern(q.detach().double(), k.double(), segments=segments)
    agree(statistics, by_definition(pattern.cpu(), tokens, segments.cpu()), 1e-5)
    assert not statistics.prefix_matching.requires_grad


# --- heads whose scores are known ---

def head_that_looks_at(target: torch.Tensor,
                       certainty: float = 100.0) -> tuple[torch.Tensor, torch.Tensor]:
    """q, k (1, 1, T, T) of a head whose row i attends only to key target_i, or to key 0 if −1."""
    T = len(target)
    k = torch.eye(T, device=DEVICE)[None, None]
    return k[:, :, target.clamp(min=0)] * certainty * T ** 0.5, k


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("period", "repeats"), [(8, 4), (25, 2), (25, 4), (50, 2)])
def test_a_perfect_induction_head_scores_one(backend, period, repeats):
    block = torch.randperm(200)[:period]
    tokens = torch.cat([torch.tensor([200]), block.repeat(repeats)])[None].to(DEVICE)
    targets = induction_targets(tokens)
    q, k = head_that_looks_at(targets[0])
    given = q.clone(), k.clone(), tokens.clone()
    _, lse = attention(q, k, k, return_lse=True)
    statistics = head_statistics(q, k, lse, tokens, backend=backend)
    first, later = slice(1 + period), slice(1 + period, None)
    assert (statistics.prefix_matching[0, 0, later] - 1).abs().max() < 1e-6
    assert (statistics.offset_profile[0, 0, later, REACH] - 1).abs().max() < 1e-6
    assert statistics.offset_profile[0, 0, later].sum(-1).sub(1).abs().max() < 1e-5
    assert statistics.prefix_matching[0, 0, first].abs().max() < 1e-6
    assert statistics.entropy[0, 0, later].abs().max() < 1e-5
    assert (statistics.distance[0, 0, later] - (period - 1)).abs().max() < 1e-4
    for tensor, as_given in zip((q, k, tokens), given):
        assert torch.equal(tensor, as_given)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_head_that_rests_on_the_first_token_is_no_induction_head(backend):
    T, scale = 64, 64 ** 0.5
    tokens = torch.cat([torch.tensor([99]), torch.arange(21).repeat(3)])[None].to(DEVICE)
    k = torch.eye(T, device=DEVICE)[None, None]
    q = torch.zeros(1, 1, T, T, device=DEVICE)
    q[..., 0] = scale * log(0.98 / 0.02 * 40)
    _, lse = attention(q, k, k, return_lse=True)
    statistics = head_statistics(q, k, lse, tokens, backend=backend)
    assert statistics.first_token[0, 0, 22:].min() > 0.96
    assert statistics.prefix_matching[0, 0, 22:].max() < 0.03


@pytest.mark.parametrize("backend", BACKENDS)
def test_previous_and_duplicate_token_heads(backend):
    tokens = torch.arange(10, device=DEVICE).repeat(3)[None]
    position = torch.arange(30, device=DEVICE)
    for back, name in ((0, "current_token"), (1, "previous_token"), (10, "duplicate_token")):
        q, k = head_that_looks_at(position - back)
        _, lse = attention(q, k, k, return_lse=True)
        statistics = head_statistics(q, k, lse, tokens, backend=backend)
        assert (getattr(statistics, name)[0, 0, 10:] - 1).abs().max() < 1e-6
        assert statistics.prefix_matching[0, 0, 10:].max() < 1e-6


def test_memory_is_a_few_rows_of_the_pattern():
    """PyTorch's highest allocation, at a length at which all heads' patterns would be 256 MB."""
    q, k = torch.randn(1, 4, 4096, 16), torch.randn(1, 2, 4096, 16)
    _, lse = attention(q, k, k, return_lse=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        head_statistics(q, k, lse, torch.randint(0, 50, (1, 4096)), backend="torch")
    held = highest = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            highest = max(highest, held)
    assert 0 < highest < 100e6


@pytest.mark.parametrize(("change", "words"), [
    ({"backend": "numpy"}, "auto, torch, triton"), ({"lse": torch.zeros(1, 2, 4)}, "lse must be"),
    ({"tokens": torch.zeros(1, 4)}, "tokens"), ({"window": 0}, "at least 1"),
    ({"segments": torch.zeros(1, 4)}, "segments"), ({"k": torch.zeros(1, 3, 5, 8)}, "divide"),
    ({"k": torch.zeros(1, 2, 3, 8)}, "T ≤ S"),
])
def test_what_cannot_be_served_is_named(change, words):
    arguments = {"q": torch.zeros(1, 2, 5, 8), "k": torch.zeros(1, 2, 5, 8),
                 "lse": torch.zeros(1, 2, 5), "tokens": torch.zeros(1, 5)} | change
    with pytest.raises(ValueError, match=words):
        head_statistics(**arguments)
