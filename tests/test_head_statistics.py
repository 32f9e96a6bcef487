"""kernels/head_statistics.py against the dense pattern, entry by entry, and on heads whose every score is known."""

from math import log

import pytest
import torch
from attention_cases import DEVICE, Case
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kernels.attention import attention
from kernels.head_statistics import REACH, HeadStatistics, head_statistics, induction_targets
from kernels.reference import attention_pattern

BACKENDS = ("torch", "triton")


def by_hand(pattern: torch.Tensor, tokens: torch.Tensor, segments: torch.Tensor | None = None) -> HeadStatistics:
    """The definitions read aloud, on the dense pattern (B, H, T, S)."""
    B, H, T, S = pattern.shape
    found = HeadStatistics(*(torch.zeros(B, H, T, dtype=torch.float64) for _ in range(6)),
                           torch.zeros(B, H, T, 2 * REACH + 1, dtype=torch.float64))
    for b in range(B):
        for row in range(T):
            i, A, x = row + S - T, pattern[b, :, row], tokens[b]
            document = torch.zeros(S) if segments is None else segments[b]
            follows = [j for j in range(1, i + 1) if x[j - 1] == x[i] and document[j - 1] == document[i]]
            found.prefix_matching[b, :, row] = A[:, [j for j in follows if document[j] == document[i]]].sum(-1)
            found.duplicate_token[b, :, row] = A[:, [j for j in range(i) if x[j] == x[i]]].sum(-1)
            found.previous_token[b, :, row] = A[:, i - 1] if i else 0
            found.first_token[b, :, row] = A[:, 0]
            found.entropy[b, :, row] = torch.special.entr(A).sum(-1)
            found.distance[b, :, row] = (A * (i - torch.arange(S))).sum(-1)
            if follows:
                for o in range(-REACH, REACH + 1):
                    if 0 <= follows[-1] + o <= i:
                        found.offset_profile[b, :, row, o + REACH] = A[:, follows[-1] + o]
    return found


def agree(found: HeadStatistics, expected: HeadStatistics, tolerance: float, what: str = "") -> None:
    for name, a, b in zip(HeadStatistics._fields, found, expected):
        assert a.shape == b.shape and a.dtype == torch.float32, name
        scale = max(1, b.abs().max().item()) if name == "distance" else 1
        assert torch.allclose(a.double().cpu(), b, atol=tolerance * scale, rtol=0), f"{name} {what}: {(a.cpu() - b).abs().max():.1e}"


@st.composite
def cases(draw):
    S = draw(st.integers(1, 70))
    return Case(T=draw(st.integers(1, S)), S=S, D=draw(st.sampled_from((4, 16, 24, 32))), B=draw(st.integers(1, 2)),
                K=draw(st.integers(1, 2)), groups=draw(st.integers(1, 3)), window=draw(st.none() | st.integers(1, S + 2)),
                documents=draw(st.sampled_from((0, 0, 3))), shuffled=draw(st.booleans()),
                layout=draw(st.sampled_from(("projection", "heads", "columns"))),
                seed=draw(st.integers(0, 99))), draw(st.integers(1, 9))


def check_statistics(backend: str, case: Case, vocabulary: int) -> None:
    q, k, _, _ = case.tensors()
    tokens = torch.randint(0, vocabulary, (case.B, case.S), generator=torch.Generator().manual_seed(case.seed))
    masks = {name: mask for name, mask in case.masks().items() if name != "causal"}
    segments = None if masks["segments"] is None else masks["segments"].cpu()
    pattern, lse = attention_pattern(q.double(), k.double(), **masks)
    found = head_statistics(q, k, lse.float(), tokens.to(DEVICE), **masks, backend=backend)
    agree(found, by_hand(pattern.cpu(), tokens, segments), 1e-5, str(case))


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=10)
@given(cases())
@example((Case(37, 67, 24, K=2, groups=2, window=2, seed=97), 1))       # distances of 1 at positions of 67
@example((Case(40, 55, 16), 1))             # whole tiles end just at the first query, which is no duplicate of itself
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
    """Against the pattern of the same rounded q and k: only the arithmetic differs, and that is float32."""
    case = Case(90, 90, 32, B=2, K=2, groups=2, dtype=dtype)
    q, k, v, _ = case.tensors()
    tokens = torch.randint(0, 9, (2, 90))
    _, lse = attention(q, k, v, return_lse=True, backend="triton")
    found = head_statistics(q, k, lse, tokens.to(DEVICE), backend=backend)
    agree(found, by_hand(attention_pattern(q.double(), k.double())[0].cpu(), tokens), 2e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_token_over_and_over_in_documents(backend):
    """Every row's target is its own position, so that half its profile lies past the end: nothing there may be read."""
    case = Case(40, 40, 16, documents=3)
    q, k, v, _ = case.tensors()
    segments = case.masks()["segments"]
    _, lse = attention(q, k, v, segments=segments, return_lse=True, backend="triton")
    tokens = torch.zeros(1, 40, dtype=torch.long)
    found = head_statistics(q.requires_grad_(), k, lse, tokens.to(DEVICE), segments=segments, backend=backend)
    pattern, _ = attention_pattern(q.detach().double(), k.double(), segments=segments)
    agree(found, by_hand(pattern.cpu(), tokens, segments.cpu()), 1e-5)
    assert not found.prefix_matching.requires_grad


def head_that_looks_at(target: torch.Tensor, certainty: float = 100.0) -> tuple[torch.Tensor, torch.Tensor]:
    """q, k (1, 1, T, T) of a head whose row i attends to key target_i alone; a row whose target is −1 attends to key 0."""
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
    before = q.clone(), k.clone(), tokens.clone()
    _, lse = attention(q, k, k, return_lse=True)
    found = head_statistics(q, k, lse, tokens, backend=backend)
    later = slice(1 + period, None)
    assert (found.prefix_matching[0, 0, later] - 1).abs().max() < 1e-6
    assert (found.offset_profile[0, 0, later, REACH] - 1).abs().max() < 1e-6
    assert found.offset_profile[0, 0, later].sum(-1).sub(1).abs().max() < 1e-5
    assert found.prefix_matching[0, 0, :1 + period].abs().max() < 1e-6 and found.entropy[0, 0, later].abs().max() < 1e-5
    assert (found.distance[0, 0, later] - (period - 1)).abs().max() < 1e-4
    assert torch.equal(q, before[0]) and torch.equal(k, before[1]) and torch.equal(tokens, before[2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_head_that_rests_on_the_first_token_is_no_induction_head(backend):
    T, scale = 64, 64 ** 0.5
    tokens = torch.cat([torch.tensor([99]), torch.arange(21).repeat(3)])[None].to(DEVICE)
    k = torch.eye(T, device=DEVICE)[None, None]
    q = torch.zeros(1, 1, T, T, device=DEVICE)
    q[..., 0] = scale * log(0.98 / 0.02 * 40)
    _, lse = attention(q, k, k, return_lse=True)
    found = head_statistics(q, k, lse, tokens, backend=backend)
    assert found.first_token[0, 0, 22:].min() > 0.96 and found.prefix_matching[0, 0, 22:].max() < 0.03


@pytest.mark.parametrize("backend", BACKENDS)
def test_previous_and_duplicate_token_heads(backend):
    tokens, here = torch.arange(10, device=DEVICE).repeat(3)[None], torch.arange(30, device=DEVICE)
    for back, name in ((1, "previous_token"), (10, "duplicate_token")):
        q, k = head_that_looks_at(here - back)
        _, lse = attention(q, k, k, return_lse=True)
        found = head_statistics(q, k, lse, tokens, backend=backend)
        assert (getattr(found, name)[0, 0, 10:] - 1).abs().max() < 1e-6
        assert found.prefix_matching[0, 0, 10:].max() < 1e-6


def test_memory_is_a_few_rows_of_the_pattern():
    """What PyTorch allocates at its highest, at a length where the pattern of all heads would take 256 MB."""
    from torch.profiler import ProfilerActivity, profile
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
    ({"segments": torch.zeros(1, 4)}, "segments"), ({"k": torch.zeros(1, 3, 5, 8)}, "divide"), ({"k": torch.zeros(1, 2, 3, 8)}, "T ≤ S"),
])
def test_what_cannot_be_served_is_named(change, words):
    arguments = {"q": torch.zeros(1, 2, 5, 8), "k": torch.zeros(1, 2, 5, 8), "lse": torch.zeros(1, 2, 5),
                 "tokens": torch.zeros(1, 5)} | change
    with pytest.raises(ValueError, match=words):
        head_statistics(**arguments)
