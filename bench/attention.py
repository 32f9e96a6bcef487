"""Our attention kernels and PyTorch's in turn, in one process: `python -m bench.attention`.

bf16, causal, 16k tokens per batch, width 2048. The peers are SDPA's FlashAttention-2, SDPA's cuDNN
and FlexAttention, compiled. Every figure is the median of rounds in which each side has its turn; a
ratio above 1 says that ours is faster. Three times are kept apart: what the kernels take, from
captured graphs (backward is forward and backward, less forward); what a call takes that Python
starts; and for how long a call keeps Python. The ceilings beside them, a copy and a matrix product,
are measured in the same run. Without a GPU every line runs on tiny shapes under triton's
interpreter, with times that mean nothing, and the output says so.

The peers are in bench/attention_peers.py, the other calls in bench/attention_calls.py.
--tune times candidates for the table in kernels/launch.py instead (bench/attention_tiles.py).
--check first compares results with the definition.
"""

import os
import statistics
from importlib.metadata import version
from itertools import product

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"        # read when triton is imported, just below

from errors import ArgumentParser, UserError, run_command

from bench import results
from bench.attention_calls import ceilings, decoding, head_statistics_cost, windows
from bench.attention_peers import beside_peers, python_microseconds
from bench.attention_shapes import CONTEXTS, GROUPS, HEAD_SIZES, TOKENS, tensors
from bench.attention_tiles import tune
from bench.results import DTYPE, GPU
from kernels.attention import attention

# (pass, peer, D) → the ratio to reach
GOALS = {("forward", "flash", 64): 1.2, ("forward", "flash", 128): 1.2,
         ("backward", "flash", 64): 1.0, ("backward", "flash", 128): 1.0,
         ("forward", "cudnn", 64): 1.0, ("forward", "cudnn", 128): 0.85}


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
        lines.append(f"head statistics T {row['T']} D {row['D']} {row['tokens']}: "
                     f"{row['of_forward']:.2f} × the forward pass, goal 1.2 ×")
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
