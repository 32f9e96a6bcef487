"""The model of a new or continued run, made on its device, before training/resume.py fills it."""

from pathlib import Path

from errors import UserError

import torch

from data.load_tokenizer import load_tokenizer
from data.tokenizer import Tokenizer
from model.gpt import GPT
from training.checkpoint import find_checkpoint, load_weights, read_model_config
from training.config import Config
from training.device import Hardware, check_memory, choose_parallel
from training.parallel import Parallel
from training.world import World


def build_model(config: Config, tokenizer: Tokenizer, hardware: Hardware, world: World,
                origin: Path | None = None) -> tuple[GPT, Parallel]:
    """A model for `tokenizer`'s vocabulary on `hardware`, with the weights of the checkpoint
    `origin` or random ones, and how the processes share it."""
    with world.together():
        vocab_size = config.model.vocab_size or tokenizer.n_vocab
        if vocab_size < tokenizer.n_vocab:
            raise UserError(f"model.vocab_size={vocab_size} is smaller than the tokenizer's "
                            f"{tokenizer.n_vocab} (leave it out)")
        with torch.device("meta"):                          # no memory yet
            model = GPT(config.model.model_copy(update={"vocab_size": vocab_size}))
            if origin:
                check_shape(model, config, origin)
        check_memory(model, hardware.device, world)
    model.compute_dtype = hardware.precision
    model.attention_backend = hardware.attention
    model.recompute_activations = config.train.checkpoint_activations
    parallel = choose_parallel(config, model.config, hardware.device, world)
    parallel.place(model, hardware.device)
    if origin:
        load_weights(model, origin, parallel)
    else:
        model.init_weights(config.seed, parallel.fill)
    return model, parallel


def origin_of(config: Config, tokenizer: Tokenizer) -> Path | None:
    """The checkpoint whose weights a new run starts from; None if it starts from random ones."""
    if config.init_from is None:
        return None
    checkpoint = find_checkpoint(config.init_from)
    if load_tokenizer(checkpoint / "tokenizer.json").hash != tokenizer.hash:
        raise UserError(f"init_from={config.init_from} was trained with another tokenizer, its "
                        "weights belong to other token ids\n"
                        f"  use its own: data.tokenizer={checkpoint}")
    return checkpoint


def check_shape(model: GPT, config: Config, origin: Path) -> None:
    """Raise UserError if the checkpoint `origin` has other parameters than the model. Both are made
    without memory."""
    theirs = GPT(read_model_config(origin))
    shapes = [{name: p.shape for name, p in each.named_parameters()} for each in (model, theirs)]
    if shapes[0] != shapes[1]:
        ours, others = model.config.model_dump(), theirs.config.model_dump()
        different = [f"model.{key}={ours[key]}, there {others[key]}" for key in ours
                     if ours[key] != others[key]]
        raise UserError(f"init_from={config.init_from} is a model of another shape "
                        f"({'; '.join(different[:6])})\n"
                        "  set those that decide the sizes of its weights as they are there")
