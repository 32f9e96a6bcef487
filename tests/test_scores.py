"""induction/scores.py and behaviour.py: against dense patterns and dense matrices, and on heads
whose score is known."""

import math

import numpy as np
import pytest
import torch
from test_probes import PROBE, SEGMENTED, V

from induction.behaviour import behaviour, behaviour_of_both, icl_score
from induction.probes import Probe, repeats, unrepeated
from induction.scores import (
    SCORES,
    attention_scores,
    composition,
    copying,
    copying_eigenvalues,
    counted_positions,
    layer_sums,
    measure,
    qk_trace,
    visible_matches,
)
from induction.watch import as_metrics
from kernels.attention import attention
from kernels.reference import attention_pattern
from kernels.statistics import head_statistics
from model.config import ModelConfig
from model.gpt import GPT
from model.taps import heads_of, taps


def make_model(seed: int = 0, **shape) -> GPT:
    """A model whose heads differ: peaked patterns, and gains that are not 1."""
    defaults = {"n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_model": 32, "n_ctx": 48,
                "vocab_size": V, "mlp": "none", "zero_init": False}
    model = GPT(ModelConfig(**(defaults | shape)), seed)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model.lm_head.weight.copy_(torch.randn(model.lm_head.weight.shape, generator=draw))
        for name, p in model.named_parameters():
            if name.endswith("gain"):
                p.copy_(1 + 0.5 * torch.rand(p.shape, generator=draw))
            if "w_q" in name:
                p.mul_(3)
    return model


# --- attention ------------------------------------------------------------------------------------

def dense_scores(pattern: torch.Tensor, tokens: torch.Tensor, queries: torch.Tensor,
                 window: int | None) -> dict[str, torch.Tensor]:
    """The definitions on a pattern (B, H, T, T), one query at a time."""
    names = [name for name in SCORES
             if name not in ("copying", "previous_token_later", "prefix_matching_visible")]
    total = {name: torch.zeros(pattern.shape[1], dtype=torch.float64) for name in names}
    count = 0
    for b, i in queries.nonzero().tolist():
        A, x = pattern[b, :, i].double(), tokens[b].tolist()
        follows = [j for j in range(1, i + 1) if x[j - 1] == x[i]]
        seen = min(i + 1, window or i + 1)
        total["prefix_matching"] += A[:, follows].sum(-1)
        total["latest_match"] += A[:, follows[-1]] if follows else 0
        total["current_token"] += A[:, i]
        total["previous_token"] += A[:, i - 1]
        total["duplicate_token"] += A[:, [j for j in range(i) if x[j] == x[i]]].sum(-1)
        total["first_token"] += A[:, 0]
        total["entropy"] += torch.special.entr(A).sum(-1) / math.log(seen) if seen > 1 else 0
        total["distance"] += (A * (i - torch.arange(A.shape[1]))).sum(-1)
        count += 1
    return {name: value / count for name, value in total.items()}


@pytest.mark.parametrize("shape, dtype, tolerance", [
    ({}, torch.float32, 1e-5),
    ({"window": [None, 9], "position": "learned"}, torch.float32, 1e-5),
    ({"n_kv_heads": 1, "mlp": "swiglu", "smear": True, "qk_norm": True}, torch.float32, 1e-5),
    ({"window": 1}, torch.float32, 1e-5),
    ({"n_heads": 1, "n_kv_heads": 1, "n_layers": 1}, torch.float32, 1e-5),
    ({}, torch.bfloat16, 5e-3),
])
def test_scores_are_those_of_the_dense_pattern(shape, dtype, tolerance):
    model = make_model(**shape)
    model.compute_dtype = dtype
    measured = attention_scores(model, PROBE.tokens, PROBE.queries)
    with taps(model, ["L*.q", "L*.k"]) as cache, torch.no_grad():
        model.hidden(PROBE.tokens)
    for layer, window in enumerate(model.config.windows):
        q, k = cache[f"L{layer}.q"].double(), cache[f"L{layer}.k"].double()
        pattern, _ = attention_pattern(q, k, window=window)
        for name, values in dense_scores(pattern, PROBE.tokens, PROBE.queries, window).items():
            scale = 10 if name == "distance" else 1
            assert torch.allclose(measured.scores[name][layer], values, atol=scale * tolerance,
                                  rtol=0), (name, layer)


def test_targets_can_be_those_of_other_tokens():
    model, other = make_model(), PROBE.tokens.roll(-1, 0)
    with taps(model, "L*.pattern") as cache, torch.no_grad():
        model.hidden(PROBE.tokens)
    found = attention_scores(model, PROBE.tokens, PROBE.queries, targets_of=other).scores
    for layer in range(2):
        dense = dense_scores(cache[f"L{layer}.pattern"], other, PROBE.queries, None)
        assert torch.allclose(found["prefix_matching"][layer], dense["prefix_matching"], atol=1e-4)


def test_the_previous_token_score_is_of_the_first_copy():
    """Where an induction circuit writes which token precedes each key; and apart from it, later."""
    model = make_model()
    with taps(model, "L*.pattern") as cache, torch.no_grad():
        model.hidden(PROBE.tokens)
    measured = measure(model, PROBE, PROBE.tokens[:, :9])
    for layer in range(2):
        first, later = [], []
        for b, period in enumerate(PROBE.periods.tolist()):
            for i in range(1, 40):
                weights = cache[f"L{layer}.pattern"][b, :, i, i - 1].double()
                (first if i <= period else later).append(weights)
        for name, rows in (("previous_token", first), ("previous_token_later", later)):
            expected = torch.stack(rows).mean(0)
            assert torch.allclose(measured.scores[name][layer], expected, atol=1e-5), name
            assert f"heads/{name}/L0H0" in as_metrics(model.config, measured)


def test_prefix_matching_is_kept_by_period():
    model = make_model()
    measured = measure(model, PROBE, PROBE.tokens[:, :9])
    assert sorted(measured.by_period) == [8, 11, 13]
    for period, values in measured.by_period.items():
        rows = PROBE.rows(PROBE.periods == period)
        alone = attention_scores(model, rows.tokens, rows.queries).scores["prefix_matching"]
        assert torch.allclose(values, alone, atol=1e-5)


@pytest.mark.parametrize("window", [None, 1, 5, 100])
def test_visible_matches_are_counted(window):
    tokens = torch.randint(0, 6, (3, 30), generator=torch.Generator().manual_seed(1))
    counts = visible_matches(tokens, window)
    for b in range(3):
        x = tokens[b].tolist()
        for i in range(30):
            first = 0 if window is None else max(0, i - window + 1)
            visible = [j for j in range(max(1, first), i + 1) if x[j - 1] == x[i]]
            assert counts[b, i] == len(visible), (b, i)


def test_layers_with_the_same_window_count_their_rows_once(monkeypatch):
    windows = []
    monkeypatch.setattr("induction.scores.visible_matches",
                        lambda tokens, window: windows.append(window) or torch.ones_like(tokens))
    attention_scores(make_model(n_layers=5, window=[8, None]), PROBE.tokens, PROBE.queries)
    assert len(windows) == 2 and set(windows) == {8, None}


def test_a_windowed_head_is_judged_on_what_it_sees():
    """Periods 8 … 24, a window of 16: a perfect head meets every target that it sees."""
    probe = repeats([8, 20, 24], 60, np.arange(99), 99, rows=3)
    x = probe.tokens
    before = torch.nn.functional.pad(x[:, :-1], (1, 0), value=-1)
    T = x.shape[1]
    wanted = 60.0 * (x[:, :, None] == before[:, None, :])                       # x_i = x_{j−1}
    q, k = wanted[:, None] * T ** 0.5, torch.eye(T).expand(len(x), 1, T, T)
    _, lse = attention(q, k, k, window=16, return_lse=True)
    rows = head_statistics(q, k, lse, x, window=16)
    counted = counted_positions(x, probe.queries, probe.first_copy, 16)
    sums, visible = layer_sums(rows, counted).sums, counted.visible
    scores = {name: (sums[name].sum() / counted.counts[name].sum()).item() for name in sums}
    assert scores["prefix_matching"] == pytest.approx(visible.fraction, abs=1e-6)
    assert 0.3 < visible.fraction < 0.6
    assert scores["prefix_matching_visible"] == pytest.approx(1, abs=1e-5)
    # Only period 8 has targets in sight: one of up to 16 keys, two as soon as the window reaches
    # back over two periods.
    seen = [i for b, i in probe.queries.nonzero().tolist() if probe.periods[b] == 8]
    by_query = [(2 if i > 16 else 1) / min(i + 1, 16) for i in seen]
    assert visible.uniform == pytest.approx(np.mean(by_query), abs=1e-6)


def test_any_text_is_scored():
    model = make_model()
    tokens = torch.randint(0, 9, (3, 30), generator=torch.Generator().manual_seed(0))
    queries = torch.ones(3, 30, dtype=torch.bool)
    queries[:, 0] = False
    with taps(model, "L*.pattern") as cache, torch.no_grad():
        model.hidden(tokens)
    scores = attention_scores(model, tokens, queries).scores
    for name, values in dense_scores(cache["L1.pattern"], tokens, queries, None).items():
        assert torch.allclose(scores[name][1], values, atol=1e-4), name


def test_a_score_that_is_listed_and_not_measured_is_not_made_up(monkeypatch):
    monkeypatch.setitem(SCORES, "new", "a score that somebody is about to add")
    assert "new" not in attention_scores(make_model(), PROBE.tokens, PROBE.queries).scores


def statistics_of(wanted: torch.Tensor, probe: Probe):
    """Scores of a head whose attention logits are `wanted` (B, T, T)."""
    T = wanted.shape[1]
    q, k = wanted[:, None] * T ** 0.5, torch.eye(T).expand(len(wanted), 1, T, T)
    _, lse = attention(q, k, k, return_lse=True)
    statistics = head_statistics(q, k, lse, probe.tokens)
    share = probe.queries.double() / probe.queries.sum()
    return {name: torch.einsum("bht...,bt->...", value.double(), share)
            for name, value in statistics._asdict().items()}


@pytest.mark.parametrize("period", [8, 25, 50])
@pytest.mark.parametrize("copies", [2, 4])
def test_a_perfect_head_scores_one(period, copies):
    probe = repeats([period], 1 + period * copies, np.arange(99), 99, rows=2)
    x = probe.tokens
    before = torch.nn.functional.pad(x[:, :-1], (1, 0), value=-1)
    wanted = 60.0 * (x[:, :, None] == before[:, None, :])                       # x_i = x_{j−1}
    scores = statistics_of(wanted, probe)
    assert scores["prefix_matching"].item() == pytest.approx(1, abs=1e-6)
    others = ("duplicate_token", "previous_token", "first_token")
    assert max(scores[name].item() for name in others) < 1e-6


def test_a_sink_is_not_an_induction_head():
    probe = repeats([12, 18], 61, np.arange(99), 99)
    wanted = torch.zeros(len(probe.tokens), 61, 61)
    # 98% on the first token, 2% on the rest
    wanted[:, :, 0] = torch.log(0.98 / 0.02 * torch.arange(1, 62).float()).clamp(min=0)
    scores = statistics_of(wanted, probe)
    assert scores["first_token"].item() == pytest.approx(0.98, abs=0.002)
    assert scores["prefix_matching"].item() <= 0.03


def test_inputs_and_model_stay_as_they_are():
    model, probe = make_model(), Probe(*(part.clone() for part in PROBE))
    before = {name: p.clone() for name, p in model.named_parameters()}
    tokens = unrepeated(26, np.arange(V - 1), V - 1)
    kept = tokens.clone()
    measure(model, probe, tokens)
    assert torch.equal(probe.tokens, PROBE.tokens) and torch.equal(tokens, kept)
    assert not model.tapped
    for name, p in model.named_parameters():
        assert torch.equal(before[name], p) and p.grad is None


def test_repeating_is_measured_inside_the_copies():
    model = make_model()
    measured = measure(model, PROBE, PROBE.tokens[:, :9])
    with torch.no_grad():
        log_p = model(PROBE.tokens).double().log_softmax(-1)
    losses = {"first": [], "second": []}
    for b, period in enumerate(PROBE.periods.tolist()):
        for t in range(39):
            loss = -log_p[b, t, PROBE.tokens[b, t + 1]].item()
            if t + 1 <= period:
                losses["first"].append(loss)
            elif period + 1 < t + 1 <= 2 * period:
                losses["second"].append(loss)
    assert measured.loss_first == pytest.approx(np.mean(losses["first"]), rel=1e-5)
    assert measured.loss_second == pytest.approx(np.mean(losses["second"]), rel=1e-5)


def test_behaviour_is_what_the_logits_say():
    """Accuracy and losses at known tokens, from logits in float64."""
    model = make_model(seed=3)
    for probe in (PROBE, SEGMENTED.bare.rows(slice(5))):
        probe = probe._replace(tokens=probe.tokens[:, :40], known=probe.known[:, :39],
                               first_copy=probe.first_copy[:, :40])
        found = behaviour(model, probe)
        with torch.no_grad():
            log_p = model(probe.tokens).double().log_softmax(-1)
        right, losses = [], {True: [], False: []}
        for b, t in [(b, t) for b in range(len(probe.tokens)) for t in range(39)]:
            target = probe.tokens[b, t + 1]
            if probe.known[b, t]:
                right.append(bool(log_p[b, t].argmax() == target))
            if probe.known[b, t] or probe.first_copy[b, t + 1]:
                losses[bool(probe.known[b, t])].append(-log_p[b, t, target].item())
        assert found.accuracy == pytest.approx(np.mean(right))
        assert found.loss_known == pytest.approx(np.mean(losses[True]), rel=1e-5)
        assert found.loss_first == pytest.approx(np.mean(losses[False]), rel=1e-5)
        assert found.gain == pytest.approx(found.loss_first - found.loss_known)
        assert found.chance == pytest.approx(np.mean([1 / n for n in probe.blocks.tolist()]))


def test_both_kinds_of_rows_are_read_in_one_pass(monkeypatch):
    model, passes, hidden = make_model(seed=3, n_ctx=64), [], GPT.hidden
    monkeypatch.setattr(GPT, "hidden", lambda *arguments, **options: (
        passes.append(1) or hidden(*arguments, **options)))
    found = behaviour_of_both(model, SEGMENTED.rows(slice(5)))
    assert len(passes) == 1
    for measured, probe in zip(found, SEGMENTED.rows(slice(5))):
        alone = behaviour(model, probe)
        assert measured.accuracy == alone.accuracy
        assert measured.loss_known == pytest.approx(alone.loss_known, rel=1e-6)
        assert measured.loss_first == pytest.approx(alone.loss_first, rel=1e-6)


def test_the_icl_score_is_late_minus_early():
    losses = torch.zeros(3, 600)
    # 17 tokens around the fiftieth and the five-hundredth
    losses[:, 41:58], losses[:, 491:508] = 5.0, 3.0
    assert icl_score(losses) == -2.0
    short = torch.arange(64.0).repeat(2, 1)
    assert icl_score(short) == pytest.approx(59.5 - 5.5)            # means of 56 … 63 and of 4 … 7
    assert icl_score(torch.zeros(2, 15)) is None


# --- weights --------------------------------------------------------------------------------------

LIKE_PYTHIA = {"mlp": "gelu", "norm": "layernorm", "bias": "all", "parallel": True, "rope_dims": 4}


def centring(model: GPT) -> torch.Tensor:
    """What LayerNorm does to the stream besides dividing and its gain, as a matrix (E, E)."""
    E = model.config.d_model
    identity = torch.eye(E, dtype=torch.float64)
    return identity - 1 / E if model.config.norm == "layernorm" else identity


def dense(model: GPT, layer: int, head: int) -> dict[str, torch.Tensor]:
    """A head's matrices in float64, cut out of the parameters by hand; rows are vectors."""
    block, D = model.blocks[layer], model.config.head_size
    group = head // (model.config.n_heads // model.config.kv_heads)
    norm = centring(model) @ torch.diag(block.norm_attn.gain.double())
    rows = [(block.attn.w_q, head), (block.attn.w_k, group), (block.attn.w_v, group)]
    w_q, w_k, w_v = (norm @ matrix.weight.double()[i * D:(i + 1) * D].T for matrix, i in rows)
    w_o = block.attn.w_o.weight.double()[:, head * D:(head + 1) * D].T
    return {"qk": w_q @ w_k.T, "ov": w_v @ w_o}


@pytest.mark.parametrize("shape", [{}, LIKE_PYTHIA], ids=["ours", "Pythia's"])
@torch.no_grad()
def test_copying_is_what_the_heads_output_does_to_the_logits(shape):
    """One token at a time through the model's own modules."""
    model = make_model(**shape)
    tokens = unrepeated(20, np.arange(V - 1), V - 1, rows=3)
    scores = copying(model, tokens).mean
    for layer in range(2):
        with taps(model, f"L{layer}.v") as cache:
            model.hidden(tokens)
        for head in range(4):
            shares = []
            for b in range(3):
                for j in range(1, 20):
                    z = torch.zeros(4, 8)
                    z[head] = cache[f"L{layer}.v"][b, head // 2, j]
                    # The bias of W_O belongs to no head.
                    written = model.blocks[layer].attn.w_o.weight @ z.flatten()
                    normed = (centring(model).float() @ written) * model.norm_final.gain
                    logits = model.unembed(normed)[tokens[b, 1:]].double()
                    change = logits - logits.mean()
                    raised, lowered = change.clamp(min=0), (-change).clamp(min=0)
                    shares.append((raised[j - 1] / raised.sum()
                                   - lowered[j - 1] / lowered.sum()).item())
            assert scores[layer, head].item() == pytest.approx(np.mean(shares), abs=1e-5)


@torch.no_grad()
def test_a_head_that_ignores_what_it_reads_scores_zero():
    """Chance is 0: over random heads, and exactly for one that writes the same whatever it reads
    (Olsson et al.'s form of the score gives 2/25 − 1 = −0.92)."""
    tokens = unrepeated(26, np.arange(V - 1), V - 1)
    scores = np.concatenate([copying(make_model(seed), tokens).mean.flatten() for seed in range(8)])
    assert abs(scores.mean()) < 4 * scores.std() / len(scores) ** 0.5 < 0.05
    model = make_model(n_layers=1, bias="attention")
    model.blocks[0].attn.w_v.weight.zero_()
    model.blocks[0].attn.w_v.bias.copy_(torch.arange(16.0).sin())
    assert np.abs(copying(model, tokens).mean).max() < 1e-6


@torch.no_grad()
def test_a_head_that_copies_scores_one_and_one_that_suppresses_minus_one():
    model = make_model(n_layers=1, n_heads=1, n_kv_heads=1, d_model=64, d_head=64, position="none")
    attn = model.blocks[0].attn
    for gain in (model.blocks[0].norm_attn.gain, model.norm_final.gain):
        gain.fill_(1)
    attn.w_v.weight.copy_(torch.eye(64))
    attn.w_o.weight.copy_(torch.eye(64))
    model.embed.weight.copy_(torch.eye(V, 64))
    model.lm_head.weight.copy_(torch.eye(V, 64))
    tokens = unrepeated(26, np.arange(V - 1), V - 1)
    assert copying(model, tokens).mean.item() == pytest.approx(1, abs=1e-6)
    assert copying_eigenvalues(model).item() == pytest.approx(1)
    attn.w_o.weight.neg_()
    assert copying(model, tokens).mean.item() == pytest.approx(-1, abs=1e-6)
    assert copying_eigenvalues(model).item() == pytest.approx(-1)


@pytest.mark.parametrize("shape", [{}, LIKE_PYTHIA], ids=["ours", "Pythia's"])
@torch.no_grad()
def test_eigenvalues_are_those_of_the_token_to_token_matrix(shape):
    model = make_model(**shape)
    w_e = model.embed.weight.double()
    w_u = centring(model) @ (model.lm_head.weight.double() * model.norm_final.gain.double()).T
    scores = copying_eigenvalues(model)
    for layer, head in heads_of(model.config):
        values = torch.linalg.eigvals(w_e @ dense(model, layer, head)["ov"] @ w_u)      # V of them
        expected = (values.real.sum() / values.abs().sum()).item()
        assert scores[layer, head].item() == pytest.approx(expected, abs=1e-5)


def by_chance(pairs: int = 200) -> float:
    """The ratio of random matrices of rank 8, 32 × 32, drawn anew."""
    draw = torch.Generator().manual_seed(7)
    ratios = []
    for _ in range(pairs):
        one, two = (torch.randn(32, 8, generator=draw) @ torch.randn(8, 32, generator=draw)
                    for _ in range(2))
        ratios.append(((one @ two).norm() / (one.norm() * two.norm())).item())
    return float(np.mean(ratios))


@torch.no_grad()
def test_composition_is_the_ratio_of_norms_above_chance():
    model = make_model()
    measured = composition(model, 0, 1)
    ratios = {name: torch.zeros(4, 4, dtype=torch.float64) for name in "qkv"}
    for later in range(4):
        for earlier in range(4):
            one, two = dense(model, 0, earlier)["ov"], dense(model, 1, later)
            for name, product, second in (("q", one @ two["qk"], two["qk"]),
                                          ("k", two["qk"] @ one.T, two["qk"]),
                                          ("v", one @ two["ov"], two["ov"])):
                ratios[name][later, earlier] = product.norm() / (one.norm() * second.norm())
    for name, matrix in zip("qkv", measured):
        chance = ratios[name] - matrix
        assert chance.std() < 1e-7 and chance.mean().item() == pytest.approx(by_chance(), abs=0.01)
    model = make_model(1, d_model=64, n_kv_heads=4)
    with torch.no_grad():
        for block in model.blocks:
            block.norm_attn.gain.fill_(1)
    # Random weights compose as much as at chance.
    assert all(abs(matrix.mean()) < 0.01 for matrix in composition(model, 0, 1))


@pytest.mark.parametrize("shape", [{}, LIKE_PYTHIA], ids=["ours", "Pythia's"])
@torch.no_grad()
def test_the_qk_trace_is_the_diagonal_of_the_matrix_of_all_tokens(shape):
    model = make_model(**shape)
    traces, w_e = qk_trace(model, 0, 1), model.embed.weight.double()
    for later in range(4):
        for earlier in range(4):
            copied = w_e @ dense(model, 0, earlier)["ov"]
            scores = w_e @ dense(model, 1, later)["qk"] @ copied.T                      # (V, V)
            expected = (scores.diagonal().mean() - scores.mean()) / scores.std(correction=0)
            assert traces[later, earlier].item() == pytest.approx(expected.item(), abs=1e-5)
