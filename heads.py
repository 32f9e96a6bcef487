"""What the attention heads of a run do: `python heads.py runs/quickstart`, or `python heads.py verdict runs/A runs/B …`."""

import json
import sys
from pathlib import Path

from errors import ArgumentParser, UserError, run_command
from files import atomic_write, explain_disk_errors, must_be_writable

BATCH = 16              # rows in one pass


def main() -> None:
    if sys.argv[1:2] == ["verdict"]:
        return verdict(sys.argv[2:])
    args = parse_arguments()
    from report.figures import plots
    from report.movie import movie_of, write_movie
    from training.device import choose_device
    from training.loaded_run import load_run
    run = load_run(args.run, args.step, choose_device(args.device, "--device "))
    records = run.records()
    if args.movie:
        movie_of(run.folder, run.config, records)                   # refuses before the work, not after it
    rows = given_rows(args, run)
    with explain_disk_errors(f"writing into {run.folder}", "make room, or copy the run to where you may write"):
        if rows is not None:
            page = look_at_rows(args, run, records, *rows)
        else:
            page, measured, seen = look_at_probe(args, run, records)
            figures = run.folder / ("figures" if args.step is None else f"figures-step-{args.step}")
            print(f"plots    {', '.join(str(path) for path in plots(figures, run.config, seen, measured))}")
        print(f"look     {page} in a browser")
        if args.movie:
            print(f"movie    {write_movie(run.folder, run.config, records)}")


def looks_back(run, probes) -> list[dict]:
    """What the trainer would have logged at every checkpoint that is kept."""
    from induction.scores import measure
    from induction.watch import as_metrics
    from training.loaded_run import load_run
    then = [load_run(checkpoint, device=run.model.embed.weight.device) for checkpoint in run.checkpoints()]
    return [{key: one.state[key] for key in ("step", "tokens")}
            | as_metrics(one.model, measure(one.model, probes.held_out, probes.unrepeated)) for one in then]


def look_at_probe(args, run, records):
    """Scores on repeated random tokens, and what they are worth: printed, and in report.html. Returns its path, what was measured, and
    the records with what was looked back at."""
    from induction.ablation import alone
    from induction.history import best_of_looks, head_transitions, icl_transition, model_transition
    from induction.phase import FORMED
    from induction.scores import copying_eigenvalues, measure
    from induction.verdict import aim, causal_set, induction_set
    from model.taps import heads_of
    from report.page import write_report
    probes, model = probes_for(run), run.model
    if args.all_steps and not best_of_looks(records):               # it was not watched: look back at what it has kept
        records = sorted([*records, *looks_back(run, probes)], key=lambda record: record["tokens"])
    measured = measure(model, probes.held_out, probes.unrepeated)
    cost = alone(model, probes.held_out.batch, probes.held_out.second_copy, progress)
    scores = measured.scores | {"copying_eigenvalues": copying_eigenvalues(model)}
    print(f"{args.run} at step {run.step}, on {probes.note}\n")
    print_table(heads_of(model.config), scores, cost, "the second copy of random tokens", head_transitions(records, model.config))

    print(f"\nrandom tokens cost {measured.loss_first:.2f} nats, repeated {measured.loss_second:.2f}")
    if found := induction_set(model, measured):
        lost = causal_set(model, found, probes, progress=progress)
        others = "" if lost.beside is None else f"; other heads of those layers: {lost.beside:.0%}"
        print(f"with {', '.join(map(str, found))} (prefix matching ≥ {FORMED}) at their means the second copy costs "
              f"{lost.lost.second_copy:+.2f} nats, {lost.lost.gain_removed:.0%} of what repeating is worth{others}")
        if aimed := aim(model, measured, found, probes):
            print(f"with {', '.join(map(str, aimed.heads))} (previous token) at their means {aimed.full:+.2f}; with every pattern kept "
                  f"{aimed.kept:+.2f};\nout of the induction heads' keys alone {aimed.by['k']:+.2f}, queries {aimed.by['q']:+.2f}, "
                  f"values {aimed.by['v']:+.2f}")
        print_composition(model, found[0])
    for what, moved in (("prefix matching rose to", model_transition(records)), ("the ICL score fell by", icl_transition(records))):
        if moved:
            print(f"{what} {moved.final:.2f} between {moved.onset / 1e6:.2f} and {moved.end / 1e6:.2f} M tokens "
                  f"(steps {step_at(records, moved.onset):,} to {step_at(records, moved.end):,})")
    if args.json:
        write_json(args.json, scores, cost)
    print()
    causal = {str(head): nats for head, nats in cost.items()}
    name = "report-all-steps.html" if args.all_steps else "report.html" if args.step is None else f"report-step-{args.step}.html"
    return write_report(run.folder, run.config, records, causal, name=name, **pictures(args, run)), measured, records


def look_at_rows(args, run, records, tokens, queries):
    """Scores on given text or tokens: printed, and in report-text.html, whose path is returned."""
    from data.batches import Batch
    from induction.ablation import alone
    from model.taps import heads_of
    from report.page import write_report
    some = slice(0, BATCH)                                      # enough for a cost; the scores are of all rows
    device = run.model.embed.weight.device
    batch, counted = Batch(tokens[some, :-1], tokens[some, 1:]).to(device), queries[some, 1:].to(device)
    scores, cost = score_rows(run.model, tokens, queries), alone(run.model, batch, counted, progress)
    what = "the given " + ("text" if args.tokens is None else "tokens")
    print(f"{args.run} at step {run.step}, on {what}\n")
    print_table(heads_of(run.model.config), scores, cost, what, {})
    if args.json:
        write_json(args.json, scores, cost)
    print()
    return write_report(run.folder, run.config, records, name="report-text.html",
                        **pictures(args, run, tokens[0][:queries[0].sum() + 1], what))


def probes_for(run):
    """The probes of a run, on its model's device: more rows than while training."""
    from induction.probes import probes_of
    n_ctx = run.config.model.n_ctx
    probes = probes_of(run.config.data, n_ctx, run.tokenizer, run.config.seed, most=64)
    if probes is None:
        raise UserError(f"{run.folder}: model.n_ctx={n_ctx} is too short to show anything twice (7 tokens at least)")
    return probes.to(run.model.embed.weight.device)


def progress(ablated):
    """A bar while heads, or sets of them, are ablated one after another, where that takes a while."""
    from tqdm import tqdm
    return tqdm(ablated, "ablating", delay=2, leave=False)


def step_at(records: list[dict], tokens: float) -> int:
    """The step by which a run had seen so many tokens."""
    return next((record["step"] for record in records if record["tokens"] >= tokens), records[-1]["step"])


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
        given = next(f"--{option} {value[:40]}" for option in ("text", "file", "tokens") if (value := getattr(args, option)) is not None)
        raise UserError(f"{given}: one token at most, and attention needs two\n  give more")
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
        text = Path(path).read_text("utf-8", "surrogateescape")
    except OSError as error:
        raise UserError(f"{option}{path}: cannot be read ({error.strerror})") from None
    if "\0" in text:
        raise UserError(f"{option}{path}: is no text (it holds zero bytes)")
    return text


def score_rows(model, tokens, queries) -> dict:
    """Scores averaged over all rows and all queries with an earlier key, some rows at a time."""
    from induction.scores import attention_scores
    device = model.embed.weight.device
    total: dict = {}
    for n in range(0, len(tokens), BATCH):
        some, asked = tokens[n:n + BATCH], queries[n:n + BATCH]
        for name, values in attention_scores(model, some.to(device), asked.to(device)).scores.items():
            total[name] = total.get(name, 0) + values * (asked.sum() / queries.sum()).double()
    return total


def print_table(heads, scores: dict, cost: dict, on: str, formed: dict) -> None:
    names = {"prefix_matching": "prefix", "latest_match": "latest", "previous_token": "previous", "duplicate_token": "duplicate",
             "first_token": "first", "copying_eigenvalues": "eigen"}
    columns = {names.get(name, name): values for name, values in scores.items()}
    wide = max(10, 2 + max(map(len, columns)))
    print("head   " + "".join(f"{name:>{wide}}" for name in columns) + "     alone" + "    formed" * bool(formed))
    for head in heads:
        print(f"{head!s:7}" + "".join(f"{values[head].item():{wide}.3f}" for values in columns.values()) + f"{cost[head]:+10.3f}"
              + (f"{formed[head].onset / 1e6:8.2f} M" if head in formed else ""))
    print("\nprefix … first: attention on tokens after an earlier copy of this one (all, the latest), on the token before, on earlier\n"
          "copies, on the first. entropy: 0 one key, 1 all alike. distance in tokens."
          + (" copying, eigen: whether what a head\nwrites raises what it reads, 1 to −1." if "copying" in scores else "")
          + f" alone: nats that {on}\ncosts more with that head alone at its mean; heads that do the same are hardly missed one by one."
          + (" formed: tokens at\nthe onset of its rise." if formed else ""))


def print_composition(model, head) -> None:
    """From the weights: which earlier head this one's keys read most."""
    from induction.scores import composition, qk_trace
    from model.taps import Head
    found = [(composition(model, layer, head.layer), qk_trace(model, layer, head.layer)) for layer in range(head.layer)]
    if not found:
        return
    by_keys = {Head(layer, index): one.k[head.index, index].item() for layer, (one, _) in enumerate(found) for index in range(len(one.k))}
    best = max(by_keys, key=lambda one: by_keys[one])
    print(f"by its weights {head}'s keys read most what {best} writes (K-composition {by_keys[best]:+.2f} above chance), and look for the\n"
          f"same token {found[best.layer][1][head.index, best.index]:.1f} deviations more than for others (at distance 0)")


def write_json(path: str, scores: dict, cost: dict) -> None:
    found = {str(head): {name: values[head].item() for name, values in scores.items()} | {"alone": nats} for head, nats in cost.items()}
    with explain_disk_errors(f"--json {path}", "name a file in a folder that is there"), atomic_write(Path(path), "w") as file:
        json.dump(found, file, indent=1)


def pictures(args, run, ids=None, what: str = "") -> dict:
    """What the page shows: the run's own snapshots; or given tokens, or the probe, at this checkpoint or at all that are kept."""
    from report.snapshots import Snapshots, patterns, shown, spelled
    from report.viewer import Passage, Snapshot
    from training.checkpoint import read_state
    from training.loaded_run import load_run
    if ids is None and not args.all_steps and args.step is None and len(Snapshots(run.folder / "heads")):
        return {}
    if ids is None:
        ids, what = probes_for(run).held_out.example(run.config.model.n_ctx)
    fits, device = shown(run.config.model, len(ids)), run.model.embed.weight.device
    title = what if fits == len(ids) else f"{what}, its first {fits} tokens"
    separator = run.tokenizer.begin if run.config.data.mask_documents else None

    def snapshots():
        for checkpoint in run.checkpoints() if args.all_steps else [run.checkpoint]:
            model = run.model if checkpoint == run.checkpoint else load_run(checkpoint, device=device).model
            state = read_state(checkpoint)
            yield Snapshot(state["step"], state["tokens"], patterns(model, [ids[:fits].to(device)], separator))

    return {"passages": [Passage(title, spelled(ids[:fits], run.tokenizer))], "snapshots": snapshots()}


def verdict(arguments: list[str]) -> None:
    """The page that says whether induction heads formed in some runs, and why one should believe it."""
    parser = ArgumentParser("python heads.py verdict", description="Did induction heads form in these runs? Evidence for and against.")
    parser.add_argument("runs", nargs="+", help="runs/NAME …: several seeds, and controls")
    parser.add_argument("--out", metavar="FILE", help="write the page (Markdown) there too")
    parser.add_argument("--device", default="auto", help="cuda, cpu, mps (default: the first there is)")
    args = parser.parse_args(arguments)
    must_be_writable(args.out, "--out")
    from tqdm import tqdm

    from induction.verdict import page
    found = page([examine_run(where, args.device) for where in tqdm(args.runs, "examining", unit=" runs", delay=2, leave=False)])
    print(found)
    if args.out:
        with explain_disk_errors(f"--out {args.out}", "name a file in a folder that is there"), atomic_write(Path(args.out), "w") as file:
            file.write(found)


def examine_run(where: str, device: str = "auto"):
    """The verdict on the run at `where`."""
    from induction.history import kind_of_run, model_transition
    from induction.verdict import examine
    from training.device import choose_device
    from training.loaded_run import load_run
    run = load_run(where, device=choose_device(device, "--device "))
    config, shape = run.config.data, run.config.model
    fixed = "repeats" in config.corpora and config.repeats.period[0] == config.repeats.period[1]
    steps = run.config.train.steps
    finished = run.step >= steps
    name = run.folder.name + ("" if finished else f" (at step {run.step:,} of {steps:,})")
    control = shape.n_layers == 1 and not shape.smear and not fixed and finished        # before its end it shows nothing yet
    return examine(name, kind_of_run(run.config), control, run.model, probes_for(run), model_transition(run.records()), run.validation(64))


def parse_arguments():
    parser = ArgumentParser("python heads.py", description="Score every attention head of a run, ablate each, and write "
                            "runs/NAME/report.html to look at their patterns.",
                            epilog="python heads.py verdict runs/A runs/B …   did induction heads form?")
    parser.add_argument("run", help="runs/NAME, or a checkpoint in it: runs/NAME/checkpoints/000500")
    parser.add_argument("--step", type=int, metavar="N", help="the checkpoint of that step (default: the newest), in report-step-N.html")
    parser.add_argument("--all-steps", action="store_true", help="patterns at every checkpoint, in report-all-steps.html")
    parser.add_argument("--text", metavar="T", help="look at this text instead of repeated random tokens (in report-text.html)")
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
    must_be_writable(args.json, "--json")
    return args


if __name__ == "__main__":
    run_command(main)
