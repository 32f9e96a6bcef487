"""Where a model is trained, in which numbers, and how much of a batch fits at a time."""

import ctypes
import os
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor

from errors import UserError
from kernels.attention import use_triton
from model.compiled import keep_apart_by_cpu
from model.config import ModelConfig
from model.gpt import GPT
from training.config import Config, divisors
from training.distributed import ALONE, World
from training.plan import Cluster, Plan

CPU_TOKENS = 16384          # a micro-batch on the CPU: larger ones leave its caches without saving overhead


def choose_device(name: str, key: str = "train.device=", local_rank: int = 0) -> torch.device:
    """The device of that name, or the first there is; `key` is what a user wrote before the name. Each process of a machine takes
    the GPU of its `local_rank`."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{local_rank}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{key}{name} is not available here ({reason if len(reason) < 80 else 'no such device'}); try {key}auto") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def keep_freed_memory() -> None:
    """Let the C library keep what tensors give back: the next step asks for the same sizes, and a page that was returned to the system
    costs a fault to have again (docs/experiments.md: 3 to 7% of a training step on a CPU)."""
    with suppress(OSError, AttributeError):                     # glibc alone has it, and numbers these options so in malloc.h
        mallopt = ctypes.CDLL(None).mallopt
        trim_threshold, mmap_threshold = -1, -3
        mallopt(mmap_threshold, 32 * 2 ** 20)                   # the largest it takes
        mallopt(trim_threshold, 2 ** 31 - 1)


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype of activations. bf16 needs no more than fp32's range; fp16 is for GPUs that lack bf16."""
    if name == "auto":
        name = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def choose_attention(name: str, device: torch.device, d_head: int) -> str:
    """The attention backend of that name, refused where a first step would fail."""
    if name == "triton":
        try:
            use_triton("train.attention", name, torch.empty(1, 1, 0, d_head, device=device))
        except ValueError as error:
            raise UserError(f"{error}\n  train.attention=auto") from None
    return name


class Hardware(NamedTuple):
    """What a model is trained on."""

    device: torch.device
    precision: torch.dtype          # of activations
    attention: str                  # backend of kernels.attention


def choose_hardware(config: Config, world: World = ALONE) -> Hardware:
    """What `config` asks for and is there; a UserError where it is not, or the processes could not share a batch evenly."""
    windows, n_ctx = config.windows_per_step, config.model.n_ctx
    if windows % world.size:
        nearest = max(1, round(windows / world.size)) * world.size * n_ctx
        raise UserError(f"train.batch_tokens={config.train.batch_tokens} is {windows} windows, which {world.size} processes cannot share "
                        f"evenly (try train.batch_tokens={nearest})")
    if (micro := config.train.micro_batch) and windows // world.size % micro:
        raise UserError(f"train.micro_batch={micro} must divide the {windows // world.size} windows of each of {world.size} processes "
                        "(leave it out: what fits is taken)")
    device = choose_device(config.train.device, local_rank=world.local_rank)
    if device.type == "cpu":
        keep_freed_memory()
    return Hardware(device, choose_precision(config.train.precision, device),
                    choose_attention(config.train.attention, device, config.model.head_size))


def choose_distribution(config: Config, model: ModelConfig, device: torch.device, world: World) -> str | None:
    """ddp or fsdp for several processes; auto: ddp where one window fits beside everything that is held."""
    if world.size == 1:
        return None
    if config.distributed != "auto":
        return config.distributed
    fits = device.type != "cuda" or windows_that_fit(config, model, device, world, "ddp") > 0
    return "ddp" if all(world.gather(fits)) else "fsdp"


def choose_micro_batch(config: Config, model: GPT, world: World = ALONE) -> int:
    """Windows per forward pass: the largest divisor of a process's share of the batch that fits everywhere."""
    if config.train.micro_batch:
        return config.train.micro_batch
    device, windows = model.embed.weight.device, config.windows_per_step // world.size
    if device.type == "cuda":
        fits = windows_that_fit(config, model.config, device, world, world.kind or "ddp") * 2 // model.compute_dtype.itemsize
    else:
        fits = CPU_TOKENS // config.model.n_ctx
    fits = max(1, min(world.gather(fits)))
    return max(m for m in divisors(windows) if m <= fits)


def windows_that_fit(config: Config, model: ModelConfig, device: torch.device, world: World, distributed: str) -> int:
    """How many windows of 16-bit activations a GPU holds beside its part of the training state, by arithmetic."""
    memory = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    cluster = Cluster(world.size, memory, bandwidth=1, flops=1, mfu=1)          # how long it takes is not asked
    return Plan(model, config.optimizer.kind, config.train.batch_tokens, cluster, distributed, config.train.checkpoint_activations).room


def check_memory(model: GPT, device: torch.device, world: World = ALONE) -> None:
    """Raise a UserError where the weights, their gradients and two moments of each alone are more than there is memory."""
    count, machines = sum(p.numel() for p in model.parameters()), world.size // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    needed, there = 4 * 4 * count, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * machines
    if device.type == "cuda":
        there = torch.cuda.mem_get_info(device)[1] * world.size
    if needed > there:
        raise UserError(f"{count:,} parameters take {needed / 1e9:,.0f} GB to train, {device} has {there / 1e9:,.0f} GB\n"
                        "  make the model smaller; python -m training.plan CONFIG says what takes it")


def training_loss(model: GPT, compile: bool | str, world: World = ALONE) -> Callable[..., Tensor]:
    """`model.loss`, compiled where that pays. Alone and with fixed shapes, so that nothing else can change its kernels; a sharded model
    block by block, since the compiler cannot see through the gathering between them."""
    loss = model.loss
    if compile is True or (compile == "auto" and model.embed.weight.device.type == "cuda"):
        keep_apart_by_cpu()
        if world.sharded:
            for block in model.blocks:
                block.compile(dynamic=False)
        else:
            loss = torch.compile(model.loss, dynamic=False)
    return world.replicate(model, loss)
