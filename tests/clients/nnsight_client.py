"""nnsight: reading and replacing activations of a checkpoint inside its trace."""

from pathlib import Path
from typing import Any

import nnsight
import torch
import transformers
from client import Reference, difference, equal, open_tokenizer, refused_type, run, same_ids
from nnsight import TransformersModel

# model_type → the modules of a layer: the list of layers, and the module that reads all heads' z.
PLACES = {"gpt2": ("transformer.h", "attn.c_proj"),
          "gpt_neox": ("gpt_neox.layers", "attention.dense")}
LLAMA = ("model.layers", "self_attn.o_proj")


def module(parent: Any, path: str) -> Any:
    """parent.a.b for "a.b"."""
    for name in path.split("."):
        parent = getattr(parent, name)
    return parent


@torch.no_grad()
def check(checkpoint: Path, reference: Reference) -> dict[str, Any]:
    if reference.model_type == "induction_gpt":
        return refused_type(lambda: TransformersModel(
            str(checkpoint), task="text-generation", device_map="cpu", dispatch=True))
    tokenizer, limit = open_tokenizer(checkpoint, reference)
    options = {"tokenizer": tokenizer} if limit else {}
    model = TransformersModel(str(checkpoint), task="text-generation", device_map="cpu",
                              dispatch=True, attn_implementation="eager", **options)
    layers_path, readout = PLACES.get(reference.model_type, LLAMA)
    layers, n_heads = module(model, layers_path), reference.facts["n_heads"]
    d_head = reference.facts["d_head"]
    with model.trace(reference.prompt):
        inputs = nnsight.save([module(layer, readout).input for layer in layers])   # (1, T, H D)
        logits = model.output.logits.save()
    with model.trace(reference.prompt):
        residual = layers[0].output.save()
    with model.trace(reference.prompt):
        module(layers[0], readout).input[:, :, -d_head:] = 0                # the last head
        silenced = model.output.logits.save()
    with model.trace(reference.prompt, output_attentions=True):
        attentions = model.output.attentions.save()
    z = torch.cat(inputs).unflatten(-1, (n_heads, -1)).transpose(1, 2)
    assert (residual[0] if isinstance(residual, tuple) else residual).shape[-1] == (
        reference.facts["d_model"])
    with model.generate(reference.prompt, max_new_tokens=20, do_sample=False) as tracer:
        continued = tracer.result.save()
    checks = {
        "ids": same_ids(reference, lambda text: model.tokenizer(text).input_ids),
        "logits": difference(logits[0], reference.logits),
        "patterns": difference(torch.cat(list(attentions)), reference.patterns),
        "z": difference(z, reference.z),
        "intervention": difference(silenced[0], reference.silenced_logits),
        "greedy": equal(continued[0, len(reference.ids):].tolist(), reference.greedy),
        "batch": check_batch(model, reference),
    }
    return {"checks": checks, "limit": limit}


def check_batch(model: Any, reference: Reference) -> float:
    """Two prompts of different lengths in one trace: the shorter is as if alone."""
    longer = f"{reference.prompt} = 1, 2"
    with model.trace() as tracer:
        with tracer.invoke(reference.prompt):
            short = model.output.logits[:, -1].save()
        with tracer.invoke(longer):
            model.output.logits[:, -1].save()
    return difference(short[0], reference.logits[-1])


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    run("nnsight", f"{nnsight.__version__} (transformers {transformers.__version__})", check)
