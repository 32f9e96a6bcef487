"""A small page with known numbers, and what tests read from a page in a browser."""

import numpy as np

from induction.history import Curve
from report.viewer import Passage, PatternSnapshot, View

L, H, T = 2, 4, 24
PASSAGES = [Passage("random tokens", [f"t{i}" for i in range(T)]),
            Passage("python", ["def", " f", "(", ")", ":", "\n", "\t", "pass"])]
TOKENS_SEEN = np.array([0, 1e5, 2e5, 5e5, 1e6])


def random_patterns(T: int, seed: int) -> np.ndarray:
    """Peaked causal patterns of all heads, (L, H, T, T) uint8."""
    logits = np.random.default_rng(seed).normal(0, 2, (L, H, T, T))
    weights = np.exp(logits) * np.tri(T)
    return np.round(weights / weights.sum(-1, keepdims=True) * 255).astype(np.uint8)


PATTERNS = [[random_patterns(len(p.tokens), 10 * s + n) for n, p in enumerate(PASSAGES)]
            for s in range(len(TOKENS_SEEN))]
PREFIX = np.random.default_rng(0).uniform(0, 1, (5, L, H)).round(3)
PREFIX[-1, 1, 2] = 1                            # so L1H2 is the head that the page opens with


def example(**changes) -> View:
    snapshots = [PatternSnapshot(int(t / 1000), int(t), patterns)
                 for t, patterns in zip(TOKENS_SEEN, PATTERNS)]
    scores = {"prefix_matching": Curve(TOKENS_SEEN, PREFIX),
              "copying": Curve(TOKENS_SEEN, 1 - 2 * PREFIX),
              "of_our_own": Curve(TOKENS_SEEN, 9 * PREFIX)}
    curves = {"train/loss": Curve(np.arange(1001) * 1e3, np.linspace(6, 2, 1001)),
              "icl/score": Curve(TOKENS_SEEN, np.array([0, 0, np.nan, -1, -2]))}
    return View(title="a run", subtitle="2 layers × 4 heads", n_layers=L, n_heads=H, n_kv_heads=2,
                passages=PASSAGES, snapshots=snapshots,
                scores=scores, scored="repeated random tokens", curves=curves,
                marks={"onset": 2e5, "end": 5e5},
                causal={"L1H2": 2.1, "L0H0": -0.004}, causal_loss="second copy", causal_step=1000,
                notes=["Synthetic rows cause the formation."])._replace(**changes)


def settled(page):
    page.wait_for_selector("#pattern[aria-busy=false]", state="attached")
    return page


def hover_cell(page, q: int, k: int) -> str:
    """Point at a cell of the matrix and read what the page says about it."""
    x, y = page.evaluate("([q, k]) => [GUTTER + (k + .5) * matrixSize().cell, "
                         "TOP + (q + .5) * matrixSize().cell]", [q, k])
    page.hover("#matrix", position={"x": x, "y": y})
    return page.inner_text("#readout")


def listed(page, which: str) -> list[tuple[int, str]]:
    """The tokens listed as looked at ("key") or as looking ("query"), with their weights."""
    return page.eval_on_selector_all(
        f"#strongest .{which} li",
        "rows => rows.map(row => [+row.dataset.i, row.lastChild.textContent])")


def strongest(weights: np.ndarray, first: int = 0) -> list[list]:
    order = sorted(range(len(weights)), key=lambda i: -int(weights[i]))[:5]
    # A weight of 1/255 reads 0.00 and is not listed.
    return [[first + i, f"{weights[i] / 255:.2f}"] for i in order if weights[i] > 1]


def background(page, selector: str) -> str:
    return page.eval_on_selector(selector, "element => getComputedStyle(element).backgroundColor")


def with_losses(vocab_size: int | None = 50) -> tuple[View, list, list]:
    """The example with the losses of its passages; the losses and which were right, by snapshot."""
    rng = np.random.default_rng(3)
    losses = [[rng.uniform(0, 5, len(p.tokens) - 1).astype(np.float32) for p in PASSAGES]
              for _ in TOKENS_SEEN]
    losses[-1][0][6] = np.inf                                   # a loss may be infinite
    right = [[rng.random(len(p.tokens) - 1) < 0.5 for p in PASSAGES] for _ in TOKENS_SEEN]
    snapshots = [snapshot._replace(losses=losses[s], right=right[s])
                 for s, snapshot in enumerate(example().snapshots)]
    passages = [passage._replace(vocab_size=vocab_size) for passage in PASSAGES]
    return example(snapshots=snapshots, passages=passages), losses, right


# --- evidence, as `heads.py --json` writes it -----------------------------------------------------

def known(value: float, low: float | None = None, high: float | None = None) -> dict:
    """A number with its 95% interval; null where there is none."""
    return {"value": value, "low": low, "high": high}


def behaviour_of(accuracy: float) -> dict:
    return {"accuracy": known(accuracy, accuracy - 0.02, accuracy + 0.02), "chance": 0.05,
            "loss_first": known(5.0), "loss_known": known(0.5), "gain": known(4.5)}


def evidence(**changes) -> dict:
    """What was found in the example's run, at its last snapshot."""
    knockout = {
        "begun": {"gain": known(4.5), "gain_removed": known(0.93, 0.9, 0.96), "known": known(4.2),
                  "by_random": known(-0.01, -0.04, 0.02), "by_misreading": known(1.02, 0.98, 1.06)},
        "bare": {"gain": known(4.4), "gain_removed": known(0.5, 0.4, 0.6), "known": known(2.2),
                 "by_random": known(0.07), "by_misreading": None}}
    everywhere = {kind: {"gain_removed": known(0.97, 0.94, 1.0), "by_random": known(0.1),
                         "by_misreading": None} for kind in ("begun", "bare")}
    paths = [{"sender": f"L0H{sender}", "receiver": f"L1H{receiver}", "into": into,
              "rise": known(round(0.1 * receiver - 0.2 * place, 2))}
             for sender in range(H) for receiver in (2, 0) for place, into in enumerate("qkv")]
    for path in paths:
        if (path["sender"], path["receiver"], path["into"]) == ("L0H3", "L1H2", "k"):
            path["rise"] = known(6.2, 5.9, 6.5)
    return {
        "run": "toy-s0", "condition": "toy", "seed": 0, "step": 1000, "tokens": 1000000,
        "control": False, "summary": "Yes: induction heads do it.",
        "answers": {"formed": "partly", "behaviour": "only with begin token", "mechanism": "yes",
                    "transfer_periods": "yes", "transfer_tokens": "not shown"},
        "heads": {"L1H2": {"prefix_matching": 0.94, "alone": 2.1}, "L0H3": {"alone": 0.2}},
        "intervals": {"L1H2": {"prefix_matching": [0.92, 0.96], "alone": [1.9, 2.3]}},
        "losses": {"first": known(5.1, 5.0, 5.2), "second": known(0.3), "gain": known(4.8)},
        "behaviour": {"begun": behaviour_of(0.93), "bare": behaviour_of(0.31), "guessing": 4.85},
        "mechanism": {
            "heads": [{"head": "L1H2", "role": "copies", "prefix_matching": known(0.9, 0.88, 0.92)},
                      {"head": "L1H0", "role": "neither", "prefix_matching": known(0.2)}],
            "peak": {"head": "L1H2", "offset": -2, "weight": 0.75}, "uniform": 0.03,
            "knockout": knockout, "knockout_all_heads": everywhere,
            "ablation": {"known": known(2.5), "first_copy": known(0.1),
                         "gain_removed": known(1.5, 1.4, 1.6)},
            "previous_token_heads": {"heads": ["L0H3"], "total": known(6.1),
                                     "patterns_kept": known(0.1), "into": {"k": known(6.2)}},
            "paths": paths},
        "transfer": {"by_period": {"17": known(0.91, 0.9, 0.92)}, "trained": known(0.99),
                     "unseen_tokens": {"begun": behaviour_of(0.4), "bare": behaviour_of(0.3)},
                     "text": {"matched": known(0.5), "by_random": known(0.1), "fraction": 0.2}},
        "transition": {"onset": known(210000, 200000, 220000), "end": 500000, "faded": None},
    } | changes


def other_run(seed: int, name: str, **changes) -> View:
    """A run like the example, with patterns, scores and losses of its own."""
    snapshots = [PatternSnapshot(s.step, s.tokens,
                                 [random_patterns(len(p.tokens), 1000 * seed + 10 * n + k)
                                  for k, p in enumerate(PASSAGES)])
                 for n, s in enumerate(example().snapshots)]
    prefix = np.random.default_rng(seed).uniform(0, 0.9, (5, L, H)).round(3)
    prefix[-1, 0, 1] = 0.95                         # so L0H1 is the best head
    accuracy = Curve(TOKENS_SEEN, np.linspace(0, 1 / seed, 5))
    return example(title=name, subtitle=f"of seed {seed}", snapshots=snapshots, causal={}, notes=[],
                   scores={"prefix_matching": Curve(TOKENS_SEEN, prefix)},
                   curves={"aperiodic/accuracy": accuracy})._replace(**changes)


def three_runs(control_answers: str = "no") -> list[View]:
    """Two seeds of one condition and a control, whose behaviour has this answer."""
    no = {"formed": "no", "behaviour": control_answers, "mechanism": "no",
          "transfer_periods": "not shown", "transfer_tokens": "not shown"}
    seed = evidence(run="toy-s1", seed=1, summary="Taken from the second seed.",
                    answers=evidence()["answers"] | {"formed": "yes", "behaviour": "yes"})
    control = evidence(run="one_layer-s0", condition="one_layer", control=True, answers=no,
                       transition=None, mechanism={"heads": [], "paths": []}, summary="No.")
    return [example(title="toy-s0", evidence=evidence()),
            other_run(1, "toy-s1", evidence=seed), other_run(2, "one_layer-s0", evidence=control)]
