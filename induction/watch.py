"""Measures the heads of a model while it trains: train.py calls this between two steps.

It takes no number from training's random streams and changes nothing in the model: training with
it and without it gives the same run, bit for bit.
"""

from collections.abc import Sequence

from induction.behaviour import behaviour_of_both
from induction.knockout import knock_out
from induction.metrics import (
    ACCURACY,
    ACCURACY_BARE,
    GAIN,
    KNOCKOUT,
    KNOCKOUT_RANDOM,
    KNOWN_LOSS,
    LOSS_FIRST,
    LOSS_SECOND,
    ONSET_TOKENS,
    best_key,
    layers_key,
    offset_profile_key,
    score_key,
)
from induction.phase import transition
from induction.probe_set import Probes
from induction.probes import Pair
from induction.scores import Measured, measure
from induction.verdict import MIN_GAIN
from model.config import ModelConfig
from model.gpt import GPT
from model.taps import heads_of

Metrics = dict[str, float | list[float]]


class HeadWatch:
    """Scores all heads of a model on fixed probes, again and again over its training."""

    measured: Measured              # the newest measurement

    def __init__(self, model_config: ModelConfig, probes: Probes,
                 history: Sequence[tuple[int, float]] = ()):
        """history   (tokens seen, prefix matching of the best head) of the measurements so far"""
        self.model_config, self.probes, self.history = model_config, probes, list(history)

    def __call__(self, model: GPT, tokens_seen: int) -> Metrics:
        """Measure `model` as it is; the metrics for the run's record."""
        self.measured = measure(model, self.probes.scored, self.probes.unrepeated)
        best = float(self.measured.scores["prefix_matching"].max())
        self.history.append((tokens_seen, best))
        metrics = as_metrics(self.model_config, self.measured)
        begun, bare = behaviour_of_both(model, live_rows(self.probes, 2))
        known = (begun.losses.known.mean + bare.losses.known.mean) / 2
        metrics |= {ACCURACY: begun.right.mean.item(), ACCURACY_BARE: bare.right.mean.item(),
                    KNOWN_LOSS: known.item()}
        all_tokens, all_best = zip(*self.history)
        if rise := transition(all_tokens, all_best):
            metrics[ONSET_TOKENS] = round(rise.onset)
        return metrics


def live_rows(probes: Probes, every: int) -> Pair:
    """One in `every` rows of the aperiodic probe: on all of them the live measurements would take
    more than 2% of the quickstart's time, and the knockout more than 1%."""
    return probes.aperiodic.rows(slice(None, None, every))


def knockout_metrics(model: GPT, probes: Probes) -> Metrics:
    """What the model loses without the induction edges of all its heads; empty as long as repeating
    is worth less than MIN_GAIN to it."""
    rows = live_rows(probes, 4).both
    result = knock_out(model, heads_of(model.config), rows, probes.vocabulary)
    if result.gain < MIN_GAIN or result.gain_removed is None or result.by_random is None:
        return {}
    return {KNOCKOUT: result.gain_removed, KNOCKOUT_RANDOM: result.by_random}


def as_metrics(model_config: ModelConfig, measured: Measured) -> Metrics:
    """A measurement under flat names, as in metrics.jsonl: heads/prefix_matching/L1H3."""
    metrics: Metrics = {LOSS_FIRST: measured.loss_first, LOSS_SECOND: measured.loss_second,
                        GAIN: measured.loss_first - measured.loss_second}
    heads = heads_of(model_config)
    for score, values in measured.scores.items():
        by_layer = [round(value, 4) for value in values.amax(1).tolist()]
        metrics[best_key(score)] = max(by_layer)
        metrics[layers_key(score)] = by_layer
        for head, value in zip(heads, values.flatten().tolist()):
            metrics[score_key(score, head)] = round(value, 4)
    for head, profile in zip(heads, measured.offset_profile.flatten(0, 1).tolist()):
        metrics[offset_profile_key(head)] = [round(weight, 4) for weight in profile]
    return metrics
