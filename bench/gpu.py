"""All tests and timings of a GPU, in less than nine minutes: `python -m bench.gpu`, or `make gpu`.

First, side by side, what is not timed: the kernels' tests under the real compiler, NVIDIA's memory
checker, the quickstart, and the compiling of whatever is timed. Then what is timed, one step after
the other: tiles, attention beside its peers, a training step, measuring heads, sampling. Everything
is written to one folder: logs, JSON, and page.md, whose tables are for docs/benchmarks.md. The page
is written again after every step.

A machine that is lent by the minute should not spend minutes on compiling, and often has no
network. So `--prepare` (bench/gpu_prepare.py), on a machine with the same Python and triton but no
GPU, fills the folder with compiled kernels and with wheels of the packages that the measurements
import; copy the folder to the GPU machine. Without a GPU the command prints what it would do, and
`--dry-run` runs the measurements on tiny shapes, with times that mean nothing.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from errors import ArgumentParser, UserError, run_command

from bench import turn
from bench.gpu_page import page

ROOT = Path(__file__).parent.parent
SECONDS = 9 * 60


class Step(NamedTuple):
    """A Python command that runs in a process of its own."""

    name: str
    seconds: int                    # after which it is stopped, counted from its start or its turn
    words: str                      # what follows `python`, as a shell reads it
    needs: tuple[str, ...] = ()     # modules without which it is left out
    tiny: str = ""                  # the words for a dry run; if empty, it is left out there
    compiles: bool = False          # it starts side by side, and waits for its turn when compiled


PYTEST = "-m pytest -q -p no:cacheprovider"
TESTED = ("tests/test_flash.py tests/test_decode.py tests/test_head_statistics.py "
          "tests/test_gluon.py tests/test_gpu_kernels.py")
TESTING = ("pytest", "hypothesis")
TRAINING = ("pydantic", "scipy", "yaml", "safetensors", "tiktoken", "tokenizers", "tqdm")
SIDE_SECONDS = 150
SIDE_BY_SIDE = (                    # 16 cores have room for them all
    Step("tests", SIDE_SECONDS, f"{PYTEST} -n 8 -m gpu -k 'not reaches' {TESTED}",
         (*TESTING, "xdist")),
    Step("grid", SIDE_SECONDS, f"{PYTEST} -n 3 -m grid -k 'D64 or D128' tests/test_flash.py",
         (*TESTING, "xdist")),
    Step("memory_checker", SIDE_SECONDS, f"{PYTEST} -m gpu -k reaches tests/test_gpu_kernels.py",
         TESTING),
    Step("training_tests", SIDE_SECONDS, f"{PYTEST} -m gpu tests/test_gpu.py",
         (*TESTING, *TRAINING)),
    Step("quickstart", SIDE_SECONDS,
         "train.py configs/quickstart.yaml run=gpu_quickstart log.wandb=disabled", TRAINING),
)
# Compiling a model of 12 layers takes a minute, of which PyTorch's caches save little.
IN_TURN = (
    Step("attention_tiles", 80, "-m bench.attention --tune", tiny="-m bench.attention --tune"),
    Step("attention", 100,
         "-m bench.attention --check --rounds 2 --contexts 1024 4096 16384 --flex 4096",
         tiny="-m bench.attention --rounds 1 --contexts 16"),
    Step("train", 40, "-m bench.train --rounds 8", TRAINING,
         "-m bench.train --eager --rounds 1 --shape 0", compiles=True),
    Step("probe_overhead", 20, "-m bench.probe_overhead --rounds 5", TRAINING, compiles=True),
    Step("sampling", 40,
         "-m bench.sampling --shape gpt2-small --batches 1 --contexts 1024 --rounds 3",
         (*TRAINING, "transformers"),
         "-m bench.sampling --eager --shape small --tokens 2 --rounds 1 --contexts 16 "
         "--batches 1 3 --prompts 5", compiles=True),
    Step("sampling_1b", 40,
         "-m bench.sampling --shape 1b --batches 1 --contexts 1024 --rounds 3 "
         "--results sampling_1b", (*TRAINING, "transformers"), compiles=True),
)


# --- on the GPU ---

def measure(folder: Path, tiny: bool, chosen: list[str]) -> int:
    """Run the chosen steps and write the page after each; returns 0 if all succeeded, else 1."""
    began = time.monotonic()
    for name in ("logs", "side_by_side"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    rows = forget(folder, chosen)
    unpack(folder)
    running: list[Running] = []

    def note(row: dict) -> None:
        rows.append(row)
        end = "left out"
        if row["code"] is not None:
            end = f"exit code {row['code']}, {row['seconds']} s"
        print(f"[{time.monotonic() - began:4.0f} s] {row['name']}: {end}: {row['last_line']}",
              flush=True)
        (folder / "steps.json").write_text(json.dumps(rows, indent=1))
        (folder / "page.md").write_text(page(folder))

    def begin(step: Step, results: Path) -> Running | None:
        """Start a step, if it is to run and can run; it stops when all its time is over."""
        words = step.tiny if tiny else step.words
        missing = [name for name in step.needs if not importable(name, folder)]
        if missing:
            note({"name": step.name, "code": None, "seconds": 0,
                  "last_line": f"{', '.join(missing)} not installed"})
        if missing or not words:
            return None
        print(f"{step.name}: at most {step.seconds} s", flush=True)
        left = SECONDS - (time.monotonic() - began)
        running.append(Running(step, words, folder, results, left))
        return running[-1]

    def wait(for_all_of: list[Running], until: Callable[[], bool] = lambda: False) -> None:
        """Until they have ended, or `until` says so."""
        while any(process in running for process in for_all_of) and not until():
            time.sleep(0.05)
            for process in [process for process in running if process.has_ended()]:
                running.remove(process)
                note(process.row())

    steps = [step for step in (*SIDE_BY_SIDE, *IN_TURN) if step.name in chosen]
    try:
        # Times measured side by side mean nothing.
        side_by_side = [begin(step, folder / "side_by_side") for step in steps
                        if step in SIDE_BY_SIDE]
        waiting = {step.name: begin(step, folder) for step in steps if step.compiles}
        compiling = [process for process in waiting.values() if process]
        wait([process for process in side_by_side if process])
        wait(compiling, until=lambda: all(process.has_compiled() for process in compiling
                                          if process in running))
        for step in steps:
            if step in IN_TURN:
                process = waiting[step.name] if step.compiles else begin(step, folder)
                if process:
                    wait([process], until=process.has_compiled)
                    process.take_turn()
                    wait([process])
    finally:
        for process in running:                     # after Ctrl-C, or an error in this file
            process.stop()
    print(f"{folder / 'page.md'} has the tables")
    return int(any(row["code"] for row in rows if row["name"] in chosen))


def forget(folder: Path, chosen: list[str]) -> list[dict]:
    """Remove what an earlier run wrote of the chosen steps; returns the rows of the others."""
    for name in chosen:
        (folder / f"{name}.json").unlink(missing_ok=True)
    try:
        rows = json.loads((folder / "steps.json").read_text())
    except (OSError, ValueError):
        return []
    return [row for row in rows if row["name"] not in chosen]


class Running:
    """A step in a process of its own, whose output goes to the folder's logs.

    A step that compiles first has until its turn and `seconds` more.
    """

    def __init__(self, step: Step, words: str, folder: Path, results: Path, left: float):
        self.step, self.began = step, time.monotonic()
        self.last = self.began + max(1.0, left)             # when all of the time is over
        self.until = self.last if step.compiles else min(self.last, self.began + step.seconds)
        self.code: int | None = None
        self.log = folder / "logs" / f"{step.name}.log"
        self.go = turn.go_file(folder, step.name) if step.compiles else None
        if self.go:
            for file in (self.go, turn.compiled_file(self.go)):     # of an earlier run
                file.unlink(missing_ok=True)
        with self.log.open("wb") as log:            # in a new session: its children stop with it
            self.process = subprocess.Popen(
                [sys.executable, *shlex.split(words)], cwd=ROOT, stdout=log,
                env=environment(folder, results, self.go), stderr=subprocess.STDOUT,
                start_new_session=True)

    def has_compiled(self) -> bool:
        return self.go is None or turn.compiled_file(self.go).exists()

    def take_turn(self) -> None:
        """Let a step that has compiled measure: no other step runs now."""
        if self.go:
            self.go.touch()
            self.until = min(self.last, time.monotonic() + self.step.seconds)

    def has_ended(self) -> bool:
        """Whether it has ended; if its time is over, it is stopped."""
        self.code = self.process.poll()
        if self.code is None and time.monotonic() > self.until:
            self.stop()
            self.code = 124
        return self.code is not None

    def stop(self) -> None:
        with suppress(ProcessLookupError):          # it has just ended by itself
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def row(self) -> dict:
        """Its exit code (124: it ran out of time), its seconds, and its last line of output."""
        text = self.log.read_text(errors="replace")
        lines = [line for line in text.splitlines() if line.strip()]
        return {"name": self.step.name, "code": self.code,
                "seconds": round(time.monotonic() - self.began, 1),
                "last_line": lines[-1][:160] if lines else ""}


def environment(folder: Path, results: Path, go: Path | None) -> dict[str, str]:
    """For steps: the folder's packages and compiled kernels, and nothing that needs a network.

    `go`: the file that a step which compiles waits for.
    """
    paths = (str(ROOT), str(folder / "packages"), os.environ.get("PYTHONPATH"))
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)), "BENCH_RESULTS": str(results),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "disabled", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1",
        turn.VARIABLE: str(go or "")}


def importable(module: str, folder: Path) -> bool:
    return bool(find_spec(module)) or (folder / "packages" / module).exists()


def unpack(folder: Path) -> None:
    """Install the folder's wheels that are missing here, and update paths of its kernels."""
    wheels = [wheel for wheel in sorted((folder / "wheels").glob("*.whl"))
              if not find_spec(module_of(wheel))]
    if wheels:
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps",
                        "--no-compile", "--upgrade", "--target", folder / "packages", *wheels],
                       check=True)
    for path in (folder / "triton").glob("*/__grp__*.json"):        # triton writes full paths
        group = json.loads(path.read_text())
        group["child_paths"] = {name: str(path.parent / name) for name in group["child_paths"]}
        path.write_text(json.dumps(group))


def module_of(wheel: Path) -> str:
    """The name by which a wheel's package is imported."""
    name = wheel.name.split("-")[0].lower()
    return {"pyyaml": "yaml", "pillow": "PIL", "pytest_xdist": "xdist",
            "python_dateutil": "dateutil"}.get(name, name)


# --- the command ---

def plan() -> str:
    """What the command does on a GPU."""
    def described(steps: tuple[Step, ...]) -> list[str]:
        return [f"  {step.name:16} ≤ {step.seconds:3} s   python {step.words}" for step in steps]

    compiled = ", ".join(step.name for step in IN_TURN if step.compiles)
    return "\n".join([f"On a GPU, in at most {SECONDS // 60} minutes. Side by side:",
                      *described(SIDE_BY_SIDE), f"  and the compiling of {compiled};",
                      "then one after the other:", *described(IN_TURN)])


def main() -> int:
    parser = ArgumentParser("python -m bench.gpu",
                            description="All tests and timings of a GPU, in nine minutes.")
    parser.add_argument("--out", type=Path, default=Path("gpu"), metavar="FOLDER",
                        help="for results, and what --prepare has written (default: gpu)")
    parser.add_argument("--prepare", action="store_true",
                        help="without a GPU, with the GPU machine's Python and triton: fill FOLDER "
                             "with compiled kernels and wheels")
    parser.add_argument("--target", default="sm_90", choices=["sm_80", "sm_90", "sm_100"],
                        help="what --prepare compiles for (default sm_90)")
    names = [step.name for step in (*SIDE_BY_SIDE, *IN_TURN)]
    parser.add_argument("--steps", nargs="+", choices=names, default=names, metavar="STEP",
                        help=f"run only these and keep what an earlier run wrote of the others: "
                             f"{', '.join(names)} (default: all)")
    parser.add_argument("--dry-run", action="store_true",
                        help="run the measurements on tiny shapes; their times mean nothing")
    args = parser.parse_args()
    folder = args.out.absolute()
    # Not imported above: a GPU machine may lack torch and triton, and `run_command` then says so.
    if args.prepare:
        import_module("bench.gpu_prepare").prepare(folder, args.target)
        return 0
    gpu = import_module("torch").cuda.is_available()
    if args.dry_run or gpu:
        if args.dry_run and gpu:
            raise UserError("--dry-run is for machines without a GPU; leave it out here")
        return measure(folder, args.dry_run, args.steps)
    print(f"{plan()}\nNo GPU is here: nothing has been run. "
          "--dry-run runs the measurements on tiny shapes.")
    return 0


if __name__ == "__main__":
    run_command(main)
