"""Text from a model: prefill the prompts, then decode one token a row at a time."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.gpt import GPT
from model.kv_cache import KVCache

DRAWS = 256             # random numbers a row that are drawn at a time


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from the logits, applied in this order."""

    repetition_penalty: float = 1.0     # logits of tokens already in the row: divided by it if > 0, else multiplied (Keskar et al. 2019)
    temperature: float = 1.0            # logits are divided by it; 0: the largest wins
    top_k: int | None = None            # the k largest stay
    top_p: float | None = None          # the largest that together reach probability p stay (Holtzman et al. 2020)
    min_p: float | None = None          # those at least this share of the largest's probability stay (Nguyen et al. 2024)


@torch.inference_mode()
def generate(model: GPT, prompts: Sequence[Sequence[int]], max_tokens: int, sampling: Sampling = Sampling(), *,
             seed: int = 0, ends: Collection[int] = (), slide: bool = False, n_tokens: int | None = None) -> Iterator[list[int | None]]:
    """Continue every prompt at once; yields the next token of each row, None for rows that have ended.

    Row r draws from (seed, r) alone, so what it says does not depend on its neighbours. A row ends after `max_tokens`,
    behind one of the tokens `ends`, or when its text fills n_ctx; with `slide` it then forgets all but its newest half and goes on.
    `n_tokens`: choose among the first so many ids, where the model's vocabulary is larger than the tokenizer's.
    Raises ValueError for an empty prompt, and without `slide` for one longer than n_ctx.
    """
    rows, n_ctx = [list(prompt) for prompt in prompts], model.config.n_ctx
    if not all(rows):
        raise ValueError("a prompt has no tokens: begin it with tokenizer.begin")
    if not slide and max(map(len, rows)) > n_ctx:
        raise ValueError(f"a prompt of {max(map(len, rows))} tokens is longer than model.n_ctx={n_ctx}")
    randoms = [np.random.Generator(np.random.Philox(key=[seed, r])) for r in range(len(rows))]
    ended = [False] * len(rows)
    forgotten = [0] * len(rows)                             # tokens of each row that the context no longer holds
    cache, chosen, draws = None, torch.empty(0), torch.empty(0)
    for n in range(max_tokens):
        if cache is None:
            forgotten = [f if len(row) - f <= n_ctx else len(row) - max(1, n_ctx // 2) for row, f in zip(rows, forgotten)]
            cache, logits = prefill(model, [row[f:] for row, f in zip(rows, forgotten)], max_tokens - n)
        else:
            logits = model(chosen[:, None], cache=cache)[:, 0]
        if n % DRAWS == 0:                                  # one number a token, some tokens ahead
            draws = torch.from_numpy(np.stack([random.random(DRAWS, np.float32) for random in randoms])).to(logits.device)
        chosen = choose(logits[:, :n_tokens].float(), sampling, draws[:, n % DRAWS], rows)
        said = chosen.tolist()
        yield [None if ended[r] else token for r, token in enumerate(said)]
        for r, token in enumerate(said):
            rows[r].append(token)
            ended[r] = ended[r] or token in ends
        full = [len(row) - f > n_ctx for row, f in zip(rows, forgotten)]
        if slide and any(f and not e for f, e in zip(full, ended)):
            cache = None                                    # positions begin anew, so the kept tokens are read again
        elif not slide:
            ended = [e or f for e, f in zip(ended, full)]
        if all(ended):
            return


def prefill(model: GPT, rows: Sequence[Sequence[int]], room: int) -> tuple[KVCache, Tensor]:
    """Read prompts of any lengths in one pass: a cache with room for that many more tokens, and each row's next logits (B, V)."""
    device, config = model.embed.weight.device, model.config
    lengths = torch.tensor([len(row) for row in rows], device=device)
    T = max(map(len, rows))
    tokens = torch.tensor([list(row) + [0] * (T - len(row)) for row in rows], device=device)            # padded on the right
    cache = KVCache(config, len(rows), min(T + room, config.n_ctx), model.compute_dtype, device)
    hidden = model.hidden(tokens, cache=cache, lengths=None if bool((lengths == T).all()) else lengths)
    return cache, model.unembed(hidden[torch.arange(len(rows), device=device), lengths - 1])


def choose(logits: Tensor, sampling: Sampling, draw: Tensor, rows: Sequence[Sequence[int]]) -> Tensor:
    """One token a row (B,) from logits (B, V); `draw` (B,) uniform numbers decide, `rows` are what has been said."""
    if sampling.repetition_penalty != 1.0:
        said = torch.zeros_like(logits, dtype=torch.bool)
        for r, row in enumerate(rows):
            said[r, torch.tensor(row, device=logits.device)] = True
        penalised = torch.where(logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty)
        logits = torch.where(said, penalised, logits)
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / sampling.temperature       # at most 0: no temperature overflows
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[:, -1:], -torch.inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered, index = logits.sort(dim=-1, descending=True)
        p = ordered.softmax(dim=-1)
        beyond = p.cumsum(dim=-1) - p >= sampling.top_p     # the token that crosses the line stays
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(1, index, beyond), -torch.inf)
    p = logits.softmax(dim=-1)
    if sampling.min_p is not None:
        p = p.masked_fill(p < sampling.min_p * p.amax(dim=-1, keepdim=True), 0)
    upto = p.cumsum(dim=-1)
    target = draw[:, None] * upto[:, -1:] * (1 - 1e-6)      # never rounds up to the whole, behind the last likely token
    return torch.searchsorted(upto, target, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
