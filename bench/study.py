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

from bench.study_runs import ROOT, STUDIES, train_missing
from bench.study_tables import Results, outcome, tables
from files import atomic_write
from induction.history import best_head_history, curve
from induction.metrics import LOSS_SECOND
from induction.phase import INDUCTION_HEAD, band
from report.figures import GREY, Figure, figure

PAGES = ROOT / "docs" / "studies"
BEGIN, END = "<!-- results -->", "<!-- end of results -->"


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
