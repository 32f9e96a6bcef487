"""Continuing a run: which config it goes on with, and the weights and optimizer state it goes on
from."""

import json
import os
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

from errors import UserError, command

from data.config import DataConfig, TokenizerConfig
from data.dataset import Dataset
from data.load_tokenizer import load_tokenizer
from files import exclusive_lock
from model.gpt import GPT
from training.ancestry import Entry, history_from, history_of
from training.checkpoint import (
    find_checkpoint,
    is_published,
    list_checkpoints,
    load_optimizer,
    load_weights,
    read_state,
)
from training.config import (
    Change,
    Config,
    differences,
    load_config,
    named_after,
    overridden,
)
from training.optimizer import Optimizer
from training.parallel import Parallel
from training.save_checkpoint import point_latest_at_newest, prune
from training.wandb_log import sweep_run

# Keys, with all keys below them, whose values must not change when a run is continued: before its
# first step (an imported model), and later.
FIXED_BEFORE_TRAINING = ("run", "seed", "init_from", "model", "data.tokenizer")
FIXED = ("run", "seed", "init_from", "model", "data", "optimizer.kind")


class Job(NamedTuple):
    """What a command line asks to train."""

    config: Config
    folder: Path                # the run directory
    changes: list[Change]       # how the config differs from the one the run began with


class Progress(NamedTuple):
    """How far a run has come."""

    step: int = 0               # completed updates
    tokens: int = 0             # trained on
    seconds: float = 0.0        # of training
    data_folder: str | None = None          # the shards it reads
    data_hash: str | None = None
    history: Sequence[Entry] = ()           # of the weights before this run (training/ancestry.py)


def job_of(target: str | Path | Config, overrides: Sequence[str]) -> Job:
    """The job that a command line names: a YAML file, or the directory of a run to continue; or
    that of a config.

    Raises UserError if the run cannot be continued with the overrides, or if another run has the
    same name.
    """
    if isinstance(target, Config) or not Path(target).is_dir():
        def read(changes: Sequence[str]) -> Config:
            if isinstance(target, Config):
                return overridden(target, changes)
            return load_config(target, changes)

        config = read(overrides)
        if run_id := sweep_run():
            # The command lines of a sweep differ in no name; an agent that goes on with a run gives
            # the same id again.
            config = read([*overrides, f"run={json.dumps(f'{config.run}-{run_id}')}"])
        folder = Path("runs") / config.run
        if (folder / "config.yaml").exists():
            changes = differences(named_after(folder, load_config(folder / "config.yaml")), config)
            if changes:
                more = "; …" if len(changes) > 3 else ""
                raise UserError(f"{folder} holds a run of another config "
                                f"({listed(changes[:3])}{more})\n"
                                f"  continue it with: {command('train.py')} {folder}   "
                                "or begin another with: run=NEW")
        return Job(config, folder, [])

    folder = Path(target)
    saved = folder / "config.yaml"
    if not saved.exists():
        if folder.resolve().parent.name == "checkpoints":
            run = os.path.relpath(folder.resolve().parent.parent)
            raise UserError(f"{target} is a checkpoint: name its run to continue it, {run}, or "
                            f"start another from its weights with init_from={target}")
        if (folder / "config.json").exists():
            raise UserError(f"{target} is a model, not a run: start a run from its weights\n"
                            f"  if it is from here: {command('train.py')} CONFIG run=NEW "
                            f"init_from={target}; else import it: "
                            f"{command('-m training.import_model')} {target} runs/NAME")
        raise UserError(f"{str(target) or repr('')} holds no config.yaml, so it is not a run "
                        "(runs/NAME continues one, configs/NAME.yaml starts one)")
    before = named_after(folder, load_config(saved))
    config = load_config(saved, [f"run={json.dumps(before.run)}", *overrides])
    changes = differences(before, config)
    fixed = FIXED if newest_progress(folder).step else FIXED_BEFORE_TRAINING
    if impossible := [change for change in changes if is_below(change.key, fixed)]:
        raise UserError(f"{target} cannot be continued with another {listed(impossible[:3])}\n"
                        "  start a run from its weights instead: "
                        f"{command('train.py')} CONFIG run=NEW init_from={target} "
                        f"data.tokenizer={target}/checkpoints/latest")
    return Job(config, folder, changes)


def listed(changes: list[Change]) -> str:
    return "; ".join(map(str, changes))


def is_below(key: str, parents: tuple[str, ...]) -> bool:
    """Whether a key is one of `parents`, or inside one of them."""
    return any(key == parent or key.startswith(f"{parent}.") for parent in parents)


def newest_progress(folder: Path) -> Progress:
    """How far the newest checkpoint of a run had come. Raises UserError if it has no training
    state."""
    checkpoints = list_checkpoints(folder / "checkpoints")
    if not checkpoints:
        return Progress()
    newest = checkpoints[-1]
    if is_published(newest):
        raise UserError(f"{newest} has no training_state/, so {folder} cannot be continued\n"
                        f"  start a run from its weights: {command('train.py')} CONFIG run=NEW "
                        f"init_from={newest} data.tokenizer={newest}")
    return _progress(read_state(newest))


def _progress(state: dict[str, Any]) -> Progress:
    return Progress(state["step"], state["tokens"], state["seconds"], state["data"].get("folder"),
                    state["data"]["hash"])


def data_of(config: Config, folder: Path) -> DataConfig:
    """The config's data for the run in `folder`.

    If its tokenizer's path is gone, because a run was renamed or moved, it is that of the run's
    newest checkpoint, or of `init_from`.
    """
    data = config.data
    if not data.tokenizer.is_path or Path(data.tokenizer.kind).exists():
        return data
    checkpoints = list_checkpoints(folder / "checkpoints")
    if checkpoints:
        copy = checkpoints[-1]
    elif config.init_from:
        copy = find_checkpoint(config.init_from)
    else:
        return data
    return data.model_copy(update={"tokenizer": TokenizerConfig(kind=str(copy.absolute()))})


def only_trainer(folder: Path) -> AbstractContextManager[None]:
    """Hold the lock of a run directory. Raises UserError if another process trains the run."""
    return exclusive_lock(folder / ".lock", f"{folder} is being trained",
                          "wait for it, stop it, or begin another run with: run=NEW")


def resume(config: Config, folder: Path, model: GPT, optimizer: Optimizer, data: Dataset,
           parallel: Parallel, origin: Path | None) -> Progress:
    """Load the run's newest checkpoint into the model and the optimizer; how far it had come.

    Without a checkpoint nothing is loaded: the weights are those of `origin`, or random. One of an
    imported model holds only weights. Raises UserError if the checkpoint is damaged, or if it does
    not belong to this config and this data.
    """
    world = parallel.world
    checkpoints = list_checkpoints(folder / "checkpoints")
    progress = Progress()
    if checkpoints:
        newest = checkpoints[-1]
        state = read_state(newest)
        progress = _progress(state)
        if progress.step == 0:                  # imported: only weights
            if load_tokenizer(newest / "tokenizer.json").hash != data.tokenizer.hash:
                raise world.error(
                    f"{folder} was imported with another tokenizer, its weights belong to other "
                    "token ids\n"
                    f"  use its own: set data.tokenizer in {folder}/config.yaml to {newest}")
            load_weights(model, newest, parallel)
        else:
            if state["data"]["hash"] != data.identity["hash"]:
                raise world.error(
                    f"{folder} was trained on other data, which was in {progress.data_folder}\n"
                    "  bring that back, or begin another run with: run=NEW")
            load_weights(model, newest, parallel)
            saved = named_after(folder, load_config(newest / "training_state" / "config.yaml"))
            if other := [change for change in differences(config, saved)
                         if is_below(change.key, FIXED)]:
                raise world.error(
                    f"{newest} belongs to another run ({listed(other[:3])})\n"
                    "  delete it to go on from the one before, or begin another run with: run=NEW")
            optimizer.load_state_dict(load_optimizer(newest))
    # The same ids, with what an import kept beside them, which the shards may lack.
    if checkpoints:
        data.tokenizer = load_tokenizer(checkpoints[-1] / "tokenizer.json")
        progress = progress._replace(history=history_of(checkpoints[-1]))
    elif origin:
        data.tokenizer = load_tokenizer(origin / "tokenizer.json")
        progress = progress._replace(history=history_from(origin))
    world.barrier()                     # all have read what is about to be pruned
    if world.first:
        clean_up(folder / "checkpoints", config)
    return progress


def clean_up(checkpoints: Path, config: Config) -> None:
    """Finish what a kill interrupted: checkpoints half written or half deleted, links, pruning.

    Call it only after the newest checkpoint has been verified. If that one is damaged, the earlier
    ones must stay.
    """
    for unfinished in checkpoints.glob(".partial-*"):
        shutil.rmtree(unfinished, ignore_errors=True)
    point_latest_at_newest(checkpoints)
    prune(checkpoints, config.checkpoint.keep, config.checkpoint.steps)
