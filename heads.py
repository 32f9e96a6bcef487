"""What the attention heads of a run do: `python heads.py runs/quickstart`, or `python heads.py verdict runs/A runs/B …`."""

import json
import sys
from pathlib import Path

from errors import ArgumentParser, UserError, run_command

BATCH = 16              # rows in one pass


def main() -> None:
    if sys.argv[1:2] == ["verdict"]:
        return verdict(sys.argv[2:])
    args = parse_arguments()
    from induction.ablation import effect
    from induction.phase import FORMED
    from induction.report import head_transitions, icl_transition, model_transition, plots, write_movie, write_report
    from induction.scores import copying_eigenvalues, measure
    from induction.verdict import aim, causal_set, induction_set
    from model.taps import heads_of
    from training.device import choose_device
    from training.logger import read_metrics
    from training.run import load_run

    run = load_run(args.run, args.step, choose_device(args.device, "--device "))
    heads, records = heads_of(run.model.config), read_metrics(run.folder / "metrics.jsonl")
    probes = probes_for(run)
    rows = given_rows(args, run)
    if rows is not None:
        scores, shown = score_rows(run.model, *rows), "the given " + ("text" if args.tokens is None else "tokens")
    else:
        measured = measure(run.model, probes.held_out, probes.unrepeated)
        scores, shown = measured.scores | {"copying_eigenvalues": copying_eigenvalues(run.model)}, probes.note
    alone = {str(head): effect(run.model, [head], probes.held_out, kind="mean").second_copy for head in heads}
    print(f"{args.run} at step {run.step}, on {shown}\n")
    formed = head_transitions(records, run.model.config)
    print_table(heads, scores, alone, formed)

    if rows is None:
        print(f"\nrandom tokens cost {measured.loss_first:.2f} nats, repeated {measured.loss_second:.2f}")
        if found := induction_set(run.model, measured):
            lost = causal_set(run.model, found, probes)
            others = f"; other heads of those layers: {sum(lost.others) / len(lost.others):.0%}" if lost.others else ""
            print(f"with {', '.join(map(str, found))} (prefix matching ≥ {FORMED}) at their means the second copy costs "
                  f"{lost.lost.second_copy:+.2f} nats, {lost.lost.gain_removed:.0%} of what repeating is worth{others}")
            if aimed := aim(run.model, measured, found, probes):
                print(f"with {', '.join(map(str, aimed.heads))} (previous token) at their means {aimed.full.second_copy:+.2f}; with every "
                      f"pattern kept as it was, {aimed.kept.second_copy:+.2f}")
        for what, moved in (("prefix matching rose", model_transition(records)), ("the ICL score fell", icl_transition(records))):
            if moved:
                steps = [round(moment / run.config.train.batch_tokens) for moment in (moved.onset, moved.end)]
                print(f"{what} by {moved.final:.2f} between steps {steps[0]:,} and {steps[1]:,} ({moved.onset / 1e6:.2f} to "
                      f"{moved.end / 1e6:.2f} M tokens)")
    if args.json:
        write_json(args.json, heads, scores, alone)
    page = write_report(run.folder, run.config, records, alone, **looked_at(args, run, rows))
    print(f"\nlook     {page} in a browser")
    if records and rows is None:
        print(f"plots    {', '.join(str(path) for path in plots(run.folder, run.config, records, measured))}")
    if args.movie:
        print(f"movie    {write_movie(run.folder, run.config, records)}")


def probes_for(run):
    """The probes of a run, on its model's device."""
    from induction.probes import probes_of
    probes = probes_of(run.config.data, run.config.model.n_ctx, run.tokenizer, run.config.seed, rows=64)
    if probes is None:
        raise UserError(f"{run.folder}: model.n_ctx={run.config.model.n_ctx} is too short to show anything twice (7 tokens at least)")
    return probes.to(run.model.embed.weight.device)


def given_rows(args, run):
    """(tokens (B, T) padded on the right, queries (B, T)) of --text, --file or --tokens; None without them."""
    import torch
    n_ctx, V = run.model.config.n_ctx, run.model.config.vocab_size
    if args.tokens is not None:
        lines = read(args.tokens, "--tokens ").splitlines()
        rows = [ids_of(line, f"--tokens {args.tokens}, line {n}", V, n_ctx) for n, line in enumerate(lines, 1) if line.strip()]
    elif args.text is not None or args.file is not None:
        ids = run.tokenizer.encode(args.text if args.text is not None else read(args.file, "--file ")).tolist()
        rows = [ids[n:n + n_ctx] for n in range(0, len(ids), n_ctx)]
    else:
        return None
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        raise UserError("there is no sequence of two tokens or more to look at")
    T = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (T - len(row)) for row in rows])                 # nobody sees what lies ahead
    queries = torch.tensor([[0 < t < len(row) for t in range(T)] for row in rows])
    return tokens, queries


def ids_of(line: str, where: str, n_vocab: int, n_ctx: int) -> list[int]:
    try:
        ids = [int(word) for word in line.replace(",", " ").strip(" []\t\r").split()]
    except ValueError:
        raise UserError(f"{where}: {line.strip()[:40]!r} is not a list of token ids") from None
    if wrong := [token for token in ids if not 0 <= token < n_vocab]:
        raise UserError(f"{where}: there is no token {wrong[0]} (the vocabulary has {n_vocab})")
    if len(ids) > n_ctx:
        raise UserError(f"{where}: {len(ids)} tokens are more than the model's context of {n_ctx}")
    return ids


def read(path: str, option: str) -> str:
    try:
        return Path(path).read_text("utf-8", "surrogateescape")
    except OSError as error:
        raise UserError(f"{option}{path}: cannot be read ({error.strerror})") from None


def score_rows(model, tokens, queries) -> dict:
    """Scores averaged over all rows and all queries with an earlier key, some rows at a time."""
    from induction.scores import attention_scores
    device, total = model.embed.weight.device, {}
    for n in range(0, len(tokens), BATCH):
        some, asked = tokens[n:n + BATCH], queries[n:n + BATCH]
        for name, values in attention_scores(model, some.to(device), asked.to(device)).scores.items():
            total[name] = total.get(name, 0) + values * (asked.sum() / queries.sum()).double()
    return total


def print_table(heads, scores: dict, alone: dict[str, float], formed: dict) -> None:
    names = {"prefix_matching": "prefix", "latest_match": "latest", "previous_token": "previous", "duplicate_token": "duplicate",
             "first_token": "first", "entropy": "entropy", "distance": "distance", "copying": "copying", "copying_eigenvalues": "eigen"}
    columns = [name for name in names if name in scores]
    print("head   " + "".join(f"{names[name]:>10}" for name in columns) + "     alone" + "    formed" * bool(formed))
    for head in heads:
        print(f"{head!s:7}" + "".join(f"{scores[name][head].item():10.3f}" for name in columns) + f"{alone[str(head)]:+10.2f}"
              + (f"{formed[head].onset / 1e6:8.2f} M" if head in formed else ""))
    print("\nprefix … first: attention on tokens after an earlier copy of this one (all, the latest), on the token before, on earlier\n"
          "copies, on the first. entropy: 0 one key, 1 all alike. distance in tokens. copying, eigen: whether what a head writes\n"
          "raises what it reads, 1 to −1. alone: nats that the second copy of random tokens costs more with that head alone at\n"
          "its mean; heads that do the same are hardly missed one by one." + " formed: tokens at the onset of its rise." * bool(formed))


def write_json(path: str, heads, scores: dict, alone: dict[str, float]) -> None:
    from files import explain_disk_errors, whole_file
    found = {str(head): {name: values[head].item() for name, values in scores.items()} | {"alone": alone[str(head)]} for head in heads}
    with explain_disk_errors(f"--json {path}", "name a file in a folder that is there"), whole_file(Path(path), "w") as file:
        json.dump(found, file, indent=1)


def looked_at(args, run, rows) -> dict:
    """What the page shows: the run's own snapshots; or given text, or the probe, at this checkpoint or at all that are kept."""
    from induction.snapshots import Snapshots, patterns, spelled
    from induction.viewer import Passage, Snapshot
    from training.run import load_run
    if rows is None and not args.all_steps and args.step is None and len(Snapshots(run.folder / "heads")):
        return {}
    if rows is None:
        ids, title = probes_for(run).held_out.example(run.config.model.n_ctx)
    else:
        ids, title = rows[0][0][:rows[1][0].sum() + 1], "the given " + ("text" if args.tokens is None else "tokens")
    tokens_a_step = run.config.train.batch_tokens
    steps = [int(path.name) for path in run.checkpoints()] if args.all_steps else [run.step]
    device = run.model.embed.weight.device

    def snapshots():
        for step in steps:
            model = run.model if step == run.step else load_run(run.folder, step, device).model
            yield Snapshot(step, step * tokens_a_step, patterns(model, [ids.to(device)]))

    return {"passages": [Passage(title, spelled(ids, run.tokenizer))], "snapshots": snapshots()}


def verdict(arguments: list[str]) -> None:
    """The page that says whether induction heads formed in some runs, and why one should believe it."""
    parser = ArgumentParser("python heads.py verdict", description="Did induction heads form in these runs? Evidence for and against.")
    parser.add_argument("runs", nargs="+", help="runs/NAME …: several seeds, and controls")
    parser.add_argument("--out", metavar="FILE", help="write the page (Markdown) there too")
    parser.add_argument("--device", default="auto", help="cuda, cpu, mps (default: the first there is)")
    args = parser.parse_args(arguments)
    from files import explain_disk_errors, whole_file
    from induction.verdict import page
    found = page([examine_run(where, args.device) for where in args.runs])
    print(found)
    if args.out:
        with explain_disk_errors(f"--out {args.out}", "name a file in a folder that is there"), whole_file(Path(args.out), "w") as file:
            file.write(found)


def validation_rows(run):
    """64 rows (N, T + 1) of the text held out of a run's training; None where it saw no text."""
    import torch

    from data.dataset import Dataset
    from training.checkpoint import read_state
    if not run.config.data.text_corpus:
        return None
    folder = read_state(run.folder / "checkpoints" / f"{run.step:06d}")["data"]["folder"]
    windows = Dataset(run.config.data, run.config.seed, folder).validation(64 * run.config.model.n_ctx, run.config.model.n_ctx, 64)[0]
    return torch.cat([windows.tokens, windows.targets[:, -1:]], dim=1).to(run.model.embed.weight.device)


def examine_run(where: str, device: str = "auto"):
    """The verdict on the run at `where`."""
    from induction.report import kind_of_run, model_transition
    from induction.verdict import examine
    from training.device import choose_device
    from training.logger import read_metrics
    from training.run import load_run
    run = load_run(where, device=choose_device(device, "--device "))
    config, shape = run.config.data, run.config.model
    fixed = "repeats" in config.corpora and config.repeats.period[0] == config.repeats.period[1]
    return examine(run.folder.name, kind_of_run(run.config), shape.n_layers == 1 and not shape.smear and not fixed, run.model,
                   probes_for(run), model_transition(read_metrics(run.folder / "metrics.jsonl")), validation_rows(run))


def parse_arguments():
    parser = ArgumentParser("python heads.py", description="Score every attention head of a run, ablate each, and write "
                            "runs/NAME/report.html to look at their patterns.",
                            epilog="python heads.py verdict runs/A runs/B …   did induction heads form?")
    parser.add_argument("run", help="runs/NAME, or a checkpoint in it: runs/NAME/checkpoints/000500")
    parser.add_argument("--step", type=int, metavar="N", help="the checkpoint of that step (default: the newest)")
    parser.add_argument("--all-steps", action="store_true", help="show patterns at every checkpoint, for the page's time slider")
    parser.add_argument("--text", metavar="T", help="look at this text instead of repeated random tokens")
    parser.add_argument("--file", metavar="F", help="look at the text of a file")
    parser.add_argument("--tokens", metavar="F", help="look at sequences of token ids, one a line, taken as they are")
    parser.add_argument("--json", metavar="F", help='write every score there: {"L0H0": {"prefix_matching": …, …}, …}')
    parser.add_argument("--movie", action="store_true", help="write runs/NAME/heads.gif: the strongest head's pattern over training")
    parser.add_argument("--device", default="auto", help="cuda, cpu, mps (default: the first there is)")
    args = parser.parse_args()
    if sum(given is not None for given in (args.text, args.file, args.tokens)) > 1:
        raise UserError("--text, --file and --tokens exclude each other: name one")
    if args.step is not None and args.all_steps:
        raise UserError("--step and --all-steps exclude each other: name one")
    return args


if __name__ == "__main__":
    run_command(main)
