"""How cost grows: `python -m bench.growth` draws docs/growth.svg.

A training step (forward and backward) against context, width and heads, and the memory it takes: attention that never holds its pattern,
beside the same formula with the pattern materialised. Then the memory of head statistics beside a pattern's. A point has a process of its
own, so that memory is that of its step; the two sides take turns. On a CPU attention is PyTorch's kernel, on a GPU ours.
"""

import statistics
import time
from pathlib import Path

import torch

from bench import results
from bench.results import DEVICE, DTYPE, GPU
from bench.side import Side
from errors import ArgumentParser, run_command
from files import atomic_write, explain_disk_errors, must_be_writable
from kernels.attention import attention
from kernels.head_statistics import head_statistics
from model.config import ModelConfig
from model.gpt import GPT
from training.run import memory_gb

SIDES = {"auto": "attention without its pattern", "reference": "pattern materialised"}
SWEEPS = {"context": [256, 512, 1024, 2048, 4096, 8192, 16384], "width": [64, 128, 256, 512, 1024], "heads": [1, 2, 4, 8, 16]}
LABELS = {"context": "context: one row of that many tokens (width 128, 2 heads)", "width": "width: 4 × 256 tokens, heads of 64",
          "heads": "heads: 4 × 256 tokens, width 256"}
MOST_PATTERN = 8e9 if GPU else 1.5e9                # bytes of all patterns of a step; their gradients and copies come on top


def shape(sweep: str, value: int) -> tuple[ModelConfig, int]:
    """Two layers, and how many rows they read."""
    context = value if sweep == "context" else 256
    width = {"context": 128, "width": value, "heads": 256}[sweep]
    config = ModelConfig(n_layers=2, n_heads=value if sweep == "heads" else width // 64, d_model=width, n_ctx=context, vocab_size=512)
    return config, 1 if sweep == "context" else 4


def pattern_bytes(config: ModelConfig, rows: int) -> int:
    return 4 * config.n_layers * rows * config.n_heads * config.n_ctx ** 2


def serve(pipe, backend: str, config: ModelConfig, rows: int, threads: int) -> None:
    """`()` → seconds of one more step, and the GB that the steps so far took beside what was held before the first."""
    torch.set_num_threads(threads)
    model = GPT(config).to(DEVICE)
    model.compute_dtype = DTYPE
    model.attention_backend = backend
    tokens = torch.randint(512, (rows, config.n_ctx + 1), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    before = memory_gb(DEVICE)
    while pipe.recv() is not None:
        started = time.perf_counter()
        loss = model.loss(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        loss.item()
        pipe.send((time.perf_counter() - started, memory_gb(DEVICE) - before))
        model.zero_grad()


def serve_statistics(pipe, context: int, threads: int) -> None:
    """`()` → seconds of the statistics of 8 heads, and the GB they took beside q, k and lse."""
    torch.set_num_threads(threads)
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 8, context, 64, generator=draw).to(DEVICE, DTYPE) for _ in range(3))
    tokens = torch.randint(512, (1, context), generator=draw).to(DEVICE)
    _, lse = attention(q, k, v, return_lse=True)
    while pipe.recv() is not None:
        before, started = memory_gb(DEVICE), time.perf_counter()
        head_statistics(q, k, lse, tokens).entropy.sum().item()
        pipe.send((time.perf_counter() - started, memory_gb(DEVICE) - before))


def measure(sweep: str, value: int, rounds: int, threads: int) -> dict[str, dict[str, float]]:
    """Median milliseconds and GB of a step with each backend; the pattern is left out where it does not fit."""
    config, rows = shape(sweep, value)
    fits = pattern_bytes(config, rows) <= MOST_PATTERN
    sides = {backend: Side(serve, backend, config, rows, threads) for backend in SIDES if backend == "auto" or fits}
    taken = {backend: [side()] for backend, side in sides.items()}              # the first is warm-up
    for _ in range(rounds):
        for backend, side in sides.items():
            taken[backend].append(side())
    for side in sides.values():
        side.close()
    return {backend: {"ms": statistics.median(seconds for seconds, _ in found[1:]) * 1e3, "gb": found[-1][1]}
            for backend, found in taken.items()}


def draw(points: dict[str, dict[int, dict]], path: Path) -> None:
    """Time above, memory below, a column a sweep."""
    from matplotlib.ticker import NullFormatter

    from report.figures import BLUE, GREY, SECOND, figure, titled
    drawn, axes = figure(3.1 * len(points), 4.6, 2, len(points))
    for column, (sweep, found) in enumerate(points.items()):
        for row, (key, label) in enumerate((("ms", "ms a training step"), ("gb", "GB it takes"))):
            place = axes[row, column]
            for backend, colour in (("auto", BLUE), ("reference", SECOND)):
                line = [(value, sides[backend][key]) for value, sides in found.items() if backend in sides and sides[backend][key] > 0]
                place.plot(*zip(*line), color=colour, marker="o", ms=3, lw=1.4, label=SIDES[backend])
            place.set_xscale("log", base=2)
            values = list(found)[::2]
            place.set_xticks(values, [str(value) if value < 1024 else f"{value // 1024}k" for value in values])
            if sweep == "heads":                            # not a power law: from zero on
                place.set_ylim(0, place.get_ylim()[1])
            else:
                place.set_yscale("log")
                place.yaxis.set_major_formatter("{x:g}")
                place.yaxis.set_minor_formatter(NullFormatter())
            place.grid(color=GREY, alpha=0.25, lw=0.6)
            if column == 0:
                place.set_ylabel(label)
            if row == 0:
                titled(place, LABELS[sweep].split(" (")[0].replace(": ", "\n"))
            else:
                place.set_xlabel(sweep)
    axes[0, 0].legend(frameon=False, fontsize=7)
    with explain_disk_errors(f"--figure {path}", "name a file in a folder that is there"), atomic_write(path) as file:
        drawn.savefig(file, format=path.suffix[1:] or "svg", metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    parser = ArgumentParser("python -m bench.growth", description="How a training step's time and memory grow.")
    parser.add_argument("--sweep", choices=list(SWEEPS), action="append", help="default: all")
    parser.add_argument("--most", type=int, default=16384, help="largest value of a sweep (default 16384)")
    parser.add_argument("--rounds", type=int, default=3, help="steps of each side whose median counts (default 3)")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU (default 1)")
    parser.add_argument("--figure", type=Path, default=Path("docs/growth.svg"), help="a .svg or .png (default docs/growth.svg)")
    args = parser.parse_args()
    must_be_writable(args.figure, "--figure")
    points: dict[str, dict[int, dict]] = {}
    for sweep in args.sweep or SWEEPS:
        print(f"\n{LABELS[sweep]}\n{'':12}{SIDES['auto']:>32}{SIDES['reference']:>28}", flush=True)
        points[sweep] = {}
        for value in (value for value in SWEEPS[sweep] if value <= args.most):
            results.meanwhile(f"  {value:8}  …")
            points[sweep][value] = found = measure(sweep, value, args.rounds, args.threads)
            ours, dense = found["auto"], found.get("reference")
            results.meanwhile("")
            print(f"  {value:8}  {ours['ms']:18.1f} ms {ours['gb']:7.3f} GB" + (
                  f"  {dense['ms']:14.1f} ms {dense['gb']:7.3f} GB  {dense['ms'] / ours['ms']:6.2f} × the time" if dense else
                  f"  {'does not fit':>14}"), flush=True)
    draw(points, args.figure)
    print(f"drawn    {args.figure}")
    print("\nstatistics of all heads (8 heads of 64): what they take beside a dense pattern")
    shares = {}
    for context in (value for value in SWEEPS["context"] if value <= args.most):
        side = Side(serve_statistics, context, args.threads)
        seconds, gb = side()
        side.close()
        dense = 4 * 8 * context ** 2 / 1e9
        shares[context] = {"ms": seconds * 1e3, "gb": gb, "pattern_gb": dense}
        print(f"  {context:8}  {seconds * 1e3:8.0f} ms {gb:7.3f} GB, {gb / dense:.1%} of a pattern's {dense:.3f} GB", flush=True)
    results.write("growth", {"device": str(DEVICE), "threads": args.threads, "points": points, "statistics": shares})


if __name__ == "__main__":
    run_command(main)
