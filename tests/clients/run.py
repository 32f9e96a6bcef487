"""`make test-clients`: take small trained checkpoints to other programs, and write what equals what
into docs/import.md. README.md beside this file describes the parts."""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from client import read_reference
from filelock import FileLock, Timeout
from reference import write_reference
from shapes import ROOT, SHAPES, STORE, checkpoint_of, store

from training.checkpoint import load_model
from training.import_model import import_model

HERE, PAGE = Path(__file__).resolve().parent, ROOT / "docs" / "import.md"
BEGIN, END = "<!-- written by make test-clients -->", "<!-- end of what it writes -->"
HEADER = ("| client | version | model types | same as ours | limits, and what to do |\n"
          "|---|---|---|---|---|\n")
# The largest differences from our float32. `logprobs` are natural logarithms.
BOUNDS = {"logits": 1e-4, "logprobs": 1e-4, "intervention": 1e-4, "patterns": 1e-5, "z": 1e-5,
          "bits_per_byte": 1e-4, "batch": 1e-4, "imported again": 1e-4,
          "logprobs (GELU in 16 bits)": 1e-2, "logits (GELU approximated)": 1e-2,
          "logits (another epsilon)": 1e-2}


class Client(NamedTuple):
    """A program, its environment, and the script that tests it."""

    title: str                          # in the table
    script: str
    package: str                        # what the first line of its snippets in the docs names
    shapes: Sequence[str] = SHAPES      # none: it opens no checkpoint


CLIENTS = {                             # name of the environment → the program
    "transformers5": Client("transformers 5", "transformers_client.py", "transformers"),
    "transformers4": Client("transformers 4", "transformers_client.py", "transformers"),
    "lm_eval": Client("lm-eval", "lm_eval_client.py", "lm-eval"),
    "nnsight": Client("nnsight", "nnsight_client.py", "nnsight"),
    "transformer_lens": Client("TransformerLens", "transformer_lens_client.py", "transformer-lens"),
    "sae_lens": Client("SAELens", "sae_lens_client.py", "sae-lens"),
    "bertviz": Client("bertviz", "bertviz_client.py", "bertviz"),
    "llama_cpp": Client("llama.cpp", "llama_cpp_client.py", "llama.cpp"),
    "vllm": Client("vLLM", "vllm_client.py", "vllm"),
    "ctranslate2": Client("CTranslate2", "ctranslate2_client.py", "ctranslate2"),
    "mlx_lm": Client("mlx-lm", "mlx_lm_client.py", "mlx-lm"),
    "wandb_oldest": Client("wandb, the oldest allowed", "wandb_training.py", "wandb", shapes=()),
    "wandb_newest": Client("wandb, the newest", "wandb_training.py", "wandb", shapes=()),
}
DOCUMENTED = "llama-attention-only"     # the shape that snippets open as runs/quickstart
Line = Mapping[str, Any]                # what a script prints of a shape


# --- running ----------------------------------------------------------------------------------

def run_script(name: str, *arguments: str | Path, runs: Path | None = None
               ) -> subprocess.CompletedProcess[str]:
    """Run a script with the Python of a client's environment, in an empty folder that holds at most
    a link to `runs`. Its packages see no network and none of our code."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    python = ROOT / ".venv-clients" / name / "bin" / "python"
    if not python.exists():
        sys.exit(f"error: {python} does not exist\n  make it with: make test-clients "
                 f"CLIENTS={name}")
    with tempfile.TemporaryDirectory() as elsewhere:
        environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": elsewhere, "WANDB_MODE": "offline",
                        "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
                        "TOKENIZERS_PARALLELISM": "false", "PROJECT": str(ROOT),
                        "VLLM_CPU_KVCACHE_SPACE": "1"}      # GB; else much of the machine's memory
        if runs:
            (Path(elsewhere) / "runs").symlink_to(runs)
        done = subprocess.run([python, *arguments], cwd=elsewhere, env=environment,
                              capture_output=True, text=True)
    if done.returncode:                         # what is printed is its end
        STORE.mkdir(exist_ok=True)
        (STORE / f"failed-{name}.log").write_text(done.stdout + done.stderr, "utf-8")
    return done


def run_client(name: str, client: Client, pairs: Sequence[tuple[Path, Path]]
               ) -> tuple[list[Line], str]:
    """The lines that a client's script prints for pairs of a checkpoint and a reference, and the
    end of its other output if it failed."""
    done = run_script(name, HERE / client.script, *(path for pair in pairs for path in pair))
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"client"')]
    return lines, (done.stdout + done.stderr)[-6000:] if done.returncode else ""


def snippets(package: str) -> list[str]:
    """The Python blocks of the README and of docs/import.md for a package: their first line names
    it."""
    blocks = [block for page in (ROOT / "README.md", PAGE)
              for block in re.findall(r"^```python\n(.*?)^```$", page.read_text("utf-8"),
                                      re.MULTILINE | re.DOTALL)]
    return [block for block in blocks
            if re.match(rf"# needs {package}\b|from {package} import", block)]


def run_snippets(name: str, client: Client, checkpoint: Path) -> str:
    """Run a client's snippets as they stand; the output of the first that fails."""
    with tempfile.TemporaryDirectory() as folder:
        runs, script = Path(folder), Path(folder) / "snippet.py"
        (runs / "quickstart").symlink_to(checkpoint.parent.parent)
        for block in snippets(client.package):
            script.write_text(block, "utf-8")
            done = run_script(name, script, runs=runs)
            if done.returncode:
                return f"{block}\n{done.stdout}{done.stderr}"[-4000:]
    return ""


def mistakes(client: Client, shapes: Sequence[str], lines: Iterable[Line], output: str
             ) -> list[str]:
    """What is wrong with a client's lines."""
    wrong, missing = [], set(shapes)
    for line in lines:
        shape = line.get("shape") or client.title
        missing.discard(shape)
        if "error" in line:
            wrong.append(f"{shape}: {line['error']}")
        elif not line["checks"] and not line.get("limit"):
            wrong.append(f"{shape}: nothing was checked")
        for check, result in line["checks"].items():
            if result in ("equal", "works") or result is True:
                continue
            if not isinstance(result, float):
                wrong.append(f"{shape}: {check}: {result!r} is not a result")
            elif not result <= BOUNDS.get(check, 0):
                wrong.append(f"{shape}: {check} differs by {result:.2g}, more than "
                             f"{BOUNDS.get(check, 0):.0e}")
    if missing:
        wrong.append(f"no result for {', '.join(sorted(missing))}")
    if output and not wrong:
        wrong.append("the script has failed")
    return wrong


def check_imports(name: str, lines: Iterable[Line], pairs: Mapping[str, tuple[Path, Path]]
                  ) -> None:
    """Import what a client has saved of each shape, and add our logits of it to the shape's
    checks."""
    for line in lines:
        if line.get("shape") not in pairs:
            continue
        reference = read_reference(pairs[line["shape"]][1])
        saved = reference.folder / f"saved by {CLIENTS[name].title}"
        if not saved.exists():
            continue
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / "run"
            import_model(saved, run, [])
            model, tokenizer = load_model(run / "checkpoints" / "latest")
        ids = tokenizer.encode_prompt(reference.prompt)
        logits = model(torch.tensor([ids]))[0].detach().numpy()
        assert ids == reference.ids, f"{saved}: imported, it gives other ids"
        largest = float(np.abs(logits - reference.logits).max())
        line["checks"]["imported again"] = largest or "equal"


# --- the table --------------------------------------------------------------------------------

def table_row(client: Client, lines: Sequence[Line]) -> str:
    """A client's row of the table."""
    opened = [line for line in lines if line["checks"]]
    results: dict[str, list[Any]] = {}
    for line in opened:
        for check, result in line["checks"].items():
            results.setdefault(check, []).append("works" if result is True else result)
    equal = [check for check, values in results.items() if set(values) == {"equal"}]
    within = {check: max(value for value in values if value not in ("equal", "works"))
              for check, values in results.items() if set(values) - {"equal", "works"}}
    works = [check for check in results if check not in equal and check not in within]
    said = [", ".join(equal), ", ".join(f"{check} within {rounded_up(largest)}"
                                        for check, largest in within.items()),
            f"works: {', '.join(works)}" if works else ""]
    limits: dict[str, list[str]] = {}
    for line in lines:
        if line.get("limit"):
            limits.setdefault(line["limit"], []).append(line["model_type"])
    types = unique(f"`{line['model_type']}`" for line in opened if "model_type" in line)
    cells = [client.title, " and ".join(unique(line["version"] for line in lines)),
             ", ".join(types) or "–", "; ".join(filter(None, said)).replace("_", " ") or "–",
             "<br>".join(f"{', '.join(f'`{name}`' for name in unique(names))}: {limit}"
                         for limit, names in limits.items()) or "–"]
    return f"| {' | '.join(cells)} |\n"


def rounded_up(number: float) -> str:
    """A positive number in one digit that is not below it: 7e-06."""
    unit = 10.0 ** math.floor(math.log10(max(number, 1e-12)))
    return f"{math.ceil(round(number / unit, 6)) * unit:.0e}"


def unique(values: Iterable[str]) -> list[str]:
    """The different values, in order."""
    return list(dict.fromkeys(values))


def with_rows(page: str, rows: Mapping[str, str]) -> str:
    """A page with new rows in its table, by client; the rows of other clients stay."""
    before, rest = page.split(BEGIN)
    table, after = rest.split(END)
    kept = {row.split(" | ")[0].removeprefix("| "): row + "\n"
            for row in re.findall(r"^\| .*\|$", table, re.MULTILINE)[1:]}
    new = kept | rows
    order = [client.title for client in CLIENTS.values() if client.title in new]
    return f"{before}{BEGIN}\n{HEADER}{''.join(new[title] for title in order)}{END}{after}"


# --- the command ------------------------------------------------------------------------------

def chosen(names: Sequence[str], known: Iterable[str], what: str) -> list[str]:
    """`names`, or all that are known if there are none. Exits if one is not known."""
    for name in names:
        if name not in known:
            sys.exit(f"error: {what} {name!r} is not known\n  known: {', '.join(known)}")
    return list(names or known)


def main() -> None:
    """The command; one at a time, because a run deletes the shapes of earlier versions."""
    STORE.mkdir(exist_ok=True)
    try:
        with FileLock(STORE / "lock", timeout=0):
            test_clients()
    except Timeout:
        sys.exit(f"error: another make test-clients is at work in {STORE}\n  wait for its end")


def test_clients() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("clients", nargs="*", metavar="CLIENT", help=", ".join(CLIENTS))
    parser.add_argument("--shapes", nargs="*", default=[], metavar="SHAPE",
                        help="only these; the table then stays as it is")
    args = parser.parse_args()
    names = chosen(args.clients, CLIENTS, "client")
    shapes = chosen(args.shapes, SHAPES, "shape")
    torch.set_num_threads(1)
    folder, pairs = store(), {}
    for shape in shapes:
        if not any(shape in CLIENTS[name].shapes for name in names):
            continue
        print(f"shape      {shape}", flush=True)
        checkpoint, target = checkpoint_of(shape, folder), folder / "references" / shape
        write_reference(shape, checkpoint, (folder / "heldout.txt").read_text("utf-8"), target)
        pairs[shape] = (checkpoint, target)
    rows, failed = {}, []
    for name in names:
        client = CLIENTS[name]
        wanted = [shape for shape in shapes if shape in client.shapes]
        lines, output = run_client(name, client, [pairs[shape] for shape in wanted])
        check_imports(name, [line for line in lines if "error" not in line], pairs)
        wrong = mistakes(client, wanted, lines, output)
        for line in lines:
            print(f"{name:<11}{json.dumps(line)}")
        if DOCUMENTED in wanted and (failure := run_snippets(name, client, pairs[DOCUMENTED][0])):
            wrong.append(f"a snippet of the documentation fails:\n{failure}")
        if wrong:
            failed.append(name)
            print("\n".join([output, *(f"FAILED     {name}: {line}" for line in wrong)]))
        else:
            row = table_row(client, lines)
            print(row, flush=True)
            if client.shapes:           # the page is about programs that open checkpoints
                rows[client.title] = row
    if not args.shapes:
        PAGE.write_text(with_rows(PAGE.read_text("utf-8"), rows), "utf-8")
    if failed:
        sys.exit(f"error: failed: {', '.join(failed)} (whole output: {STORE}/failed-NAME.log)")


if __name__ == "__main__":
    main()
