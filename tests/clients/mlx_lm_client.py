"""mlx-lm on the CPU. MLX is made for Apple's GPUs; mlx[cpu] also runs on Linux."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import transformers
from client import OTHER_TYPE, Reference, difference, equal, refused, run, same_ids
from mlx_lm.generate import generate_step

NO_WINDOWS = ("mlx-lm ignores the windows of Mistral and Qwen2 without a warning, and has no "
              "Ministral. Train with `model.window=null`")
NEOX = ("mlx-lm's GPT-NeoX has MLPs of 4 × d_model, all biases and no tied embeddings: train with "
        "`model.d_mlp=null model.bias=all model.tied_embeddings=false`")
GPT2 = ("mlx-lm's GPT-2 has tied embeddings and MLPs of 4 × d_model: train with "
        "`model.tied_embeddings=true model.d_mlp=null`")

mx.set_default_device(mx.cpu)


def check(checkpoint: Path, reference: Reference) -> dict[str, Any]:
    def refusal(limit: str, words: str) -> dict[str, Any]:
        refused(lambda: checks(checkpoint, reference), words)
        return {"limit": limit}

    facts = reference.facts
    match reference.model_type:
        case "induction_gpt":
            return refusal(OTHER_TYPE, "Model type induction_gpt not supported")
        case "ministral":
            return refusal(NO_WINDOWS, "Model type ministral not supported")
        case "mistral" | "qwen2":
            return refusal(NO_WINDOWS, "greedy tokens")
        case "gpt_neox" if facts["d_mlp"] != 4 * facts["d_model"]:
            return refusal(NEOX, "mlp.dense_h_to_4h.weight")
        case "gpt2" if not facts["tied"]:
            return refusal(GPT2, "lm_head.weight")
    return {"checks": checks(checkpoint, reference)}


def checks(checkpoint: Path, reference: Reference) -> dict[str, Any]:
    model, tokenizer = mlx_lm.load(str(checkpoint))
    steps = generate_step(mx.array(reference.ids), model, max_tokens=20)
    greedy = equal([int(token) for token, _ in steps], reference.greedy, "greedy tokens:")
    logits = np.array(model(mx.array([reference.ids]))[0])
    # Its GPT-NeoX computes the exact GELU by tanh.
    name = "logits (GELU approximated)" if reference.model_type == "gpt_neox" else "logits"
    return {"ids": same_ids(reference, tokenizer.encode), "greedy": greedy,
            name: difference(logits, reference.logits)}


if __name__ == "__main__":
    run("mlx-lm", f"{mlx_lm.__version__} (transformers {transformers.__version__})", check)
