"""Studies of how induction heads form: several configs, several seeds, one page of results each.

    python -m bench.study toy               # train the missing runs in runs/, then write
                                            # docs/studies/toy.md
    python -m bench.study toy --seeds 2     # a shorter form, printed and not written

The text of a page is written by hand. The command renews only the tables and the figure between its
two marks.
"""

import os
from pathlib import Path

from errors import ArgumentParser, UserError, run_command

import numpy as np

from bench.study_runs import ROOT, STUDIES, train_missing
from bench.study_tables import Results, outcome, tables
from files import atomic_write
from induction.behaviour import InContextLearning
from induction.history import best_head_history, curve
from induction.intervals import over_seeds
from induction.metrics import LOSS_SECOND
from induction.phase import INDUCTION_HEAD, band
from report.figures import GREY, Axes, Figure, figure

PAGES = ROOT / "docs" / "studies"
BEGIN, END = "<!-- results -->", "<!-- end of results -->"
CAPTION = ("Each line is a seed. The points above the lines are mean onsets, with 95% intervals "
           "over seeds.\nLoss by position, if shown, is the mean over seeds with its 95% band.")


def draw(results: Results) -> Figure:
    """Prefix matching and second-copy loss over tokens: one colour per condition, one line per
    seed, because the mean of curves that jump at different moments is a curve that no seed has.
    Above, the mean onset and its 95% interval over seeds. Of runs on text also the loss by
    position, which is smooth: the mean over seeds and its 95% band."""
    on_text = any(o.verdict.transfer.icl for outcomes in results.values() for o in outcomes)
    drawn, ((left, right, *rest),) = figure(12.5 if on_text else 9.0, 3.2, 1, 2 + on_text)
    for n, (condition, outcomes) in enumerate(results.items()):
        colour = f"C{n}"
        label: str | None = condition.label             # once in the legend
        for o in outcomes:
            tokens, scores = zip(*best_head_history(o.records))
            style = {"color": colour, "lw": 1.0, "alpha": 0.8, "label": label}
            left.plot(np.array(tokens) / 1e6, scores, **style)
            if loss := curve(o.records, LOSS_SECOND):
                right.plot(loss.tokens / 1e6, loss.values, **style)
            label = None
        draw_onset(left, [o.verdict.transition.onset / 1e6 for o in outcomes
                          if o.verdict.transition], 1.05 + 0.05 * n, colour)
        if on_text:
            draw_positions(rest[0], [o.verdict.transfer.icl for o in outcomes
                                     if o.verdict.transfer.icl], colour)
    left.axhline(INDUCTION_HEAD, color=GREY, lw=0.8, ls=":")
    left.set(xlabel="million tokens seen", ylabel="prefix matching, best head",
             ylim=(-0.02, 1.07 + 0.05 * len(results)), yticks=np.linspace(0, 1, 6))
    right.set(xlabel="million tokens seen", ylabel="second-copy loss, nats per token",
              ylim=(0, min(right.get_ylim()[1], 8)))
    if on_text:
        rest[0].set(xlabel="position in held-out text", xscale="log", xticks=(1, 10, 100),
                    xticklabels=("1", "10", "100"),
                    ylabel="loss minus that of the first token, nats")
    drawn.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=len(results),
                 frameon=False, fontsize=8)
    return drawn


def draw_onset(axes: Axes, onsets: list[float], height: float, colour: str) -> None:
    """The mean onset of some seeds, and the interval of that mean."""
    if not onsets:
        return
    mean = over_seeds(onsets)
    axes.plot(float(mean), height, "o", color=colour, ms=3)
    if mean.has_interval:
        axes.plot([mean.low, mean.high], [height, height], color=colour, lw=1.5)


def draw_positions(axes: Axes, seeds: list[InContextLearning], colour: str) -> None:
    """The loss by position on text, minus that of the first token."""
    if not seeds:
        return
    middle = [(part.start + 1 + part.stop) / 2 for part in seeds[0].positions]
    mean = band([(middle, [part.change for part in icl.positions]) for icl in seeds])
    axes.plot(mean.x, mean.mean, color=colour, lw=1.2)
    axes.fill_between(mean.x, mean.low, mean.high, color=colour, alpha=0.15, lw=0)


def write_page(name: str, markdown: str, drawn: Figure) -> Path:
    """Renew the results and the figure of docs/studies/NAME.md."""
    PAGES.mkdir(parents=True, exist_ok=True)
    with atomic_write(PAGES / f"{name}.svg") as file:
        drawn.savefig(file, format="svg", metadata={"Date": None})
    return renew_results(name, f"{markdown}\n\n![curves]({name}.svg)\n\n{CAPTION}")


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
