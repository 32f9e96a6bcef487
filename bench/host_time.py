"""For how long a call of our attention keeps Python busy: `python -m bench.host_time`.

A GPU that is done before Python has started the next call waits for it: at T = 512 the forward kernel itself takes about 100 µs.
On a GPU the calls are real, with less for it to do than for Python. Without one everything happens but the driver's own
work, which is some microseconds a launch.
"""

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

from errors import ArgumentParser, run_command

import torch

from bench import results
from bench.results import DEVICE, GPU
from kernels import ahead_of_time
from kernels.attention import attention
from kernels.flash import flash_attention, flash_attention_backward


def microseconds(call: Callable[[], object], calls: int, rounds: int = 9) -> float:
    """A call's share of the time that `calls` of them keep Python, the median of some rounds."""
    call()
    taken = []
    for _ in range(rounds):
        if GPU:
            torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(calls):
            call()
        taken.append((time.perf_counter() - started) / calls * 1e6)
    return statistics.median(taken)


def main() -> None:
    parser = ArgumentParser("python -m bench.host_time", description="For how long a call of our attention keeps Python busy.")
    parser.add_argument("--calls", type=int, default=200, metavar="N", help="of a round (default 200)")
    args = parser.parse_args()
    q, k, v, grad = (torch.randn(1, 128, 16, 64, device=DEVICE, dtype=torch.bfloat16).transpose(1, 2) for _ in range(4))
    rest = (True, None, None, 0.125)
    with nullcontext() if GPU else ahead_of_time.device("sm_90"):
        out, lse = flash_attention(q, k, v, *rest)
        inputs = [t.detach().requires_grad_() for t in (q, k, v)]
        call = partial(attention, *inputs, backend="triton")
        with_grad = call()
        calls = {"operator, forward": lambda: flash_attention(q, k, v, *rest),
                 "operator, backward": lambda: flash_attention_backward(grad, q, k, v, out, lse, *rest),
                 "attention, forward": call,
                 "attention, backward": lambda: torch.autograd.grad(with_grad, inputs, grad, retain_graph=True)}
        found = {name: microseconds(timed, args.calls) for name, timed in calls.items()}
    for name, us in found.items():
        print(f"{name:20} {us:6.0f} µs")
    results.write("host_time", {"device": results.device(1), "us": found})


if __name__ == "__main__":
    run_command(main)
