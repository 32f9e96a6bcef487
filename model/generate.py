"""Text from a model: prefill the prompts, then decode one token per row at a time."""

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.compiled import CompiledStep
from model.gpt import GPT
from model.kv_cache import KVCache

RANDOM_BLOCK = 256          # random numbers that a row draws at a time
MIN_COMPILED_CAPACITY = 1024


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from the logits. The options apply in this order."""

    # Logits of tokens already in the row are divided by it if positive, else multiplied (Keskar et
    # al. 2019).
    repetition_penalty: float = 1.0
    temperature: float = 1.0            # logits are divided by it; 0: the largest is chosen
    top_k: int | None = None            # keep the k largest
    top_p: float | None = None          # keep the most probable that together reach p (Holtzman et
                                        # al. 2020)
    min_p: float | None = None          # drop those below this fraction of the largest probability
                                        # (Nguyen et al. 2024)


@torch.inference_mode()
def generate(model: GPT, prompts: Sequence[Sequence[int]], max_tokens: int,
             sampling: Sampling = Sampling(), *, seed: int = 0, ends: Collection[int] = (),
             slide: bool = False, n_vocab: int | None = None, batch_size: int = 32,
             wanted: Callable[[int], bool] = lambda number: True,
             compiled_step: CompiledStep | None = None) -> Iterator[dict[int, int]]:
    """Continue every prompt. Yields, step by step, the next token of each prompt that is being
    continued, by its number.

    At most `batch_size` rows are decoded at a time. When one ends, the next prompt takes its place
    at once (continuous batching, Yu et al. 2022, "Orca", section 3). Prompt n draws its random
    numbers from (seed, n), so its text does not depend on the other rows.

    max_tokens      of each continuation
    ends            tokens that end a text
    wanted          wanted(n) is asked after each token of prompt n; False ends it
    slide           when a text fills n_ctx, forget all but its newest half and go on; else it ends
    n_vocab         choose only among the first n_vocab ids: a model's vocabulary may be larger than
                    its tokenizer's
    compiled_step   computes the logits after prefill, instead of the model; the number of rows then
                    never changes
    Raises ValueError for an empty prompt, and without `slide` for one longer than n_ctx.
    """
    n_ctx, longest = model.config.n_ctx, max(map(len, prompts))
    if not all(prompts):
        raise ValueError("a prompt has no tokens: begin it with tokenizer.begin")
    if not slide and longest > n_ctx:
        raise ValueError(f"a prompt of {longest} tokens is longer than model.n_ctx={n_ctx}")
    capacity = min(longest + max_tokens, n_ctx)
    if compiled_step:
        # Each capacity is compiled anew, so it is one of few powers of two. The cache is never
        # full: that would be another program.
        power = 1 << (capacity - 1).bit_length()
        capacity = min(max(MIN_COMPILED_CAPACITY, power), n_ctx) + 1

    def is_over(row: "Row", token: int) -> bool:
        return (token in ends or row.n_new == max_tokens or (row.n_held > n_ctx and not slide)
                or not wanted(row.number))

    waiting = deque(Row(number, prompt, seed) for number, prompt in enumerate(prompts))
    rows = [waiting.popleft() for _ in prompts[:batch_size]]        # in the order of the cache
    unread = list(range(len(rows)))             # rows whose text the cache does not hold
    cache: KVCache | None = None
    chosen = torch.empty(0)                     # the newest token of each row
    ahead: Tensor | None = None                 # the next logits, if their step started early
    while True:
        # Logits of each row's next token: (B, V).
        for n in unread:
            rows[n].forget_old_half(n_ctx)
        if cache is None or len(unread) == len(rows):
            cache = None                        # frees the old one first
            cache, logits = prefill(model, rows, capacity, compiled_step)
            if compiled_step and waiting and len(rows) > 1:
                # Rows become ragged once a waiting prompt enters: compile that program at once.
                cache.make_ragged()
        else:
            logits = (decode_one_token(model, chosen, cache, compiled_step) if ahead is None
                      else ahead)
            if unread:
                new_cache, logits[unread] = prefill(model, [rows[n] for n in unread], capacity)
                cache.replace_rows(unread, new_cache)

        # The next token of each row.
        draws = torch.from_numpy(np.array([next(row.random) for row in rows]))
        chosen = choose(logits[:, :n_vocab].float(), sampling,
                        draws.to(logits.device, non_blocking=True),
                        [row.tokens for row in rows])                           # (B,)
        read_tokens = start_reading(chosen)
        # A GPU starts the next step now, unless a row is certain to end or to be read anew.
        ahead = None
        if compiled_step and compiled_step.on_gpu and all(
                row.ended or (row.n_new + 1 < max_tokens and row.n_held < n_ctx) for row in rows):
            ahead = compiled_step(chosen[:, None], cache)[:, 0]
        next_tokens = read_tokens()
        yield {row.number: token for row, token in zip(rows, next_tokens) if not row.ended}

        # Rows that end make room for waiting prompts; places that nobody takes are dropped.
        unread, finished = append_tokens(rows, next_tokens, waiting, is_over, n_ctx)
        active = [n for n, row in enumerate(rows) if not row.ended]
        if not active:
            return
        if cache.ragged and (unread or finished):
            cache.clear_rows([*unread, *finished])      # so the next step reads fewer slots
        if 2 * len(active) <= len(rows) and not compiled_step:
            cache = cache.select_rows(active)
            unread = [active.index(n) for n in unread]
            rows, chosen = [rows[n] for n in active], chosen[active]


def start_reading(tokens: Tensor) -> Callable[[], list[int]]:
    """Start to copy tokens (B,) to the CPU; the returned function waits for them, and not for what
    a GPU is given to do in between."""
    if not tokens.is_cuda:
        return tokens.tolist
    copy, copied = tokens.to("cpu", non_blocking=True), torch.cuda.Event()
    copied.record()

    def wait() -> list[int]:
        copied.synchronize()
        return copy.tolist()

    return wait


def prefill(model: GPT, rows: Sequence["Row"], capacity: int,
            compiled_step: CompiledStep | None = None) -> tuple[KVCache, Tensor]:
    """Read rows of any lengths in one pass: a cache of that capacity, and the logits (B, V) of each
    row's next token."""
    device, texts = model.embed.weight.device, [row.held for row in rows]
    lengths = torch.tensor([len(text) for text in texts], device=device)        # (B,)
    T = max(map(len, texts))
    padded = [text + [0] * (T - len(text)) for text in texts]
    tokens = torch.tensor(padded, device=device)                                # (B, T)
    if compiled_step:
        cache = compiled_step.new_cache(len(rows), capacity)
    else:
        cache = KVCache(model.config, len(rows), capacity, model.compute_dtype, device)
    equal = bool((lengths == T).all())
    hidden = model.hidden(tokens, cache=cache, lengths=None if equal else lengths)
    last = hidden[torch.arange(len(rows), device=device), lengths - 1]          # (B, E)
    return cache, model.unembed(last)


def decode_one_token(model: GPT, tokens: Tensor, cache: KVCache,
                     compiled_step: CompiledStep | None) -> Tensor:
    """Append one token per row (B,) to the cache: the logits (B, V) of the next ones."""
    if compiled_step:
        return compiled_step(tokens[:, None], cache)[:, 0]
    return model(tokens[:, None], cache=cache)[:, 0]


def append_tokens(rows: list["Row"], tokens: Sequence[int], waiting: deque["Row"],
                  is_over: Callable[["Row", int], bool], n_ctx: int) -> tuple[list[int], list[int]]:
    """Append each row's next token. A row that is then over gives its place to the first one that
    waits.

    Returns the places in `rows` of the rows to read anew (new ones, and those whose context is
    full), and of the rows that ended without a successor.
    """
    unread, finished = [], []
    for n, token in enumerate(tokens):
        row = rows[n]
        if row.ended:
            continue
        row.tokens.append(token)
        row.ended = is_over(row, token)
        if row.ended and waiting:
            rows[n] = waiting.popleft()
            unread.append(n)
        elif row.ended:
            finished.append(n)
        elif row.n_held > n_ctx:
            unread.append(n)
    return unread, finished


class Row:
    """One prompt and its continuation."""

    def __init__(self, number: int, prompt: Sequence[int], seed: int):
        self.number, self.tokens = number, list(prompt)
        self.n_prompt = len(prompt)
        self.forgotten = 0                      # tokens at the start that the context has dropped
        self.ended = False
        self.random = uniform_numbers(seed, number)

    @property
    def held(self) -> list[int]:
        """The tokens in the context."""
        return self.tokens[self.forgotten:]

    @property
    def n_held(self) -> int:
        return len(self.tokens) - self.forgotten

    @property
    def n_new(self) -> int:
        return len(self.tokens) - self.n_prompt

    def forget_old_half(self, n_ctx: int) -> None:
        """Drop all but the newest half of a context that would run over."""
        if self.n_held > n_ctx:
            self.forgotten = len(self.tokens) - max(1, n_ctx // 2)


def uniform_numbers(seed: int, number: int) -> Iterator[np.float32]:
    """The random numbers of prompt `number`."""
    random = np.random.Generator(np.random.Philox(key=[seed, number]))
    while True:
        yield from random.random(RANDOM_BLOCK, np.float32)


def choose(logits: Tensor, sampling: Sampling, draws: Tensor,
           texts: Sequence[Sequence[int]]) -> Tensor:
    """One token per row (B,) from logits (B, V). The uniform random numbers `draws` (B,) decide;
    `texts` are the tokens of each row so far."""
    if sampling.repetition_penalty != 1.0:
        penalty, seen = sampling.repetition_penalty, torch.zeros_like(logits, dtype=torch.bool)
        for n, text in enumerate(texts):
            seen[n, torch.tensor(text, device=logits.device)] = True
        penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
        logits = torch.where(seen, penalised, logits)
    if sampling.temperature < torch.finfo(torch.float32).tiny:      # 0, or 0 in float32
        return logits.argmax(dim=-1)
    # At most 0 after subtracting the largest: no temperature overflows.
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        kth = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered, index = logits.sort(dim=-1, descending=True)
        p = ordered.softmax(dim=-1)
        beyond = p.cumsum(dim=-1) - p >= sampling.top_p         # the token that reaches p stays
        dropped = torch.zeros_like(beyond).scatter(1, index, beyond)
        logits = logits.masked_fill(dropped, -torch.inf)
    p = logits.softmax(dim=-1)
    if sampling.min_p is not None:
        p = p.masked_fill(p < sampling.min_p * p.amax(dim=-1, keepdim=True), 0)
    cumulative = p.cumsum(dim=-1)
    # The factor keeps rounding from choosing a token after the last one with nonzero probability.
    target = draws[:, None] * cumulative[:, -1:] * (1 - 1e-6)
    token = torch.searchsorted(cumulative, target, right=True)[:, 0]
    return token.clamp(max=logits.shape[-1] - 1)
