"""The device a model is trained on, its number formats, and how much of a batch fits at a time."""

import ctypes
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from math import inf, nan
from typing import Literal, NamedTuple

from errors import UserError, command

import torch
from torch import Tensor

from kernels.attention import use_triton
from model.compiled import keep_apart_by_cpu
from model.config import ModelConfig
from model.gpt import GPT
from training.config import Config, divisors
from training.parallel import ONE_PROCESS, DataParallel, FullySharded, Parallel
from training.plan import BF16, FP32, Cluster, Plan
from training.world import World

if sys.platform != "win32":
    import resource

CPU_TOKENS = 16384      # of a micro-batch on the CPU: larger ones leave its caches and gain nothing


def choose_device(name: str, option: str = "train.device=", local_rank: int = 0) -> torch.device:
    """The device of that name; "auto" is the first there is.

    `option` is what the user wrote before the name, for the error. Each process of a machine takes
    the GPU of its `local_rank`. Raises UserError if the device is not there.
    """
    if name == "auto":
        if torch.cuda.is_available():
            name = "cuda"
        else:
            name = "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{local_rank}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        if len(reason) >= 80:
            reason = "no such device"
        raise UserError(f"{option}{name} is not available here ({reason}); "
                        f"try {option}auto") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def keep_freed_memory() -> None:
    """Let the C library keep the memory that tensors free: the next step asks for the same sizes.

    A page returned to the system costs a page fault to get back (docs/experiments.md: 3 to 7% of a
    training step on a CPU).
    """
    # Only glibc has mallopt; Windows (TypeError) has no library without a name. Numbers: malloc.h.
    with suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        trim_threshold, mmap_threshold = -1, -3
        mallopt(mmap_threshold, 32 * 2 ** 20)       # the largest value it accepts
        mallopt(trim_threshold, 2 ** 31 - 1)


def peak_memory_gb(device: torch.device) -> float:
    """The most memory that this process has held on its device, in GB; NaN for a CPU on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if sys.platform == "win32":
        return nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


# --- hardware ---------------------------------------------------------------------------------

class Hardware(NamedTuple):
    """What a model is trained on."""

    device: torch.device
    precision: torch.dtype          # of activations
    attention: str                  # backend of kernels.attention


def choose_hardware(config: Config, world: World = ONE_PROCESS.world) -> Hardware:
    """The hardware that `config` asks for. Raises UserError if it is not there."""
    device = choose_device(config.train.device, local_rank=world.local_rank)
    if device.type == "cpu":
        keep_freed_memory()
    return Hardware(device, choose_precision(config.train.precision, device),
                    choose_attention(config.train.attention, device, config.model.head_size))


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype of activations. bf16 has the range of fp32; fp16 is for GPUs that lack bf16."""
    if name == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        name = "bf16" if has_bf16 else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def choose_attention(name: str, device: torch.device, d_head: int) -> str:
    """The attention backend of that name. Raises UserError where its first call would fail."""
    if name == "triton":
        try:
            use_triton("train.attention", name, torch.empty(1, 1, 0, d_head, device=device))
        except ValueError as error:
            raise UserError(f"{error}\n  train.attention=auto") from None
    return name


# --- how much fits ----------------------------------------------------------------------------

def check_shares(config: Config, world: World) -> None:
    """Raise a UserError if the processes cannot share a batch evenly."""
    windows, tokens = config.windows_per_step, config.train.batch_tokens
    if windows % world.size:
        nearest = max(1, round(windows / world.size)) * world.size * config.model.n_ctx
        raise UserError(f"train.batch_tokens={tokens} is {windows} windows, which {world.size} "
                        f"processes cannot share evenly (try train.batch_tokens={nearest})")
    micro_batch = config.train.micro_batch
    if micro_batch and windows // world.size % micro_batch:
        raise UserError(f"train.micro_batch={micro_batch} must divide the {windows // world.size} "
                        f"windows of each of {world.size} processes (leave it out: the largest "
                        "that fits is taken)")


def choose_parallel(config: Config, model: ModelConfig, device: torch.device,
                    world: World) -> Parallel:
    """How the processes share the model; auto is DDP if one window fits beside the whole model."""
    if world.size == 1:
        return Parallel(world)
    strategy = config.distributed
    if strategy == "auto":
        fits = device.type != "cuda" or windows_that_fit(config, model, device, world, "ddp") > 0
        strategy = "ddp" if all(world.gather(fits)) else "fsdp"
    return DataParallel(world) if strategy == "ddp" else FullySharded(world)


def choose_micro_batch(config: Config, model: GPT, parallel: Parallel = ONE_PROCESS) -> int:
    """Windows of a forward pass: the largest divisor of a process's share that fits everywhere."""
    if config.train.micro_batch:
        return config.train.micro_batch
    device, world = model.embed.weight.device, parallel.world
    if device.type == "cuda":
        strategy: Literal["ddp", "fsdp"] = "fsdp" if parallel.sharded else "ddp"
        fit = windows_that_fit(config, model.config, device, world, strategy)
        fit = fit * BF16 // model.compute_dtype.itemsize
    else:
        fit = CPU_TOKENS // config.model.n_ctx
    fit = max(1, min(world.gather(fit)))
    return max(n for n in divisors(config.windows_per_step // world.size) if n <= fit)


def windows_that_fit(config: Config, model: ModelConfig, device: torch.device, world: World,
                     strategy: Literal["ddp", "fsdp"]) -> int:
    """How many windows of 16-bit activations fit on a GPU beside its part of the training state.
    By arithmetic: nothing is run."""
    memory = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    # The speed of the cluster does not matter here.
    cluster = Cluster(world.size, memory, bandwidth=1, flops=1, mfu=1)
    plan = Plan(model, config.optimizer.kind, config.train.batch_tokens, cluster, strategy,
                config.train.checkpoint_activations)
    return plan.windows_that_fit


def check_memory(model: GPT, device: torch.device, world: World = ONE_PROCESS.world) -> None:
    """Raise a UserError if weights, gradients and two moments of each exceed the memory."""
    count = sum(p.numel() for p in model.parameters())
    available: float
    needed = FP32 * (1 + 1 + 2) * count             # weights, gradients, two moments
    if device.type == "cuda":
        available = torch.cuda.mem_get_info(device)[1] * world.size
    elif not hasattr(os, "sysconf"):                # Windows
        available = inf
    else:
        machines = world.size // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * machines
    if needed > available:
        raise UserError(f"{count:,} parameters need {needed / 1e9:,.0f} GB to train, {device} has "
                        f"{available / 1e9:,.0f} GB\n  make the model smaller; "
                        f"{command('-m training.plan')} CONFIG shows what needs the memory")


def training_loss(model: GPT, compile: bool | Literal["auto"],
                  parallel: Parallel = ONE_PROCESS) -> Callable[..., Tensor]:
    """`model.loss`, compiled if that pays, such that its backward pass averages gradients.

    It is compiled on its own and with fixed shapes, so that nothing else can change its kernels.
    A sharded model is compiled block by block: the compiler cannot see through the gathering of
    weights between blocks.
    """
    loss = model.loss
    if compile is True or (compile == "auto" and model.embed.weight.device.type == "cuda"):
        keep_apart_by_cpu()
        if parallel.sharded:
            for block in model.blocks:
                block.compile(dynamic=False)
        else:
            loss = torch.compile(model.loss, dynamic=False)
    return parallel.replicate(model, loss)
