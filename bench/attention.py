"""Our attention kernels beside PyTorch's, in one process, taking turns: `python -m bench.attention`.

bf16, causal, 16k tokens a batch, width 2048. Peers: SDPA's FlashAttention-2, SDPA's cuDNN, FlexAttention compiled. Every
figure is the median of rounds in which all sides have their turn; a ratio above 1 says that ours is faster. Three times are
told apart: what the kernels take, from captured graphs (backward is forward and backward less forward); what a call takes
that Python starts; and for how long a call keeps Python. The ceilings beside them, a copy and a matrix product, are measured
in the same run. Without a GPU it runs every line of itself on tiny shapes under triton's interpreter, times that mean
nothing, and says so.

--tune times candidates for the table in kernels/launch.py instead; --check first holds results against the definition.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from itertools import product

from errors import ArgumentParser, UserError, run_command

import torch
import torch.nn.functional as F

from bench import results

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"        # before anything imports triton
DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
TOKENS, WIDTH = (16384, 2048) if GPU else (32, 32)
CONTEXTS = (512, 1024, 2048, 4096, 8192, 16384) if GPU else (16, 32)
HEAD_SIZES = (64, 128) if GPU else (16,)
GROUPS = (1, 4) if GPU else (1, 2)
# kernel → D → tiles that neither spill nor serialise on Hopper (kernels/ahead_of_time.py), several programs to a multiprocessor or few
# bytes a product: rows, columns, warps, stages, programs, maxnreg.
CANDIDATES = {
    "forward": {64: [(128, 64, 8, 3), (128, 64, 8, 2), (128, 128, 8, 2), (64, 128, 4, 2), (64, 64, 4, 3)],
                128: [(128, 32, 8, 3), (128, 128, 8, 2), (128, 64, 8, 2), (64, 64, 4, 2), (64, 64, 4, 3)]},
    "backward_q": {64: [(128, 64, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2)],
                   128: [(128, 64, 8, 2), (64, 64, 4, 2), (128, 32, 8, 2), (64, 32, 4, 2)]},
    "backward_kv": {64: [(32, 128, 8, 2, 2, 128), (64, 64, 4, 2, 3, 168), (64, 128, 8, 2), (32, 64, 4, 2), (64, 64, 4, 2)],
                    128: [(32, 64, 4, 2), (64, 64, 4, 2), (64, 128, 8, 2), (32, 64, 4, 3), (64, 64, 8, 2)]},
    "statistics_rows": {64: [(128, 64, 8, 2), (64, 64, 4, 2), (64, 128, 4, 2)], 128: [(128, 64, 8, 2), (64, 64, 4, 2), (64, 128, 4, 2)]},
    "forward_gluon": {64: [(128, 64, 8, 3), (64, 128, 4, 2), (64, 64, 4, 3), (128, 128, 8, 2)],
                      128: [(128, 128, 8, 2), (64, 64, 4, 2), (128, 64, 8, 2)]},
}
TINY_CANDIDATES = {kernel: {16: [(32, 32, 4, 1), (16, 16, 4, 1)]} for kernel in ("forward", "backward_q", "backward_kv", "statistics_rows")}
PASSES = {"forward": 1.0, "backward": 2.5, "both": 3.5}        # floating-point operations in units of the forward's
GOALS = {("forward", "flash", 64): 1.2, ("forward", "flash", 128): 1.2, ("backward", "flash", 64): 1.1, ("backward", "flash", 128): 1.1,
         ("forward", "cudnn", 64): 1.0, ("forward", "cudnn", 128): 0.85}


def call_milliseconds(call: Callable[[], object]) -> float:
    """Median time of a call as Python makes it, caches flushed between calls."""
    if GPU:
        from triton.testing import do_bench
        return do_bench(call, warmup=10, rep=50, return_mode="median")
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def kernel_milliseconds(call: Callable[[], object]) -> float:
    """Median time of what a call runs on the GPU, captured and replayed many times in a row."""
    if GPU:
        from triton.testing import do_bench_cudagraph
        return do_bench_cudagraph(call, rep=20, return_mode="median")
    return call_milliseconds(call)


def in_turn(calls: dict[str, Callable[[], object]], rounds: int,
            timed: Callable[[Callable], float] = kernel_milliseconds) -> dict[str, float]:
    """Milliseconds of each call, the median of `rounds` in which each has its turn."""
    times = {name: [] for name in calls}
    for call in calls.values():
        call()                                                  # compiles
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(timed(call))
    return {name: statistics.median(values) for name, values in times.items()}


def tensors(T: int, D: int, groups: int) -> list[torch.Tensor]:
    """q, k, v as the projections leave them, (B, heads, T, D) over (B, T, heads, D) memory, and a gradient."""
    B, H = TOKENS // T, WIDTH // D
    shapes = [(B, T, H, D), (B, T, H // groups, D), (B, T, H // groups, D), (B, T, H, D)]
    q, k, v, grad = (torch.randn(shape, device=DEVICE, dtype=DTYPE).transpose(1, 2) for shape in shapes)
    return [q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), grad]


def attentions(T: int, flex: bool) -> dict[str, Callable]:
    """name → function of q, k, v: ours and its peers."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from kernels.attention import attention

    def sdpa(backend):
        def call(q, k, v):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        return call

    sides = {"ours": lambda q, k, v: attention(q, k, v, backend="triton")}
    if not GPU:
        return sides | {"flash": sdpa(SDPBackend.FLASH_ATTENTION)}
    sides |= {"flash": sdpa(SDPBackend.FLASH_ATTENTION), "cudnn": sdpa(SDPBackend.CUDNN_ATTENTION)}
    if flex:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
        torch._dynamo.reset()
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, T, T, device=DEVICE)
        compiled = torch.compile(flex_attention, dynamic=False)
        sides["flex"] = lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
    return sides


def beside_peers(contexts, rounds: int, flex_contexts) -> Iterator[dict]:
    """Forward, backward and both, for every context, head size and group."""
    for T, D, groups in product(contexts, HEAD_SIZES, GROUPS):
        for row in one_shape(T, D, groups, rounds, T in flex_contexts):
            print(line(row), flush=True)
            yield row


def one_shape(T: int, D: int, groups: int, rounds: int, flex: bool) -> list[dict]:
    """A row for each pass: milliseconds of kernels and of calls and, over forward and backward together, megabytes of every side."""
    q, k, v, grad = tensors(T, D, groups)
    passes: dict[str, dict] = {name: {} for name in PASSES}
    memory = {}
    for name, attend in attentions(T, flex).items():
        both = lambda attend=attend: torch.autograd.grad(attend(q, k, v), (q, k, v), grad)                      # noqa: E731
        try:
            memory[name], out = megabytes(attend, q, k, v, grad)
            kernel_milliseconds(both)
        except RuntimeError as error:
            print(f"{name} does not serve T={T} D={D} groups={groups}: {str(error).splitlines()[0][:90]}", flush=True)
            memory.pop(name, None)
            continue
        passes["forward"][name] = lambda attend=attend: no_grad(attend, q, k, v)
        passes["backward"][name] = lambda out=out: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)
        passes["both"][name] = both
    if "ours" not in memory:
        return []
    kernels = {name: in_turn(passes[name], rounds) for name in ("forward", "both")}
    # A graph of the backward pass alone cannot be captured: it runs where its forward pass ran.
    kernels["backward"] = {side: kernels["both"][side] - kernels["forward"][side] for side in kernels["both"]}
    rows = []
    for name, calls in passes.items():
        flops = PASSES[name] * 2 * TOKENS * T * WIDTH                           # 4 B H T² D / 2
        rows.append({"T": T, "D": D, "groups": groups, "pass": name, "tflops": flops / kernels[name]["ours"] / 1e9, "ms": kernels[name],
                     "call_ms": in_turn(calls, rounds, call_milliseconds), "memory_mb": memory})
    return rows


def megabytes(attend, q, k, v, grad) -> tuple[float, torch.Tensor]:
    """What forward and backward take at their highest, beside the inputs (0 without a GPU); and the output."""
    if GPU:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    out = attend(q, k, v)
    torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)
    return ((torch.cuda.max_memory_allocated() - before) / 2 ** 20 if GPU else 0.0), out


def no_grad(attend, q, k, v):
    with torch.no_grad():
        return attend(q, k, v)


def line(row: dict) -> str:
    ratios = "  ".join(f"{name} {row['ms'][name] / row['ms']['ours']:5.2f} ×" for name in row["ms"] if name != "ours")
    memory = "  ".join(f"{name} {mb:.0f}" for name, mb in row["memory_mb"].items())
    return (f"T {row['T']:6}  D {row['D']:3}  groups {row['groups']}  {row['pass']:8}  ours {row['ms']['ours']:9.3f} ms (a call "
            f"{row['call_ms']['ours']:.3f}) {row['tflops']:6.1f} TFLOP/s  against {ratios}  MB: {memory}")


def ceilings() -> dict[str, float]:
    """What the device gives: a copy (bytes read and written) in GB/s, a bf16 matrix product in TFLOP/s, on random data."""
    n, m = (2 ** 30, 8192) if GPU else (2 ** 20, 256)
    x, a = torch.randn(n // 2, device=DEVICE), torch.randn(m, m, device=DEVICE, dtype=DTYPE)
    y = torch.empty_like(x)
    copied = kernel_milliseconds(lambda: y.copy_(x))
    return {"copy_gb_s": 2 * x.nbytes / copied / 1e6, "matmul_tflops": 2 * m ** 3 / kernel_milliseconds(lambda: a @ a) / 1e9}


def windows(rounds: int) -> dict:
    """A window of 1024 at the longest context against full causal attention."""
    from kernels.attention import attention
    T, window = CONTEXTS[-1], 1024 if GPU else 16
    q, k, v, _ = (t.detach() for t in tensors(T, HEAD_SIZES[-1], 1))
    times = in_turn({"full": lambda: attention(q, k, v, backend="triton"),
                     "window": lambda: attention(q, k, v, window=window, backend="triton")}, rounds)
    return {"T": T, "window": window, "ms": times, "faster": times["full"] / times["window"]}


def decoding(rounds: int, copy_gb_s: float) -> list[dict]:
    """One new token a row against S keys, as a share of the copy bandwidth: each key and value is read once."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from kernels.attention import attention, decode
    from kernels.launch import about

    def flash(q, k, v):
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    rows = []
    for B, S, K, groups, D in (((64, 8192, 8, 4, 128), (64, 8192, 32, 1, 64), (1, 8192, 8, 4, 128)) if GPU else ((2, 64, 1, 2, 16),)):
        q = torch.randn(B, K * groups, 1, D, device=DEVICE, dtype=DTYPE)
        # As many caches as do not fit the L2 cache together, one after the other: a single one might be read from there.
        number = -(-4 * about(q.device).l2_bytes // (2 * B * K * S * D * q.itemsize)) if GPU else 1
        caches = [[torch.randn(B, K, S, D, device=DEVICE, dtype=DTYPE) for _ in range(2)] for _ in range(number)]
        # Rows of every length, as a batch of prompts has them: half of the cache on average.
        at = torch.linspace(0, S - 1, B + 2, device=DEVICE)[1:-1].long()[:, None]
        sides = {"ours": lambda k, v, q=q: attention(q, k, v, backend="triton"), "flash": lambda k, v, q=q: flash(q, k, v),
                 "ours, ragged": lambda k, v, q=q, at=at: decode(q, k, v, at, backend="triton")}
        ms = in_turn({name: lambda side=side, caches=caches: [side(k, v) for k, v in caches] for name, side in sides.items()}, rounds)
        ms = {name: time / number for name, time in ms.items()}
        rate = 2 * caches[0][0].nbytes / ms["ours"] / 1e6
        rows.append({"B": B, "S": S, "K": K, "groups": groups, "D": D, "ms": ms, "gb_s": rate, "share_of_copy": rate / copy_gb_s})
    return rows


def head_statistics_cost(rounds: int) -> list[dict]:
    """All statistics of all heads against the forward pass whose lse they take."""
    from kernels.attention import attention
    from kernels.statistics import head_statistics
    rows = []
    for T, D in product(sorted({CONTEXTS[0], *CONTEXTS[-2:]}), HEAD_SIZES):
        q, k, v, _ = (t.detach() for t in tensors(T, D, 1))
        ids = torch.randint(0, 500, (TOKENS // T, T), device=DEVICE)
        _, lse = attention(q, k, v, backend="triton", return_lse=True)
        ms = in_turn({"forward": lambda q=q, k=k, v=v: attention(q, k, v, backend="triton"),
                      "statistics": lambda q=q, k=k, lse=lse, ids=ids: head_statistics(q, k, lse, ids, backend="triton")}, rounds)
        rows.append({"T": T, "D": D, "ms": ms, "of_forward": ms["statistics"] / ms["forward"]})
    return rows


def host_microseconds() -> dict[str, float]:
    """For how long a call keeps Python, forward and backward, while the GPU has less to do than that (bench/host_time.py)."""
    from bench.host_time import microseconds
    q, k, v, grad = (t[:1, :4, :128] for t in tensors(CONTEXTS[0], HEAD_SIZES[0], 1))
    calls, rounds = (100, 5) if GPU else (1, 1)
    found = {}
    for name, attend in attentions(q.shape[2], flex=False).items():
        try:
            out = attend(q, k, v)
        except RuntimeError as error:
            print(f"{name} does not serve T=128: {str(error).splitlines()[0][:90]}", flush=True)
            continue
        backward = lambda out=out: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)                  # noqa: E731
        found[f"{name}, forward"] = microseconds(lambda attend=attend: attend(q, k, v), calls, rounds)
        found[f"{name}, backward"] = microseconds(backward, calls, rounds)
    return found


def check() -> None:
    """Every kernel against the definition on this device, on fresh random numbers; SystemExit where one is off."""
    from kernels.attention import attention
    for T, D, groups in product((CONTEXTS[0], CONTEXTS[0] - 3), HEAD_SIZES, GROUPS):
        q, k, v, grad = (t[:1, :4 * groups if i in (0, 3) else 4, :T].detach() for i, t in enumerate(tensors(CONTEXTS[0], D, groups)))
        k, v = (t[:, :q.shape[1] // groups] for t in (k, v))
        found = []
        for backend, dtype in (("triton", DTYPE), ("reference", torch.float64)):
            inputs = [t.to(dtype).requires_grad_() for t in (q, k, v)]
            out = attention(*inputs, backend=backend)
            found.append([out.detach(), *torch.autograd.grad(out, inputs, grad.to(dtype))])
        for name, a, b in zip(("out", "dq", "dk", "dv"), *found):
            error = ((a.double() - b).norm() / b.norm()).item()
            if not error < (1e-2 if GPU else 1e-4):
                raise UserError(f"{name} is off by {error:.1e} of its size at T={T} D={D} groups={groups}: no timing is worth taking")
    print("checked: out, dq, dk, dv agree with float64", flush=True)


def tune() -> Iterator[dict]:
    """Milliseconds of forward and backward with each candidate tile in place of the table's."""
    from kernels import launch
    from kernels.launch import Tile
    for kernel, by_size in (CANDIDATES if GPU else TINY_CANDIDATES).items():
        if kernel not in launch.TILES[launch.family(torch.device(DEVICE, 0))]:
            continue                                                            # Gluon's is for Hopper alone
        for D, tiles in by_size.items():
            T = CONTEXTS[3 if GPU else 0]
            q, k, v, grad = (t.detach() for t in tensors(T, D, 1))
            ids = torch.randint(0, 500, (TOKENS // T, T), device=DEVICE)
            for tile in [Tile(*numbers) for numbers in tiles]:
                name = f"{kernel:16} D {D:3}  {tile.rows:3} × {tile.columns:3}  warps {tile.warps}  stages {tile.stages}"
                try:
                    with launch.tile_for(kernel, tile):
                        ms = kernel_milliseconds(timed_call(kernel, q, k, v, grad, ids))
                except Exception as error:                                      # too large for the device, or for the compiler
                    print(f"{name}  {type(error).__name__}", flush=True)
                else:
                    print(f"{name}  {ms:.3f} ms", flush=True)
                    yield {"kernel": kernel, "D": D, "T": T, "tile": tile, "ms": ms}


def timed_call(kernel: str, q, k, v, grad, ids) -> Callable[[], object]:
    """A call whose time moves with one kernel's tile (the backward ones run together)."""
    from kernels.flash import flash_attention, flash_attention_backward
    from kernels.statistics import head_statistics
    from kernels.tiles import masks_of
    rest = (True, None, None, q.shape[-1] ** -0.5)
    out, lse = flash_attention(q, k, v, *rest)
    if kernel == "forward_gluon":
        from kernels.flash_gluon import launch_gluon
        masks = masks_of(q, k, *rest)
        return lambda: launch_gluon(q, k, v, out, lse, masks)
    return {"forward": lambda: flash_attention(q, k, v, *rest),
            "statistics_rows": lambda: head_statistics(q, k, lse, ids, backend="triton"),
            }.get(kernel, lambda: flash_attention_backward(grad, q, k, v, out, lse, *rest))


def verdict(figures: dict) -> list[str]:
    """The goals, each beside what was measured: of ratios the median and the worst over all contexts and groups."""
    ceilings, windowed = figures["ceilings"], figures["windows"]
    lines = [f"ceilings: copy {ceilings['copy_gb_s']:.0f} GB/s, matrix product {ceilings['matmul_tflops']:.0f} TFLOP/s"]
    for (name, peer, D), goal in GOALS.items():
        ratios = [r["ms"][peer] / r["ms"]["ours"] for r in figures["rows"] if (r["pass"], r["D"]) == (name, D) and peer in r["ms"]]
        if ratios:
            lines.append(f"{name} D {D} against {peer}: median {statistics.median(ratios):.2f} ×, worst {min(ratios):.2f} ×, goal {goal} ×")
    lines.append(f"window {windowed['window']} at T {windowed['T']}: {windowed['faster']:.1f} × faster than full, goal 6 ×")
    for r in figures["decode"]:
        lines.append(f"decode B {r['B']} S {r['S']} K {r['K']} groups {r['groups']} D {r['D']}: {r['gb_s']:.0f} GB/s, "
                     f"{r['share_of_copy']:.0%} of a copy, goal 80% at B 64")
    for r in figures["statistics"]:
        lines.append(f"head statistics T {r['T']} D {r['D']}: {r['of_forward']:.2f} × the forward pass, goal 1.2 ×")
    return lines


def main() -> None:
    parser = ArgumentParser("python -m bench.attention", description="Our attention kernels beside PyTorch's.")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="turns that each side has (default 3)")
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS, metavar="T", help="contexts to measure (default: all)")
    parser.add_argument("--flex", type=int, nargs="*", default=(1024, 4096, 16384), metavar="T",
                        help="contexts at which FlexAttention joins: it compiles at each, for half a minute (default 1024 4096 16384)")
    parser.add_argument("--check", action="store_true", help="hold results against the definition first")
    parser.add_argument("--tune", action="store_true", help="time candidate tiles instead")
    args = parser.parse_args()
    if bad := [T for T in args.contexts if T < 1 or TOKENS % T]:
        raise UserError(f"--contexts {bad[0]} does not divide the {TOKENS} tokens of a batch (try 1024)")
    device = torch.cuda.get_device_name() if GPU else "none: a dry run on the CPU under the interpreter, whose times mean nothing"
    print(f"GPU: {device}", flush=True)
    figures: dict = {"gpu": device, "triton": version("triton"), "dry_run": not GPU}
    if args.check or not GPU:
        check()
    # Written after every figure: the machine may be lent for minutes.
    if args.tune:
        figures["tiles"] = []
        for row in tune():
            figures["tiles"].append(row)
            results.write("attention_tiles", figures)
        return
    figures["ceilings"], figures["host_us"], figures["rows"] = ceilings(), host_microseconds(), []
    print("Python is kept for", ", ".join(f"{name} {us:.0f} µs" for name, us in figures["host_us"].items()), flush=True)
    for row in beside_peers(args.contexts, args.rounds, args.flex):
        figures["rows"].append(row)
        results.write("attention", figures)
    figures["windows"], figures["decode"] = windows(args.rounds), decoding(args.rounds, figures["ceilings"]["copy_gb_s"])
    figures["statistics"] = head_statistics_cost(args.rounds)
    results.write("attention", figures)
    print("\n".join(verdict(figures) if GPU else ["every line has run; run it on a GPU for figures"]))


if __name__ == "__main__":
    run_command(main)
