"""What tells synthetic rows from text is found and named; the configs mix rows that begin alike."""

import numpy as np
import pytest
from commands import ROOT, command, fails, succeeds
from test_prepare import data_config

from data.dataset import Dataset
from data.hints import FEATURES, TASK, linear_probe, row_hints
from training.config import load_config

BEGIN, COUNT, WIDTH = 256, 800, 65
CHANCE = 0.08           # of an accuracy on 800 rows around 0.5: four standard deviations are 0.07
MIXTURE = [{"corpus": "files", "weight": 0.5}, {"corpus": "repeats", "weight": 0.5}]
IN_FULL = "data.mixture=[{corpus: files, weight: 0.5}, {corpus: repeats, weight: 0.5}]"


def distinct_rows(seed: int, count: int = COUNT) -> np.ndarray:
    """Rows of distinct random tokens (count, WIDTH): no feature tells two of these arrays apart."""
    generator = np.random.default_rng(seed)
    return np.stack([generator.permutation(200)[:WIDTH] for _ in range(count)])


def put_parity(rows: np.ndarray, position: int, parity: int) -> None:
    """Exchange the token at `position` with one of the row that is even (0) or odd (1)."""
    generator = np.random.default_rng(parity)
    for row in rows:
        other = generator.choice(np.flatnonzero(row % 2 == parity))
        row[[position, other]] = row[[other, position]]


def plant(hint: str, a: np.ndarray, b: np.ndarray) -> None:
    """Change rows a and b so that only `hint` tells them apart."""
    anywhere = np.random.default_rng(0).integers(1, WIDTH - 1, COUNT)     # neither end
    every = np.arange(COUNT)
    match hint:
        case "first token" | "position":
            position = 0 if hint == "first token" else 7
            put_parity(a, position, 0)
            put_parity(b, position, 1)
        case "first token is begin":
            a[:, 0] = BEGIN
        case "row length":
            a[:, 50:] = BEGIN
        case "where begin is":
            a[every, anywhere] = BEGIN
        case "vocabulary":
            a[every, anywhere], b[every, anywhere] = 200, 201
        case "repetition":
            a[:, 32:64] = a[:, :32]


# Whether the first token is `begin` is also a question of which token and where `begin` is.
ALSO = {"first token is begin": {"first token", "where begin is"}}


@pytest.mark.parametrize("hint", [*FEATURES, "nothing"])
def test_a_planted_hint_is_found_and_nothing_else(hint):
    a, b = distinct_rows(1), distinct_rows(2)
    plant(hint, a, b)
    told = row_hints({"text": a, "repeats": b}, BEGIN, seed=0)
    assert list(told) == list(FEATURES)
    for feature, accuracy in told.items():
        if feature == hint or feature in ALSO.get(hint, ()):
            assert accuracy > 0.95, told
        else:
            assert abs(accuracy - 0.5) < CHANCE, told


def test_an_accuracy_is_that_of_the_best_rule():
    """Token 0 is first in 80% of one kind and in 30% of the other: (0.8 + 0.7) / 2."""
    a, b = distinct_rows(1, 2000), distinct_rows(2, 3000)
    generator = np.random.default_rng(3)
    a[:, 0], b[:, 0] = generator.random(2000) > 0.8, generator.random(3000) > 0.3
    told = row_hints({"text": a, "repeats": b}, BEGIN, seed=0)["first token"]
    assert abs(told - 0.75) < 0.04                      # four standard deviations
    assert told == row_hints({"text": a, "repeats": b}, BEGIN, seed=0)["first token"]


def test_the_linear_probe_is_ridge_regression():
    generator = np.random.default_rng(0)
    learn, test = generator.integers(0, 12, (40, 9)), generator.integers(0, 14, (30, 9))
    begin = 5

    def counts(rows):
        table = np.stack([(rows == token).sum(1) for token in range(12)], 1).astype(np.float64)
        table[:, begin] = 0                             # and tokens 12 and 13 were never seen
        return table * 9 / table.sum(1, keepdims=True)

    x, y, mean = counts(learn), np.resize([1.0, -1.0], 40), counts(learn).mean(0)
    weights = np.linalg.solve((x - mean).T @ (x - mean) + 9 * np.eye(12), (x - mean).T @ y)
    expected = (counts(test) - mean) @ weights
    np.testing.assert_allclose(linear_probe(learn, test, begin), expected, atol=1e-5)


def test_rows_of_begin_tokens_only_and_too_few_rows():
    empty = np.full((8, 5), BEGIN)
    assert set(row_hints({"text": empty, "repeats": empty}, BEGIN, 0).values()) == {0.5}
    with pytest.raises(ValueError, match="3 and 8 rows"):
        row_hints({"text": empty[:3], "repeats": empty}, BEGIN, 0)


def test_a_begin_fraction_takes_the_begin_token_s_hint_away(workplace):
    told = {}
    for fraction in (None, 0.5):
        config = data_config(corpus=None, mixture=MIXTURE, begin_fraction=fraction)
        sources = Dataset(config, seed=0).training(2048, 64).sources
        rows = {name: source.rows(np.arange(1600)) for name, source in sources.items()}
        told[fraction] = row_hints(rows, BEGIN, seed=0)
    assert told[None]["first token is begin"] >= 0.9 <= told[None]["where begin is"]
    for feature in ("first token is begin", "row length", "where begin is"):
        assert 0.45 <= told[0.5][feature] <= 0.55, told[0.5]        # chance is ± 0.05
    assert told[None][TASK] > 0.65 < told[0.5][TASK]         # texts repeat bytes too


def test_the_command_names_the_hints(workplace):
    lines = {}
    for fraction in ("null", "0.5"):
        done = command("-m data.hints", "tiny.yaml", "data.corpus=null", IN_FULL,
                       f"data.begin_fraction={fraction}", cwd=workplace)
        lines[fraction] = succeeds(done).stdout.splitlines()
        assert "rows of files and as many of repeats" in lines[fraction][0]
        assert [line[:22].strip() for line in lines[fraction][2:-1]] == list(FEATURES)
        assert max(map(len, lines[fraction][1:-1])) <= 100
        assert TASK not in lines[fraction][-1]
    assert "first token is begin" in lines["null"][-1]
    assert "begin" not in lines["0.5"][-1]


def test_the_command_needs_rows_of_both_kinds(workplace):
    fails(command("-m data.hints", "tiny.yaml", cwd=workplace), "tiny.yaml", "files",
          "data.mixture")
    fails(command("-m data.hints", "tiny.yaml", "data.corpus=repeats", "data.files=[]",
                  "data.tokenizer=bytes", cwd=workplace), "repeats", "data.mixture")


def test_training_notes_that_the_begin_token_tells_the_kind(workplace):
    for fraction, noted in (("null", True), ("0.5", False)):
        done = command("train.py", "tiny.yaml", f"run=note{fraction}", "data.corpus=null", IN_FULL,
                       f"data.begin_fraction={fraction}", "data.repeats.period=[4, 8]",
                       "train.steps=1", "heads.every=0", "eval.every=0", cwd=workplace)
        output = succeeds(done).stdout + done.stderr
        notes = [line for line in output.splitlines() if "data.begin_fraction=0.5" in line]
        assert len(notes) == noted
        assert all("repeats begin with <|endoftext|> and text rows do not" in note
                   for note in notes)


def test_in_every_config_text_and_repeats_begin_alike():
    configs = [load_config(path).data for path in ROOT.glob("configs/**/*.yaml")]
    mixed = [config for config in configs if config.mixes_text_and_repeats]
    assert len(mixed) >= 3
    assert not any(config.begin_tells_kind for config in mixed)
