"""How cost grows: `python -m bench.growth` draws docs/growth.svg.

Time and memory of a training step (forward and backward) against context, width and number of
heads: attention that never holds its pattern, and the same formula with the pattern materialised.
Then the memory of the head statistics and of a dense pattern. Each point runs in a process of its
own, so that its memory is that of its own step; the two variants take turns. On a CPU attention is
PyTorch's kernel, on a GPU ours.
"""

import statistics
import time
from multiprocessing.connection import Connection
from pathlib import Path

from errors import ArgumentParser, run_command

import torch

from bench import results
from bench.results import DEVICE, DTYPE, GPU
from bench.side import Side
from files import atomic_write, explain_disk_errors, must_be_writable
from kernels.attention import attention
from kernels.statistics import head_statistics
from model.config import ModelConfig
from model.gpt import GPT
from report.figures import BLUE, GREY, SECOND, figure, titled
from training.device import peak_memory_gb

BACKENDS = {"auto": "attention without its pattern", "reference": "pattern materialised"}
SWEEPS = {
    "context": [256, 512, 1024, 2048, 4096, 8192, 16384],
    "width": [64, 128, 256, 512, 1024],
    "heads": [1, 2, 4, 8, 16],
}
LABELS = {
    "context": "context: one row of that many tokens (width 128, 2 heads)",
    "width": "width: 4 × 256 tokens, heads of 64",
    "heads": "heads: 4 × 256 tokens, width 256",
}
# Bytes of all patterns of a step. Their gradients and copies come on top.
MAX_PATTERN_BYTES = 8e9 if GPU else 1.5e9

Point = dict[str, dict[str, float]]             # backend → "ms", "gb"


def shape(sweep: str, value: int) -> tuple[ModelConfig, int]:
    """A model of two layers, and the number of rows in its batch."""
    context = value if sweep == "context" else 256
    width = {"context": 128, "width": value, "heads": 256}[sweep]
    n_heads = value if sweep == "heads" else width // 64
    config = ModelConfig(n_layers=2, n_heads=n_heads, d_model=width, n_ctx=context, vocab_size=512)
    return config, 1 if sweep == "context" else 4


def pattern_bytes(config: ModelConfig, rows: int) -> int:
    """Bytes of all attention patterns of a step in float32."""
    return 4 * config.n_layers * rows * config.n_heads * config.n_ctx ** 2


def serve_step(
        pipe: Connection, backend: str, config: ModelConfig, rows: int, threads: int) -> None:
    """`()` → seconds of one more step, and the GB that the steps so far added to the start."""
    torch.set_num_threads(threads)
    model = GPT(config).to(DEVICE)
    model.compute_dtype = DTYPE
    model.attention_backend = backend
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(512, (rows, config.n_ctx + 1), generator=generator).to(DEVICE)
    before = peak_memory_gb(DEVICE)
    while pipe.recv() is not None:
        started = time.perf_counter()
        loss = model.loss(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        loss.item()
        pipe.send((time.perf_counter() - started, peak_memory_gb(DEVICE) - before))
        model.zero_grad()


def serve_statistics(pipe: Connection, context: int, threads: int) -> None:
    """`()` → seconds of the statistics of 8 heads, and the GB they added to q, k and lse."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 8, context, 64, generator=generator).to(DEVICE, DTYPE)
               for _ in range(3))
    tokens = torch.randint(512, (1, context), generator=generator).to(DEVICE)
    _, lse = attention(q, k, v, return_lse=True)
    while pipe.recv() is not None:
        before, started = peak_memory_gb(DEVICE), time.perf_counter()
        head_statistics(q, k, lse, tokens).entropy.sum().item()
        pipe.send((time.perf_counter() - started, peak_memory_gb(DEVICE) - before))


def measure(sweep: str, value: int, rounds: int, threads: int) -> Point:
    """Median milliseconds and GB of a step with each backend.

    The backend that holds the pattern is left out if the pattern does not fit.
    """
    config, rows = shape(sweep, value)
    fits = pattern_bytes(config, rows) <= MAX_PATTERN_BYTES
    sides = {backend: Side(serve_step, backend, config, rows, threads)
             for backend in BACKENDS if backend == "auto" or fits}
    for side in sides.values():
        side()                                  # warm-up
    steps: dict[str, list[tuple[float, float]]] = {backend: [] for backend in sides}
    for _ in range(rounds):
        for backend, side in sides.items():
            steps[backend].append(side())
    for side in sides.values():
        side.close()
    point = {}
    for backend, timed in steps.items():
        median = statistics.median(seconds for seconds, _ in timed)
        point[backend] = {"ms": median * 1e3, "gb": timed[-1][1]}
    return point


def run_sweep(sweep: str, values: list[int], rounds: int, threads: int) -> dict[int, Point]:
    """Measure and print every point of a sweep."""
    print(f"\n{LABELS[sweep]}\n"
          f"{'':12}{BACKENDS['auto']:>32}{BACKENDS['reference']:>28}", flush=True)
    points = {}
    for value in values:
        results.meanwhile(f"  {value:8}  …")
        points[value] = point = measure(sweep, value, rounds, threads)
        results.meanwhile("")
        ours, dense = point["auto"], point.get("reference")
        row = f"  {value:8}  {ours['ms']:18.1f} ms {ours['gb']:7.3f} GB"
        if dense:
            row += (f"  {dense['ms']:14.1f} ms {dense['gb']:7.3f} GB"
                    f"  {dense['ms'] / ours['ms']:6.2f} × the time")
        else:
            row += f"  {'does not fit':>14}"
        print(row, flush=True)
    return points


def run_statistics(contexts: list[int], threads: int) -> dict[int, dict[str, float]]:
    """Measure and print what the statistics of 8 heads take, and what their pattern would."""
    print("\nstatistics of all heads (8 heads of 64): their memory and that of a dense pattern")
    points = {}
    for context in contexts:
        side = Side(serve_statistics, context, threads)
        seconds, gb = side()
        side.close()
        pattern_gb = 4 * 8 * context ** 2 / 1e9
        points[context] = {"ms": seconds * 1e3, "gb": gb, "pattern_gb": pattern_gb}
        print(f"  {context:8}  {seconds * 1e3:8.0f} ms {gb:7.3f} GB, "
              f"{gb / pattern_gb:.1%} of a pattern's {pattern_gb:.3f} GB", flush=True)
    return points


def draw(sweeps: dict[str, dict[int, Point]], path: Path) -> None:
    """Draw time in the upper row and memory in the lower one, one column for each sweep."""
    from matplotlib.ticker import NullFormatter
    drawing, axes = figure(3.1 * len(sweeps), 4.6, 2, len(sweeps))
    for column, (sweep, points) in enumerate(sweeps.items()):
        for row, (key, label) in enumerate((("ms", "ms per training step"), ("gb", "GB added"))):
            axis = axes[row, column]
            for backend, colour in (("auto", BLUE), ("reference", SECOND)):
                # A step that took no new memory has no place on a logarithmic axis.
                line = [(value, point[backend][key]) for value, point in points.items()
                        if backend in point and point[backend][key] > 0]
                axis.plot(*zip(*line), color=colour, marker="o", ms=3, lw=1.4,
                          label=BACKENDS[backend])
            axis.set_xscale("log", base=2)
            values = list(points)[::2]
            axis.set_xticks(values, [str(value) if value < 1024 else f"{value // 1024}k"
                                     for value in values])
            if sweep == "heads":                            # not a power law: start at zero
                axis.set_ylim(0, axis.get_ylim()[1])
            else:
                axis.set_yscale("log")
                axis.yaxis.set_major_formatter("{x:g}")
                axis.yaxis.set_minor_formatter(NullFormatter())
            axis.grid(color=GREY, alpha=0.25, lw=0.6)
            if column == 0:
                axis.set_ylabel(label)
            if row == 0:
                titled(axis, LABELS[sweep].split(" (")[0].replace(": ", "\n"))
            else:
                axis.set_xlabel(sweep)
    axes[0, 0].legend(frameon=False, fontsize=7)
    # The date is left out, so that the same measurements give the same SVG.
    metadata = {"Date": None} if path.suffix == ".svg" else None
    with explain_disk_errors(f"--figure {path}", "name a file in an existing folder"), \
            atomic_write(path) as file:
        drawing.savefig(file, format=path.suffix[1:] or "svg", metadata=metadata)


def main() -> None:
    parser = ArgumentParser("python -m bench.growth",
                            description="How a training step's time and memory grow.")
    parser.add_argument("--sweep", choices=list(SWEEPS), action="append", help="default: all")
    parser.add_argument("--most", type=int, default=16384, metavar="N",
                        help="largest value of a sweep (default 16384)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N",
                        help="timed steps of each variant; the median counts (default 3)")
    parser.add_argument("--threads", type=int, default=1, metavar="N",
                        help="CPU threads (default 1)")
    parser.add_argument("--figure", type=Path, default=Path("docs/growth.svg"), metavar="FILE",
                        help="a .svg or .png (default docs/growth.svg)")
    args = parser.parse_args()
    must_be_writable(args.figure, "--figure")

    values = {sweep: [value for value in SWEEPS[sweep] if value <= args.most] for sweep in SWEEPS}
    points = {sweep: run_sweep(sweep, values[sweep], args.rounds, args.threads)
              for sweep in args.sweep or SWEEPS}
    draw(points, args.figure)
    print(f"drawn    {args.figure}")
    statistics_points = run_statistics(values["context"], args.threads)
    results.write("growth", {"device": str(DEVICE), "threads": args.threads, "points": points,
                             "statistics": statistics_points})


if __name__ == "__main__":
    run_command(main)
