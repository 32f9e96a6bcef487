"""Studies of how induction heads form: several configs, several seeds, one page of results each.

    python -m bench.study toy               # train the missing runs in runs/, then write
                                            # docs/studies/toy.md
    python -m bench.study toy --seeds 2     # a shorter form, printed and not written

The text of a page is written by hand. The command renews only the tables and the figure between its
two marks.
"""

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from errors import ArgumentParser, UserError, run_command

from files import atomic_write
from induction.examine import judge_run
from induction.history import best_head_history, curve, icl_transition
from induction.metrics import ICL_SCORE, LOSS_SECOND
from induction.phase import INDUCTION_HEAD, Transition, band
from induction.verdict import Verdict
from report.figures import GREY, Figure, figure
from report.text import percent
from training.checkpoint import list_checkpoints
from training.config import differences, load_config
from training.device import choose_device
from training.loaded_run import load_run
from training.logger import Record, read_metrics
from training.resume import listed

ROOT = Path(__file__).parent.parent
CONFIGS, PAGES = ROOT / "configs" / "induction", ROOT / "docs" / "studies"
BEGIN, END = "<!-- results -->", "<!-- end of results -->"


class Condition(NamedTuple):
    """One condition of a study: a name, a config, and what is changed in it."""

    label: str
    config: str
    changes: tuple[str, ...] = ()
    seeds: int | None = None            # fewer than the study's

    def first(self, seeds: int) -> range:
        """Its seeds in a study with this many."""
        return range(min(seeds, self.seeds or seeds))

    def run(self, seed: int) -> Path:
        return Path("runs") / f"{self.label}-s{seed}"

    def overrides(self, seed: int) -> list[str]:
        return [*self.changes, f"run={self.run(seed).name}", f"seed={seed}", "log.wandb=disabled"]


class Study(NamedTuple):
    seeds: int
    conditions: list[Condition]


def as_configured(*names: str) -> list[Condition]:
    """Conditions that are configs of configs/induction without changes."""
    return [Condition(name, name) for name in names]


STUDIES = {
    "toy": Study(5, as_configured("toy_2l", "toy_1l", "toy_1l_smear", "toy_fixed_period")),
    "text": Study(3, [
        *as_configured("text_mixed_2l", "text_mixed_1l", "text_only_2l", "text_smear"),
        Condition("text_unseen_tokens", "text_mixed_2l", (
            "data.repeats.held_out_tokens=0.1", "train.steps=3000",
            "data.mixture=[{corpus: stdlib, weight: 0.5}, {corpus: repeats, weight: 0.5}]"))]),
    "begin_token": Study(5, [
        Condition("text_mixed_2l", "text_mixed_2l"),
        Condition("text_mixed_gated", "text_mixed_2l", ("data.begin_fraction=null",), seeds=3)]),
    "positions": Study(3, [
        Condition(f"position_{name}", "toy_2l", (f"model.position={name}",))
        for name in ("rope", "learned", "sinusoidal", "none")]),
    "gqa": Study(3, [
        Condition(f"gqa_{n}", "toy_2l", ("model.n_heads=8", f"model.n_kv_heads={n}"))
        for n in (8, 4, 2, 1)]),
}


# --- training -------------------------------------------------------------------------------------

def train_missing(conditions: list[Condition], seeds: int, at_once: int) -> None:
    """Train every condition with every seed, `at_once` runs side by side on one thread each.
    Finished runs stay as they are."""
    missing = [(condition, seed) for seed in range(seeds) for condition in conditions
               if seed in condition.first(seeds) and not finished(condition, seed)]
    started = time.monotonic()
    with ThreadPoolExecutor(at_once) as pool:
        for n, run in enumerate(pool.map(train, missing), 1):
            passed = time.monotonic() - started
            left = passed / n * (len(missing) - n)
            print(f"{n}/{len(missing)}  {run.name}  {passed:.0f} s, about {left:.0f} s left",
                  flush=True)


def train(job: tuple[Condition, int]) -> Path:
    """Train one condition with one seed in a process of its own; returns the run."""
    condition, seed = job
    run, config = condition.run(seed), CONFIGS / f"{condition.config}.yaml"
    command = [sys.executable, str(ROOT / "train.py"), str(config), *condition.overrides(seed)]
    done = subprocess.run(command, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        output = done.stderr.strip() or done.stdout.strip()
        raise UserError(f"{run}: {output.splitlines()[-1]}")
    return run


def finished(condition: Condition, seed: int) -> bool:
    """Whether the run exists and reached its last step. A UserError if it has another config."""
    run = condition.run(seed)
    wanted = load_config(CONFIGS / f"{condition.config}.yaml", condition.overrides(seed))
    if not (run / "config.yaml").exists():
        return False
    if changes := differences(load_config(run / "config.yaml"), wanted):
        raise UserError(f"{run} was trained with another config ({listed(changes[:3])})\n"
                        "  move it away and run this again")
    checkpoints = list_checkpoints(run / "checkpoints")
    return bool(checkpoints) and int(checkpoints[-1].name) >= wanted.train.steps


# --- results --------------------------------------------------------------------------------------

class Outcome(NamedTuple):
    """The results of one run."""

    verdict: Verdict
    newest: dict[str, float]    # the newest value of each metric
    icl: Transition | None
    cache: int                  # numbers in the cache per token and layer
    records: list[Record]


def outcome(run: Path) -> Outcome:
    records = read_metrics(run / "metrics.jsonl")
    shape = load_config(run / "config.yaml").model
    newest = {key: value for record in records for key, value in record.items()}
    verdict = judge_run(load_run(run, device=choose_device("auto")))
    return Outcome(verdict, newest, icl_transition(records), 2 * shape.kv_heads * shape.head_size,
                   records)


Cell = Callable[[Outcome], str | None]              # None if a run has no such value


def millions(moment: Callable[[Outcome], float | None]) -> Cell:
    """Of tokens."""
    def cell(o: Outcome) -> str | None:
        tokens = moment(o)
        return None if tokens is None else f"{tokens / 1e6:.2f}"
    return cell


def on_text(metric: str) -> Cell:
    """Only of runs that saw text."""
    return lambda o: f"{o.newest[metric]:.3f}" if ICL_SCORE in o.newest else None


def unseen(o: Outcome) -> str | None:
    finding = o.verdict.transfer.unseen
    return None if finding is None else f"{finding.accuracy:.0%}"


def text_loss(o: Outcome, field: str) -> str | None:
    """Loss on held-out text with the begin token in front of it, or without."""
    loss = o.verdict.transfer.text_loss
    return None if loss is None else f"{getattr(loss, field):.3f}"


def edges_removed(field: str) -> Cell:
    """A field of the knockout of the induction edges, behind the begin token."""
    def cell(o: Outcome) -> str | None:
        knockouts = o.verdict.mechanism.evidence.knockout
        value = None if knockouts is None else getattr(knockouts.begun, field)
        return None if value is None else percent(value)
    return cell


def ablation_removed(o: Outcome) -> str | None:
    effect = o.verdict.mechanism.evidence.ablation
    return None if effect is None or effect.gain_removed is None else f"{effect.gain_removed:.0%}"


def on_text_edges(field: str) -> Cell:
    """A field of the knockout of the induction edges on held-out text."""
    def cell(o: Outcome) -> str | None:
        text = o.verdict.transfer.text
        if text is None or not o.verdict.mechanism.evidence.roles:
            return None
        return f"{getattr(text, field):+.3f}"
    return cell


def previous_token(effect: str, into: str | None = None) -> Cell:
    """A field of the effect of the previous-token heads."""
    def cell(o: Outcome) -> str | None:
        heads = o.verdict.mechanism.evidence.previous_token
        if heads is None:
            return None
        value = getattr(heads, effect)
        return f"{value if into is None else value[into]:+.2f}"
    return cell


# Heading → cell. A column without any value is left out, and so is a row.
FORMED: dict[str, Cell] = {
    "right with begin token": lambda o: f"{o.verdict.behaviour.begun.accuracy:.0%}",
    "without": lambda o: f"{o.verdict.behaviour.bare.accuracy:.0%}",
    "unseen tokens": unseen,
    "prefix matching": lambda o: f"{o.verdict.best:.2f}",
    "peak near target": lambda o: f"{o.verdict.measured.offset_profile.max():.2f}",
    "first copy": lambda o: f"{o.verdict.measured.loss_first:.2f}",
    "second copy": lambda o: f"{o.verdict.measured.loss_second:.3f}",
    "onset, M tokens": millions(lambda o: o.verdict.transition and o.verdict.transition.onset),
    "end": millions(lambda o: o.verdict.transition and o.verdict.transition.end),
    "faded": millions(lambda o: o.verdict.transition and o.verdict.transition.faded),
    "text loss": on_text("val/loss"),
    "text with begin token": lambda o: text_loss(o, "begun"),
    "text without": lambda o: text_loss(o, "bare"),
    "ICL score": on_text(ICL_SCORE),
    "its onset": millions(lambda o: o.icl and o.icl.onset),
    "its end": millions(lambda o: o.icl and o.icl.end),
    "it faded": millions(lambda o: o.icl and o.icl.faded),
}
NEEDED: dict[str, Cell] = {
    "without induction edges": edges_removed("gain_removed"),
    "without random edges": edges_removed("by_random"),
    "heads mean-ablated": ablation_removed,
    "previous-token heads": previous_token("total"),
    "patterns kept": previous_token("patterns_kept"),
    "into keys": previous_token("into", "k"),
    "into queries": previous_token("into", "q"),
    "on text, without induction edges": on_text_edges("matched"),
    "random edges": on_text_edges("by_random"),
}

Results = dict[Condition, list[Outcome]]
Column = dict[Condition, str]


def tables(results: Results) -> str:
    """Markdown: what formed and when, and what it is worth. One row per condition; of several seeds
    the median and the range."""
    caches = {condition: outcomes[0].cache for condition, outcomes in results.items()}
    first = {"induction heads": {condition: answers(outcomes)
                                 for condition, outcomes in results.items()}}
    if len(set(caches.values())) > 1:
        first["cache, numbers a token and layer"] = {condition: str(cache)
                                                     for condition, cache in caches.items()}
    both = (table(first | columns(results, FORMED)), table(columns(results, NEEDED)))
    return "\n\n".join(markdown for markdown in both if markdown)


def answers(outcomes: list[Outcome]) -> str:
    """The verdicts of several seeds: yes 5 of 5; or no 2, yes 1 of 3."""
    counts = Counter(o.verdict.answer for o in outcomes)
    return (", ".join(f"{answer} {count}" for answer, count in counts.most_common())
            + f" of {len(outcomes)}")


def columns(results: Results, cells: dict[str, Cell]) -> dict[str, Column]:
    return {heading: {condition: spread([cell(o) for o in outcomes])
                      for condition, outcomes in results.items()}
            for heading, cell in cells.items()}


def table(all_columns: dict[str, Column]) -> str:
    filled = {heading: column for heading, column in all_columns.items() if any(column.values())}
    if not filled:
        return ""
    lines = ["|  | " + " | ".join(filled) + " |", "|" + "---|" * (1 + len(filled))]
    for condition in next(iter(filled.values())):
        cells = [column[condition] for column in filled.values()]
        if any(cells):
            lines.append(f"| `{condition.label}` | " + " | ".join(cell or "–" for cell in cells)
                         + " |")
    return "\n".join(lines)


def spread(cells: Sequence[str | None]) -> str:
    """The median and the range; the number of values, if some runs have none."""
    values = sorted((cell for cell in cells if cell), key=lambda cell: float(cell.rstrip("%")))
    if not values:
        return ""
    low, middle, high = values[0], values[(len(values) - 1) // 2], values[-1]
    few = "" if len(values) == len(cells) else f", {len(values)} of {len(cells)}"
    return f"{middle}{few}" if low == high else f"{middle} ({low} … {high}{few})"


def draw(results: Results) -> Figure:
    """Prefix matching and second-copy loss over tokens, one colour per condition: the mean over
    seeds and its 95% band."""
    drawn, ((left, right),) = figure(9.0, 3.2, 1, 2)
    for condition, outcomes in results.items():
        histories = [best_head_history(o.records) for o in outcomes]
        best = [([tokens for tokens, _ in history], [score for _, score in history])
                for history in histories]
        losses = [curve(o.records, LOSS_SECOND) for o in outcomes]
        for axes, seeds in ((left, band(best)), (right, band([c for c in losses if c]))):
            line, = axes.plot(seeds.x / 1e6, seeds.mean, lw=1.5, label=condition.label)
            axes.fill_between(seeds.x / 1e6, seeds.low, seeds.high, color=line.get_color(),
                              alpha=0.15, lw=0)
    left.axhline(INDUCTION_HEAD, color=GREY, lw=0.8, ls=":")
    left.set(xlabel="million tokens seen", ylabel="prefix matching, best head", ylim=(-0.02, 1.02))
    right.set(xlabel="million tokens seen", ylabel="second-copy loss, nats per token",
              ylim=(0, min(right.get_ylim()[1], 8)))
    drawn.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=len(results),
                 frameon=False, fontsize=8)
    return drawn


def write_page(name: str, markdown: str, drawn: Figure) -> Path:
    """Renew the results and the figure of docs/studies/NAME.md."""
    PAGES.mkdir(parents=True, exist_ok=True)
    with atomic_write(PAGES / f"{name}.svg") as file:
        drawn.savefig(file, format="svg", metadata={"Date": None})
    return renew_results(name, f"{markdown}\n\n![curves]({name}.svg)")


def renew_results(name: str, markdown: str) -> Path:
    """Renew the results in docs/studies/NAME.md; the text around them stays. Raises UserError if
    the page lacks a mark."""
    page = PAGES / f"{name}.md"
    text = page.read_text("utf-8") if page.exists() else f"# {name}\n\n{BEGIN}\n{END}\n"
    if BEGIN not in text or END not in text:
        raise UserError(f"{page}: one of the marks {BEGIN} and {END} is missing; the results go "
                        "between them")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    with atomic_write(page, "w") as file:
        file.write(f"{before}{BEGIN}\n{markdown}\n{END}{after}")
    return page


def main() -> None:
    parser = ArgumentParser("python -m bench.study", description="Train the runs of a study and "
                            "write its page, docs/studies/NAME.md.")
    parser.add_argument("study", choices=STUDIES, help="the study's name")
    parser.add_argument("--seeds", type=int, help="number of seeds (default: the study's own)")
    parser.add_argument("--at-once", type=int, default=os.cpu_count() or 1,
                        help="runs side by side (default: one per core)")
    args = parser.parse_args()
    study = STUDIES[args.study]
    seeds = args.seeds or study.seeds
    train_missing(study.conditions, seeds, args.at_once)
    results = {condition: [outcome(condition.run(seed)) for seed in condition.first(seeds)]
               for condition in study.conditions}
    markdown = tables(results)
    print(f"\n{markdown}")
    if seeds >= study.seeds:
        print(f"\nwritten  {write_page(args.study, markdown, draw(results))}")


if __name__ == "__main__":
    run_command(main)
