"""A run to look at: its model at one of its checkpoints, and what belongs to it."""

from pathlib import Path
from typing import Any, NamedTuple

from errors import UserError

import torch

from data.batches import Batch
from data.config import DataConfig, TokenizerConfig
from data.dataset import Dataset
from data.tokenizer import Tokenizer
from model.gpt import GPT
from training.checkpoint import (
    find_checkpoint,
    is_published,
    list_checkpoints,
    load_model,
    read_state,
)
from training.config import Config, TrainConfig, load_config, named_after
from training.device import choose_device
from training.logger import Record, read_metrics
from training.resume import data_of


class LoadedRun(NamedTuple):
    """A run, opened at one checkpoint to look at."""

    folder: Path            # of the run; of the checkpoint itself if that is outside a run
    checkpoint: Path
    state: dict[str, Any]   # step, tokens, seconds … when it was saved
    config: Config
    model: GPT
    tokenizer: Tokenizer

    def __repr__(self) -> str:
        shape = self.model.config
        parameters = sum(p.numel() for p in self.model.parameters())
        layers = f"{shape.n_layers} layer{'s' if shape.n_layers > 1 else ''}"
        return (f"LoadedRun({self.folder} at step {self.step:,} of {self.config.train.steps:,}, "
                f"{self.state['tokens']:,} tokens: {layers} × {shape.n_heads} heads, "
                f"{parameters:,} parameters on {self.model.embed.weight.device})")

    @property
    def step(self) -> int:
        return self.state["step"]

    def checkpoints(self) -> list[Path]:
        """All checkpoints that the run keeps, oldest first."""
        return list_checkpoints(self.checkpoint.parent) or [self.checkpoint]

    def records(self) -> list[Record]:
        """Its metrics up to this checkpoint, oldest first."""
        records = read_metrics(self.folder / "metrics.jsonl")
        return [record for record in records if record["step"] <= self.step]

    def validation(self, windows: int) -> Batch | None:
        """`windows` windows of the validation text, on the model's device. None if the run was not
        trained on text, or not yet."""
        data, n_ctx = data_of(self.config, self.folder), self.config.model.n_ctx
        if not data.text_corpus or not self.step or is_published(self.checkpoint):
            return None
        begun_with = self.state["data"]
        dataset = Dataset(data, self.config.seed, begun_with.get("folder"), begun_with["hash"])
        batch = dataset.validation(windows * n_ctx, n_ctx, windows)[0]
        return batch.to(self.model.embed.weight.device)


def load_run(where: str | Path, step: int | None = None,
             device: torch.device | str = "cpu") -> LoadedRun:
    """Open runs/NAME at its newest checkpoint, or at that of `step`, or the checkpoint that `where`
    itself names. Raises UserError if it is not there, or damaged.

        run = load_run("runs/quickstart")
        with taps(run.model, "L*.pattern") as acts:
            run.model(tokens)
    """
    if isinstance(device, str):
        device = choose_device(device, "device=")
    checkpoint = find_checkpoint(where)
    if step is not None:
        if (Path(where) / "manifest.json").exists():
            raise UserError(f"{where} is one checkpoint: leave step {step} out, or name the run")
        kept = {int(path.name): path for path in list_checkpoints(checkpoint.parent)}
        if step not in kept:
            raise UserError(f"{where} has no checkpoint of step {step}; "
                            f"there are {', '.join(map(str, kept))}")
        checkpoint = kept[step]
    model, tokenizer = load_model(checkpoint, device)
    state = read_state(checkpoint)
    if is_published(checkpoint):
        config = named_after(checkpoint, _config_of_published(checkpoint, model, state["step"]))
    else:
        config = load_config(checkpoint / "training_state" / "config.yaml")
    folder = checkpoint
    if checkpoint.parent.name == "checkpoints":
        folder = checkpoint.parent.parent
        config = named_after(folder, config)
    return LoadedRun(folder, checkpoint, state, config, model.requires_grad_(False), tokenizer)


def _config_of_published(checkpoint: Path, model: GPT, step: int) -> Config:
    """The config of a checkpoint without training_state/: defaults, but for its model, whose
    weights a run of this config would start from."""
    shape = model.config
    tokens = shape.n_ctx * max(1, TrainConfig().batch_tokens // shape.n_ctx)
    return Config(init_from=str(checkpoint), model=shape,
                  data=DataConfig(tokenizer=TokenizerConfig(kind=str(checkpoint))),
                  train=TrainConfig(steps=max(1, step), batch_tokens=tokens))
