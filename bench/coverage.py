"""Do 95% intervals hold the truth 95% of the time? `python -m bench.coverage`.

The model is set by hand and has few tokens and short periods, so every row that a probe can draw is
known, and with them the numbers that its intervals are about. Then 1,000 probes are drawn, each is
measured as heads.py measures a run, and the intervals that hold the true number are counted. For
text, losses are drawn from a skewed distribution whose mean is known.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from itertools import permutations

from errors import ArgumentParser, run_command

import numpy as np
import torch

from bench import results
from bench.hand_built import BEGIN, ONE_BACK, blank, induction, previous_token, same
from induction.ablation import ablate_each_head, ablation_effect
from induction.behaviour import behaviour, in_context_learning
from induction.intervals import Estimate, over_seeds
from induction.knockout import knock_out
from induction.probes import Probe, periodic, repeats
from induction.scores import measure, score_bounds
from model.gpt import GPT
from model.taps import Head

PERIODS, VOCABULARY, LENGTH = (3, 4), np.arange(8), 16
SIZES = (16, 64)                # rows during training, and in heads.py
WINDOWS, WINDOW_LENGTH = 64, 64
HEAD = Head(1, 0)
Numbers = Mapping[str, Estimate | None]


@torch.no_grad()
def small_model() -> GPT:
    """An induction circuit with noise in its attention scores, so that what it attends to and
    predicts depends on which tokens a row has."""
    model = blank(prior=0.5, n_heads=2)
    previous_token(model)
    for index in (0, 1):                        # two, so that removing one leaves something
        induction(model, index, 6.0, match=same(ONE_BACK, 4.0))
    noise = torch.Generator().manual_seed(0)
    for block in model.blocks:
        weight = block.attn.w_q.weight
        weight += model.config.head_size ** 0.5 * torch.randn(weight.shape, generator=noise)
    return model


def population() -> Probe:
    """Every row that a probe of PERIODS can draw; as many of each period, as a probe has."""
    blocks = {period: [np.array(block) for block in permutations(VOCABULARY, period)]
              for period in PERIODS}
    most = max(map(len, blocks.values()))
    return periodic([block for row in range(most) for period in PERIODS
                     for block in [blocks[period][row % len(blocks[period])]]], LENGTH, BEGIN)


def numbers(model: GPT, probe: Probe) -> Numbers:
    """What is measured on a probe, with intervals."""
    measured = measure(model, probe, probe.tokens[:, :4])
    bounds, rows = score_bounds(measured, probe), probe.resampling
    estimates: dict[str, Estimate | None] = {}
    for name in ("prefix_matching", "latest_match", "entropy"):
        score, (low, high) = measured.scores[name][HEAD].item(), bounds[name]
        estimates[f"{name} of {HEAD}"] = Estimate(score, low[HEAD], high[HEAD])
    predicted, effect = behaviour(model, probe), ablation_effect(model, [HEAD], probe)
    knockout = knock_out(model, [HEAD], probe, len(VOCABULARY))
    alone = ablate_each_head(model, probe.batch, probe.known, rows)
    return estimates | {
        "accuracy": predicted.accuracy, "loss of known tokens": predicted.loss_known,
        "repeat gain": predicted.gain, "rise without L0H0": alone[Head(0, 0)],
        f"rise without {HEAD}": effect.known, f"gain removed without {HEAD}": effect.gain_removed,
        f"gain removed without the edges of {HEAD}": knockout.gain_removed}


def text_losses(draw: np.random.Generator) -> torch.Tensor:
    """Losses of windows of text (WINDOWS, WINDOW_LENGTH), in nats: skewed, alike within a window,
    and on average 4 at the first position and 2 at the last."""
    windows = draw.lognormal(-0.125, 0.5, (WINDOWS, 1))                 # of mean 1
    tokens = draw.exponential(1.0, (WINDOWS, WINDOW_LENGTH))
    return torch.from_numpy(np.linspace(4, 2, WINDOW_LENGTH) * windows * tokens)


def text_numbers(losses: torch.Tensor) -> Numbers:
    icl = in_context_learning(losses)
    late = icl.positions[-1]
    return {"ICL score": icl.score, f"loss at {late.start} to {late.stop - 1}": late.loss,
            f"the same, minus that at {icl.positions[0].start}": late.change}


def coverage(truth: Numbers, measure_draw: Callable[[int], Numbers],
             draws: int) -> dict[str, float]:
    """The fraction of draws whose interval holds the true number."""
    held: Counter[str] = Counter()
    for n in range(draws):
        for name, estimate in measure_draw(n).items():
            true = truth[name]
            if estimate is not None and true is not None:
                held[name] += estimate.low <= true <= estimate.high
        results.meanwhile(f"{n + 1} of {draws} draws")
    results.meanwhile("")
    return {name: held[name] / draws for name in truth}


@torch.inference_mode()
def all_coverages(draws: int) -> dict[str, dict[str, float]]:
    """What is measured → kind of rows → coverage."""
    model = small_model()
    truth = numbers(model, population())

    def measure_rows(seed: int, rows: int) -> Numbers:
        return numbers(model, repeats(PERIODS, LENGTH, VOCABULARY, BEGIN, rows=rows, seed=seed))

    columns = {f"{rows} rows": coverage(truth, partial(measure_rows, rows=rows), draws)
               for rows in SIZES}
    mean = torch.from_numpy(np.linspace(4, 2, WINDOW_LENGTH)).expand(2, -1)
    columns[f"{WINDOWS} windows"] = coverage(
        text_numbers(mean), lambda n: text_numbers(text_losses(np.random.default_rng(n))), draws)
    columns["5 seeds"] = coverage({"mean over seeds": Estimate(0.0)}, lambda n: {
        "mean over seeds": over_seeds(np.random.default_rng(n).standard_normal(5).tolist())}, draws)
    return {name: {column: values[name] for column, values in columns.items() if name in values}
            for name in {name: None for values in columns.values() for name in values}}


def main() -> None:
    parser = ArgumentParser("python -m bench.coverage", description="How often 95% intervals hold "
                            "the truth, where it is known.")
    parser.add_argument("--draws", type=int, default=1000, metavar="N",
                        help="probes drawn of each size (default 1000: four minutes)")
    args = parser.parse_args()
    rows = all_coverages(args.draws)
    columns = list({column: None for row in rows.values() for column in row})
    print(f"{'95% intervals that hold the truth':42}" + "".join(f"{name:>12}" for name in columns))
    for name, row in rows.items():
        print(f"{name:42}" + "".join(f"{row[column]:12.1%}" if column in row else " " * 12
                                     for column in columns))
    results.write("coverage", {"draws": args.draws, "coverage": rows})


if __name__ == "__main__":
    run_command(main)
