"""A model in Hugging Face's names and config.json, so that `AutoModelForCausalLM` opens a
checkpoint as it is.

The exact ModelConfig is kept inside config.json under `gpt`; our own loading reads only that.
model/families.py holds the tables of names.
"""

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from errors import UserError

import torch
from torch import Tensor

from model.config import ModelConfig
from model.families import FAMILIES, OWN, Family, architecture_of, family
from model.gpt import GPT
from model.hf_config import describe


def hf_config(config: ModelConfig, begin: int, ends: Sequence[int]) -> dict[str, Any]:
    """The contents of config.json; `begin` and `ends` are the tokenizer's."""
    model_type = family(config)
    return {
        "model_type": model_type, "architectures": [architecture_of(model_type).architecture],
        **describe(config, model_type), "dtype": "float32", "bos_token_id": begin,
        "eos_token_id": one_or_all(ends), "pad_token_id": None, "gpt": config.model_dump()}


def one_or_all(ids: Sequence[int]) -> int | list[int]:
    """End tokens as Hugging Face writes them: a single one as a number."""
    return ids[0] if len(ids) == 1 else list(ids)


def hf_state(model: GPT, full: Callable[[Tensor], Tensor] = lambda part: part
             ) -> Iterator[tuple[str, Tensor]]:
    """The parameters under Hugging Face's names, one after another.

    `full` gathers a parameter that is sharded.
    """
    config, architecture = model.config, architecture_of(family(model.config))
    parameters = dict(model.named_parameters())
    for name, ours in by_their_name(parameters, architecture).items():
        parts = [full(parameters[p].detach()) for p in ours]
        if architecture.short_names and config.tied_embeddings:
            name = without_first_word(name)
        yield name, to_theirs(parts, ours[0], architecture, config.n_heads)
    yield from zeros_for(config, architecture).items()


def load_hf_state(model: GPT, state: Mapping[str, Tensor], source: str,
                  model_type: str | None = None,
                  fill: Callable[[Tensor, Tensor], object] = Tensor.copy_) -> None:
    """Copy `state` into the model's parameters, tensor by tensor.

    source      names it in errors
    model_type  the family whose names these are; the one that we would save it as, unless given
    fill        copies the full value of a parameter into it
    Raises UserError if a name or a shape does not fit.
    """
    config, architecture = model.config, architecture_of(model_type or family(model.config))
    parameters = dict(model.named_parameters())
    expected = by_their_name(parameters, architecture)
    if architecture.short_names:
        expected = {name if name in state else without_first_word(name): ours
                    for name, ours in expected.items()}
    names = set(state) - set(zeros_for(config, architecture))
    if different := sorted(names ^ set(expected)):
        shown = ", ".join(different[:3]) + (" …" if len(different) > 3 else "")
        raise UserError(f"{source}: its parameters are not those of its config ({shown})")
    with torch.no_grad():
        for name, ours in expected.items():
            empty = [torch.empty(parameters[p].shape, device="meta") for p in ours]
            shape = to_theirs(empty, ours[0], architecture, config.n_heads).shape
            value = state[name]
            if value.shape != shape:
                raise UserError(f"{source}: {name} is {tuple(value.shape)}, its config says "
                                f"{tuple(shape)}")
            parts = to_ours(value, ours[0], len(ours), architecture, config.n_heads)
            for p, part in zip(ours, parts):
                fill(parameters[p], part)


def zeros_for(config: ModelConfig, architecture: Family) -> dict[str, Tensor]:
    """Tensors of zeros for what the family has and the model lacks, by their names there.

    An attention-only model gets MLPs of one unit. A model with biases of q, k and v only gets a
    bias of o if it is saved as Llama, which has all four.
    """
    if architecture is OWN:
        return {}
    E, shapes = config.d_model, dict[str, tuple[int, ...]]()
    if config.mlp == "none":
        shapes |= {"post_attention_layernorm.weight": (E,), "mlp.gate_proj.weight": (1, E),
                   "mlp.up_proj.weight": (1, E), "mlp.down_proj.weight": (E, 1)}
    if config.bias == "qkv" and architecture is FAMILIES["llama"]:
        shapes["self_attn.o_proj.bias"] = (E,)
    return {f"model.layers.{layer}.{name}": torch.zeros(shape)
            for layer in range(config.n_layers) for name, shape in shapes.items()}


# --- names and layouts ------------------------------------------------------------------------

def by_their_name(names: Iterable[str], spec: Family) -> dict[str, list[str]]:
    """The family's tensors, and which of our parameters `names` each holds, in order."""
    tensors: dict[str, list[str]] = {}
    for name in names:
        module, leaf = name.rsplit(".", 1)
        layer = re.search(r"\.(\d+)(\.|$)", module)
        template = spec.names[re.sub(r"\.\d+(?=\.|$)", ".{}", module, count=1)]
        their_module = template.format(layer[1] if layer else "")
        their_leaf = "weight" if leaf == "gain" else leaf
        tensors.setdefault(f"{their_module}.{their_leaf}", []).append(name)
    return tensors


def without_first_word(name: str) -> str:
    """transformer.h.0.ln_1.weight → h.0.ln_1.weight, as in the file that OpenAI published."""
    return name.partition(".")[2]


def to_theirs(parts: Sequence[Tensor], name: str, spec: Family, n_heads: int) -> Tensor:
    """The tensor that a family makes of our parameters, the first of which is called `name`."""
    if spec.layout == "by head" and len(parts) > 1:         # (H D, …) each → (H · parts · D, …)
        by_head = [part.unflatten(0, (n_heads, -1)) for part in parts]
        return torch.stack(by_head, dim=1).flatten(0, 2)
    tensor = torch.cat(list(parts)) if len(parts) > 1 else parts[0]
    return tensor.mT if _transposed(tensor, name, spec) else tensor


def to_ours(tensor: Tensor, name: str, count: int, spec: Family, n_heads: int) -> Iterator[Tensor]:
    """The `count` parameters in a family's tensor, the first of which is called `name`."""
    if spec.layout == "by head" and count > 1:
        by_head = tensor.unflatten(0, (n_heads, count, -1))
        yield from (part.flatten(0, 1) for part in by_head.unbind(1))
    else:
        yield from (tensor.mT if _transposed(tensor, name, spec) else tensor).chunk(count)


def _transposed(tensor: Tensor, name: str, spec: Family) -> bool:
    return spec.layout == "transposed" and tensor.ndim == 2 and name.startswith("blocks.")



if __name__ == "__main__":                                  # the command of earlier versions
    sys.exit("error: this command is now: python -m training.import_model DIR runs/NAME")
