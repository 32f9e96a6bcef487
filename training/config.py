"""The whole YAML file as one frozen typed object.

`python -m training.config > configs/schema.json` writes its schema for editors.
"""

import json
import re
from collections.abc import Sequence
from math import isqrt
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from errors import run_command

import yaml
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from console import stdout_is_the_result
from data.config import SHORTEST_PERIOD, DataConfig
from model.config import ModelConfig
from settings.schema import json_schema
from settings.validate import (
    AsWritten,
    Conflicts,
    Settings,
    Text,
    flatten,
    validate,
    validate_file,
)
from settings.yaml12 import override

Every = Annotated[NonNegativeInt, Field(description="steps between two; 0: never")]
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
LONGEST_NAME = 100
Name = Annotated[str, Field(pattern=NAME, max_length=LONGEST_NAME), AsWritten]
NonNegative = Annotated[float, Field(ge=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]
SMALLEST_FLOAT32 = 2.0 ** -126               # smaller ones are 0 on some devices
Tokens = Annotated[int, Field(gt=0, le=2 ** 28)]


class TrainConfig(Settings):
    steps: PositiveInt = 1000
    batch_tokens: Tokens = 4096                 # tokens per update, over all micro-batches and
                                                # processes
    micro_batch: PositiveInt | None = None      # windows per forward pass; null: as many as fit
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
                                                # of activations; weights are float32. auto: bf16 on
                                                # CUDA
    compile: bool | Literal["auto"] = "auto"    # auto: on CUDA
    checkpoint_activations: bool = False        # keep only each block's input and recompute the
                                                # rest: less memory, a third more compute
    attention: Literal["auto", "reference", "sdpa", "triton"] = "auto"
                                                # auto: our Triton kernels on CUDA, PyTorch's
                                                # elsewhere
    device: Text = "auto"                       # cuda, cpu, mps; auto: the first that is available
    profile: bool = False                       # write a trace of a few early steps, as trace.json


class OptimizerConfig(Settings):
    kind: Literal["muon", "adamw"] = "muon"     # muon: matrices by Muon, the rest by AdamW
    lr: PositiveFloat = 0.02                    # of the matrices under muon, of everything under
                                                # adamw
    adam_lr: PositiveFloat = 0.004              # of embeddings, head and gains under muon
    weight_decay: NonNegative = 0.0             # of matrices only
    warmup_steps: NonNegativeInt = 50
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    decay_share: Share = 1.0                    # fraction of the steps after warm-up, at the end,
                                                # in which the learning rate falls
    final_lr: Share = 0.0                       # what the learning rate falls to, as a fraction of
                                                # its peak
    clip: NonNegative = 1.0                     # largest gradient norm; 0: no limit
    momentum: Beta = 0.95
    momentum_warmup_steps: NonNegativeInt = 300     # Muon's momentum rises from 0.85
    betas: list[Beta] = [0.9, 0.95]

    def conflicts(self) -> Conflicts:
        if len(self.betas) != 2:
            yield ("betas",), (f"optimizer.betas={self.betas} must be two numbers, "
                               "for example [0.9, 0.95]")
        for name, rate in (("lr", self.lr), ("adam_lr", self.adam_lr)):
            if rate < SMALLEST_FLOAT32:
                yield (name,), f"optimizer.{name}={rate} is 0 in float32 (try 1e-3)"


class EvalConfig(Settings):
    every: Every = 100
    tokens: Tokens = 131072                     # of the validation text, always the same ones


class CheckpointConfig(Settings):
    every: Every = 250
    keep: PositiveInt = 3                       # the newest, in addition to the best one
                                                # and those in `steps`
    steps: list[PositiveInt] = []               # further steps to save and to keep
    background: bool = False                    # write while training continues


class HeadsConfig(Settings):
    every: Every = 50                           # measure what each head attends to
    images_every: Every = 500                   # also show patterns as images in wandb


class LogConfig(Settings):
    every: PositiveInt = 10
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
                                                # auto: online with a key, else offline
    project: Text = "induction"
    group: Text | None = None                   # of runs in wandb, such as the name of a study


class Config(Settings):
    run: Name = "run"                           # → runs/NAME
    seed: Annotated[int, Field(ge=0, lt=2 ** 63)] = 0
    init_from: Text | None = None               # a run or checkpoint whose weights to start from
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    heads: HeadsConfig = HeadsConfig()
    log: LogConfig = LogConfig()
    distributed: Literal["auto", "ddp", "fsdp"] = "auto"
                                                # how torchrun's processes share a model; auto: fsdp
                                                # if ddp does not fit

    @property
    def windows_per_step(self) -> int:
        return self.train.batch_tokens // self.model.n_ctx

    def conflicts(self) -> Conflicts:
        tokens, n_ctx = self.train.batch_tokens, self.model.n_ctx
        windows, micro_batch = self.windows_per_step, self.train.micro_batch
        if tokens % n_ctx:
            nearest = max(1, round(tokens / n_ctx)) * n_ctx
            yield ("train.batch_tokens", "model.n_ctx"), (
                f"train.batch_tokens={tokens} must be a multiple of model.n_ctx={n_ctx} "
                f"(try {nearest})")
        elif micro_batch and windows % micro_batch:
            _, nearest = min((abs(divisor - micro_batch), divisor) for divisor in divisors(windows))
            yield ("train.micro_batch", "train.batch_tokens", "model.n_ctx"), (
                f"train.micro_batch={micro_batch} must divide the {windows} windows of "
                f"train.batch_tokens={tokens} (try {nearest})")
        yield from self._repeats_conflicts()
        model_size, tokenizer_size = self.model.vocab_size, self.data.tokenizer.vocab_size
        if model_size and tokenizer_size and model_size < tokenizer_size:
            yield ("model.vocab_size", "data.tokenizer.vocab_size"), (
                f"model.vocab_size={model_size} is smaller than "
                f"data.tokenizer.vocab_size={tokenizer_size} (leave it out)")

    def _repeats_conflicts(self) -> Conflicts:
        n_ctx, period = self.model.n_ctx, self.data.repeats.period
        held_out = self.data.repeats.held_out_periods
        if held_out and all(2 * length >= n_ctx for length in held_out):
            yield ("data.repeats.held_out_periods", "model.n_ctx"), (
                f"data.repeats.held_out_periods={held_out}: none fits twice behind the first token "
                f"of model.n_ctx={n_ctx} (shortest allowed: {SHORTEST_PERIOD}, longest: "
                f"{(n_ctx - 1) // 2})")
        if "repeats" in self.data.corpora and 2 * period[-1] > n_ctx:
            yield ("data.repeats.period", "model.n_ctx"), (
                f"data.repeats.period={period} does not fit twice into model.n_ctx={n_ctx} "
                f"(longest: {n_ctx // 2})")


def divisors(n: int) -> list[int]:
    """All divisors of n, ascending."""
    small = [d for d in range(1, isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The config in a YAML file with `key.path=value` overrides.

    Raises UserError with all mistakes in it.
    """
    return validate_file(Config, path, overrides)


def overridden(config: Config, overrides: Sequence[str]) -> Config:
    """A config with `key.path=value` overrides. Raises UserError with all mistakes in them."""
    tree = config.model_dump(exclude_unset=True)
    return validate(Config, tree, "config", override(tree, overrides))


def named_after(folder: Path, config: Config) -> Config:
    """The config of the run in `folder`, with the name that the folder has now: it may have been
    renamed or copied. If that cannot be a run's name, the run keeps its own."""
    name = folder.resolve().name
    if len(name) <= LONGEST_NAME and re.fullmatch(NAME, name):
        return config.model_copy(update={"run": name})
    return config


def dump_config(config: Config) -> str:
    """The resolved config as YAML, every default written out."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True)


class Change(NamedTuple):
    """A value that differs between two configs."""

    key: str                    # its path: optimizer.lr
    before: Any
    after: Any
    was_default: bool

    def __str__(self) -> str:
        note = " (by default)" if self.was_default else ""
        return f"{self.key}: {self.before!r}{note} → {self.after!r}"


def differences(a: Config, b: Config) -> list[Change]:
    """Every value that differs between a and b."""
    left, right = flatten(a.model_dump()), flatten(b.model_dump())
    explicit = flatten(a.model_dump(exclude_unset=True))
    return [Change(key, left.get(key), right.get(key), key in left and key not in explicit)
            for key in {**left, **right} if left.get(key) != right.get(key)]


def print_schema() -> None:
    """`python -m training.config > configs/schema.json`"""
    stdout_is_the_result()
    print(json.dumps(json_schema(Config), indent=1, ensure_ascii=False))


if __name__ == "__main__":
    run_command(print_schema)
