"""A model in Hugging Face's names and config.json, so that `AutoModelForCausalLM` opens a checkpoint as it is.

The exact ModelConfig is kept inside config.json under `gpt`, and is what our own loading reads. model/families.py holds the tables.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from errors import UserError
from model.config import ModelConfig
from model.families import FAMILIES, OWN, by_their_name, described, family, to_ours, to_theirs
from model.gpt import GPT


def hf_config(config: ModelConfig, begin: int, ends: Sequence[int]) -> dict:
    """The contents of config.json; `begin` and `ends` are the tokenizer's."""
    model_type = family(config)
    return {
        "model_type": model_type, "architectures": [FAMILIES.get(model_type, OWN).architecture], **described(config, model_type),
        "dtype": "float32", "bos_token_id": begin, "eos_token_id": one_or_all(ends), "pad_token_id": None, "gpt": config.model_dump()}


def one_or_all(ids: Sequence[int]) -> int | list[int]:
    """As Hugging Face writes tokens that end a text: one as a number."""
    return ids[0] if len(ids) == 1 else list(ids)


def hf_state(model: GPT, whole: Callable[[Tensor], Tensor] = lambda part: part) -> Iterator[tuple[str, Tensor]]:
    """The parameters under Hugging Face's names, one after another; `whole` makes all of one that is shared out. An attention-only model
    gets MLPs of one unit of zeros."""
    config, of = model.config, FAMILIES.get(family(model.config), OWN)
    parameters = dict(model.named_parameters())
    for theirs, ours in by_their_name(parameters, of).items():
        yield theirs, to_theirs([whole(parameters[name].detach()) for name in ours], ours[0], of, config.n_heads)
    if config.mlp == "none" and of is not OWN:
        yield from _empty_mlps(config).items()


def load_hf_state(model: GPT, state: Mapping[str, Tensor], source: str, model_type: str | None = None,
                  fill: Callable[[Tensor, Tensor], object] = lambda p, value: p.copy_(value)) -> None:
    """Copy `state` into the model's parameters, tensor by tensor; a UserError where a name or a shape does not fit. `source` names it.
    `model_type`: whose names these are, where not those that we would give. `fill` copies all of a parameter into it."""
    config, of = model.config, FAMILIES.get(model_type or family(model.config), OWN)
    parameters = dict(model.named_parameters())
    theirs = by_their_name(parameters, of)
    given = {name for name in state if not (config.mlp == "none" and name in _empty_mlps(config))}
    if different := sorted(given ^ set(theirs)):
        raise UserError(f"{source}: its parameters are not those of its config ({', '.join(different[:3])}"
                        f"{' …' if len(different) > 3 else ''})")
    with torch.no_grad():
        for name, ours in theirs.items():
            expected = to_theirs([torch.empty(parameters[p].shape, device="meta") for p in ours], ours[0], of, config.n_heads).shape
            if expected != (value := state[name]).shape:
                raise UserError(f"{source}: {name} is {tuple(value.shape)}, its config says {tuple(expected)}")
            for p, part in zip(ours, to_ours(value, ours[0], len(ours), of, config.n_heads)):
                fill(parameters[p], part)


def _empty_mlps(config: ModelConfig) -> dict[str, Tensor]:
    E = config.d_model
    shapes = {"post_attention_layernorm": (E,), "mlp.gate_proj": (1, E), "mlp.up_proj": (1, E), "mlp.down_proj": (E, 1)}
    return {f"model.layers.{layer}.{part}.weight": torch.zeros(shape)
            for layer in range(config.n_layers) for part, shape in shapes.items()}


if __name__ == "__main__":                      # the command of earlier versions
    sys.exit("error: this command is now: python -m training.import_model DIR runs/NAME")
