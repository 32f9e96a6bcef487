"""induction/phase.py on curves whose moments are known."""

import numpy as np
import pytest

from induction.history import head_transitions
from induction.phase import band, students_t, transition
from model.config import ModelConfig
from model.taps import Head
from report.figures import formation, score_curves
from report.page import moments_of
from report.text import transitions
from report.verdict_page import describe_transition

FADES = [0, 0, 0, .5, .95, .95, .9, .7, .4, .3, .2]


def test_a_transition_is_found_where_it_was_put():
    x = np.arange(0, 101) * 1000.0
    # A straight rise of 0.9 over 20 thousand tokens.
    y = np.interp(x, [0, 40000, 60000, 100000], [0.03, 0.03, 0.93, 0.93])
    rise = transition(x, y)

    def at(level: float) -> float:
        return 40000 + (level - 0.03) / 0.9 * 20000

    assert rise.final == pytest.approx(0.93)
    assert rise.onset == pytest.approx(at(0.12)) and rise.end == pytest.approx(at(0.84))
    assert rise.crossings == {level: pytest.approx(at(level)) for level in (0.3, 0.4, 0.5)}
    assert (rise.peak, rise.peak_at, rise.faded) == (y[60], 60000, None)


def test_a_blip_before_it_is_not_its_onset_and_no_rise_is_no_transition():
    x = np.arange(100.0)
    y = np.where(x < 50, 0.02, 0.9)
    y[20] = 0.3
    assert 49 <= transition(x, y).onset <= 50
    assert transition(x, np.full(100, 0.05)) is None and transition([], []) is None
    assert transition(x, 0 * x + 0.8).onset == 0                    # there from the beginning


def test_a_curve_that_formed_and_faded_is_a_transition_to_its_peak():
    rise = transition(np.arange(11) * 10, FADES)
    assert rise.onset == pytest.approx(20 + 10 * 0.095 / 0.5)               # a tenth of the peak
    assert rise.end == pytest.approx(30 + 10 * (0.855 - 0.5) / 0.45)
    assert (rise.peak, rise.peak_at, rise.final, rise.height) == (0.95, 40, 0.2, 0.95)
    assert rise.faded == pytest.approx(70 + 10 * (0.7 - 0.475) / 0.3)       # half of the peak
    # Above `least` at the end, but below half of its rise.
    high = transition(range(9), [0.05, 0.05, 0.5, 0.95, 0.95, 0.7, 0.45, 0.45, 0.45])
    assert high.faded == pytest.approx(5 + (0.7 - 0.5) / 0.25) and high.height == 0.95
    # A peak of 0.5 that ends above half of it, but no longer as an induction head.
    assert transition(range(6), [0, 0, 0.5, 0.5, 0.3, 0.3]).faded == pytest.approx(3.5)
    # Formed before the first measurement.
    lost = transition(range(6), [0.9, 0.9, 0.9, 0.8, 0.1, 0.1])
    assert (lost.onset, lost.end) == (0, 0) and lost.faded == pytest.approx(3.5)


def test_what_stays_has_not_faded():
    assert transition(range(6), [0, 0, 0.95, 0.95, 0.6, 0.6]).faded is None
    assert transition(range(5), [0.9, 0.92, 0.91, 0.89, 0.9]).faded is None     # its rise is noise
    assert transition(range(8), [0, 0, 0.9, 0.1, 0.9, 0.9, 0.9, 0.9]).faded is None
    spike = transition(range(8), [0, 1, 0, 0, 0.3, 0.45, 0.45, 0.45])
    assert (spike.faded, spike.peak, spike.peak_at) == (None, 0.45, 5)


def test_a_single_high_measurement_is_no_formation_and_neither_is_the_beginning_of_a_rise():
    assert transition(range(6), [0, 0, 0.9, 0, 0, 0]) is None
    assert transition(range(7), [0, 0, 0.9, 0, 0.9, 0, 0]) is None
    rising = np.concatenate([np.zeros(45), [0.1, 0.1, 0.1, 0.5, 0.9]])
    assert transition(np.arange(50), rising) is None            # its last tenth has a mean of 0.34
    assert transition(range(5), [0, 0.9, 0.9, 0.1, float("nan")]) is None


def test_a_head_that_faded_is_named_in_text_figure_and_page():
    records = [{"step": n, "tokens": n * 1e6, "train/loss": 1.0, "heads/prefix_matching/L0H0": 0.0,
                "heads/prefix_matching/L0H1": score} for n, score in enumerate(FADES)]
    model = ModelConfig(n_layers=1, n_heads=2, d_model=8)
    formed = head_transitions(records, model)
    assert list(formed) == [Head(0, 1)]
    rise = formed[Head(0, 1)]
    text = transitions(records)
    assert "rose to 0.95 between 2.19 and 3.79 M" in text and "(steps 3 to 4)" in text
    assert "faded at 7.75 M" in text and "(step 8): 0.20 at the end." in text
    assert "rise to 0.95" in describe_transition(rise)
    assert "faded at 7.75 M, to 0.20." in describe_transition(rise)
    assert moments_of(rise) == {"onset": rise.onset, "end": rise.end, "faded": rise.faded}
    stays = transition(range(4), [0, 0, 0.9, 0.9])
    assert list(moments_of(stays)) == ["onset", "end"]
    assert describe_transition(stays).endswith(" M).")
    drawn = formation(model, records, score_curves(records, "prefix_matching", model))
    below = drawn.axes[1]
    assert [label.get_text() for label in below.get_legend().get_texts()] == ["L0H1"]
    dashed = [line for line in below.lines if line.get_linestyle() == "--"]
    assert [line.get_xdata()[0] for line in dashed] == [pytest.approx(7.75)]


@pytest.mark.parametrize(("degrees", "t"), [
    (1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (10, 2.2281), (11, 2.2010),
    (30, 2.0423), (60, 2.0003), (120, 1.9799)])
def test_students_t_is_that_of_published_tables(degrees, t):
    assert students_t(degrees) == pytest.approx(t, abs=5e-5)


def test_a_band_is_students_interval():
    curves = [(np.arange(5.0), np.full(5, value)) for value in (1.0, 2.0, 3.0)]
    curves.append((np.arange(1.0, 9.0), np.full(8, 2.0)))
    seeds = band(curves)
    assert seeds.x.tolist() == [1, 2, 3, 4] and seeds.mean.tolist() == [2] * 4
    half = 3.182446 * np.std([1, 2, 3, 2], ddof=1) / 2
    assert np.allclose(seeds.high - seeds.mean, half) and np.allclose(seeds.mean - seeds.low, half)
    assert band(curves[:1]).low.tolist() == [1] * 5
