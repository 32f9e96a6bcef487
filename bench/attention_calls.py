"""Other attention calls, each against its own ceiling, for `python -m bench.attention`: windows,
decoding, and the statistics of heads."""

from collections.abc import Callable
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.attention_shapes import (
    CONTEXTS,
    HEAD_SIZES,
    random_tokens,
    repeated_tokens,
    tensors,
)
from bench.results import DEVICE, DTYPE, GPU
from bench.timers import in_turn, kernel_milliseconds
from kernels.attention import attention, decode
from kernels.launch import about
from kernels.statistics import head_statistics


def ceilings() -> dict[str, float]:
    """What the device can do, on random data.

    A copy (bytes read and written) in GB/s, a bf16 matrix product in TFLOP/s; both for as long as
    the kernels are timed, under which a GPU lowers its clock.
    """
    n, m = (2 ** 30, 8192) if GPU else (2 ** 20, 256)
    x, a = torch.randn(n // 2, device=DEVICE), torch.randn(m, m, device=DEVICE, dtype=DTYPE)
    y = torch.empty_like(x)
    # Not copy_: in a graph that is the copy engine, which is slower than a kernel.
    copied = kernel_milliseconds(lambda: torch.neg(x, out=y))
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
    """All statistics of all heads against the forward pass whose lse they take.

    On random tokens, whose induction targets are scattered, and on repeats, whose targets follow
    each other.
    """
    def of(q: Tensor, k: Tensor, lse: Tensor, ids: Tensor) -> object:
        return head_statistics(q, k, lse, ids, backend="triton")

    rows = []
    for T, D in product(sorted({CONTEXTS[0], *CONTEXTS[-3:]}), HEAD_SIZES):
        q, k, v, _ = (t.detach() for t in tensors(T, D, 1))
        _, lse = attention(q, k, v, backend="triton", return_lse=True)
        ms = in_turn({"forward": partial(attention, q, k, v, backend="triton"),
                      "random": partial(of, q, k, lse, random_tokens(T)),
                      "repeats": partial(of, q, k, lse, repeated_tokens(T))}, rounds)
        rows += [{"T": T, "D": D, "tokens": tokens, "ms": ms[tokens],
                  "of_forward": ms[tokens] / ms["forward"]} for tokens in ("random", "repeats")]
    return rows
