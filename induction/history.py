"""What metrics.jsonl says about a run's heads over training: curves, and when they rose."""

from typing import NamedTuple

import numpy as np

from induction.metrics import ICL_SCORE, score_key, scores_by_head
from induction.phase import Transition, transition
from model.config import ModelConfig
from model.taps import Head, heads_of
from training.config import Config
from training.logger import Record

RESCALED = ("copying", "previous_token")        # since heads/current_token/… is measured too


class Curve(NamedTuple):
    """A metric over training."""

    tokens: np.ndarray      # (N,) seen so far
    values: np.ndarray      # (N,), or (N, L, H) for a score of all heads


def curve(records: list[Record], name: str) -> Curve | None:
    """A metric over training; None if it was never measured."""
    points = [(record["tokens"], record[name]) for record in records
              if record.get(name) is not None]
    if not points:
        return None
    return Curve(*np.array(points, dtype=float).T)


def score_curves(records: list[Record], score: str, model: ModelConfig) -> Curve | None:
    """A score of all heads over training, values (N, L, H); None if it was never measured."""
    keys = [score_key(score, head) for head in heads_of(model)]
    measured = [record for record in records if keys[0] in record]
    if score in RESCALED:               # earlier versions measured it otherwise
        measured = [record for record in measured
                    if score_key("current_token", heads_of(model)[0]) in record]
    if not measured:
        return None
    tokens = np.array([record["tokens"] for record in measured], dtype=float)
    values = np.array([[record[key] for key in keys] for record in measured],
                      dtype=float)                                      # a null becomes NaN
    return Curve(tokens, values.reshape(-1, model.n_layers, model.n_heads))


def best_head_history(records: list[Record]) -> list[tuple[int, float]]:
    """(tokens seen, prefix matching of the best head) of every measurement of the heads."""
    history = []
    for record in records:
        if scores := scores_by_head(record, "prefix_matching"):
            history.append((record["tokens"], max(scores.values())))
    return history


def model_transition(records: list[Record]) -> Transition | None:
    """When prefix matching of the best head rose, and whether it faded, in tokens (the best at each
    moment: the head may change)."""
    history = best_head_history(records)
    return transition([tokens for tokens, _ in history], [best for _, best in history])


def icl_transition(records: list[Record]) -> Transition | None:
    """When the in-context-learning score fell below its first value, in tokens; `height` is by how
    much, in nats. A fall of less than 0.1 may be noise of a small validation text: None."""
    scores = curve(records, ICL_SCORE)
    if scores is None:
        return None
    return transition(scores.tokens, scores.values[0] - scores.values, least=0.1)


def head_transitions(records: list[Record], model: ModelConfig) -> dict[Head, Transition]:
    """When each head that became an induction head did so, in tokens. Some may have faded."""
    scores = score_curves(records, "prefix_matching", model)
    if scores is None:
        return {}
    transitions = {}
    for head in heads_of(model):
        if rise := transition(scores.tokens, scores.values[:, *head]):
            transitions[head] = rise
    return transitions


def step_at(records: list[Record], tokens: float) -> int:
    """The step by which a run had seen this many tokens."""
    for record in records:
        if record["tokens"] >= tokens:
            return record["step"]
    return records[-1]["step"]


def condition_of(config: Config) -> str:
    """The run's name without its seed: the same for runs that differ only by their seed."""
    name = config.run
    for ending in (f"-s{config.seed}", f"_s{config.seed}", f"-seed{config.seed}"):
        name = name.removesuffix(ending)
    return name
