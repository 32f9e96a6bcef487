"""The whole YAML file as one frozen typed object. `python -m training.config > configs/schema.json` writes its schema for editors."""

import json
from collections.abc import Iterator, Sequence
from math import isqrt
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from data.config import DataConfig
from model.config import ModelConfig
from settings.schema import json_schema
from settings.validate import Settings, validate
from settings.yaml12 import override, read_file

Every = Annotated[NonNegativeInt, Field(description="steps between two; 0: never")]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class TrainConfig(Settings):
    steps: PositiveInt = 1000
    batch_tokens: Annotated[int, Field(gt=0, le=2 ** 28)] = 4096        # tokens per update, over all micro-batches and processes
    micro_batch: PositiveInt | None = None      # windows per forward pass; null: what fits
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"         # of activations; weights are float32. auto: bf16 on CUDA
    compile: bool | Literal["auto"] = "auto"    # auto: on CUDA
    checkpoint_activations: bool = False        # keep each block's input alone and compute the rest again: less memory, a third more work
    attention: Literal["auto", "reference", "sdpa", "triton"] = "auto"  # auto: our Triton kernels on CUDA, PyTorch's elsewhere
    device: str = "auto"                        # cuda, cpu, mps; auto: the first there is
    profile: bool = False                       # write what a few early steps spend their time on, as trace.json


class OptimizerConfig(Settings):
    kind: Literal["muon", "adamw"] = "muon"     # muon: matrices by Muon, the rest by AdamW
    lr: PositiveFloat = 0.02                    # of the matrices under muon, of everything under adamw
    adam_lr: PositiveFloat = 0.004              # of embeddings, head and gains under muon
    weight_decay: NonNegative = 0.0             # of matrices only
    warmup_steps: NonNegativeInt = 50
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    decay_share: Share = 1.0                    # the last share of the steps after warm-up over which the rate falls
    final_lr: Share = 0.0                       # what the rate falls to, as a share of its height
    clip: NonNegative = 1.0                     # longest gradient; 0: any
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    momentum_warmup_steps: NonNegativeInt = 300         # Muon's momentum rises from 0.85
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = [0.9, 0.95]

    def conflicts(self) -> Iterator[tuple[tuple[str, ...], str]]:
        if len(self.betas) != 2:
            yield ("betas",), f"optimizer.betas={self.betas} must be two numbers, for example [0.9, 0.95]"


class EvalConfig(Settings):
    every: Every = 100
    tokens: Annotated[int, Field(gt=0, le=2 ** 28)] = 131072    # of the validation text, always the same ones


class CheckpointConfig(Settings):
    every: Every = 250
    keep: PositiveInt = 3                       # the newest k; the best and the listed steps stay besides
    steps: list[PositiveInt] = []               # further steps to save and to keep
    background: bool = False                    # write while training goes on


class HeadsConfig(Settings):
    every: Every = 50                           # measure what every head attends to
    images_every: Every = 500                   # of those, show patterns as images in wandb


class LogConfig(Settings):
    every: PositiveInt = 10
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"    # auto: online with a key, else offline
    project: str = "induction"


class Config(Settings):
    run: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)] = "run"     # → runs/NAME
    seed: Annotated[int, Field(ge=0, lt=2 ** 63)] = 0
    init_from: str | None = None                # a run or checkpoint whose weights to start from
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    heads: HeadsConfig = HeadsConfig()
    log: LogConfig = LogConfig()
    distributed: Literal["auto", "ddp", "fsdp"] = "auto"        # how torchrun's processes share a model; auto: fsdp where ddp does not fit

    @property
    def windows_per_step(self) -> int:
        return self.train.batch_tokens // self.model.n_ctx

    def conflicts(self) -> Iterator[tuple[tuple[str, ...], str]]:
        tokens, n_ctx = self.train.batch_tokens, self.model.n_ctx
        if tokens % n_ctx:
            yield ("train.batch_tokens", "model.n_ctx"), (f"train.batch_tokens={tokens} must be a multiple of model.n_ctx={n_ctx} "
                                       f"(try {max(1, round(tokens / n_ctx)) * n_ctx})")
        elif (micro := self.train.micro_batch) and (windows := self.windows_per_step) % micro:
            near = min(divisors(windows), key=lambda m: abs(m - micro))
            yield ("train.micro_batch", "train.batch_tokens", "model.n_ctx"), (
                f"train.micro_batch={micro} must divide the {windows} windows of train.batch_tokens={tokens} (try {near})")
        longest, held_out = self.data.repeats.period[-1], self.data.repeats.held_out_periods
        if held_out and all(2 * period >= n_ctx for period in held_out):
            yield ("data.repeats.held_out_periods", "model.n_ctx"), (
                f"data.repeats.held_out_periods={held_out}: none fits twice behind the first token of model.n_ctx={n_ctx} "
                f"(shortest to name: 3, longest {(n_ctx - 1) // 2})")
        if "repeats" in self.data.corpora and 2 * longest > n_ctx:
            yield ("data.repeats.period", "model.n_ctx"), (f"data.repeats.period={self.data.repeats.period} does not fit twice into "
                                      f"model.n_ctx={n_ctx} (longest: {n_ctx // 2})")
        if self.model.vocab_size and self.data.tokenizer.vocab_size and self.model.vocab_size < self.data.tokenizer.vocab_size:
            yield ("model.vocab_size", "data.tokenizer.vocab_size"), (f"model.vocab_size={self.model.vocab_size} is smaller than "
                                      f"data.tokenizer.vocab_size={self.data.tokenizer.vocab_size} (leave it out)")


def divisors(n: int) -> list[int]:
    """All that divide n, ascending."""
    small = [d for d in range(1, isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The config in a YAML file with `key.path=value` overrides; a UserError lists all that is wrong with it."""
    tree = read_file(path)
    return validate(Config, tree, str(path), override(tree, overrides))


def dump_config(config: Config) -> str:
    """The resolved config as YAML, every default written out."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True)


def differences(a: Config, b: Config) -> list[str]:
    """`key.path: a → b` for every value that differs; where `a` was not told the value, it says so."""
    def flat(tree: object, path: str) -> dict[str, object]:
        if not isinstance(tree, dict):
            return {path: tree}
        return {k: v for key, value in tree.items() for k, v in flat(value, f"{path}.{key}" if path else key).items()}

    left, right, told = (flat(tree, "") for tree in (a.model_dump(), b.model_dump(), a.model_dump(exclude_unset=True)))
    return [f"{key}: {left.get(key)!r}{' (by default)' if key in left and key not in told else ''} → {right.get(key)!r}"
            for key in {**left, **right} if left.get(key) != right.get(key)]


if __name__ == "__main__":                      # python -m training.config > configs/schema.json
    print(json.dumps(json_schema(Config), indent=1, ensure_ascii=False))
