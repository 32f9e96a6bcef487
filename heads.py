"""What the attention heads of a run do: `python heads.py runs/quickstart`, or of several runs:
`python heads.py verdict runs/A runs/B …`, `python heads.py report runs/A runs/B … --out page.html`.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import own_modules  # noqa: F401   first: it says what is in the way of the others
from errors import ArgumentParser, UserError, run_command

import torch
from tqdm import tqdm

from console import stdout_is_the_result
from files import atomic_write, explain_disk_errors, must_be_writable
from induction.ablation import chosen_heads
from induction.examine import (
    Examination,
    apart_if_unlike,
    examine_on_rows,
    examine_run,
    measure_checkpoints,
    probes_for,
)
from induction.history import best_head_history, head_transitions
from induction.token_rows import TokenRows, given_rows
from report.activations import check_size, write_activations
from report.export import as_text, rows_as_json, run_as_json, runs_as_json
from report.figures import write_figures
from report.movie import movie_of, write_movie
from report.page import Examined, Steps, pictures_at, probe_view, scores_on_rows, write_report
from report.snapshots import SnapshotFolder
from report.text import describe_visible, findings, head_table, transitions
from report.tidy import as_csv, history_rows, text_rows, tidy_rows
from report.verdict_page import verdict_page
from report.viewer import write_viewer
from training.checkpoint import find_checkpoint
from training.device import choose_device
from training.loaded_run import LoadedRun, load_run
from training.logger import Record, read_metrics


def main() -> None:
    for command in (verdict, report):
        if sys.argv[1:2] == [command.__name__]:
            return command(sys.argv[2:])
    args = parse_arguments()
    run = load_run(args.run, args.step, choose_device(args.device, "--device "))
    records = run.records()
    movie = movie_of(run.folder, run.config, records) if args.movie else None
    rows = given_rows(run, text=args.text, file=args.file, tokens=args.tokens)
    if args.export:                                     # mistakes are said before the work
        tokens = probes_for(run).scored.tokens if rows is None else rows.tokens
        chosen = chosen_heads(args.heads, run.model.config, "--heads ")
        check_size(Path(args.export), run.model, chosen, tokens)
    with explain_disk_errors(f"writing into {run.folder}",
                             "make room, or copy the run to where you may write"):
        if rows is None:
            show_probe(args, run, records)
        else:
            show_rows(args, run, rows)
        if movie:
            print(f"movie    {write_movie(movie)}")


def show_probe(args: argparse.Namespace, run: LoadedRun, records: list[Record]) -> None:
    """Examine the heads on repeated random tokens: a table, findings, figures, a page."""
    examination = examine_run(run, progress)
    table, probes = examination.table, examination.verdict.probes
    if args.all_steps:
        known = [tokens for tokens, _ in best_head_history(records)]    # measured during training
        records = sorted([*records, *measure_checkpoints(run, probes, known)],
                         key=lambda record: record["tokens"])
    formed = head_transitions(records, run.config.model)
    print(f"{args.run} at step {run.step}, on {probes.note}\n")
    print(head_table(table, "the second copy of random tokens", formed))
    print(f"\n{findings(examination)}")
    if rose := transitions(records):
        print(rose)
    if args.json:
        write_text(args.json, "--json", as_text(run_as_json(examination)))
    if args.csv:
        earlier = history_rows(run.config, records, run.step) if args.all_steps else []
        write_text(args.csv, "--csv", as_csv([*earlier, *tidy_rows(examination)]))
    if args.export:
        tokens = probes.scored.tokens
        export(args, run, tokens, torch.ones_like(tokens, dtype=torch.bool), probes.note)

    paths, page = draw_run(args, run, records, examination)
    print(f"\nplots    {', '.join(map(str, paths))}\nlook     {page} in a browser")


def draw_run(args: argparse.Namespace, run: LoadedRun, records: list[Record],
             examination: Examination) -> tuple[list[Path], Path]:
    """Write figures and the page of a run: their paths."""
    steps: Steps = "kept"
    name, figures, shown = "report.html", "figures", records
    if args.all_steps:
        steps, name = "all", "report-all-steps.html"
    elif args.step is not None or run.checkpoint != run.checkpoints()[-1]:
        steps, name, figures = "this", f"report-step-{run.step}.html", f"figures-step-{run.step}"
    elif len(SnapshotFolder(run.folder / "heads")):     # which may be later than the checkpoint
        shown = read_metrics(run.folder / "metrics.jsonl")
    page = run.folder / name
    write_viewer(page, [probe_view(run, examination, shown, steps)])
    measured = examination.verdict.measured
    return write_figures(run.folder / figures, run.config, records, measured), page


def show_rows(args: argparse.Namespace, run: LoadedRun, rows: TokenRows) -> None:
    """Examine the heads on the user's text or tokens: a table, a page."""
    title = "the given text" if args.tokens is None else "the given tokens"
    text = examine_on_rows(run.model, rows, progress)
    print(f"{args.run} at step {run.step}, on {title}\n")
    print(head_table(text.table, title, {}))
    print(f"\n{describe_visible(text)}")
    if args.json:
        scores = rows_as_json(run.config, run.step, title, len(rows.tokens), text)
        write_text(args.json, "--json", as_text(scores))
    if args.csv:
        write_text(args.csv, "--csv", as_csv(text_rows(run.config, run.step, text)))
    if args.export:
        export(args, run, rows.tokens, rows.real, title)
    n_rows, steps = len(rows.tokens), checkpoints(args, run)
    first, scored = title, title
    if n_rows > 1:
        first, scored = f"{title}, row 1 of {n_rows}", f"all {n_rows} rows of {title}"
    examined = Examined(scored, f"loss on {title}", run.step, text.table.ablated,
                        scores_on_rows(run, text.table, rows, steps))
    page = write_report(run.folder, run.config, [], examined, name="report-text.html",
                        pictures=pictures_at(run, steps, rows.first, first))
    print(f"\nlook     {page} in a browser")


def export(args: argparse.Namespace, run: LoadedRun, tokens: torch.Tensor, real: torch.Tensor,
           rows: str) -> None:
    """Write what the heads compute on these rows."""
    about = {"run": run.config.run, "step": str(run.step), "rows": rows,
             "scale": str(run.config.model.head_size ** -0.5)}
    with explain_disk_errors(f"--export {args.export}", "name a file where there is room"):
        write_activations(Path(args.export), run.model, tokens, real,
                          chosen_heads(args.heads, run.model.config, "--heads "), about)
    print(f"export   {args.export}")


# --- several runs ---------------------------------------------------------------------------------

def verdict(arguments: list[str]) -> None:
    """Did induction heads form in some runs? A page with the evidence."""
    parser = ArgumentParser("python heads.py verdict", description="Did induction heads form in "
                            "these runs? Evidence for and against.")
    parser.add_argument("runs", nargs="+", help="runs/NAME …: several seeds, and controls")
    parser.add_argument("--out", metavar="FILE", help="also write the page (Markdown) to FILE")
    parser.add_argument("--json", metavar="FILE", help="also write all numbers to FILE "
                        "(docs/exports.md)")
    parser.add_argument("--csv", metavar="FILE", help="also write them as tidy rows")
    add_device(parser)
    args = parser.parse_intermixed_args(arguments)
    different_files(args, ("out", "json", "csv"))
    if not args.out:
        stdout_is_the_result()
    examinations = apart_if_unlike([examine_run(run) for run in opened(args)])
    page = verdict_page([examination.verdict for examination in examinations])
    print(page)
    if args.out:
        write_text(args.out, "--out", page)
    if args.json:
        write_text(args.json, "--json", as_text(runs_as_json(examinations)))
    if args.csv:
        write_text(args.csv, "--csv", as_csv(row for examination in examinations
                                             for row in tidy_rows(examination)))


def report(arguments: list[str]) -> None:
    """Several runs in one page to look at."""
    parser = ArgumentParser("python heads.py report", description="One page with several runs: "
                            "seeds, and controls beside them.")
    parser.add_argument("runs", nargs="+", help="runs/NAME …")
    parser.add_argument("--out", metavar="FILE", required=True, help="the page, in HTML")
    add_device(parser)
    args = parser.parse_intermixed_args(arguments)
    must_be_writable(args.out, "--out")
    views = [probe_view(run, examine_run(run), run.records(), runs_in_page=len(args.runs))
             for run in opened(args)]
    with explain_disk_errors(f"--out {args.out}", "name a file in an existing folder"):
        write_viewer(Path(args.out), views)
    print(f"look     {args.out} in a browser")


def opened(args: argparse.Namespace) -> Iterator[LoadedRun]:
    """Each of the runs in turn: only one model is held at a time. Raises UserError, before the
    first, for a run that is not there or is named twice."""
    device = choose_device(args.device, "--device ")
    found = [find_checkpoint(where) for where in args.runs]
    for where, checkpoint in zip(args.runs, found):
        if found.count(checkpoint) > 1:
            raise UserError(f"{where} is named twice: a run is no seed beside itself\n"
                            "  name each run once")
    for checkpoint in tqdm(found, "examining", unit=" runs", delay=2, leave=False):
        yield load_run(checkpoint, device=device)


# --- pieces ---------------------------------------------------------------------------------------

def checkpoints(args: argparse.Namespace, run: LoadedRun) -> list[Path]:
    """Those whose patterns are shown."""
    return run.checkpoints() if args.all_steps else [run.checkpoint]


def progress(ablated: Iterable) -> Iterable:
    """A bar over what is ablated one by one, if it takes more than two seconds."""
    return tqdm(ablated, "ablating", delay=2, leave=False)


def write_text(path: str, option: str, text: str) -> None:
    with (explain_disk_errors(f"{option} {path}", "name a file in an existing folder"),
          atomic_write(Path(path), "w") as file):
        file.write(text)


# --- arguments ------------------------------------------------------------------------------------

def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(
        "python heads.py", description="Score every attention head of a run, ablate each, and "
        "write runs/NAME/report.html to look at their patterns.",
        epilog="Of several runs: `python heads.py verdict runs/A runs/B …` says whether induction "
        "heads formed, `python heads.py report runs/A runs/B … --out page.html` shows them in one "
        "page.")
    add = parser.add_argument
    add("run", help="runs/NAME, or a checkpoint in it: runs/NAME/checkpoints/000500")
    add("--step", type=int, metavar="N", help="the checkpoint of step N (default: the newest), in "
        "report-step-N.html")
    add("--all-steps", action="store_true", help="patterns at every checkpoint, in "
        "report-all-steps.html")
    add("--text", metavar="T", help="examine this text instead of repeated random tokens (in "
        "report-text.html)")
    add("--file", metavar="F", help="examine the text of a file")
    add("--tokens", metavar="F", help="examine token ids as they are, one sequence per line")
    add("--json", metavar="F", help="write everything that is measured to F (docs/exports.md)")
    add("--csv", metavar="F", help="write every score of every head as tidy rows; with --all-steps "
        "also those measured during training")
    add("--export", metavar="F", help="write q, k, v, z, lse and patterns to F, in safetensors")
    add("--heads", metavar="HEADS", help="the heads to export, as L0H1,L1: a layer is all of "
        "its heads (default: all)")
    add("--movie", action="store_true", help="write runs/NAME/heads.gif: the strongest head's "
        "pattern over training")
    add_device(parser)
    args = parser.parse_args()
    if sum(given is not None for given in (args.text, args.file, args.tokens)) > 1:
        raise UserError("--text, --file and --tokens exclude each other: name one")
    if args.step is not None and args.all_steps:
        raise UserError("--step and --all-steps exclude each other: name one")
    if args.heads and not args.export:
        raise UserError("--heads chooses what --export writes: name a file with --export")
    different_files(args, ("json", "csv", "export"))
    return args


def different_files(args: argparse.Namespace, options: Iterable[str]) -> None:
    """Raise UserError if one of these files cannot be written, or if two are the same."""
    seen: dict[Path, str] = {}
    for option in options:
        name = getattr(args, option)
        must_be_writable(name, f"--{option}")
        if name is not None:
            other = seen.setdefault(Path(name).absolute(), option)
            if other != option:
                raise UserError(f"--{other} and --{option} name the same file {name}\n"
                                "  give each a file of its own")


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto",
                        help="cuda, cpu or mps (default: the first that is available)")


if __name__ == "__main__":
    run_command(main)
