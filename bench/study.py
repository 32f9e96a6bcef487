"""Studies of how induction heads form: several configs, several seeds, one page of results each.

    python -m bench.study toy                   # train what is missing in runs/, two at a time, then write docs/studies/toy.md
    python -m bench.study toy --seeds 2         # a shorter form, its table printed and not written

The page's words are its authors'; the command renews the table and the figure between its two marks.
"""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from errors import ArgumentParser, UserError, run_command
from files import atomic_write
from heads import examine_run
from induction.history import best_of_looks, curve, icl_transition
from induction.phase import FORMED, Transition, band
from induction.verdict import Verdict
from report.figures import GREY, figure
from training.checkpoint import whole_checkpoints
from training.config import differences, load_config
from training.logger import read_metrics

ROOT = Path(__file__).parent.parent
CONFIGS, PAGES = ROOT / "configs" / "induction", ROOT / "docs" / "studies"
BEGIN, END = "<!-- results -->", "<!-- end of results -->"


class Arm(NamedTuple):
    """One condition of a study: what to call it, a config, what is changed of it."""

    label: str
    config: str
    changes: tuple[str, ...] = ()

    def run(self, seed: int) -> Path:
        return Path("runs") / f"{self.label}-s{seed}"

    def overrides(self, seed: int) -> list[str]:
        return [*self.changes, f"run={self.run(seed).name}", f"seed={seed}", "log.wandb=disabled"]


STUDIES: dict[str, tuple[int, list[Arm]]] = {           # name → seeds, arms
    "toy": (5, [Arm(name, name) for name in ("toy_2l", "toy_1l", "toy_1l_smear", "toy_fixed_period")]),
    "text": (3, [*(Arm(name, name) for name in ("text_mixed_2l", "text_mixed_1l", "text_only_2l", "text_smear")),
                 Arm("text_unseen_tokens", "text_mixed_2l", (
                     "data.repeats.held_out_tokens=0.1", "train.steps=3000",
                     "data.mixture=[{corpus: stdlib, weight: 0.5}, {corpus: repeats, weight: 0.5}]"))]),
    "positions": (3, [Arm(f"position_{name}", "toy_2l", (f"model.position={name}",))
                      for name in ("rope", "learned", "sinusoidal", "none")]),
    "gqa": (3, [Arm(f"gqa_{kv}", "toy_2l", ("model.n_heads=8", f"model.n_kv_heads={kv}")) for kv in (8, 4, 2, 1)]),
}


# --- training -------------------------------------------------------------------------------------------------------------

def train_missing(arms: list[Arm], seeds: int, at_once: int) -> None:
    """Train every arm with every seed, `at_once` side by side on one thread each; what is finished stays as it is."""
    missing = [(arm, seed) for seed in range(seeds) for arm in arms if not finished(arm, seed)]
    started = time.monotonic()

    def train(job: tuple[Arm, int]) -> None:
        arm, seed = job
        done = subprocess.run([sys.executable, str(ROOT / "train.py"), str(CONFIGS / f"{arm.config}.yaml"), *arm.overrides(seed)],
                              capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        if done.returncode:
            raise UserError(f"{arm.run(seed)}: {(done.stderr.strip() or done.stdout.strip()).splitlines()[-1]}")

    with ThreadPoolExecutor(at_once) as pool:
        for n, ((arm, seed), _) in enumerate(zip(missing, pool.map(train, missing)), 1):
            passed = time.monotonic() - started
            left = passed / n * (len(missing) - n)
            print(f"{n}/{len(missing)}  {arm.run(seed).name}  {passed:.0f} s, about {left:.0f} s left", flush=True)


def finished(arm: Arm, seed: int) -> bool:
    """Whether the run is there to its end; a UserError where it was trained as something else."""
    run, wanted = arm.run(seed), load_config(CONFIGS / f"{arm.config}.yaml", arm.overrides(seed))
    if not (run / "config.yaml").exists():
        return False
    if other := differences(load_config(run / "config.yaml"), wanted):
        raise UserError(f"{run} was trained as another config says ({'; '.join(other[:3])})\n  move it away and run this again")
    whole = whole_checkpoints(run / "checkpoints")
    return bool(whole) and int(whole[-1].name) >= wanted.train.steps


# --- results --------------------------------------------------------------------------------------------------------------

class Outcome(NamedTuple):
    """What one run came to: its verdict, its last measurements, and all of them."""

    verdict: Verdict
    last: dict[str, float]
    icl: Transition | None
    cache: int                  # numbers of cache a token and layer
    records: list[dict]


def outcome(run: Path) -> Outcome:
    records, shape = read_metrics(run / "metrics.jsonl"), load_config(run / "config.yaml").model
    last = {key: value for record in records for key, value in record.items()}
    return Outcome(examine_run(str(run)), last, icl_transition(records), 2 * shape.kv_heads * shape.head_size, records)


def million(tokens: float | None) -> str | None:
    return None if tokens is None else f"{tokens / 1e6:.2f}"


# Heading → what of a run stands under it, None where there is no such thing. A column of nothing is left out, and so is a row.
FORMED_WHEN = {
    "prefix matching": lambda o: f"{o.verdict.best:.2f}",
    "peak near target": lambda o: f"{o.verdict.measured.offset_profile.max():.2f}",
    "first copy": lambda o: f"{o.verdict.measured.loss_first:.2f}",
    "second copy": lambda o: f"{o.verdict.measured.loss_second:.3f}",
    "on unseen tokens": lambda o: None if o.verdict.unseen is None else f"{o.verdict.unseen:.2f}",
    "onset, M tokens": lambda o: o.verdict.moved and million(o.verdict.moved.onset),
    "end": lambda o: o.verdict.moved and million(o.verdict.moved.end),
    "text loss": lambda o: f"{o.last['val/loss']:.3f}" if "icl/score" in o.last else None,
    "ICL score": lambda o: f"{o.last['icl/score']:.3f}" if "icl/score" in o.last else None,
    "its onset": lambda o: o.icl and million(o.icl.onset),
    "its end": lambda o: o.icl and million(o.icl.end),
}
NEEDED = {
    "gain removed": lambda o: o.verdict.cause and f"{o.verdict.cause.lost.gain_removed:.0%}",
    "by other heads": lambda o: f"{o.verdict.cause.beside:.0%}" if o.verdict.cause and o.verdict.cause.others else None,
    "previous-token heads": lambda o: o.verdict.aim and f"{o.verdict.aim.full:+.2f}",
    "patterns kept": lambda o: o.verdict.aim and f"{o.verdict.aim.kept:+.2f}",
    "into keys": lambda o: o.verdict.aim and f"{o.verdict.aim.by['k']:+.2f}",
    "into queries": lambda o: o.verdict.aim and f"{o.verdict.aim.by['q']:+.2f}",
}


def tables(arms: list[Arm], results: dict[Arm, list[Outcome]]) -> str:
    """Markdown: what formed and when, and what it is worth. A row an arm; of several seeds the median and the range."""
    yes = {arm: sum(o.verdict.answer == "yes" for o in results[arm]) for arm in arms}
    caches = {arm: results[arm][0].cache for arm in arms}
    extra = {"verdict": {arm: f"{yes[arm]} of {len(results[arm])}" for arm in arms}}
    if len(set(caches.values())) > 1:
        extra["cache, numbers a token and layer"] = {arm: str(cache) for arm, cache in caches.items()}
    return "\n\n".join(found for found in (table(arms, results, FORMED_WHEN, extra), table(arms, results, NEEDED, {})) if found)


def table(arms: list[Arm], results: dict[Arm, list[Outcome]], columns: dict, extra: dict[str, dict[Arm, str]]) -> str:
    cells = {**extra, **{name: {arm: spread([of(o) for o in results[arm]]) for arm in arms} for name, of in columns.items()}}
    cells = {name: column for name, column in cells.items() if any(column.values())}
    rows = [arm for arm in arms if any(column[arm] for column in cells.values())]
    if not rows:
        return ""
    return "\n".join(["|  | " + " | ".join(cells) + " |", "|" + "---|" * (1 + len(cells)),
                      *(f"| `{arm.label}` | " + " | ".join(column[arm] or "–" for column in cells.values()) + " |" for arm in rows)])


def spread(found: Sequence[str | None]) -> str:
    """The median and the range; how many there are, where some runs have none."""
    values = sorted((value for value in found if value), key=lambda value: float(value.rstrip("%")))
    if not values:
        return ""
    low, middle, high = values[0], values[(len(values) - 1) // 2], values[-1]
    few = "" if len(values) == len(found) else f", {len(values)} of {len(found)}"
    return f"{middle}{few}" if low == high else f"{middle} ({low} … {high}{few})"


def drawn(arms: list[Arm], results: dict[Arm, list[Outcome]]):
    """Prefix matching and the loss of the second copy over tokens, an arm a colour, mean and 95% band over seeds."""
    picture, ((left, right),) = figure(9.0, 3.2, 1, 2)
    for arm in arms:
        best = [tuple(zip(*best_of_looks(o.records))) for o in results[arm]]
        second = [curve(o.records, "repeat/loss_second") for o in results[arm]]
        for axes, curves in ((left, best), (right, second)):
            found = band(curves)
            line, = axes.plot(found.x / 1e6, found.mean, lw=1.5, label=arm.label)
            axes.fill_between(found.x / 1e6, found.low, found.high, color=line.get_color(), alpha=0.15, lw=0)
    left.axhline(FORMED, color=GREY, lw=0.8, ls=":")
    left.set(xlabel="million tokens", ylabel="prefix matching, best head", ylim=(-0.02, 1.02))
    right.set(xlabel="million tokens", ylabel="loss in the second copy, nats", ylim=(0, min(right.get_ylim()[1], 8)))
    picture.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=len(arms), frameon=False, fontsize=8)
    return picture


def write_page(name: str, found: str, picture) -> Path:
    """Renew the results of docs/studies/NAME.md; its words stay."""
    page = PAGES / f"{name}.md"
    PAGES.mkdir(parents=True, exist_ok=True)
    with atomic_write(PAGES / f"{name}.svg") as file:
        picture.savefig(file, format="svg", metadata={"Date": None})
    words = page.read_text("utf-8") if page.exists() else f"# {name}\n\n{BEGIN}\n{END}\n"
    if BEGIN not in words or END not in words:
        raise UserError(f"{page}: {BEGIN} and {END} mark where its results go; one is missing")
    before, after = words.split(BEGIN)[0], words.split(END)[1]
    with atomic_write(page, "w") as file:
        file.write(f"{before}{BEGIN}\n{found}\n\n![curves]({name}.svg)\n{END}{after}")
    return page


def main() -> None:
    parser = ArgumentParser("python -m bench.study", description="Train the runs of a study and write its page, docs/studies/NAME.md.")
    parser.add_argument("study", choices=STUDIES, help="which")
    parser.add_argument("--seeds", type=int, help="fewer or more than the study's own number")
    parser.add_argument("--at-once", type=int, default=os.cpu_count() or 1, help="runs side by side (default: a run a core)")
    args = parser.parse_args()
    whole, arms = STUDIES[args.study]
    seeds = args.seeds or whole
    train_missing(arms, seeds, args.at_once)
    results = {arm: [outcome(arm.run(seed)) for seed in range(seeds)] for arm in arms}
    found = tables(arms, results)
    print(f"\n{found}")
    if seeds >= whole:
        print(f"\nwritten  {write_page(args.study, found, drawn(arms, results))}")


if __name__ == "__main__":
    run_command(main)
