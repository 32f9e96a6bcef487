"""TransformerLens: logits, patterns, z and an intervention through its bridge."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from client import (
    Reference,
    difference,
    equal,
    refused,
    refused_type,
    run,
)
from transformer_lens.model_bridge import TransformerBridge

WINDOWS = ("TransformerLens has no model with full and windowed layers but Qwen2 and Qwen3. Train "
           "with one window for all layers (saved as Mistral), or use nnsight")
QWEN2_IDS = "texts get other ids, as from `AutoTokenizer`: pass ids (see the notes). Also, "
NO_BEGIN = ("a text gets no begin token in front, though texts of the other types do. Say "
            "`prepend_bos=True` or `False`, or pass ids")


@torch.no_grad()
def check(checkpoint: Path, reference: Reference) -> dict[str, Any]:
    def boot() -> Any:
        return TransformerBridge.boot_transformers(str(checkpoint), device="cpu",
                                                   dtype=torch.float32)

    if reference.model_type == "induction_gpt":
        return refused_type(boot)
    if reference.model_type == "ministral":
        refused(boot, "Could not determine supported architecture", "MinistralForCausalLM")
        return {"limit": WINDOWS}
    limit, model = None, boot()
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
    begins = model.to_tokens("x")[0].tolist() != model.to_tokens("x", prepend_bos=False)[0].tolist()
    if reference.model_type in ("qwen2", "qwen3", "gpt_neox"):
        assert not begins, "the documented limit has gone: texts get a begin token"
        limit = NO_BEGIN
    else:
        assert begins
    if reference.model_type == "qwen2":
        refused(lambda: check_ids(model, reference), "ids of plain")
        ids_checked, limit = {}, QWEN2_IDS + NO_BEGIN
    else:
        ids_checked = {"ids": check_ids(model, reference)}
    return {"limit": limit, "checks": {
        **ids_checked,
        "logits": difference(logits[0], reference.logits),
        "patterns": difference(patterns, reference.patterns),
        "z": difference(z, reference.z),
        "intervention": difference(silenced[0], reference.silenced_logits),
        "greedy": equal(continued[0, len(reference.ids):].tolist(), reference.greedy),
    }}


def check_ids(model: Any, reference: Reference) -> str:
    """The ids of texts as they are, and with the token that begins texts."""
    begin = [reference.facts["begin"]]
    for name, text in reference.texts.items():
        if name != "empty":
            bare = text["ids"][1:] if reference.facts["prefixed"] else text["ids"]
            for prefix, prepend in (([], False), (begin, True)):
                ids = model.to_tokens(text["text"], prepend_bos=prepend)[0].tolist()
                equal(ids, prefix + bare, f"ids of {name}:")
    return "equal"


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    run("TransformerLens",
        f"{version('transformer-lens')} (transformers {transformers.__version__})", check)
