"""bertviz: pages of attention patterns, and the patterns that they show."""

import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from bertviz import head_view, model_view
from client import Reference, difference, open_tokenizer, refused_type, run
from transformers import AutoModel


@torch.no_grad()
def check(checkpoint: Path, reference: Reference) -> dict[str, Any]:
    def load() -> Any:
        return AutoModel.from_pretrained(str(checkpoint), attn_implementation="eager")

    if reference.model_type == "induction_gpt":
        return refused_type(load)
    tokenizer, limit = open_tokenizer(checkpoint, reference)
    model = load()
    inputs = tokenizer(reference.prompt, return_tensors="pt")
    attentions = model(**inputs, output_attentions=True).attentions
    tokens = tokenizer.convert_ids_to_tokens(inputs.input_ids[0])
    checks: dict[str, Any] = {"patterns": difference(torch.cat(attentions), reference.patterns)}
    for view in (head_view, model_view):
        page = view(attentions, tokens, html_action="return").data
        (Path.cwd() / f"{view.__name__}.html").write_text(page)
        shown = shown_patterns(page)
        assert shown.shape == reference.patterns.shape
        assert np.abs(shown - reference.patterns).max() < 1e-3          # rounded to three digits
        checks[view.__name__] = "works"
    return {"checks": checks, "limit": limit}


def shown_patterns(page: str) -> np.ndarray:
    """The patterns (L, H, T, T) in a page's script."""
    parameters, = re.findall(r"const params = (\{.*?\}); // HACK", page)
    return np.array(json.loads(parameters)["attention"][0]["attn"], dtype=np.float64)


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    run("bertviz", f"{version('bertviz')} (transformers {transformers.__version__})", check)
