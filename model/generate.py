"""Text from a model: prefill the prompts, then decode one token a row at a time."""

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from model.gpt import GPT
from model.kv_cache import KVCache

if TYPE_CHECKING:                                   # it loads the compiler
    from model.compiled import CompiledStep

DRAWS = 256             # random numbers that a row draws at a time


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
             seed: int = 0, ends: Collection[int] = (), slide: bool = False, n_tokens: int | None = None, batch_size: int = 32,
             wanted: Callable[[int], bool] = lambda row: True,
             step: "CompiledStep | None" = None) -> Iterator[dict[int, int]]:
    """Continue every prompt; yields the next token of each row that is being continued, by its number among `prompts`.

    At most `batch_size` rows are continued at a time, and as one ends, the next prompt takes its place at once (continuous batching, Yu
    et al. 2022, "Orca", section 3). Row r draws from (seed, r) alone, so what it says does not depend on its neighbours.
    A row ends after `max_tokens`, behind one of the tokens `ends`, when it is no longer `wanted`, or when its text fills n_ctx; with
    `slide` it then forgets all but its newest half and goes on.
    `step`: makes the logits in the model's place once prompts are read, of as many rows throughout.
    `n_tokens`: choose among the first so many ids, where the model's vocabulary is larger than the tokenizer's.
    Raises ValueError for an empty prompt, and without `slide` for one longer than n_ctx.
    """
    n_ctx, longest = model.config.n_ctx, max(map(len, prompts))
    if not all(prompts):
        raise ValueError("a prompt has no tokens: begin it with tokenizer.begin")
    if not slide and longest > n_ctx:
        raise ValueError(f"a prompt of {longest} tokens is longer than model.n_ctx={n_ctx}")
    capacity = min(longest + max_tokens, n_ctx)
    if step:                # one of few sizes, since each is compiled anew; and never full, which would be another program
        capacity = min(max(1024, 1 << (capacity - 1).bit_length()), n_ctx) + 1
    waiting = deque(enumerate(prompts))
    rows = [Row(*waiting.popleft(), seed) for _ in prompts[:batch_size]]        # in the order of the cache
    unread = list(range(len(rows)))                                             # of them
    cache, chosen = None, torch.empty(0)
    while True:
        for n in unread:
            rows[n].fit(n_ctx)
        if cache is None or len(unread) == len(rows):       # equal rows that begin together need no masks
            cache = None                                    # frees the old one first
            cache, logits = prefill(model, rows, capacity, step)
            if step and waiting and len(rows) > 1:
                cache.count()                               # they will be ragged: compile that at once
        else:
            logits = (step(chosen[:, None], cache) if step else model(chosen[:, None], cache=cache))[:, 0]
            if unread:
                read, logits[unread] = prefill(model, [rows[n] for n in unread], capacity)
                cache.put(unread, read)
        draws = torch.from_numpy(np.array([next(row.draws) for row in rows])).to(logits.device)
        chosen = choose(logits[:, :n_tokens].float(), sampling, draws, [row.tokens for row in rows])
        said = chosen.tolist()
        yield {row.number: token for row, token in zip(rows, said) if not row.ended}
        unread, ending = [], []
        for n, (row, token) in enumerate(zip(rows, said)):
            if row.ended:
                continue
            row.tokens.append(token)
            full = len(row.tokens) - row.forgotten > n_ctx
            row.ended = (token in ends or len(row.tokens) == row.prompt + max_tokens or (full and not slide)
                         or not wanted(row.number))
            if row.ended and waiting:
                rows[n] = Row(*waiting.popleft(), seed)
            elif row.ended:
                ending.append(n)
            if not rows[n].ended and (rows[n] is not row or full):
                unread.append(n)
        going = [n for n, row in enumerate(rows) if not row.ended]
        if not going:
            return
        if cache.ragged and (unread or ending):             # the next step has nothing to say to them: it need not be long
            cache.clear([*unread, *ending])
        if 2 * len(going) <= len(rows) and not step:        # nobody waits for these places
            cache = cache.only(going)
            rows, chosen, unread = [rows[n] for n in going], chosen[going], [going.index(n) for n in unread]


class Row:
    """One prompt and what has been said behind it."""

    def __init__(self, number: int, prompt: Sequence[int], seed: int):
        self.number, self.prompt, self.tokens = number, len(prompt), list(prompt)
        self.forgotten, self.ended = 0, False               # tokens at its beginning that the context no longer holds
        self.draws = uniform_numbers(seed, number)

    @property
    def held(self) -> list[int]:
        return self.tokens[self.forgotten:]

    def fit(self, n_ctx: int) -> None:
        """Forget all but the newest half of a context that would run over."""
        if len(self.held) > n_ctx:
            self.forgotten = len(self.tokens) - max(1, n_ctx // 2)


def uniform_numbers(seed: int, row: int) -> Iterator[np.float32]:
    random = np.random.Generator(np.random.Philox(key=[seed, row]))
    while True:
        yield from random.random(DRAWS, np.float32)


def prefill(model: GPT, rows: Sequence[Row], capacity: int, step: "CompiledStep | None" = None) -> tuple[KVCache, Tensor]:
    """Read what rows of any lengths hold in one pass: a cache of that capacity, and each row's next logits (B, V)."""
    device, texts = model.embed.weight.device, [row.held for row in rows]
    lengths = torch.tensor([len(text) for text in texts], device=device)
    T = max(map(len, texts))
    tokens = torch.tensor([text + [0] * (T - len(text)) for text in texts], device=device)              # padded on the right
    cache = step.new_cache(len(rows), capacity) if step else KVCache(model.config, len(rows), capacity, model.compute_dtype, device)
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
