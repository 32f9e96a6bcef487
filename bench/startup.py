"""Seconds until a command does what was asked: `python -m bench.startup`.

`python train.py` until its first step is in metrics.jsonl, `python sample.py` until the first token
is printed, and every command's `--help` until its end. For comparison, Python without any import
and `import torch`: no command here can be faster. Each runs in a process of its own, all in turn,
files in the page cache (a first round does not count), medians. `--imports COMMAND` lists the
modules that take longest when a command starts.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from errors import ArgumentParser, UserError, run_command

from bench import results

ROOT = Path(__file__).parent.parent
COMMANDS = ["train.py", "sample.py", "heads.py", "-m data.prepare", "-m training.plan",
            "-m training.import_model"]
# Without PYTHONDONTWRITEBYTECODE, or every process compiles our modules again.
ENVIRONMENT = {key: value for key, value in os.environ.items()
               if key != "PYTHONDONTWRITEBYTECODE"} | {"PYTHONPATH": str(ROOT)}


def python(command: str, *options: str) -> list[str]:
    """The command line of `command`: a script of the repository, or anything that Python takes.

    `options` are Python's own.
    """
    first, *rest = command.split()
    if first.endswith(".py"):
        first = str(ROOT / first)
    return [sys.executable, *options, first, *rest]


def until_end(command: list[str], folder: Path) -> float:
    """Seconds until a command ends."""
    started = time.perf_counter()
    subprocess.run(command, cwd=folder, env=ENVIRONMENT, check=True, capture_output=True)
    return time.perf_counter() - started


def until_first_step(config: Path, overrides: list[str], folder: Path) -> float:
    """Seconds until a new run has written its first step; then it is killed."""
    name = f"run{time.time_ns()}"
    command = [*python("train.py"), str(config), f"run={name}", "log.every=1", *overrides]
    metrics = folder / "runs" / name / "metrics.jsonl"
    started = time.perf_counter()
    with subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, stdout=subprocess.DEVNULL,
                          stderr=subprocess.PIPE, text=True) as process:
        while not (metrics.exists() and metrics.stat().st_size):
            if process.poll() is not None:
                assert process.stderr is not None
                raise UserError(f"{config} did not train: {process.stderr.read()[-500:]}")
            time.sleep(0.001)
        seconds = time.perf_counter() - started
        process.kill()
    return seconds


def until_first_token(run: Path, folder: Path) -> float:
    """Seconds until sample.py prints its first byte: without a prompt, the model wrote it."""
    command = [*python("sample.py"), str(run), "--max-tokens", "9"]
    started = time.perf_counter()
    with subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        return time.perf_counter() - started


def list_imports(command: list[str], folder: Path, most: int = 25) -> None:
    """Print the modules that take longest to load, each with all that it loads first."""
    report = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True,
                            text=True).stderr
    modules = []
    for line in report.splitlines():
        if line.startswith("import time:"):
            _, cumulative, name = line.removeprefix("import time:").split("|")
            if cumulative.strip().isdigit():                # not the heading
                modules.append((int(cumulative) / 1e6, name.strip()))
    for seconds, name in sorted(modules, reverse=True)[:most]:
        print(f"{seconds:7.3f} s  {name}")


def train_one_step(config: Path, overrides: list[str], folder: Path) -> Path:
    """A run of one step, which leaves shards and a checkpoint to sample from."""
    command = [*python("train.py"), str(config), "run=first", "train.steps=1", *overrides]
    subprocess.run(command, cwd=folder, env=ENVIRONMENT, check=True, capture_output=True)
    return folder / "runs" / "first"


def measure(config: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds of every command, round by round; a first round is not returned."""
    quiet = ["log.wandb=disabled"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = train_one_step(config, quiet, folder)
        timers: dict[str, Callable[[], float]] = {
            "python -c pass": partial(until_end, [sys.executable, "-c", "pass"], folder),
            "python -c 'import torch'": partial(
                until_end, [sys.executable, "-c", "import torch"], folder)}
        for command in COMMANDS:
            timers[f"python {command} --help"] = partial(
                until_end, [*python(command), "--help"], folder)
        timers |= {
            "python sample.py RUN, to the first token": partial(until_first_token, run, folder),
            "python train.py CONFIG, to the first step": partial(
                until_first_step, config, quiet, folder),
            "the same with wandb, offline": partial(
                until_first_step, config, ["log.wandb=offline"], folder)}
        seconds: dict[str, list[float]] = {label: [] for label in timers}
        for n in range(rounds + 1):
            for label, timer in timers.items():
                results.meanwhile(f"round {n} of {rounds}: {label}")
                seconds[label].append(timer())
    results.meanwhile("")
    return {label: values[1:] for label, values in seconds.items()}     # the first fills caches


def main() -> None:
    parser = ArgumentParser("python -m bench.startup",
                            description="Seconds until each command does what was asked.")
    parser.add_argument("--config", default=str(ROOT / "configs" / "quickstart.yaml"),
                        help="config to train (default: the quickstart)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N",
                        help="timed rounds; the median counts (default 5)")
    parser.add_argument("--imports", metavar="COMMAND",
                        help="list the slowest imports of a command, e.g. 'sample.py --help'")
    args = parser.parse_args()
    if args.imports:
        list_imports(python(args.imports, "-X", "importtime"), Path.cwd())
        return
    config = Path(args.config).resolve()
    seconds = measure(config, args.rounds)
    medians = {label: statistics.median(values) for label, values in seconds.items()}
    import_torch = medians["python -c 'import torch'"]
    print(f"{args.rounds} rounds in turn, {config.name}; relative to importing torch")
    for label, median in medians.items():
        print(f"  {median:6.2f} s  {median / import_torch:5.2f} ×  {label}")
    results.write("startup", {"config": config.name, "rounds": args.rounds, "seconds": seconds})


if __name__ == "__main__":
    run_command(main)
