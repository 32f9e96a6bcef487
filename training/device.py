"""Where a model is trained, in which numbers, and how much of a batch fits at a time."""

import os
from collections.abc import Callable

import torch
from torch import Tensor

from errors import UserError
from kernels.attention import use_triton
from model.budget import activation_bytes_per_token, parameters
from model.config import ModelConfig
from model.gpt import GPT
from training.config import Config, divisors

CPU_TOKENS = 16384          # a micro-batch on the CPU: larger ones leave its caches without saving overhead


def choose_device(name: str, key: str = "train.device=") -> torch.device:
    """The device of that name, or the first there is; `key` is what a user wrote before the name."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
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


def choose_micro_batch(config: Config, device: torch.device, precision: torch.dtype) -> int:
    """Windows per forward pass: the largest divisor of the batch that fits."""
    if config.train.micro_batch:
        return config.train.micro_batch
    if device.type == "cuda":
        tokens = 0.8 * torch.cuda.mem_get_info(device)[0] / activation_bytes_per_token(config.model, precision.itemsize)
    else:
        tokens = CPU_TOKENS
    fits = max(1, int(tokens) // config.model.n_ctx)
    return max(m for m in divisors(config.windows_per_step) if m <= fits)


def check_memory(config: ModelConfig, device: torch.device) -> None:
    """Raise a UserError where the weights, their gradients and two moments of each alone are more than there is memory."""
    count, processes = parameters(config).total(), int(os.environ.get("WORLD_SIZE", 1))
    needed, there = 4 * 4 * count, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if device.type == "cuda":
        there = torch.cuda.mem_get_info(device)[1] * processes
    if needed > there:
        raise UserError(f"{count:,} parameters take {needed / 1e9:,.0f} GB to train, {device} has {there / 1e9:,.0f} GB\n"
                        "  make the model smaller; python -m model.budget CONFIG says what takes it")


def training_loss(model: GPT, compile: bool | str, device: torch.device) -> Callable[..., Tensor]:
    """`model.loss`, compiled where that pays. Alone and with fixed shapes, so that nothing else can change its kernels."""
    if compile is True or (compile == "auto" and device.type == "cuda"):
        return torch.compile(model.loss, dynamic=False)
    return model.loss
