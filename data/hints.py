"""What tells synthetic rows from text, other than what the rows are for.

    python -m data.hints CONFIG [key.path=value …]

A model trained on text and on repeats learns whatever tells the two apart. If a single feature
does, such as the first token, then what it learned from repeats may work only behind that feature.
Here each feature is tried by itself: a rule is learned on half of the rows and tested on the other
half. The rules are counts and a linear probe (Alain and Bengio 2016).
"""

from math import sqrt

from errors import ArgumentParser, UserError, run_command

import numpy as np

from data.dataset import Dataset
from data.prepare import DataPart
from settings.validate import Settings, Size, validate_file

ROWS = 2000                     # of each kind that the command looks at
TASK = "repetition"             # this one must tell: it is what repeats are for
FEATURES = {
    "first token": "the row's first token, whichever it is",
    "first token is begin": "only whether that is the begin token",
    "row length": "tokens before the end, which begin tokens may fill up",
    "where begin is": "the begin token: first or not, and how often later",
    "vocabulary": "how often each token occurs: a linear probe of the counts",
    "position": "the token at the later position that tells most",
    TASK: "tokens that occurred before: the task, not a hint",
}


def row_hints(rows_by_source: dict[str, np.ndarray], begin: int, seed: int) -> dict[str, float]:
    """How well each of FEATURES by itself tells rows of two sources apart.

    Takes two arrays of rows (N, T + 1) of tokens, the token `begin` that begins documents, and the
    seed of the division into halves. Returns balanced accuracies (Brodersen et al. 2010) on rows
    that the rule was not learned on: 0.5 not at all, 1 always. Of the longer array only as many
    rows as of the other are used. Raises ValueError if there are fewer than 4 rows.
    """
    first, second = rows_by_source.values()
    count = min(len(first), len(second)) // 4 * 4
    if count == 0:
        raise ValueError(f"{len(first)} and {len(second)} rows: at least 4 of each are needed")
    generator = np.random.default_rng(seed)
    pairs = np.stack([generator.permutation(rows)[:count] for rows in (first, second)], axis=1)
    learn, test = np.split(pairs.reshape(2 * count, -1), 2)     # rows of the two kinds take turns
    lengths = row_lengths(learn, begin)
    guesses = {
        "first token": counted(learn[:, 0], test[:, 0]),
        "first token is begin": counted(learn[:, 0] == begin, test[:, 0] == begin),
        "row length": counted(lengths, row_lengths(test, begin)),
        "where begin is": counted(places_of(learn, begin), places_of(test, begin)),
        "vocabulary": linear_probe(learn, test, begin),
        "position": best_position(learn, test, lengths.min()),
        TASK: counted(repetition(learn, begin), repetition(test, begin)),
    }
    return {feature: accuracy(guess) for feature, guess in guesses.items()}


def kinds(n: int) -> np.ndarray:
    """The kinds of n rows, +1 and −1 in turn: (n,)."""
    return np.resize([1.0, -1.0], n)


def accuracy(guess: np.ndarray) -> float:
    """Balanced accuracy of a guess (N,): its sign is the kind, and 0, undecided, is half right."""
    return float(np.mean(1 + np.sign(guess) * kinds(len(guess))) / 2)


# --- features: rows (N, T + 1) → a whole number for each row (N,) ---------------------------------

def row_lengths(rows: np.ndarray, begin: int) -> np.ndarray:
    """The number of tokens up to the last that is not `begin`, which may fill up the end."""
    filled = rows != begin
    return np.where(filled.any(axis=1), rows.shape[1] - filled[:, ::-1].argmax(axis=1), 0)


def places_of(rows: np.ndarray, begin: int) -> np.ndarray:
    """Where `begin` is, as a number: 2 × (how often after the first position) + (is it first?)."""
    before_the_end = np.arange(rows.shape[1]) < row_lengths(rows, begin)[:, None]
    is_begin = rows == begin
    return 2 * (is_begin & before_the_end)[:, 1:].sum(axis=1) + is_begin[:, 0]


def repetition(rows: np.ndarray, begin: int) -> np.ndarray:
    """The share of tokens other than `begin` that occurred before in the row, in twentieths."""
    ordered = np.sort(rows, axis=1)
    again = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != begin)
    return 20 * again.sum(axis=1) // np.maximum(1, (rows != begin).sum(axis=1))


# --- rules: learned on some rows, they guess the kind of others -----------------------------------

def counted(learn: np.ndarray, test: np.ndarray) -> np.ndarray:
    """The kind that a value of a feature had more often in `learn`: (N,) → guess (N_test,).

    0 if both kinds had it equally often, or none.
    """
    values, place = np.unique(np.concatenate([learn, test]), return_inverse=True)
    votes = np.bincount(place[:len(learn)], kinds(len(learn)), minlength=len(values))
    return votes[place[len(learn):]]


def best_position(learn: np.ndarray, test: np.ndarray, end: int) -> np.ndarray:
    """`counted` at that position of 1 … end − 1 that tells most within `learn`.

    `end`: the shortest row's, because tokens after the end of a row would tell its length.
    """
    half = len(learn) // 2
    told = [accuracy(counted(*np.split(learn[:, p], [half]))) for p in range(1, end)]
    if not told:
        return np.zeros(len(test))
    best = 1 + int(np.argmax(told))
    return counted(learn[:, best], test[:, best])


def linear_probe(learn: np.ndarray, test: np.ndarray, begin: int) -> np.ndarray:
    """Ridge regression of the kind on the share of each token among a row's tokens but `begin`.

    It is solved in its dual form, α = (X Xᵀ + λ)⁻¹ y, for which a large vocabulary costs little
    (Saunders et al. 1998). λ is the number of tokens of a row.
    """
    tokens = np.unique(learn)
    x, x_test = (token_counts(rows, tokens, begin) for rows in (learn, test))
    mean = x.mean(axis=0)
    x -= mean
    x_test -= mean
    gram = (x @ x.T).astype(np.float64) + learn.shape[1] * np.eye(len(x))
    alpha = np.linalg.solve(gram, kinds(len(x)))
    return x_test @ (x.T @ alpha.astype(np.float32))


def token_counts(rows: np.ndarray, tokens: np.ndarray, begin: int) -> np.ndarray:
    """How often each of the sorted `tokens` (V,) except `begin` occurs in a row, multiplied so that
    the counts of every row have the same sum: (N, T + 1) → (N, V) float32."""
    place = np.searchsorted(tokens, rows).clip(max=len(tokens) - 1)
    known = (tokens[place] == rows) & (rows != begin)
    counts = np.zeros((len(rows), len(tokens)), np.float32)
    np.add.at(counts, (np.nonzero(known)[0], place[known]), 1)
    counts *= rows.shape[1] / np.maximum(1, counts.sum(axis=1, keepdims=True))
    return counts


# --- the command ----------------------------------------------------------------------------------

class ModelPart(Settings):
    """The only part of a model that decides what its rows are."""

    model_config = Settings.model_config | {"extra": "ignore"}

    n_ctx: Size


class RowsPart(DataPart):
    """The part of a config file that says what the rows of a run are."""

    seed: int = 0
    model: ModelPart


def table(hints: dict[str, float], tested: int) -> str:
    """A line for each feature, and the names of those that are hints.

    `tested`: the number of rows, of both kinds together, behind each accuracy.
    """
    chance = 0.5 + 4 * 0.5 / sqrt(tested)           # four standard deviations of a fair coin
    lines = [f"{'feature':<22}accuracy  tells   what is looked at"]
    for feature, told in hints.items():
        tells = "yes" if told >= 0.9 else "partly" if told > chance else "no"
        lines.append(f"{feature:<22}{told:8.2f}  {tells:<6}  {FEATURES[feature]}")
    named = [feature for feature, told in hints.items() if told > chance and feature != TASK]
    lines.append(f"hints: {', '.join(named) or 'none'} (1: always; up to {chance:.2f} is chance)")
    return "\n".join(lines)


def main() -> None:
    parser = ArgumentParser("python -m data.hints", description=(
        "Which single features of a row tell a model whether it is text or repeats, in a config "
        "that mixes both. The text is prepared if it has not been."))
    parser.add_argument("config", help="a YAML file of configs/")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key.path=value",
                        help="change a value of the config, for example data.begin_fraction=0.5")
    args = parser.parse_intermixed_args()
    config = validate_file(RowsPart, args.config, args.overrides)
    if not config.data.mixes_text_and_repeats:
        raise UserError(f"{args.config}: all rows are of one kind, {config.data.corpora[0]}\n"
                        "  name a config whose data.mixture has text and repeats, for example "
                        "configs/quickstart.yaml")
    data = Dataset(config.data, config.seed)
    assert data.shards
    n_ctx = config.model.n_ctx
    sources = data.training(n_ctx, n_ctx).sources
    count = max(4, min(ROWS, len(data.shards.train) // n_ctx))      # so that no text is read twice
    rows = {name: source.rows(np.arange(count)) for name, source in sources.items()}
    print(f"{args.config}: {count} rows of {' and as many of '.join(rows)}, told apart by one "
          "feature alone")
    print(table(row_hints(rows, data.begin, config.seed), count))


if __name__ == "__main__":
    run_command(main)
