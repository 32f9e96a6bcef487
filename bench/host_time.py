"""For how long a call of our attention keeps Python busy: `python -m bench.host_time`.

If the GPU is done before Python has started the next call, it waits: at T = 512 the forward kernel
itself takes about 100 µs. On a GPU the calls are real, with less work for the GPU than for Python.
Without one everything happens but the driver's own work, which is a few microseconds per launch.
"""

from contextlib import nullcontext

from errors import ArgumentParser, run_command

import torch
from torch import Tensor

from bench import results
from bench.results import DEVICE, GPU
from bench.timers import host_microseconds
from kernels import ahead_of_time
from kernels.attention import attention
from kernels.flash import flash_attention, flash_attention_backward


def main() -> None:
    parser = ArgumentParser("python -m bench.host_time",
                            description="For how long a call of our attention keeps Python busy.")
    parser.add_argument("--calls", type=int, default=200, metavar="N",
                        help="calls per round (default 200)")
    args = parser.parse_args()
    q, k, v, grad = (
        torch.randn(1, 128, 16, 64, device=DEVICE, dtype=torch.bfloat16).transpose(1, 2)
        for _ in range(4))
    inputs = [t.detach().requires_grad_() for t in (q, k, v)]
    rest = (True, None, None, 0.125)                # causal, window, segments, scale

    def call() -> Tensor:
        return attention(*inputs, backend="triton")

    with nullcontext() if GPU else ahead_of_time.device("sm_90"):
        out, lse = flash_attention(q, k, v, *rest)
        with_grad = call()
        calls = {
            "operator, forward": lambda: flash_attention(q, k, v, *rest),
            "operator, backward": lambda: flash_attention_backward(grad, q, k, v, out, lse, *rest),
            "attention, forward": call,
            "attention, backward": lambda: torch.autograd.grad(with_grad, inputs, grad,
                                                               retain_graph=True),
        }
        microseconds = {name: host_microseconds(timed, args.calls)
                        for name, timed in calls.items()}
    for name, us in microseconds.items():
        print(f"{name:20} {us:6.0f} µs")
    results.write("host_time", {"device": results.device(1), "us": microseconds})


if __name__ == "__main__":
    run_command(main)
