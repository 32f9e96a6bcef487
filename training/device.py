"""Where a model is trained, in which numbers, and how much of a batch fits at a time."""

from collections.abc import Callable

import torch
from torch import Tensor

from errors import UserError
from kernels.attention import use_triton
from model.budget import activation_bytes_per_token
from model.gpt import GPT
from training.config import Config
from training.distributed import ALONE, World

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


def choose_micro_batch(config: Config, device: torch.device, precision: torch.dtype, world: World = ALONE) -> int:
    """Windows per forward pass: the largest divisor of a process's share of the batch that fits everywhere."""
    windows, asked = config.windows_per_step // world.size, config.train.micro_batch
    if config.windows_per_step % world.size:
        nearest = max(1, round(config.windows_per_step / world.size)) * world.size * config.model.n_ctx
        raise world.error(f"train.batch_tokens={config.train.batch_tokens} is {config.windows_per_step} windows, which {world.size} "
                          f"processes cannot share evenly (try train.batch_tokens={nearest})")
    if asked and windows % asked:
        raise world.error(f"train.micro_batch={asked} must divide the {windows} windows of each of {world.size} processes (leave it out)")
    if asked:
        return asked
    if device.type == "cuda":
        tokens = 0.8 * torch.cuda.mem_get_info(device)[0] / activation_bytes_per_token(config.model, precision.itemsize)
    else:
        tokens = CPU_TOKENS
    fits = min(world.gather(max(1, int(tokens) // config.model.n_ctx)))
    return max(m for m in range(1, windows + 1) if windows % m == 0 and m <= fits)


def training_loss(model: GPT, compile: bool | str, device: torch.device, sharded: bool = False) -> Callable[..., Tensor]:
    """`model.loss`, compiled where that pays. Alone and with fixed shapes, so that nothing else can change its kernels.
    A sharded model is compiled block by block, between whose gatherings the compiler cannot look."""
    if compile is True or (compile == "auto" and device.type == "cuda"):
        if not sharded:
            return torch.compile(model.loss, dynamic=False)
        for block in model.blocks:
            block.compile(dynamic=False)
    return model.loss
