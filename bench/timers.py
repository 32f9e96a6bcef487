"""How long calls take: on the GPU, and for Python that starts them."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from triton.testing import do_bench, do_bench_cudagraph

from bench.results import GPU


def seconds_of(call: Callable[..., object], *arguments: Any) -> float:
    """Seconds of one call, until the device has finished it."""
    if GPU:
        torch.cuda.synchronize()
    started = time.perf_counter()
    call(*arguments)
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def call_milliseconds(call: Callable[[], object]) -> float:
    """Median time of a call as Python makes it, caches flushed between calls."""
    if GPU:
        return do_bench(call, warmup=10, rep=50, return_mode="median")
    return 1e3 * seconds_of(call)


def kernel_milliseconds(call: Callable[[], object]) -> float:
    """Median time of what a call runs on the GPU, captured and replayed many times in a row."""
    if GPU:
        return do_bench_cudagraph(call, rep=20, return_mode="median")
    return call_milliseconds(call)


def in_turn(calls: dict[str, Callable[[], object]], rounds: int,
            timed: Callable[[Callable], float] = kernel_milliseconds) -> dict[str, float]:
    """Milliseconds of each call, the median of `rounds` rounds; in a round each has its turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()                                                  # compiles
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(timed(call))
    return {name: statistics.median(values) for name, values in times.items()}


def host_microseconds(call: Callable[[], object], calls: int, rounds: int = 9) -> float:
    """For how long a call keeps Python, from `calls` calls in a row: the median of some rounds."""
    call()
    times = []
    for _ in range(rounds):
        if GPU:
            torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - started) / calls * 1e6)
    return statistics.median(times)
