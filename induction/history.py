"""What metrics.jsonl says of a run's heads over training: curves, and when they rose."""

import numpy as np

from induction.phase import Transition, transition
from model.config import ModelConfig
from model.taps import Head, heads_of


def curve(records: list[dict], name: str) -> tuple[np.ndarray, np.ndarray] | None:
    """A metric over training: tokens seen (N,) and its values (N,)."""
    points = [(record["tokens"], record[name]) for record in records if record.get(name) is not None]
    return tuple(np.array(points, dtype=float).T) if points else None


def score_curves(records: list[dict], score: str, model: ModelConfig) -> tuple[np.ndarray, np.ndarray] | None:
    """A score of all heads over training: tokens seen (N,) and values (N, L, H)."""
    keys = [f"heads/{score}/{head}" for head in heads_of(model)]
    looks = [record for record in records if keys[0] in record]
    if not looks:
        return None
    values = np.array([[record[key] for key in keys] for record in looks], dtype=float)      # a null becomes nan
    return np.array([record["tokens"] for record in looks], dtype=float), values.reshape(-1, model.n_layers, model.n_heads)


def best_of_looks(records: list[dict]) -> list[tuple[int, float]]:
    """(tokens, prefix matching of the best head) of every look at the heads."""
    looks = [(record["tokens"], [value for key, value in record.items() if key.startswith("heads/prefix_matching/") and value is not None])
             for record in records]
    return [(tokens, max(found)) for tokens, found in looks if found]


def model_transition(records: list[dict]) -> Transition | None:
    """When the model's best head of each moment rose to match prefixes, in tokens."""
    looks = best_of_looks(records)
    if not looks:
        return None
    tokens, best = zip(*looks)
    return transition(tokens, best)


def icl_transition(records: list[dict]) -> Transition | None:
    """When the in-context-learning score fell from what it was first measured at, in tokens; its `final` is how far it fell, in nats.
    Less than 0.1 may be the noise of a small validation text."""
    found = curve(records, "icl/score")
    return None if found is None else transition(found[0], found[1][0] - found[1], least=0.1)


def head_transitions(records: list[dict], model: ModelConfig) -> dict[Head, Transition]:
    """When each head that became an induction head did, in tokens."""
    found = score_curves(records, "prefix_matching", model)
    moved = {} if found is None else {head: transition(found[0], found[1][:, *head]) for head in heads_of(model)}
    return {head: when for head, when in moved.items() if when}


def kind_of_run(config) -> str:
    """What runs that differ by their seed alone share, as a name."""
    name = config.run
    for ending in (f"-s{config.seed}", f"_s{config.seed}", f"-seed{config.seed}"):
        name = name.removesuffix(ending)
    return name
