"""induction/knockout.py: which edges are removed, and that removing them is masking before the
softmax."""

import gc
import math
from math import isnan

import numpy as np
import pytest
import torch
from test_scores import make_model

from data.batches import Batch
from induction import knockout
from induction.behaviour import ProbeLosses, losses_by_row, repeat_gain
from induction.intervals import Resampling, RowSums
from induction.knockout import (
    induction_edges,
    knock_out,
    knock_out_on_text,
    losses_misreading,
    losses_without_edges,
    random_edges,
    removed,
    without_edges,
)
from induction.probes import aperiodic
from model.taps import Head, heads_of, taps

PROBE = aperiodic(40, np.arange(59), 59, rows=6)
TWO = [Head(0, 1), Head(1, 3)]


def test_induction_edges_are_what_followed_earlier_copies():
    tokens = torch.tensor([[5, 7, 5, 5, 8]])
    # After the 5 at 0 comes key 1, after the 5 at 2 key 3; key 3 is the query's own place at 3.
    expected = {2: [1], 3: [1, 3]}
    edges = induction_edges(tokens)[0]
    by_query = {i: edges[i].nonzero().flatten().tolist() for i in range(5)}
    assert {i: keys for i, keys in by_query.items() if keys} == expected


def test_random_edges_are_as_many_others_that_the_query_sees():
    edges = induction_edges(PROBE.tokens)
    others = random_edges(edges)
    assert not (edges & others).any() and not others.triu(1).any()
    visible = torch.arange(1, 41)
    wanted = torch.minimum(edges.sum(-1), visible - 1 - edges.sum(-1))  # the first token is a sink
    assert torch.equal(others.sum(-1), wanted) and edges.sum() > 200
    assert torch.equal(random_edges(edges), others)
    assert not torch.equal(random_edges(edges, seed=1), others)
    # Not always the same places: uniform over what is left.
    draws = torch.stack([random_edges(edges, seed=seed)[0, 39] for seed in range(400)])
    where = draws.float().mean(0)
    free = ~edges[0, 39]
    assert free[0] and where[0] == 0
    free[0] = False
    assert (where[free] - edges[0, 39].sum() / free.sum()).abs().max() < 0.1


def test_a_window_is_no_place_for_edges_that_it_does_not_show():
    """Else a random edge of a windowed layer would often be one that does not exist."""
    edges, near = (induction_edges(PROBE.tokens, window) for window in (None, 9))
    position = torch.arange(40)
    inside = position > position[:, None] - 9
    assert torch.equal(near, edges & inside) and 0 < near.sum() < edges.sum()
    others = random_edges(near, 9)
    assert not (others & ~inside).any() and not (others & near).any()
    free = (inside.tril() & ~near)[..., 1:].sum(-1)
    assert torch.equal(others.sum(-1), torch.minimum(near.sum(-1), free))


@pytest.mark.parametrize("shape", [{}, {"n_kv_heads": 1}, {"window": [None, 9]}])
@torch.no_grad()
def test_removing_edges_is_masking_before_the_softmax(shape):
    """By the model's own q, k and v: the scores of removed edges are −∞."""
    model, batch = make_model(**shape), PROBE.batch
    edges, heads = induction_edges(batch.tokens), [Head(1, 0), Head(1, 3)]
    with taps(model, ["L1.q", "L1.k", "L1.v", "L1.z"]) as acts:
        model.hidden(batch.tokens)
    z = acts["L1.z"].clone()
    group = 4 // model.config.kv_heads
    position = torch.arange(39)
    sees = position[:, None] >= position
    if model.config.windows[1]:
        sees &= position > position[:, None] - model.config.windows[1]
    for _, head in heads:
        k, v = acts["L1.k"][:, head // group], acts["L1.v"][:, head // group]
        scores = (acts["L1.q"][:, head] @ k.mT / 8 ** 0.5).masked_fill(~sees | edges, -torch.inf)
        z[:, head] = scores.softmax(-1).nan_to_num(0) @ v          # nothing left: it writes nothing
    with taps(model, {"L1.z": lambda x: z}):
        expected = model.losses(*batch)
    losses = losses_without_edges(model, batch, induction_edges, heads)
    assert torch.allclose(losses, expected, atol=1e-4)
    assert not torch.allclose(losses, model.losses(*batch), atol=1e-2)


def test_a_query_without_edges_left_attends_to_nothing():
    model = make_model()
    with taps(model, "L0.pattern") as seen:
        losses_without_edges(model, PROBE.batch, lambda tokens, _: torch.ones(
            *tokens.shape, tokens.shape[1], dtype=torch.bool), [Head(0, 2)])
    # The tap reads the intact pattern: the inner one, set later, gets what it has replaced.
    assert seen["L0.pattern"][:, 2].sum(-1).allclose(torch.ones(6, 39))
    losses = losses_without_edges(model, PROBE.batch, lambda tokens, _: torch.ones(
        *tokens.shape, tokens.shape[1], dtype=torch.bool), [Head(0, 2)])
    with taps(model, {"L0.z": lambda z: z.index_fill(1, torch.tensor([2]), 0)}):
        silenced = model.losses(*PROBE.batch)
    assert torch.allclose(losses, silenced, atol=1e-5)


def test_rows_are_taken_a_few_at_a_time(monkeypatch):
    model = make_model()
    whole = losses_without_edges(model, PROBE.batch, induction_edges, TWO)
    monkeypatch.setattr(knockout, "PATTERN_ELEMENTS", 4 * 39 * 39 * 4)
    sizes = []
    with taps(model, {"L0.pattern": lambda pattern: sizes.append(len(pattern))}):
        parts = losses_without_edges(model, PROBE.batch, induction_edges, TWO)
    assert sizes == [4, 2] and torch.allclose(whole, parts, atol=1e-5)


def test_a_knockout_is_the_gain_without_these_edges():
    model = make_model()
    heads = heads_of(model.config)
    result = knock_out(model, heads, PROBE, vocabulary=59)

    def losses(edges_of):
        return losses_by_row(losses_without_edges(model, PROBE.batch, edges_of, heads), PROBE)

    intact, rows = losses_by_row(model.losses(*PROBE.batch), PROBE), PROBE.resampling
    targets = losses(induction_edges)
    others = losses(lambda tokens, _: random_edges(induction_edges(tokens)))
    assert result.known == pytest.approx(targets.known.mean - intact.known.mean)
    assert result.gain_removed == removed(targets, intact, rows, math.log(59))
    assert result.by_random == removed(others, intact, rows, math.log(59))


def fraction_removed(before: tuple[float, float], after: tuple[float, float],
                     guessing: float) -> float | None:
    """`removed` of mean losses (first, known), in a probe of a single row."""
    intact, without = (ProbeLosses(*(RowSums(np.array([loss]), np.ones(1)) for loss in losses))
                       for losses in (before, after))
    return removed(without, intact, Resampling.of_rows(1), guessing)


def test_gain_is_measured_from_guessing_if_that_is_better():
    assert repeat_gain(9.0, 1.0, guessing=4.0) == 3.0
    assert repeat_gain(3.5, 1.0, guessing=4.0) == 2.5
    # The model overpays in the block by 5 nats, which no removal of edges changes: half of 8 nats
    # is left of 9 − 1, nothing of 4 − 1.
    assert fraction_removed((9, 1), (9, 5), 4.0) == 1
    assert fraction_removed((9, 1), (9, 2.5), 4.0) == 0.5
    assert fraction_removed((9, 3.95), (9, 5), 4.0) is None


@pytest.mark.parametrize("shape", [{}, {"n_kv_heads": 1}])
@torch.no_grad()
def test_misreading_is_attention_with_the_values_of_the_next_row(shape):
    model, batch, heads = make_model(**shape), PROBE.batch, [Head(1, 0), Head(1, 3)]
    group = 4 // model.config.kv_heads
    names = ["L1.pattern", "L1.v", "L1.z"]
    with taps(model, names) as acts:
        model.hidden(batch.tokens)
    pattern, v, z = (acts[name].double() for name in names)
    for row, query, key in induction_edges(batch.tokens).nonzero().tolist():
        for _, head in heads:
            change = v[(row + 1) % 6, head // group, key] - v[row, head // group, key]
            z[row, head, query] += pattern[row, head, query, key] * change
    with taps(model, {"L1.z": lambda _: z.float()}):
        expected = model.losses(*batch)
    losses = losses_misreading(model, batch, induction_edges, heads)
    assert torch.allclose(losses, expected, atol=1e-4)
    assert not torch.allclose(losses, model.losses(*batch), atol=1e-2)


def test_edges_on_text_count_where_a_token_occurred_before():
    model = make_model()
    tokens = torch.randint(0, 20, (4, 31), generator=torch.Generator().manual_seed(0))
    text = Batch(tokens[:, :-1], tokens[:, 1:])
    result = knock_out_on_text(model, TWO, text)
    matched = torch.tensor([[row[i] in row[:i] for i in range(30)] for row in tokens.tolist()])
    assert result.fraction == pytest.approx(matched.double().mean().item())
    change = losses_without_edges(model, text, induction_edges, TWO) - model.losses(*text)
    assert result.matched == pytest.approx(change[matched].mean().item(), abs=1e-5)


def test_no_number_is_no_gain_removed():
    """A model that overflows must not count as one whose gain is gone."""
    nan = (float("nan"), float("nan"))
    assert isnan(fraction_removed((5.0, 1.0), nan, 4.85))
    assert fraction_removed((5.0, 1.0), (5.0, 9.0), 4.85) == 1
    assert fraction_removed((5.0, 4.9), nan, 4.85) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_row_that_loses_everything_is_zero_in_any_precision(dtype):
    pattern = torch.eye(4, dtype=dtype)[None, None].expand(1, 2, 4, 4)
    left = without_edges(torch.eye(4, dtype=torch.bool)[None], [1])(pattern)
    assert left.dtype == dtype
    assert torch.equal(left[:, 0], pattern[:, 0]) and (left[:, 1] == 0).all()


def test_misreading_holds_the_patterns_of_one_layer_at_a_time():
    model = make_model(n_layers=4)
    alive = []

    def count(z: torch.Tensor) -> None:
        alive.append(sum(isinstance(part, torch.Tensor) and part.shape == (6, 4, 39, 39)
                         for part in gc.get_objects()))

    with taps(model, dict.fromkeys([f"L{n}.attn_out" for n in range(4)], count)):
        losses_misreading(model, PROBE.batch, induction_edges, heads_of(model.config))
    assert len(alive) >= 4 and max(alive) <= min(alive) + 1


def test_text_without_repeated_tokens_has_no_edges():
    text = Batch(torch.arange(30)[None], torch.arange(1, 31)[None])
    assert knock_out_on_text(make_model(), TWO, text) is None
    near = make_model(window=2)                 # the only targets are further away
    far = Batch(torch.tensor([[5, 1, 2, 3, 5]]), torch.tensor([[1, 2, 3, 5, 1]]))
    assert knock_out_on_text(near, TWO, far) is None
    assert knock_out_on_text(make_model(), TWO, far).fraction == pytest.approx(0.2)
