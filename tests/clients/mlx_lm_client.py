"""mlx-lm, on the CPU: MLX runs on Apple's GPUs, and on Linux with mlx[cpu]."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import transformers
from client import Reference, difference, equal, run, same_ids
from mlx_lm.generate import generate_step

mx.set_default_device(mx.cpu)


def check(checkpoint: Path, reference: Reference) -> dict[str, Any]:
    model, tokenizer = mlx_lm.load(str(checkpoint))
    logits = np.array(model(mx.array([reference.ids]))[0])
    steps = generate_step(mx.array(reference.ids), model, max_tokens=20)
    return {"checks": {
        "ids": same_ids(reference, tokenizer.encode),
        "logits": difference(logits, reference.logits),
        "greedy": equal([int(token) for token, _ in steps], reference.greedy)}}


if __name__ == "__main__":
    run("mlx-lm", f"{mlx_lm.__version__} (transformers {transformers.__version__})", check)
