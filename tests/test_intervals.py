"""induction/intervals.py: its intervals hold the truth as often as they say, where it is known."""

import numpy as np
import pytest
import torch

from bench import coverage
from bench.coverage import numbers, population, small_model, text_losses, text_numbers
from bench.hand_built import BEGIN
from induction.behaviour import behaviour, icl_score, in_context_learning
from induction.intervals import Estimate, Resampling, RowSums, over_seeds, row_sums, students_t
from induction.probes import Pair, Probe, repeats
from induction.scores import measure, score_bounds
from model.taps import Head

DRAWS = 1000


@pytest.fixture(scope="module")
def every_row() -> tuple[Probe, dict[str, RowSums]]:
    """All rows that a small probe can draw, and what is measured on each."""
    model, rows = small_model(), population()
    with torch.inference_mode():
        measured, predicted = measure(model, rows, rows.tokens[:, :4]), behaviour(model, rows)
    return rows, {"prefix_matching": measured.rows["prefix_matching"].of_head(Head(1, 0)),
                  "entropy": measured.rows["entropy"].of_head(Head(1, 0)),
                  "accuracy": predicted.right, "first": predicted.losses.first,
                  "known": predicted.losses.known}


def drawn(rows: Probe, of_row: dict[str, RowSums], n: int, seed: int) -> dict[str, RowSums]:
    """A probe of `n` rows, half of each period."""
    draw, periods = np.random.default_rng(seed), rows.periods.numpy()
    index = np.concatenate([draw.choice(np.flatnonzero(periods == period), n // 2)
                            for period in coverage.PERIODS])
    return {name: values.of(index) for name, values in of_row.items()}


@pytest.mark.parametrize("n_rows, within", [(16, 0.03), (64, 0.02)])
def test_an_interval_holds_the_truth_in_19_of_20_probes(every_row, n_rows, within):
    """Means, a paired difference, and a ratio; the loss is skewed, since few rows fail."""
    rows, of_row = every_row
    resampling = Resampling(range(n_rows), np.repeat(coverage.PERIODS, n_rows // 2).tolist())
    cases = {"prefix_matching": ("prefix_matching",), "entropy": ("entropy",),
             "accuracy": ("accuracy",), "known": ("known",), "gain": ("first", "known"),
             "share": ("known", "first")}
    functions = {"gain": np.subtract, "share": np.divide}
    held = dict.fromkeys(cases, 0)
    for seed in range(DRAWS):
        probe = drawn(rows, of_row, n_rows, seed)
        for name, parts in cases.items():
            function = functions.get(name, lambda mean: mean)
            truth = function(*(of_row[part].mean for part in parts))
            low, high = resampling.bounds(function, *(probe[part] for part in parts))
            held[name] += low <= truth <= high
    assert {name: count / DRAWS for name, count in held.items()} == dict.fromkeys(
        cases, pytest.approx(0.95, abs=within))


def test_an_interval_over_windows_of_text_holds_the_truth():
    truth = text_numbers(torch.from_numpy(np.linspace(4, 2, coverage.WINDOW_LENGTH)).expand(2, -1))
    held = coverage.coverage(truth, lambda n: text_numbers(text_losses(np.random.default_rng(n))),
                             400)
    assert held == dict.fromkeys(truth, pytest.approx(0.95, abs=0.03))


def some_rows(seed: int, n: int = 12, shift: float = 0.0) -> RowSums:
    draw = np.random.default_rng(seed)
    counts = draw.integers(3, 9, n)
    return RowSums(counts * (shift + draw.exponential(1.0, n)), counts)


def test_a_difference_is_paired():
    """Rows differ much, and all by the same amount before and after: that amount is certain."""
    before = some_rows(0)
    after = RowSums(before.sums + 0.25 * before.counts, before.counts)
    rows = Resampling.of_rows(12)
    assert rows.difference(after, before) == pytest.approx(0.25)
    change, level = rows.difference(after, before), rows.mean(before)
    assert change.high - change.low < 1e-6 < 0.5 < level.high - level.low
    unpaired = rows.difference(some_rows(1), before)
    assert unpaired.high - unpaired.low > 0.5


def test_rows_of_one_draw_go_together():
    """The same blocks with the begin token and without are one draw, not two: seeing every row
    twice makes no interval narrower."""
    once, n = some_rows(0), 12
    twice = RowSums(np.tile(once.sums, 2), np.tile(once.counts, 2))
    single = Resampling.of_rows(n).mean(once)
    pair = Resampling([*range(n), *range(n)], [0] * 2 * n).mean(twice)
    assert (pair, pair.low, pair.high) == pytest.approx((single, single.low, single.high))
    apart = Resampling.of_rows(2 * n).mean(twice)
    assert apart.high - apart.low < 0.8 * (pair.high - pair.low)
    begun, bare = (repeats([8, 11], 24, np.arange(59), begin, rows=6) for begin in (59, None))
    assert Pair(begun, bare).both.draws.tolist() == [0, 1, 2, 3, 4, 5] * 2
    assert begun.rows(slice(None, None, 2)).draws.tolist() == [0, 2, 4]


def test_periods_are_no_chance():
    """A probe has as many rows of each period as it was asked for: their difference is no doubt."""
    levels = RowSums(np.array([1.0, 1, 1, 5, 5, 5]), np.ones(6))
    by_period = Resampling(range(6), [8, 8, 8, 11, 11, 11]).mean(levels)
    assert (by_period.low, by_period, by_period.high) == (3, 3, 3)
    assert Resampling.of_rows(6).mean(levels).high > 4
    single = Resampling(range(6), [8, 9, 9, 9, 9, 9]).mean(levels)      # 8 has no row to compare
    assert single.has_interval and single.high > 4


def test_what_cannot_be_known_is_said_to_be_unknown():
    one = Resampling.of_rows(1).mean(RowSums(np.array([3.0]), np.array([2])))
    assert one == 1.5 and not one.has_interval
    assert not over_seeds([0.5]).has_interval and over_seeds([0.5]) == 0.5
    assert not Resampling.of_rows(4).mean(some_rows(0, 4)).has_interval
    alike = Resampling.of_rows(5).mean(RowSums(np.full(5, 2.0), np.full(5, 2)))
    assert (alike, alike.low, alike.high) == (1, 1, 1)


def test_rows_in_which_nothing_counts_change_nothing():
    """Of a user's rows many have no token that occurred before."""
    rows, empty = some_rows(0, 8), np.zeros(3)
    padded = RowSums(np.append(rows.sums, empty), np.append(rows.counts, empty))
    alone, beside = Resampling.of_rows(8).mean(rows), Resampling.of_rows(11).mean(padded)
    assert (beside, beside.low, beside.high) == (alone, alone.low, alone.high)
    single = RowSums(np.array([3.0, 0, 0, 0, 0, 0]), np.array([5, 0, 0, 0, 0, 0]))
    assert not Resampling.of_rows(6).mean(single, (0, 1)).has_interval      # one row decides


@pytest.mark.parametrize("right", [0.9999, 0.999, 0.98])
def test_never_to_have_failed_is_no_certainty(right):
    """16 rows of 40 tokens: of a model that fails once in a thousand tokens most probes see
    nothing."""
    draw, rows, held = np.random.default_rng(0), Resampling.of_rows(16), 0
    for _ in range(DRAWS):
        accuracy = rows.mean(RowSums(draw.binomial(40, right, 16).astype(float), np.full(16, 40)),
                             (0, 1))
        held += accuracy.low <= right <= accuracy.high
    assert held >= 0.92 * DRAWS
    never = rows.mean(RowSums(np.zeros(16), np.full(16, 40)), (0, 1))
    assert never.low == 0 and never.high == pytest.approx(1 - 0.025 ** (1 / 640))


def test_one_failure_among_many_rows_has_an_end():
    """A draw without it has no error, and would put the truth infinitely many errors away."""
    failing = RowSums(np.eye(1, 32)[0] * 8, np.ones(32))
    failure = Resampling.of_rows(32).mean(failing)
    assert failure == 0.25 and failure.low < 0.1 and 0.75 < failure.high < 2
    right = Resampling.of_rows(32).mean(RowSums(1 - np.eye(1, 32)[0], np.ones(32)), (0, 1))
    assert right.low < 0.93 < right.high <= 1


@pytest.mark.filterwarnings("error")
def test_a_model_that_overflows_has_no_interval():
    rows = some_rows(0, 8)
    rows.sums[3] = np.nan
    estimate = Resampling.of_rows(8).difference(rows, some_rows(1, 8))
    assert np.isnan(estimate) and not estimate.has_interval


def test_an_estimate_is_a_number():
    estimate = Estimate(0.5, 0.25, 0.75)
    assert estimate == 0.5 and f"{estimate:.0%}" == "50%" and max(estimate, 0.25) is estimate
    assert type(estimate + 1) is type(-estimate) is float


def test_seeds_have_students_interval():
    values = [1.0, 2.0, 3.0, 2.0]
    mean = over_seeds(values)
    half = 3.182446 * np.std(values, ddof=1) / 2
    assert (mean, mean.low, mean.high) == pytest.approx((2, 2 - half, 2 + half))
    assert students_t(9) == pytest.approx(2.2622, abs=5e-5)
    near_one = over_seeds([1.0, 0.99, 0.7], (0, 1))
    assert near_one.low < 0.7 and near_one.high == 1


def test_loss_by_position_is_the_mean_over_windows():
    losses = text_losses(np.random.default_rng(0))
    icl = in_context_learning(losses)
    assert icl.score == pytest.approx(icl_score(losses))
    assert icl.score.low < icl.score < icl.score.high
    covered = [position for part in icl.positions for position in range(part.start, part.stop)]
    assert covered == list(range(coverage.WINDOW_LENGTH))
    for part in icl.positions:
        by_window = losses[:, part.start:part.stop].mean(1)
        assert part.loss == pytest.approx(by_window.mean().item())
        assert part.change == pytest.approx((by_window - losses[:, 0]).mean().item())
    assert icl.positions[0].change == 0 and in_context_learning(losses[:, :9]).score is None


def test_every_score_has_an_interval_around_it():
    model, rows = small_model(), repeats([3, 4], 16, np.arange(8), BEGIN, rows=16)
    measured = measure(model, rows, rows.tokens[:, :4])
    bounds = score_bounds(measured, rows)
    assert list(bounds) == list(measured.scores)
    for name, (low, high) in bounds.items():
        score = measured.scores[name].numpy()
        assert low.shape == score.shape and (low <= score + 1e-12).all(), name
        assert (score <= high + 1e-12).all() and (low >= -1).all(), name
    losses = numbers(model, rows)
    assert losses["loss of known tokens"].low >= 0 and losses["accuracy"].high <= 1


def test_sums_of_rows_are_of_what_is_counted():
    values = torch.tensor([[1.0, 2.0, 4.0], [8.0, float("nan"), 16.0]])
    counted = torch.tensor([[True, False, True], [True, False, False]])
    sums = row_sums(values, counted)
    assert sums.sums.tolist() == [5, 8] and sums.counts.tolist() == [2, 1]
    assert sums.mean == pytest.approx(13 / 3)
