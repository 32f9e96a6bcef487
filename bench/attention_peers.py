"""Our attention beside PyTorch's, for `python -m bench.attention`: times and memory."""

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from bench.attention_shapes import CONTEXTS, GROUPS, HEAD_SIZES, TOKENS, WIDTH, tensors
from bench.results import DEVICE, GPU
from bench.timers import call_milliseconds, host_microseconds, in_turn, kernel_milliseconds
from kernels.attention import attention

# Floating-point operations of each pass, in units of the forward's.
PASSES = {"forward": 1.0, "backward": 2.5, "both": 3.5}


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
            # Leaves of its own: autograd would wait for the stream on which q, k and v were made,
            # and that cannot be captured.
            leaves = [t.detach().requires_grad_() for t in (q, k, v)]
            return torch.autograd.grad(attend(*leaves), leaves, grad)

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
