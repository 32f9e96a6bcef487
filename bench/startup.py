"""Seconds until a command does what was asked: `python -m bench.startup`.

`python train.py` until its first step stands in metrics.jsonl, `python sample.py` until the first token is printed, and every command's
`--help` until its end; beside them Python alone and `import torch`, which nothing here can be faster than. Each in a process of its own,
all in turn, files in the page cache (a first round does not count), medians. `--imports COMMAND` lists what a command's start loads
longest.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench import results
from errors import ArgumentParser, UserError, run_command

ROOT = Path(__file__).parent.parent
COMMANDS = ["train.py", "sample.py", "heads.py", "-m data.prepare", "-m training.plan", "-m training.import_model"]
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"} | {"PYTHONPATH": str(ROOT)}


def python(command: str, *options: str) -> list[str]:
    """A command line; scripts are the repository's."""
    first, *rest = command.split()
    return [sys.executable, *options, *([str(ROOT / first), *rest] if first.endswith(".py") else [first, *rest])]


def until_end(command: list[str], folder: Path) -> float:
    started = time.perf_counter()
    subprocess.run(command, cwd=folder, env=ENVIRONMENT, check=True, capture_output=True)
    return time.perf_counter() - started


def until_first_step(config: Path, overrides: list[str], folder: Path) -> float:
    """A new run each time; it is killed once its first step is written."""
    name = f"run{time.time_ns()}"
    command = [*python("train.py"), str(config), f"run={name}", "log.every=1", *overrides]
    metrics = folder / "runs" / name / "metrics.jsonl"
    started = time.perf_counter()
    with subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while not (metrics.exists() and metrics.stat().st_size):
            if process.poll() is not None:
                raise UserError(f"{config} did not train: {process.stderr.read()[-500:]}")
            time.sleep(0.001)
        seconds = time.perf_counter() - started
        process.kill()
    return seconds


def until_first_token(run: Path, folder: Path) -> float:
    started = time.perf_counter()
    with subprocess.Popen([*python("sample.py"), str(run), "--max-tokens", "9"], cwd=folder, env=ENVIRONMENT,
                          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        process.stdout.read(1)                      # no prompt is given, so the first byte is the model's
        return time.perf_counter() - started


def imports(command: list[str], folder: Path, most: int = 25) -> None:
    """Print the modules that a command loads longest, each with all that it loads first."""
    said = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True).stderr
    lines = [line.removeprefix("import time:").split("|") for line in said.splitlines() if line.startswith("import time:")]
    found = sorted(((int(whole) / 1e6, name.strip()) for _, whole, name in lines if whole.strip().isdigit()), reverse=True)
    for seconds, name in found[:most]:
        print(f"{seconds:7.3f} s  {name}")


def prepared(config: Path, overrides: list[str], folder: Path) -> Path:
    """A run of one step, which leaves shards and a checkpoint to sample from."""
    subprocess.run([*python("train.py"), str(config), "run=first", "train.steps=1", *overrides], cwd=folder, env=ENVIRONMENT, check=True,
                   capture_output=True)
    return folder / "runs" / "first"


def main() -> None:
    parser = ArgumentParser("python -m bench.startup", description="Seconds until each command does what was asked.")
    parser.add_argument("--config", default=str(ROOT / "configs" / "quickstart.yaml"), help="what is trained (default: the quickstart)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds whose median counts (default 5)")
    parser.add_argument("--imports", metavar="COMMAND", help="what this command loads longest, for example 'sample.py --help'")
    args = parser.parse_args()
    config = Path(args.config).resolve()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.imports:
            return imports(python(args.imports, "-X", "importtime"), Path.cwd())
        quiet = ["log.wandb=disabled"]
        run = prepared(config, quiet, folder)
        timed: dict[str, Callable[[], float]] = {
            "python -c pass": lambda: until_end([sys.executable, "-c", "pass"], folder),
            "python -c 'import torch'": lambda: until_end([sys.executable, "-c", "import torch"], folder)}
        timed |= {f"python {command} --help": lambda command=command: until_end([*python(command), "--help"], folder)
                  for command in COMMANDS}
        timed |= {"python sample.py RUN, to the first token": lambda: until_first_token(run, folder),
                  "python train.py CONFIG, to the first step": lambda: until_first_step(config, quiet, folder),
                  "the same with wandb, offline": lambda: until_first_step(config, ["log.wandb=offline"], folder)}
        taken: dict[str, list[float]] = {what: [] for what in timed}
        for n in range(args.rounds + 1):
            for what, call in timed.items():
                results.meanwhile(f"round {n} of {args.rounds}: {what}")
                taken[what].append(call())
    results.meanwhile("")
    found = {what: statistics.median(seconds[1:]) for what, seconds in taken.items()}         # the first fills caches
    torch_alone = found["python -c 'import torch'"]
    print(f"{args.rounds} rounds in turn, {config.name}; beside what importing torch takes")
    for what, seconds in found.items():
        print(f"  {seconds:6.2f} s  {seconds / torch_alone:5.2f} ×  {what}")
    results.write("startup", {"config": config.name, "rounds": args.rounds, "seconds": {what: s[1:] for what, s in taken.items()}})


if __name__ == "__main__":
    run_command(main)
