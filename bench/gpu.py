"""All tests and timings of a GPU, in less than nine minutes: `python -m bench.gpu`, or `make gpu`.

First, side by side, what is not timed: the kernels' tests under the real compiler, NVIDIA's memory
checker, the quickstart. Then what is timed, one step after the other: tiles, attention beside its
peers, a training step, measuring heads, sampling. Everything is written to one folder: logs, JSON,
and page.md, whose tables are for docs/benchmarks.md. The page is written again after every step.

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
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from errors import ArgumentParser, UserError, run_command

from bench.gpu_page import page

ROOT = Path(__file__).parent.parent
SECONDS = 9 * 60


class Step(NamedTuple):
    """A Python command that runs in a process of its own."""

    name: str
    seconds: int                    # after which it is stopped
    words: str                      # what follows `python`, as a shell reads it
    needs: tuple[str, ...] = ()     # modules without which it is left out
    tiny: str = ""                  # the words for a dry run; if empty, it is left out there


PYTEST = "-m pytest -q -p no:cacheprovider"
TESTED = ("tests/test_flash.py tests/test_decode.py tests/test_head_statistics.py "
          "tests/test_gluon.py tests/test_gpu_kernels.py")
TESTING = ("pytest", "hypothesis")
TRAINING = ("pydantic", "yaml", "safetensors", "tiktoken", "tokenizers", "tqdm")
SIDE_BY_SIDE = (                    # 16 cores have room for them all
    Step("tests", 140, f"{PYTEST} -n 8 -m gpu -k 'not reaches' {TESTED}", (*TESTING, "xdist")),
    Step("grid", 140, f"{PYTEST} -n 3 -m grid -k 'D64 or D128' tests/test_flash.py",
         (*TESTING, "xdist")),
    Step("memory_checker", 140, f"{PYTEST} -m gpu -k reaches tests/test_gpu_kernels.py", TESTING),
    Step("training_tests", 140, f"{PYTEST} -m gpu tests/test_gpu.py", (*TESTING, *TRAINING)),
    Step("quickstart", 140,
         "train.py configs/quickstart.yaml run=gpu_quickstart log.wandb=disabled", TRAINING),
    # Fills the compiler's folder for the step `train` below.
    Step("compile_train", 140, "-m bench.train --rounds 1", TRAINING),
)
IN_TURN = (
    Step("attention_tiles", 80, "-m bench.attention --tune", tiny="-m bench.attention --tune"),
    Step("attention", 100,
         "-m bench.attention --check --rounds 2 --contexts 1024 4096 16384 --flex",
         tiny="-m bench.attention --rounds 1 --contexts 16"),
    Step("train", 60, "-m bench.train --rounds 8", TRAINING,
         "-m bench.train --eager --rounds 1 --shape 0"),
    Step("probe_overhead", 45, "-m bench.probe_overhead --rounds 5", TRAINING),
    Step("sampling", 75,
         "-m bench.sampling --shape gpt2-small --batches 1 8 --contexts 1024 --rounds 2",
         (*TRAINING, "transformers"),
         "-m bench.sampling --eager --shape small --tokens 2 --rounds 1 --contexts 16 "
         "--batches 1 3 --prompts 5"),
)


# --- on the GPU ---

def measure(folder: Path, tiny: bool) -> int:
    """Run every step and write the page after each; returns 0 if all succeeded, else 1."""
    began, rows = time.monotonic(), []
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    for old in (*folder.glob("*.json"), *folder.glob("page.md")):          # of an earlier run
        old.unlink()
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

    def begin(steps: tuple[Step, ...], results: Path) -> None:
        for step in steps:
            words = step.tiny if tiny else step.words
            missing = [name for name in step.needs if not importable(name, folder)]
            if missing:
                note({"name": step.name, "code": None, "seconds": 0,
                      "last_line": f"{', '.join(missing)} not installed"})
            elif words:
                print(f"{step.name}: at most {step.seconds} s", flush=True)
                left = SECONDS - (time.monotonic() - began)
                running.append(Running(step, words, folder, results, left))

    def wait() -> None:
        while running:
            time.sleep(0.05)
            ended = [process for process in running if process.has_ended()]
            for process in ended:
                running.remove(process)
                note(process.row())

    try:
        begin(SIDE_BY_SIDE, folder / "side_by_side")        # times measured there mean nothing
        wait()
        for step in IN_TURN:
            begin((step,), folder)
            wait()
    finally:
        for process in running:                     # after Ctrl-C, or an error in this file
            process.stop()
    print(f"{folder / 'page.md'} has the tables")
    return int(any(row["code"] for row in rows))


class Running:
    """A step in a process of its own, whose output goes to the folder's logs."""

    def __init__(self, step: Step, words: str, folder: Path, results: Path, left: float):
        self.name, self.began = step.name, time.monotonic()
        self.until = self.began + max(1.0, min(step.seconds, left))
        self.code: int | None = None
        self.log = folder / "logs" / f"{step.name}.log"
        with self.log.open("wb") as log:            # in a new session: its children stop with it
            self.process = subprocess.Popen([sys.executable, *shlex.split(words)], cwd=ROOT,
                                            env=environment(folder, results), stdout=log,
                                            stderr=subprocess.STDOUT, start_new_session=True)

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
        return {"name": self.name, "code": self.code,
                "seconds": round(time.monotonic() - self.began, 1),
                "last_line": lines[-1][:160] if lines else ""}


def environment(folder: Path, results: Path) -> dict[str, str]:
    """For steps: the folder's packages and compiled kernels, and nothing that needs a network."""
    paths = (str(ROOT), str(folder / "packages"), os.environ.get("PYTHONPATH"))
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)), "BENCH_RESULTS": str(results),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "disabled", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}


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

    return "\n".join([f"On a GPU, in at most {SECONDS // 60} minutes. Side by side:",
                      *described(SIDE_BY_SIDE), "then one after the other:", *described(IN_TURN)])


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
        return measure(folder, tiny=args.dry_run)
    print(f"{plan()}\nNo GPU is here: nothing has been run. "
          "--dry-run runs the measurements on tiny shapes.")
    return 0


if __name__ == "__main__":
    run_command(main)
