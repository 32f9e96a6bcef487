"""Everything this project wants to know of a GPU, in one command of less than nine minutes: `python -m bench.gpu`, or `make gpu`.

First what no clock is asked about, side by side: the kernels' tests under the real compiler, NVIDIA's memory checker, the
quickstart. Then, alone on the GPU, what is timed: tiles, attention beside its peers, a training step, looking at heads,
sampling. Everything is written to one folder: logs, JSON, and page.md, whose tables are for docs/benchmarks.md. The page is
written anew whenever a step ends.

A machine that is lent by the minute should not spend them compiling, and often has no network. So `--prepare`, on a machine
with the same Python and triton but no GPU, fills the folder with compiled kernels and with wheels of the packages that the
measurements import; the folder is then taken along. Without a GPU the command says what it would do, and `--dry-run` runs the
measurements on tiny shapes, whose times mean nothing.
"""

import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

from errors import ArgumentParser, UserError, run_command

from bench.gpu_page import page

ROOT = Path(__file__).parent.parent
SECONDS = 9 * 60
# What the measurements import beside torch, triton and numpy, which a GPU machine has in builds of its own.
PACKAGES = ("pydantic", "pyyaml", "safetensors", "tiktoken", "tokenizers", "filelock", "matplotlib", "pillow", "tqdm", "transformers",
            "pytest", "pytest-xdist", "pytest-timeout", "hypothesis")
NOT_TAKEN = ("torch", "triton", "numpy", "nvidia")


class Step(NamedTuple):
    """A command of Python's, in a process of its own."""

    name: str
    seconds: int                    # after which it is stopped
    words: str                      # what follows `python`, as a shell reads it
    needs: tuple[str, ...] = ()     # modules without which it is left out
    tiny: str = ""                  # the same for a dry run; none: left out there


PYTEST = "-m pytest -q -p no:cacheprovider"
TESTED = "tests/test_flash.py tests/test_decode.py tests/test_head_statistics.py tests/test_gluon.py tests/test_gpu_kernels.py"
TESTING = ("pytest", "hypothesis")
TRAINING = ("pydantic", "yaml", "safetensors", "tiktoken", "tokenizers", "tqdm")
TOGETHER = (                        # 16 cores have room for them all
    Step("tests", 140, f"{PYTEST} -n 8 -m gpu -k 'not reaches' {TESTED}", (*TESTING, "xdist")),
    Step("grid", 140, f"{PYTEST} -n 3 -m grid -k 'D64 or D128' tests/test_flash.py", (*TESTING, "xdist")),
    Step("memory_checker", 140, f"{PYTEST} -m gpu -k reaches tests/test_gpu_kernels.py", TESTING),
    Step("training_tests", 140, f"{PYTEST} -m gpu tests/test_gpu.py", (*TESTING, *TRAINING)),
    Step("quickstart", 140, "train.py configs/quickstart.yaml run=gpu_quickstart log.wandb=disabled", TRAINING),
    Step("compile_train", 140, "-m bench.train --rounds 1", TRAINING),          # fills the compiler's folder for the step below
)
ALONE = (
    Step("attention_tiles", 80, "-m bench.attention --tune", tiny="-m bench.attention --tune"),
    Step("attention", 100, "-m bench.attention --check --rounds 2 --contexts 1024 4096 16384 --flex",
         tiny="-m bench.attention --rounds 1 --contexts 16"),
    Step("train", 60, "-m bench.train --rounds 8", TRAINING, "-m bench.train --eager --rounds 1 --shape 0"),
    Step("probe_overhead", 45, "-m bench.probe_overhead --rounds 5", TRAINING),
    Step("sampling", 75, "-m bench.sampling --shape gpt2-small --batches 1 8 --contexts 1024 --rounds 2", (*TRAINING, "transformers"),
         "-m bench.sampling --eager --shape small --tokens 2 --rounds 1 --contexts 16 --batches 1 3 --prompts 5"),
)


# --- on the GPU ------------------------------------------------------------------------------------------------------

def measure(folder: Path, tiny: bool) -> int:
    """Run every step, write the page after each; 0 if all went well, else 1."""
    began, done = time.monotonic(), []
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    for old in (*folder.glob("*.json"), *folder.glob("page.md")):          # of an earlier run
        old.unlink()
    unpack(folder)
    running: list[Running] = []

    def note(row: dict) -> None:
        done.append(row)
        code = "left out" if row["code"] is None else f"exit code {row['code']}, {row['seconds']} s"
        print(f"[{time.monotonic() - began:4.0f} s] {row['name']}: {code}: {row['said']}", flush=True)
        (folder / "steps.json").write_text(json.dumps(done, indent=1))
        (folder / "page.md").write_text(page(folder))

    try:
        for steps in (TOGETHER, *((step,) for step in ALONE)):
            results = folder if steps is not TOGETHER else folder / "side_by_side"      # where no time means anything
            for step in steps:
                words, missing = step.tiny if tiny else step.words, [name for name in step.needs if not importable(name, folder)]
                if missing:
                    note({"name": step.name, "code": None, "seconds": 0, "said": f"{', '.join(missing)} not installed"})
                elif words:
                    print(f"{step.name}: at most {step.seconds} s", flush=True)
                    running.append(Running(step, words, folder, results, SECONDS - (time.monotonic() - began)))
            while running:
                time.sleep(0.05)
                for process in [process for process in running if process.has_ended()]:
                    running.remove(process)
                    note(process.row())
    finally:
        for process in running:                     # Ctrl-C, or a mistake of this file
            process.stop()
    print(f"{folder / 'page.md'} has the tables")
    return int(any(row["code"] for row in done))


class Running:
    """A step in a process of its own, with what it says in the folder's logs."""

    def __init__(self, step: Step, words: str, folder: Path, results: Path, left: float):
        self.name, self.began = step.name, time.monotonic()
        self.until, self.code = self.began + max(1.0, min(step.seconds, left)), None
        self.log = folder / "logs" / f"{step.name}.log"
        with self.log.open("wb") as log:            # a group of its own, so that all that it starts can be stopped
            self.process = subprocess.Popen([sys.executable, *shlex.split(words)], cwd=ROOT, env=environment(folder, results), stdout=log,
                                            stderr=subprocess.STDOUT, start_new_session=True)

    def has_ended(self) -> bool:
        """Whether it is over; it is stopped when its time is."""
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
        """Its exit code (124: it ran out of time), its seconds, and the last line it said."""
        said = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return {"name": self.name, "code": self.code, "seconds": round(time.monotonic() - self.began, 1),
                "said": said[-1][:160] if said else ""}


def environment(folder: Path, results: Path) -> dict[str, str]:
    """What steps run in: the folder's packages and compiled kernels, and nothing that asks a network."""
    path = os.pathsep.join(filter(None, (str(ROOT), str(folder / "packages"), os.environ.get("PYTHONPATH"))))
    return os.environ | {"PYTHONPATH": path, "BENCH_RESULTS": str(results), "TRITON_CACHE_DIR": str(folder / "triton"),
                         "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled",
                         "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}


def importable(module: str, folder: Path) -> bool:
    return bool(find_spec(module)) or (folder / "packages" / module).exists()


def unpack(folder: Path) -> None:
    """Install the folder's wheels beside it, as far as they are missing here, and tell its compiled kernels where they are now."""
    wheels = [wheel for wheel in sorted((folder / "wheels").glob("*.whl")) if not find_spec(module_of(wheel))]
    if wheels:
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--upgrade", "--target",
                        folder / "packages", *wheels], check=True)
    for path in (folder / "triton").glob("*/__grp__*.json"):        # triton notes full paths
        group = json.loads(path.read_text())
        group["child_paths"] = {name: str(path.parent / name) for name in group["child_paths"]}
        path.write_text(json.dumps(group))


def module_of(wheel: Path) -> str:
    """What a wheel is imported as."""
    name = wheel.name.split("-")[0].lower()
    return {"pyyaml": "yaml", "pillow": "PIL", "pytest_xdist": "xdist", "python_dateutil": "dateutil"}.get(name, name)


# --- beforehand, without one -----------------------------------------------------------------------------------------

def prepare(folder: Path, target: str) -> None:
    """Wheels, and every kernel that the steps are going to launch on `target`, compiled by this Python's triton."""
    import triton
    (folder / "wheels").mkdir(parents=True, exist_ok=True)
    print(f"Python {platform.python_version()}, triton {triton.__version__}: of use on a machine with the same two", flush=True)
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--only-binary=:all:",
                    "--constraint", ROOT / "requirements.txt", "--dest", folder / "wheels", *PACKAGES], check=True)
    for wheel in (folder / "wheels").glob("*.whl"):
        if wheel.name.startswith(NOT_TAKEN):
            wheel.unlink()
    # Set before the processes below import triton. The text that a kernel was compiled from is not of use there.
    os.environ |= {"TRITON_CACHE_DIR": str(folder / "triton"), "TRITON_STORE_BINARY_ONLY": "1"}
    cores = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(cores, get_context("spawn")) as pool:
        launches = sum(pool.map(compile_share, range(cores), [cores] * cores, [target] * cores))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{launches} launches compiled, {len(list((folder / 'wheels').iterdir()))} wheels: {folder} has {size / 2 ** 20:.0f} MB")


def compile_share(share: int, shares: int, target: str) -> int:
    """Make every `shares`-th of the calls that tests and benches make, as far as compiling → how many."""
    sys.path.append(str(ROOT / "tests"))
    sys.modules["interpreter"] = type(sys)("interpreter")           # the tests' cases are wanted here, not their interpreter
    from kernels import ahead_of_time, launch
    with ahead_of_time.device(target):
        launch.about = lambda device: launch.Device(132, 50 * 2 ** 20)
        calls = [*calls_of_tests(), *calls_of_benches()][share::shares]
        for call in calls:
            call()
    return len(calls)


def calls_of_tests() -> Iterator[Callable[[], object]]:
    """The cases of the steps `tests`, `memory_checker` and `grid`."""
    import test_decode
    import test_flash
    import test_gluon
    import torch
    from attention_cases import DTYPES

    from kernels import flash
    from kernels.decode import decode
    from kernels.statistics_triton import statistics

    def gluon(case) -> None:
        flash.USE_GLUON = True
        q, k, v, _ = case.tensors()
        masks = case.masks()
        flash.flash_attention(q, k, v, masks["causal"], masks["window"], masks["segments"], case.D ** -0.5)
        flash.USE_GLUON = False

    def one_query(case) -> None:
        q, k, v = test_decode.tensors(case)
        decode(q, k, v, None, None, case.window, case.D ** -0.5)

    def heads(dtype: str) -> None:
        q = torch.zeros(2, 90, 4, 32, dtype=DTYPES[dtype]).transpose(1, 2)
        ids = torch.zeros(2, 90, dtype=torch.long)
        statistics(q, q[:, :2], torch.zeros(2, 4, 90), ids, ids, ids, None, None, 1.0)

    for dtype in DTYPES:
        yield partial(heads, dtype)
        for case in test_flash.CASES:
            case = replace(case, dtype=dtype)
            yield lambda case=case: test_flash.run(case, *case.tensors())
        yield from (partial(one_query, replace(case, dtype=dtype)) for case in test_decode.CASES)
        if dtype != "fp32":
            yield from (partial(gluon, replace(case, dtype=dtype)) for case in test_gluon.CASES)
    for case in test_flash.grid():
        if case.D in (64, 128):
            yield lambda case=case: test_flash.run(case, *case.tensors())


def calls_of_benches() -> Iterator[Callable[[], object]]:
    """The candidate tiles, and the shapes of the other benches: bf16, causal or with a window, heads of 64 and 128."""
    import torch

    from bench.attention import CANDIDATES, timed_call
    from kernels import launch
    from kernels.decode import decode
    from kernels.flash import flash_attention
    from kernels.launch import Tile

    def candidate(kernel: str, D: int, tile: tuple) -> None:
        with launch.tile_for(kernel, Tile(*tile)):
            timed_call(kernel, *tensors(D), tensors(D)[0], torch.zeros(1, 256, dtype=torch.long))()

    def tensors(D: int, H: int = 4, T: int = 256) -> list:
        return [torch.zeros(1, T, H, D, dtype=torch.bfloat16).transpose(1, 2) for _ in range(3)]

    def cache(D: int, groups: int, ragged: bool) -> None:
        k = torch.zeros(2, 4, 1024, D, dtype=torch.bfloat16)
        q, at = torch.zeros(2, 4 * groups, 1, D, dtype=torch.bfloat16), torch.zeros(2, 1, dtype=torch.long) if ragged else None
        decode(q, k, k, at, None, None, D ** -0.5)

    for kernel, sizes in CANDIDATES.items():
        if launch.has_tiles(kernel, tensors(64)[0]):
            yield from (partial(candidate, kernel, D, tile) for D, tiles in sizes.items() for tile in tiles)
    for D in (64, 128):
        yield lambda D=D: flash_attention(*tensors(D), True, 100, None, D ** -0.5)
        yield from (partial(cache, D, groups, ragged) for groups, ragged in product((1, 4), (False, True)))


# --- the command -----------------------------------------------------------------------------------------------------

def plan() -> str:
    """What the command does on a GPU."""
    lines = [f"On a GPU, in at most {SECONDS // 60} minutes. Side by side:"]
    for steps in (TOGETHER, ALONE):
        lines += [f"  {step.name:16} ≤ {step.seconds:3} s   python {step.words}" for step in steps]
        lines += ["then one after the other:"] if steps is TOGETHER else []
    return "\n".join(lines)


def main() -> int:
    parser = ArgumentParser("python -m bench.gpu", description="Everything this project wants to know of a GPU, in nine minutes.")
    parser.add_argument("--out", type=Path, default=Path("gpu"), metavar="FOLDER",
                        help="results, and what --prepare has put there (default: gpu)")
    parser.add_argument("--prepare", action="store_true",
                        help="without a GPU, with the GPU machine's Python and triton: fill FOLDER with compiled kernels and wheels")
    parser.add_argument("--target", default="sm_90", choices=["sm_80", "sm_90", "sm_100"],
                        help="that --prepare compiles for (default sm_90)")
    parser.add_argument("--dry-run", action="store_true", help="run the measurements on tiny shapes; their times mean nothing")
    args = parser.parse_args()
    folder = args.out.absolute()
    if args.prepare:
        prepare(folder, args.target)
        return 0
    import torch  # here, so that `run_command` can say that it is missing
    gpu = torch.cuda.is_available()
    if args.dry_run or gpu:
        if args.dry_run and gpu:
            raise UserError("--dry-run is for machines without a GPU; leave it out here")
        return measure(folder, tiny=args.dry_run)
    print(f"{plan()}\nNo GPU is here: nothing has been run. --dry-run runs the measurements on tiny shapes.")
    return 0


if __name__ == "__main__":
    run_command(main)
