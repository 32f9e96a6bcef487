"""induction/verdict.py on models whose weights were set by hand, so that the right answers are
known (bench/fooling_models.py)."""

import math

import numpy as np
import pytest
import torch

from bench.fooling import judge_entry
from bench.fooling_models import (
    GALLERY,
    content_blind,
    look_back_17,
    look_backs,
    target_plus_one,
    unigram,
)
from bench.hand_built import probes
from bench.true_circuits import honest
from induction.knockout import induction_edges, knock_out
from induction.probes import Pair, aperiodic
from induction.verdict import judge, mechanism_answer
from induction.watch import knockout_metrics
from model.taps import heads_of
from report.verdict_page import verdict_page

PROBES = probes(rows=8)


@pytest.mark.parametrize("entry", GALLERY, ids=lambda entry: entry.name)
def test_what_is_true_of_a_model_is_found(entry):
    judged = judge_entry(entry, PROBES)
    assert judged.found == entry.truth
    page = verdict_page([judged.verdict])           # words for every combination of answers
    assert f"## {entry.name}: {entry.truth.answer}" in page


@pytest.mark.parametrize("build", [look_back_17, look_backs, unigram, content_blind,
                                   target_plus_one], ids=lambda build: build.__name__)
def test_heads_that_ignore_what_they_read_do_not_attend_to_targets(build):
    # By distance or evenly, each puts some weight on targets: 0.06 if it attends evenly.
    entry = next(entry for entry in GALLERY if entry.build is build)
    assert judge_entry(entry, PROBES).verdict.mechanism.evidence.roles == []


@torch.no_grad()
def test_the_honest_circuit_is_exact():
    # Where a token has a single earlier copy, the logit of its successor is the highest by far: 16
    # times the head's weight on it, e^8 / (e^8 + other keys), beside random logits.
    model, rows = honest(), PROBES.aperiodic.bare
    single = (induction_edges(rows.tokens).sum(-1) == 1)[:, :-1] & rows.known
    assert single.sum() > 50
    right = model(rows.tokens)[:, :-1].gather(-1, rows.tokens[:, 1:, None]).squeeze(-1)[single]
    keys = torch.arange(1, rows.tokens.shape[1])[None].expand_as(single)[single]
    weight = math.exp(8) / (math.exp(8) + keys - 1)
    prior = model.lm_head.weight[rows.tokens[:, 1:], rows.tokens[:, :-1]][single]
    assert torch.allclose(right - prior, 16 * weight.float(), atol=0.05)


def judged_by_name(name: str):
    entry = next(entry for entry in GALLERY if entry.name == name)
    return judge_entry(entry, PROBES).verdict


@pytest.mark.parametrize("name, wanted", [
    ("honest", "**Yes**: the model continues sequences of random tokens that it has just seen, and "
               "induction heads do it ("),
    ("half_vocabulary", "**Yes**: the model continues sequences of random tokens that it has just "
                        "seen (not sequences of tokens that training never repeated), and "
                        "induction heads do it ("),
    ("begin_gated", "**Partly**: the model continues sequences of random tokens that it has just "
                    "seen, but only behind the begin token, and induction heads do it ("),
    ("target_plus_one", "**No**: the model continues sequences of random tokens that it has just "
                        "seen; it does not need to copy from induction targets: L1H0 attends 1 "
                        "token after them ("),
    ("idle_attention", "**No**: the model does not continue sequences that it has just seen, "
                       "though heads attend as induction heads do ("),
    ("look_back_17", "**No**: the model does not continue sequences that it has just seen ("),
])
def test_the_headline_is_one_sentence_that_nobody_misreads(name, wanted):
    page = verdict_page([judged_by_name(name)])
    assert f"**{name}**: {wanted}" in page


def test_a_control_that_passes_gates_the_headline():
    """A one-layer run that does what it cannot do says that the probe can be met without induction
    heads, so nothing is claimed of the others."""
    verdict = judged_by_name("honest")
    control = verdict._replace(run="one_layer", condition="one_layer", control=True)
    assert control.control_fails and not verdict.control_fails
    page = verdict_page([verdict, control])
    assert "**honest: not shown**, because a control" in page and "it fails" in page
    assert "**honest**: **Yes**" not in page
    quiet = judged_by_name("look_back_17")._replace(run="one_layer", condition="one_layer",
                                                    control=True)
    page = verdict_page([verdict, quiet])
    assert "**honest**: **Yes**" in page and "as expected" in page


def test_a_control_that_predicts_on_one_kind_of_rows_fails_too():
    control = judged_by_name("begin_gated")._replace(run="one_layer", condition="one_layer",
                                                     control=True)
    page = verdict_page([judged_by_name("honest"), control])
    assert control.control_fails and "**honest: not shown**" in page
    assert "**one_layer: a control that fails**" in page
    assert "## honest: not shown (a control fails)" in page


def test_too_few_tokens_held_out_show_nothing():
    """Of five tokens one is right by chance in five: that decides nothing about transfer."""
    rows = probes(rows=8)
    few = Pair(*(aperiodic(48, np.arange(5), begin, rows=8) for begin in (36, None)))
    verdict = judge("honest", "honest", False, honest(), rows._replace(unseen_tokens=few), None)
    assert verdict.transfer.tokens == "not shown" and verdict.answer == "yes"


def test_text_without_synthetic_repeats_holds_nothing_out():
    rows = probes(rows=8)._replace(repeats_trained=False, unseen_tokens=None)
    transfer = judge("text", "text", False, honest(), rows, None).transfer
    assert transfer.periods == transfer.tokens == "not shown"


def test_damage_by_random_edges_on_one_kind_of_rows_shows_nothing():
    verdict = judged_by_name("honest")
    knockouts = verdict.mechanism.evidence.knockout
    damaged = knockouts._replace(bare=knockouts.bare._replace(by_random=0.9))
    evidence = verdict.mechanism.evidence._replace(knockout=damaged)
    assert mechanism_answer(verdict.behaviour, evidence) == "not shown"
    assert mechanism_answer(verdict.behaviour, verdict.mechanism.evidence) == "yes"


def test_the_live_log_has_the_knockout_as_soon_as_there_is_a_gain():
    metrics = knockout_metrics(honest(), PROBES)
    assert metrics["knockout/gain_removed"] == pytest.approx(1, abs=0.01)
    assert abs(metrics["knockout/gain_removed_random"]) < 0.05
    rows = PROBES.aperiodic.both
    assert knock_out(honest(), heads_of(honest().config), rows, PROBES.vocabulary).gain > 3
    assert knockout_metrics(look_back_17(), PROBES) == {}
