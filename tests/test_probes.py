"""induction/probes.py and probe_set.py: the rows on which heads are measured, and which of them a
run gets."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from data.config import DataConfig
from data.load_tokenizer import make_tokenizer
from induction.probe_set import Probes, Training, probes_of
from induction.probes import Pair, Probe, aperiodic, repeats

V = 60
PROBE = repeats([8, 11, 13], 40, np.arange(V - 1), V - 1, rows=6, seed=1)


def test_a_periodic_probe_is_its_definition():
    for row, period in zip(PROBE.tokens.tolist(), PROBE.periods.tolist()):
        block = row[1:1 + period]
        assert row[0] == V - 1 and len(set(block)) == period and V - 1 not in block
        assert all(row[i] == row[i - period] for i in range(1 + period, 40))
    assert PROBE.periods.tolist() == PROBE.blocks.tolist() == [8, 11, 13, 8, 11, 13]
    row = PROBE.periods.tolist().index(11)
    assert PROBE.first_copy[row].nonzero().flatten().tolist() == list(range(1, 12))
    assert PROBE.queries[row].nonzero().flatten().tolist() == list(range(12, 40))
    # Targets are one to the right: target t is token t + 1. Token 12, the seam, is left out.
    assert PROBE.unknown[row].nonzero().flatten().tolist() == list(range(0, 11))
    assert PROBE.known[row].nonzero().flatten().tolist() == list(range(12, 22))
    again = repeats([8, 11, 13], 40, np.arange(V - 1), V - 1, rows=6, seed=1)
    assert torch.equal(again.tokens, PROBE.tokens)
    other_seed = repeats([8, 11, 13], 40, np.arange(V - 1), V - 1, rows=6, seed=2)
    assert not torch.equal(other_seed.tokens, PROBE.tokens)


SEGMENTED = Pair(*(aperiodic(64, np.arange(V - 1), begin, rows=64, seed=1)
                   for begin in (V - 1, None)))


def test_an_aperiodic_probe_is_its_definition():
    """Inside a segment each token follows the token that it follows in the block; no segment goes
    on where the one before it ended."""
    for probe, start in zip(SEGMENTED, (1, 0)):
        for tokens, size, known, queries in zip(probe.tokens.tolist(), probe.blocks.tolist(),
                                                probe.known.tolist(), probe.queries.tolist()):
            row = tokens[start:]
            block = row[:size]
            assert len(set(block)) == size and set(row) <= set(block)
            follows = dict(pairwise(block))
            for t in range(len(tokens) - 1):
                inside = t + 1 >= start + size and known[t]
                assert known[t] == queries[t] == inside
                if t + 1 >= start + size:
                    assert known[t] == (follows.get(tokens[t]) == tokens[t + 1])
            assert sum(known) > (len(row) - size) / 2
    assert torch.equal(SEGMENTED.begun.tokens[:, 1:], SEGMENTED.bare.tokens[:, :-1])
    assert (SEGMENTED.begun.tokens[:, 0] == V - 1).all()
    assert len(SEGMENTED.both.tokens) == 128


def right_by_looking_back(probe: Probe, distance: int) -> float:
    """How many known tokens a model predicts that repeats what is `distance` tokens back."""
    x, guess = probe.tokens, torch.full_like(probe.tokens[:, 1:], -1)
    guess[:, distance - 1:] = x[:, :x.shape[1] - distance]
    return (guess == x[:, 1:])[probe.known].double().mean().item()


@pytest.mark.parametrize("rows", [16, 64])
@pytest.mark.parametrize("n_ctx", [64, 256])
def test_no_look_back_meets_the_aperiodic_probe(n_ctx, rows):
    for begin in (999, None):
        probe = aperiodic(n_ctx, np.arange(900), begin, rows=rows, seed=3)
        by_distance = [right_by_looking_back(probe, distance) for distance in range(1, n_ctx)]
        assert max(by_distance) < 3 * probe.chance < 0.15
        periodic = repeats([n_ctx // 4], n_ctx, np.arange(900), begin, rows=4)
        assert right_by_looking_back(periodic, n_ctx // 4) == 1         # the trap it replaces


def test_a_run_is_probed_on_what_it_never_trained_on():
    tokenizer = make_tokenizer(DataConfig(tokenizer="bytes").tokenizer, iter(()))

    def of(n_ctx: int = 64, before=(), **data) -> Probes | None:
        return probes_of(DataConfig(tokenizer="bytes", **data), n_ctx, tokenizer, 0, before=before)

    held = {"corpus": "repeats", "repeats": {"period": [8, 32], "held_out_periods": [12, 18],
                                             "held_out_tokens": 0.25, "n_tokens": 128}}
    probes = of(**held)
    assert set(probes.scored.periods.tolist()) == {12, 18}
    assert not {12, 18} & set(probes.trained.begun.periods.tolist())
    known = set(probes.scored.tokens[:, 1:].flatten().tolist())
    unseen = set(probes.unseen_tokens.bare.tokens.flatten().tolist())
    assert not known & unseen and max(known | unseen) < 128 and len(known) > 80
    assert all(len(set(row)) == len(row) == 26 for row in probes.unrepeated.tolist())
    assert "of 12, 18 a multiple or a divisor was trained" in probes.note         # 24, 9
    unnamed = of(corpus="repeats", repeats={"period": [16, 16]})
    assert 16 not in unnamed.scored.periods and len(unnamed.scored.periods.unique()) >= 3
    assert of().trained is None and of().unseen_tokens is None
    assert "training repeats nothing" in of().note
    assert of(n_ctx=6) is None
    # All periods from 8 on are trained: the shortest are left.
    short = of(corpus="repeats", repeats={"period": [8, 32]})
    assert short.never_trained and set(short.scored.periods.tolist()) == {3, 5, 7}
    every = of(corpus="repeats", repeats={"period": [2, 32]})
    assert not every.never_trained and "every period that fits was trained on" in every.note


def test_every_held_out_period_has_a_row():
    """Also in a context so long that the probe has fewer rows than there are periods."""
    tokenizer = make_tokenizer(DataConfig(tokenizer="bytes").tokenizer, iter(()))
    periods = [11, 13, 17, 19, 23, 29, 31, 37]
    data = DataConfig(tokenizer="bytes", corpus="repeats",
                      repeats={"period": [8, 40], "held_out_periods": periods})
    probes = probes_of(data, 1024, tokenizer, 0)
    assert probes.scored.periods.unique().tolist() == periods


@pytest.mark.parametrize("n_ctx, trained", [(64, [8, 12]), (64, [16, 16]), (128, [8, 24]),
                                            (256, [10, 40]), (64, None)])
def test_held_out_periods_have_no_multiple_or_divisor_among_trained_ones(n_ctx, trained):
    tokenizer = make_tokenizer(DataConfig(tokenizer="bytes").tokenizer, iter(()))
    data = DataConfig(tokenizer="bytes", corpus="stdlib")
    if trained:
        data = DataConfig(tokenizer="bytes", corpus="repeats", repeats={"period": trained})
    probes = probes_of(data, n_ctx, tokenizer, 0)
    scored = probes.scored.periods.unique().tolist()
    in_training = range(trained[0], trained[1] + 1) if trained else ()
    assert 2 <= len(scored) <= 4 and probes.never_trained
    for period in scored:
        others = [*in_training, *(other for other in scored if other != period)]
        assert not [other for other in others if other % period == 0 or period % other == 0]


def test_what_ancestors_trained_is_not_held_out():
    """The laundered look-back: period 24 was trained before, by the run whose weights this one
    starts from, and this run's config calls it held out."""
    tokenizer = make_tokenizer(DataConfig(tokenizer="bytes").tokenizer, iter(()))
    data = DataConfig(tokenizer="bytes", corpus="repeats", repeats={
        "period": [8, 9], "held_out_periods": [24], "held_out_tokens": 0.25})
    earlier = DataConfig(tokenizer="bytes", corpus="repeats", repeats={
        "period": [24, 24], "held_out_tokens": 0.25})
    assert set(probes_of(data, 64, tokenizer, 0).scored.periods.tolist()) == {24}
    probes = probes_of(data, 64, tokenizer, 0, before=[Training(earlier, 5)])
    assert not {8, 9, 24} & set(probes.scored.periods.tolist()) and probes.never_trained
    assert {8, 9, 24} == set(probes.trained.begun.periods.tolist())
    # Only what neither of the two repeated is left: a sixteenth of the 256 bytes, about.
    unseen = set(probes.unseen_tokens.bare.tokens.flatten().tolist())
    assert 3 <= len(unseen) < 32
    unknown = probes_of(data, 64, tokenizer, 0, before=None)
    assert not unknown.never_trained and not unknown.history_known
    assert "unknown" in unknown.note
