"""Our attention kernels and PyTorch's in turn, in one process: `python -m bench.attention`.

bf16, causal, 16k tokens per batch, width 2048. The peers are SDPA's FlashAttention-2, SDPA's cuDNN
and FlexAttention, compiled. Every figure is the median of rounds in which each side has its turn; a
ratio above 1 says that ours is faster. Three times are kept apart: what the kernels take, from
captured graphs (backward is forward and backward, less forward); what a call takes that Python
starts; and for how long a call keeps Python. The ceilings beside them, a copy and a matrix product,
are measured in the same run. Without a GPU every line runs on tiny shapes under triton's
interpreter, with times that mean nothing, and the output says so.

--tune times candidates for the table in kernels/launch.py instead (bench/attention_tiles.py).
--check first compares results with the definition.
"""

import os
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"        # read when triton is imported, just below

from errors import ArgumentParser, UserError, run_command

from bench import results
from bench.attention_shapes import (
    CONTEXTS,
    GROUPS,
    HEAD_SIZES,
    TOKENS,
    WIDTH,
    random_tokens,
    tensors,
)
from bench.attention_tiles import tune
from bench.results import DEVICE, DTYPE, GPU
from bench.timers import call_milliseconds, host_microseconds, in_turn, kernel_milliseconds
from kernels.attention import attention, decode
from kernels.launch import about
from kernels.statistics import head_statistics

# Floating-point operations of each pass, in units of the forward's.
PASSES = {"forward": 1.0, "backward": 2.5, "both": 3.5}
# (pass, peer, D) → the ratio to reach
GOALS = {("forward", "flash", 64): 1.2, ("forward", "flash", 128): 1.2,
         ("backward", "flash", 64): 1.1, ("backward", "flash", 128): 1.1,
         ("forward", "cudnn", 64): 1.0, ("forward", "cudnn", 128): 0.85}


# --- ours and its peers ---

def attentions(T: int, flex: bool) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """name → function of q, k, v: ours and its peers."""
    def sdpa(backend: SDPBackend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True,
                                                      enable_gqa=q.shape[1] != k.shape[1])
        return call

    sides = {"ours": lambda q, k, v: attention(q, k, v, backend="triton"),
             "flash": sdpa(SDPBackend.FLASH_ATTENTION)}
    if not GPU:
        return sides
    sides["cudnn"] = sdpa(SDPBackend.CUDNN_ATTENTION)
    if flex:
        torch._dynamo.reset()
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, T, T, device=DEVICE)
        compiled = torch.compile(flex_attention, dynamic=False)
        sides["flex"] = lambda q, k, v: compiled(q, k, v, block_mask=mask,
                                                 enable_gqa=q.shape[1] != k.shape[1])
    return sides


def beside_peers(contexts: tuple[int, ...], rounds: int,
                 flex_contexts: tuple[int, ...]) -> Iterator[dict]:
    """Forward, backward and both, for every context, head size and group."""
    for T, D, groups in product(contexts, HEAD_SIZES, GROUPS):
        for row in rows_of_shape(T, D, groups, rounds, T in flex_contexts):
            print(line(row), flush=True)
            yield row


def rows_of_shape(T: int, D: int, groups: int, rounds: int, flex: bool) -> list[dict]:
    """A row for each pass: milliseconds of kernels and of calls, and megabytes, of every side.

    Megabytes are of forward and backward together.
    """
    q, k, v, grad = tensors(T, D, groups)
    passes: dict[str, dict] = {name: {} for name in PASSES}
    memory = {}
    for name, attend in attentions(T, flex).items():
        def forward(attend: Any = attend) -> Any:
            with torch.no_grad():
                return attend(q, k, v)

        def both(attend: Any = attend) -> Any:
            return torch.autograd.grad(attend(q, k, v), (q, k, v), grad)

        try:
            memory[name], out = megabytes(attend, q, k, v, grad)
            kernel_milliseconds(both)
        except RuntimeError as error:
            print(f"{name} does not serve T={T} D={D} groups={groups}: {first_words(error)}",
                  flush=True)
            memory.pop(name, None)
            continue

        def backward(out: Any = out) -> Any:
            return torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)

        passes["forward"][name] = forward
        passes["backward"][name] = backward
        passes["both"][name] = both
    if "ours" not in memory:
        return []
    kernels = {name: in_turn(passes[name], rounds) for name in ("forward", "both")}
    # A graph of only the backward pass cannot be captured: it runs on its forward pass's stream.
    kernels["backward"] = {side: kernels["both"][side] - kernels["forward"][side]
                           for side in kernels["both"]}
    rows = []
    for name, calls in passes.items():
        flops = PASSES[name] * 2 * TOKENS * T * WIDTH                   # 4 B H T² D / 2
        rows.append({"T": T, "D": D, "groups": groups, "pass": name,
                     "tflops": flops / kernels[name]["ours"] / 1e9, "ms": kernels[name],
                     "call_ms": in_turn(calls, rounds, call_milliseconds), "memory_mb": memory})
    return rows


def megabytes(attend: Callable, q: Tensor, k: Tensor, v: Tensor,
              grad: Tensor) -> tuple[float, Tensor]:
    """The peak of forward and backward beyond the inputs (0 without a GPU), and the output."""
    if GPU:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    out = attend(q, k, v)
    torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)
    return ((torch.cuda.max_memory_allocated() - before) / 2 ** 20 if GPU else 0.0), out


def first_words(error: Exception) -> str:
    return str(error).splitlines()[0][:90]


def line(row: dict) -> str:
    ours, calls = row["ms"]["ours"], row["call_ms"]["ours"]
    ratios = "  ".join(f"{name} {ms / ours:5.2f} ×" for name, ms in row["ms"].items()
                       if name != "ours")
    memory = "  ".join(f"{name} {mb:.0f}" for name, mb in row["memory_mb"].items())
    return (f"T {row['T']:6}  D {row['D']:3}  groups {row['groups']}  {row['pass']:8}  "
            f"ours {ours:9.3f} ms (a call {calls:.3f}) {row['tflops']:6.1f} TFLOP/s  "
            f"against {ratios}  MB: {memory}")


# --- other calls, each against its own ceiling ---

def ceilings() -> dict[str, float]:
    """What the device can do, on random data.

    A copy (bytes read and written) in GB/s, a bf16 matrix product in TFLOP/s.
    """
    n, m = (2 ** 30, 8192) if GPU else (2 ** 20, 256)
    x, a = torch.randn(n // 2, device=DEVICE), torch.randn(m, m, device=DEVICE, dtype=DTYPE)
    y = torch.empty_like(x)
    copied = kernel_milliseconds(lambda: y.copy_(x))
    return {"copy_gb_s": 2 * x.nbytes / copied / 1e6,
            "matmul_tflops": 2 * m ** 3 / kernel_milliseconds(lambda: a @ a) / 1e9}


def windows(rounds: int) -> dict:
    """A window of 1024 at the longest context against full causal attention."""
    T, window = CONTEXTS[-1], 1024 if GPU else 16
    q, k, v, _ = (t.detach() for t in tensors(T, HEAD_SIZES[-1], 1))
    times = in_turn({"full": lambda: attention(q, k, v, backend="triton"),
                     "window": lambda: attention(q, k, v, window=window, backend="triton")}, rounds)
    return {"T": T, "window": window, "ms": times, "faster": times["full"] / times["window"]}


def read_all(side: Callable[[Tensor, Tensor], Tensor], caches: list[list[Tensor]]) -> None:
    """One call on each cache."""
    for k, v in caches:
        side(k, v)


def decoding(rounds: int, copy_gb_s: float) -> list[dict]:
    """One new token per row against S keys, as a fraction of the copy bandwidth.

    Each key and value is read once.
    """
    def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    shapes = [(64, 8192, 8, 4, 128), (64, 8192, 32, 1, 64), (1, 8192, 8, 4, 128)]
    if not GPU:
        shapes = [(2, 64, 1, 2, 16)]
    rows = []
    for B, S, K, groups, D in shapes:
        q = torch.randn(B, K * groups, 1, D, device=DEVICE, dtype=DTYPE)
        # As many caches as do not fit the L2 cache together, one after the other: a single one
        # might be read from there.
        bytes_of_cache = 2 * B * K * S * D * q.itemsize
        number = -(-4 * about(q.device).l2_bytes // bytes_of_cache) if GPU else 1
        caches = [[torch.randn(B, K, S, D, device=DEVICE, dtype=DTYPE) for _ in range(2)]
                  for _ in range(number)]
        # Rows of every length, as a batch of prompts has them: half of the cache on average.
        at = torch.linspace(0, S - 1, B + 2, device=DEVICE)[1:-1].long()[:, None]
        sides: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "ours": partial(attention, q, backend="triton"), "flash": partial(flash, q),
            "ours, ragged": partial(decode, q, query_positions=at, backend="triton")}
        calls: dict[str, Callable[[], object]] = {
            name: partial(read_all, side, caches) for name, side in sides.items()}
        ms = {name: time / number for name, time in in_turn(calls, rounds).items()}
        rate = 2 * caches[0][0].nbytes / ms["ours"] / 1e6
        rows.append({"B": B, "S": S, "K": K, "groups": groups, "D": D, "ms": ms, "gb_s": rate,
                     "share_of_copy": rate / copy_gb_s})
    return rows


def head_statistics_cost(rounds: int) -> list[dict]:
    """All statistics of all heads against the forward pass whose lse they take."""
    rows = []
    for T, D in product(sorted({CONTEXTS[0], *CONTEXTS[-2:]}), HEAD_SIZES):
        q, k, v, _ = (t.detach() for t in tensors(T, D, 1))
        ids = random_tokens(T)
        _, lse = attention(q, k, v, backend="triton", return_lse=True)

        def forward(q: Any = q, k: Any = k, v: Any = v) -> Any:
            return attention(q, k, v, backend="triton")

        def statistics(q: Any = q, k: Any = k, lse: Any = lse, ids: Any = ids) -> Any:
            return head_statistics(q, k, lse, ids, backend="triton")

        ms = in_turn({"forward": forward, "statistics": statistics}, rounds)
        rows.append({"T": T, "D": D, "ms": ms, "of_forward": ms["statistics"] / ms["forward"]})
    return rows


def python_microseconds() -> dict[str, float]:
    """For how long a call keeps Python, while the GPU has less to do than that.

    Forward and backward, as in bench/host_time.py.
    """
    q, k, v, grad = (t[:1, :4, :128] for t in tensors(CONTEXTS[0], HEAD_SIZES[0], 1))
    calls, rounds = (100, 5) if GPU else (1, 1)
    microseconds = {}
    for name, attend in attentions(q.shape[2], flex=False).items():
        try:
            out = attend(q, k, v)
        except RuntimeError as error:
            print(f"{name} does not serve T=128: {first_words(error)}", flush=True)
            continue

        def forward(attend: Any = attend) -> Any:
            return attend(q, k, v)

        def backward(out: Any = out) -> Any:
            return torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)

        microseconds[f"{name}, forward"] = host_microseconds(forward, calls, rounds)
        microseconds[f"{name}, backward"] = host_microseconds(backward, calls, rounds)
    return microseconds


def check() -> None:
    """Every kernel against the definition on this device, on random numbers; UserError if wrong."""
    largest = 1e-2 if GPU else 1e-4
    for T, D, groups in product((CONTEXTS[0], CONTEXTS[0] - 3), HEAD_SIZES, GROUPS):
        q, k, v, grad = (t[:1, :, :T].detach() for t in tensors(CONTEXTS[0], D, groups))
        q, grad = q[:, :4 * groups], grad[:, :4 * groups]
        k, v = k[:, :q.shape[1] // groups], v[:, :q.shape[1] // groups]
        results_by = {}
        for backend, dtype in (("triton", DTYPE), ("reference", torch.float64)):
            inputs = [t.to(dtype).requires_grad_() for t in (q, k, v)]
            out = attention(*inputs, backend=backend)
            grads = torch.autograd.grad(out, inputs, grad.to(dtype))
            results_by[backend] = [out.detach(), *grads]
        for name, a, b in zip(("out", "dq", "dk", "dv"), *results_by.values()):
            error = ((a.double() - b).norm() / b.norm()).item()
            if not error < largest:
                raise UserError(f"{name} is off by {error:.1e} of its size at T={T} D={D} "
                                f"groups={groups}: no timing is worth taking")
    print("checked: out, dq, dk, dv agree with float64", flush=True)


# --- the command ---

def verdict(figures: dict) -> list[str]:
    """The goals beside the measurements: of ratios the median and the worst, over all shapes."""
    copy_gb_s, tflops = figures["ceilings"]["copy_gb_s"], figures["ceilings"]["matmul_tflops"]
    windowed = figures["windows"]
    lines = [f"ceilings: copy {copy_gb_s:.0f} GB/s, matrix product {tflops:.0f} TFLOP/s"]
    for (name, peer, D), goal in GOALS.items():
        ratios = [row["ms"][peer] / row["ms"]["ours"] for row in figures["rows"]
                  if row["pass"] == name and row["D"] == D and peer in row["ms"]]
        if ratios:
            lines.append(f"{name} D {D} against {peer}: median {statistics.median(ratios):.2f} ×, "
                         f"worst {min(ratios):.2f} ×, goal {goal} ×")
    lines.append(f"window {windowed['window']} at T {windowed['T']}: {windowed['faster']:.1f} × "
                 "faster than full, goal 6 ×")
    for row in figures["decode"]:
        lines.append(f"decode B {row['B']} S {row['S']} K {row['K']} groups {row['groups']} "
                     f"D {row['D']}: {row['gb_s']:.0f} GB/s, {row['share_of_copy']:.0%} of a copy, "
                     "goal 80% at B 64")
    for row in figures["statistics"]:
        lines.append(f"head statistics T {row['T']} D {row['D']}: {row['of_forward']:.2f} × the "
                     "forward pass, goal 1.2 ×")
    return lines


def main() -> None:
    parser = ArgumentParser("python -m bench.attention",
                            description="Our attention kernels beside PyTorch's.")
    parser.add_argument("--rounds", type=int, default=3, metavar="N",
                        help="turns that each side has (default 3)")
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS, metavar="T",
                        help="contexts to measure (default: all)")
    parser.add_argument("--flex", type=int, nargs="*", default=(1024, 4096, 16384), metavar="T",
                        help="contexts at which FlexAttention takes part: it compiles at each, "
                             "for half a minute (default 1024 4096 16384)")
    parser.add_argument("--check", action="store_true",
                        help="first compare results with the definition")
    parser.add_argument("--tune", action="store_true", help="time candidate tiles instead")
    args = parser.parse_args()
    if bad := [T for T in args.contexts if T < 1 or TOKENS % T]:
        raise UserError(f"--contexts {bad[0]} does not divide the {TOKENS} tokens of a batch "
                        "(try 1024)")
    device = "none: a dry run on the CPU under the interpreter, whose times mean nothing"
    if GPU:
        device = torch.cuda.get_device_name()
    print(f"GPU: {device}", flush=True)
    figures: dict = {"gpu": device, "triton": version("triton"), "dry_run": not GPU}
    if args.check or not GPU:
        check()
    # Written after every figure: a machine may be lent only for minutes.
    if args.tune:
        figures["tiles"] = []
        for row in tune():
            figures["tiles"].append(row)
            results.write("attention_tiles", figures)
        return
    figures["ceilings"], figures["host_us"] = ceilings(), python_microseconds()
    times = ", ".join(f"{name} {us:.0f} µs" for name, us in figures["host_us"].items())
    print("A call keeps Python for", times, flush=True)
    figures["rows"] = []
    for row in beside_peers(args.contexts, args.rounds, args.flex):
        figures["rows"].append(row)
        results.write("attention", figures)
    figures["windows"] = windows(args.rounds)
    figures["decode"] = decoding(args.rounds, figures["ceilings"]["copy_gb_s"])
    figures["statistics"] = head_statistics_cost(args.rounds)
    results.write("attention", figures)
    lines = verdict(figures) if GPU else ["every line has run; run it on a GPU for figures"]
    print("\n".join(lines))


if __name__ == "__main__":
    run_command(main)
