"""TransformerLens: logits, patterns, z and an intervention through its bridge."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from client import Reference, difference, equal, refused, run, same_ids
from importlib.metadata import version
from transformer_lens.model_bridge import TransformerBridge

OWN = ("TransformerLens opens transformers' models, which have none of this shape. Use "
       "`model.taps` of this project")


@torch.no_grad()
def check(checkpoint: Path, reference: Reference) -> dict[str, Any]:
    def boot() -> Any:
        return TransformerBridge.boot_transformers(str(checkpoint), device="cpu",
                                                   dtype=torch.float32)

    if reference.model_type == "induction_gpt":
        refused(boot, "induction_gpt")
        return {"limit": OWN}
    model = boot()
    ids = torch.tensor([reference.ids])
    logits, cache = model.run_with_cache(ids)
    layers, last = range(reference.facts["n_layers"]), reference.facts["n_heads"] - 1

    def silence(z: torch.Tensor, hook: Any) -> torch.Tensor:            # (B, T, H, D)
        return z.index_fill(2, torch.tensor(last), 0)

    silenced = model.run_with_hooks(ids, fwd_hooks=[("blocks.0.attn.hook_z", silence)])
    patterns = torch.stack([cache[f"blocks.{n}.attn.hook_pattern"][0] for n in layers])
    z = torch.stack([cache[f"blocks.{n}.attn.hook_z"][0].transpose(0, 1) for n in layers])
    loss = model(ids, return_type="loss").item()
    ours = torch.from_numpy(reference.logits[:-1]).log_softmax(-1)[range(len(reference.ids) - 1),
                                                                   reference.ids[1:]]
    assert abs(loss + ours.mean().item()) < 1e-4
    labels = cache.decompose_resid(return_labels=True)[1]
    assert len(labels) >= 1 + reference.facts["n_layers"]
    continued = model.generate(ids, max_new_tokens=20, do_sample=False, verbose=False,
                               return_type="tokens")
    return {"checks": {
        "ids": same_ids(reference, lambda text: encode(model, text), skip=("empty",)),
        "logits": difference(logits[0], reference.logits),
        "patterns": difference(patterns, reference.patterns),
        "z": difference(z, reference.z),
        "intervention": difference(silenced[0], reference.silenced_logits),
        "greedy": equal(continued[0, len(reference.ids):].tolist(), reference.greedy),
        "begin token": check_begin(model, reference),
    }}


def encode(model: Any, text: str) -> list[int]:
    return model.to_tokens(text, prepend_bos=False)[0].tolist()


def check_begin(model: Any, reference: Reference) -> str:
    """Texts get the token that begins texts unless prepend_bos=False says otherwise."""
    ids, begin = reference.ids, reference.facts["begin"]
    bare = ids[1:] if reference.facts["prefixed"] else ids
    return equal(model.to_tokens(reference.prompt)[0].tolist(), [begin, *bare])


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    np.seterr(all="raise")
    run("TransformerLens",
        f"{version('transformer-lens')} (transformers {transformers.__version__})", check)
