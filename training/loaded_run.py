"""A run to look at: its model at one of its checkpoints, and what goes with it."""

from pathlib import Path
from typing import NamedTuple

import torch

from data.batches import Batch
from data.dataset import Dataset
from data.tokenizer import Tokenizer
from errors import UserError
from model.gpt import GPT
from training.checkpoint import find_checkpoint, load_model, read_state, whole_checkpoints
from training.config import Config, load_config
from training.logger import read_metrics


class LoadedRun(NamedTuple):
    """A run to look at: its model at one checkpoint, and what goes with it."""

    folder: Path            # of the run; of the checkpoint itself where it lies outside a run
    checkpoint: Path
    state: dict             # step, tokens, seconds … when it was saved
    config: Config
    model: GPT
    tokenizer: Tokenizer

    @property
    def step(self) -> int:
        return self.state["step"]

    def checkpoints(self) -> list[Path]:
        """All that the run keeps, oldest first."""
        return whole_checkpoints(self.checkpoint.parent) or [self.checkpoint]

    def records(self) -> list[dict]:
        """Its measurements up to this checkpoint, oldest first."""
        return [record for record in read_metrics(self.folder / "metrics.jsonl") if record["step"] <= self.step]

    def validation(self, windows: int) -> Batch | None:
        """So many windows of the text held out of its training, on the model's device; None where it saw no text."""
        data, n_ctx = self.config.data, self.config.model.n_ctx
        if not data.text_corpus or not self.step:
            return None
        opened = Dataset(data, self.config.seed, self.state["data"].get("folder"))
        return opened.validation(windows * n_ctx, n_ctx, windows)[0].to(self.model.embed.weight.device)


def load_run(where: str | Path, step: int | None = None, device: torch.device | str = "cpu") -> LoadedRun:
    """Open runs/NAME at its newest checkpoint, or at that of `step`, or the checkpoint that `where` itself names.

        run = load_run("runs/quickstart")
        with taps(run.model, "L*.pattern") as cache:
            run.model(tokens)
    """
    checkpoint = find_checkpoint(where)
    if step is not None:
        kept = {int(path.name): path for path in whole_checkpoints(checkpoint.parent)}
        if step not in kept:
            raise UserError(f"{where} has no checkpoint of step {step}; there are {', '.join(map(str, kept))}")
        checkpoint = kept[step]
    model, tokenizer = load_model(checkpoint, device)
    config = load_config(checkpoint / "training_state" / "config.yaml")
    folder = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint
    return LoadedRun(folder, checkpoint, read_state(checkpoint), config, model.requires_grad_(False), tokenizer)
