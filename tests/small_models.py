"""Small models for the tests of model/, and what several of those tests do with them."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from data.byte_bpe import bytes_tokenizer
from model.compiled import CompiledStep
from model.config import ModelConfig
from model.generate import Sampling, generate
from model.gpt import GPT
from model.kv_cache import KVCache
from training.save_checkpoint import checkpoint_contents, save_checkpoint


def perturbed_model(**changes) -> GPT:
    """A small model with noise added to every weight, so that no path multiplies by 0 or 1."""
    config = {"n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "d_model": 32, "n_ctx": 32,
              "vocab_size": 50} | changes
    model = GPT(ModelConfig(**config)).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return model


def checkpoint_of(model: GPT, folder: Path) -> Path:
    """Save a model with the byte tokenizer as step 3 in `folder`; its path."""
    state = checkpoint_contents(model, {}, {"step": 3}, "", bytes_tokenizer(), copy=False)
    return save_checkpoint(folder, state)


def cache_tensors(cache: KVCache) -> list[Tensor]:
    """Every tensor that a cache holds."""
    return [*cache.keys, *cache.values, *cache.last_raw_key, cache._lengths]


@contextmanager
def saved_for_backward() -> Iterator[list[Tensor]]:
    """The list of tensors that autograd saves inside the block, one entry for each time."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


# --- continuing prompts ----------------------------------------------------------------------

GREEDY = Sampling(temperature=0)
PROMPTS = [[1, 2, 3], [7], [4] * 9, [5, 6], [8, 3, 1, 2, 2, 6], [9, 9], [2, 4, 6, 8], [1]]
WANTED = [9, 3, 20, 1, 12, 20, 2, 7]            # tokens to continue each prompt by
SHAPES = [{}, {"window": 4}, {"smear": True}, {"position": "learned"},
          {"position": "sinusoidal", "n_kv_heads": 1}]


@torch.no_grad()
def next_token(model: GPT, context: list[int]) -> int:
    """The greedy next token, by a pass over the whole context."""
    return int(model(torch.tensor([context]))[0, -1].argmax())


def continue_one(model: GPT, prompt: list[int], n: int, sampling: Sampling = GREEDY,
                 **options) -> list[int]:
    """The tokens that `generate` continues a single prompt by."""
    return [tokens[0] for tokens in generate(model, [prompt], n, sampling, **options)]


def tokens_by_row(steps: Iterable[dict[int, int]], rows: int) -> list[list[int]]:
    """Each row's tokens from the steps of `generate`."""
    tokens: list[list[int]] = [[] for _ in range(rows)]
    for step in steps:
        for row, token in step.items():
            tokens[row].append(token)
    return tokens


def recomputed(model: GPT, slide: bool) -> list[list[int]]:
    """The greedy continuations of PROMPTS, each token by a pass over everything before it."""
    n_ctx, continuations = model.config.n_ctx, []
    for prompt, n in zip(PROMPTS, WANTED):
        context, tokens = list(prompt), []
        while len(tokens) < n and (slide or len(context) <= n_ctx):
            if len(context) > n_ctx:
                context = context[-n_ctx // 2:]
            tokens.append(next_token(model, context))
            context.append(tokens[-1])
        continuations.append(tokens)
    return continuations


def generated(model: GPT, slide: bool, batch_size: int,
              step: CompiledStep | None = None) -> list[list[int]]:
    """The greedy continuations of PROMPTS by `generate`, `batch_size` rows at a time."""
    remaining = list(WANTED)

    def wanted(row: int) -> bool:
        remaining[row] -= 1
        return remaining[row] > 0

    steps = list(generate(model, PROMPTS, 20, GREEDY, slide=slide, batch_size=batch_size,
                          wanted=wanted, compiled_step=step))
    assert all(0 < len(tokens) <= batch_size for tokens in steps)
    return tokens_by_row(steps, len(PROMPTS))
