"""What our own code says of a checkpoint, written for client scripts: reference.json and arrays.

    ids         of tricky texts, with the token that begins every prompt of some imported models
    greedy      20 tokens after a prompt that no rounding error changes
    heldout     bits per byte of a text, in the windows of lm-eval's rolling log-likelihood
    arrays      of the prompt: logits, patterns, z, and logits with one head silenced
"""

import json
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.tokenizer import Tokenizer
from model.generate import Sampling, generate
from model.gpt import GPT
from model.taps import taps
from training.checkpoint import load_model

TEXTS = {                       # those of which tokenizers make different things
    "plain": "def f(x):\n    return x", "emoji": "a🙂b 👩‍👩‍👧 ✨",
    "composed": "é", "decomposed": "e\u0301",
    "digits": "year 20251 x=12345", "CRLF": "a\r\nb\r\n\r\nc", "NUL": "a\0b", "leading": "   lead",
    "trailing": "trail   ", "tabs": "\t\tx", "wide spaces": "a\u00a0b\u3000c",
    "contractions": "don't WE'LL I'd", "controls": "\x01\x7f\x1b[0m",
    "right to left": "שלום مرحبا", "CJK": "日本語。テスト",
    "punctuation": "def  f ( x ) : , . ! 'x' n't", "empty": "",
    "invisible": "\ufeffx\u200by", "newlines": "x\n\n\n", "mixed": " \n \t x  1a_b",
}
PROMPTS = ["def parse(self, text):\n    return", "for name in names:", "class Error(Exception):\n",
           "import os\nimport sys\n\n\n", "the text of the argument", "if value is None:\n        ",
           "return self.name", "    def __init__(self"]
N_GREEDY = 20
MARGIN = 1e-3                   # the least distance of a greedy token's logit from the next one's
HELDOUT_CHARACTERS = 3000


def write_reference(shape: str, checkpoint: Path, heldout: str, folder: Path) -> None:
    """Write the reference of a shape's checkpoint to `folder`, complete or not at all."""
    model, tokenizer = load_model(checkpoint)
    model.requires_grad_(False)
    prompt, greedy, margin = choose_prompt(model, tokenizer)
    ids = torch.tensor([encode(tokenizer, prompt)])
    with taps(model, ["L*.pattern", "L*.z"]) as acts:
        logits = model(ids)[0]
    layers = range(model.config.n_layers)
    last = torch.tensor([model.config.n_heads - 1])
    with taps(model, {"L0.z": lambda z: z.index_fill(1, last, 0)}):
        silenced = model(ids)[0]
    arrays = {"logits": logits, "silenced_logits": silenced,
              "patterns": torch.stack([acts[f"L{layer}.pattern"][0] for layer in layers]),
              "z": torch.stack([acts[f"L{layer}.z"][0] for layer in layers])}
    settings = json.loads((checkpoint / "config.json").read_text("utf-8"))
    text = heldout[:HELDOUT_CHARACTERS]
    facts = {
        "shape": shape, "model_type": settings["model_type"],
        "bytes": tokenizer.n_vocab == 257,      # every byte is a token
        "n_layers": model.config.n_layers, "n_heads": model.config.n_heads,
        "n_kv_heads": model.config.kv_heads, "n_ctx": model.config.n_ctx,
        "d_model": model.config.d_model, "d_head": model.config.head_size,
        "d_mlp": model.config.mlp_size,
        "tied": model.config.tied_embeddings, "vocab_size": model.config.vocab_size,
        "n_vocab": tokenizer.n_vocab, "begin": tokenizer.begin,
        "ends": list(tokenizer.ends), "prefixed": tokenizer.prefixed,
        "texts": {name: {"text": text, "ids": encode(tokenizer, text)}
                  for name, text in TEXTS.items()},
        "special": {"text": "a<|endoftext|>b", "ids": encode(tokenizer, "a<|endoftext|>b")},
        "prompt": {"text": prompt, "ids": ids[0].tolist()}, "greedy": greedy, "margin": margin,
        "greedy_text": tokenizer.decode(greedy),
        "heldout": {"text": text, "bits_per_byte": bits_per_byte(model, tokenizer, text)},
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array.float().numpy())
    (folder / "reference.json").write_text(json.dumps(facts, indent=1))     # written last


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a prompt, and none for an empty text, as other programs have it."""
    ids = tokenizer.encode(text).tolist()
    return [tokenizer.begin, *ids] if tokenizer.prefixed else ids


def choose_prompt(model: GPT, tokenizer: Tokenizer) -> tuple[str, list[int], float]:
    """The first prompt whose continuation is 20 tokens, none of them near another choice: prompt,
    continuation, and its least margin."""
    for prompt in PROMPTS:
        ids = encode(tokenizer, prompt)
        if len(ids) + N_GREEDY > model.config.n_ctx:
            continue
        rows = generate(model, [ids], N_GREEDY, Sampling(temperature=0))
        greedy = [row[0] for row in rows]
        logits = model(torch.tensor([ids + greedy]))[0, len(ids) - 1:-1]        # (20, V)
        best = logits.topk(2).values
        margin = float((best[:, 0] - best[:, 1]).min())
        if (margin > MARGIN and max(greedy) < tokenizer.n_vocab
                and not set(greedy) & set(tokenizer.special.values())):
            return prompt, greedy, margin
    raise SystemExit("no prompt has 20 certain greedy tokens: add some to PROMPTS")


def bits_per_byte(model: GPT, tokenizer: Tokenizer, text: str) -> float:
    """Loss per byte of UTF-8 of a text, in windows of n_ctx that predict each token once.

    The first window begins with the token that begins texts, the others with the last token of the
    window before. The last window is filled with earlier tokens, which it does not predict again.
    """
    ids, n_ctx = tokenizer.encode(text).tolist(), model.config.n_ctx
    row = [tokenizer.begin, *ids]
    nats, done = 0.0, 0
    while done < len(ids):
        end = min(done + n_ctx, len(ids))                   # predicts ids[done:end]
        start = max(0, end - n_ctx)
        inputs, targets = torch.tensor([row[start:end]]), torch.tensor([row[start + 1:end + 1]])
        losses: Tensor = model.losses(inputs, targets)[0]
        nats += float(losses[done - start:].double().sum())
        done = end
    return nats / math.log(2) / len(text.encode())
