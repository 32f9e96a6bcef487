"""A decoding step, compiled: `generate(model, …, step=CompiledStep(model))`.

A step of one token a row is many small operations, and starting each costs more than it does. On a CPU the compiler joins them and
multiplies by generated code, which reads the matrices faster than PyTorch's own products. On a GPU the step is captured as well, and
replayed as one graph.
"""

import io
from contextlib import ExitStack, redirect_stderr

import torch
import torch.compiler.config
from torch import Tensor

from model.gpt import GPT
from model.kv_cache import KVCache

GRAIN = 512             # slots: a captured step serves for so many tokens
PACKED = {"freezing": True, "max_autotune": True, "cpp_wrapper": True}      # weights become constants, laid out for generated products


def keep_apart_by_cpu() -> None:
    """Call it before torch.compile. PyTorch keeps compiled code in a folder for later processes, without saying for which vector width.

    Code for 8 floats at a time that is read back where a vector holds 16 (under another `ATEN_CPU_CAPABILITY`, or from a folder shared with
    another machine) gives wrong numbers and writes past the ends of its tensors.
    """
    torch.compiler.config.cache_key_tag = torch.backends.cpu.get_cpu_capability()


class CompiledStep:
    """`step(tokens (B, 1), cache)` → logits (B, 1, V), as the model's own; its parameters must not change any more.

    Rows of another number, or a cache of another capacity, are compiled anew: half a minute on a CPU. Raises what torch.compile raises
    where there is no C++ compiler.
    """

    def __init__(self, model: GPT):
        self.model, self.on_gpu = model, model.embed.weight.is_cuda
        keep_apart_by_cpu()
        self.compiled = torch.compile(model.forward, fullgraph=True)
        self.known: set[tuple] = set()                      # what has been compiled
        self.cache: KVCache | None = None                   # the newest: whose memory the graphs read and write
        self.tokens: Tensor | None = None                   # which they read too
        self.graphs: dict[tuple, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache: where its shape is that of the newest, that one again, so that what has been captured stays good."""
        cache = self.cache
        if cache is None or (cache.keys[0].shape[0], cache.capacity) != (batch, capacity):
            cache = KVCache(self.model.config, batch, capacity, self.model.compute_dtype, self.model.embed.weight.device)
            self.adopt(cache)
        cache.reset()
        return cache

    def adopt(self, cache: KVCache) -> None:
        self.cache, self.tokens, self.graphs = cache, None, {}
        cache.grain = GRAIN if self.on_gpu else 1

    def __call__(self, tokens: Tensor, cache: KVCache) -> Tensor:
        if cache.longest < 2:                               # 0 and 1 would be compiled as constants
            return self.model(tokens, cache=cache)
        return self.replay(tokens, cache) if self.on_gpu else self.run(tokens, cache)

    def run(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """One step of compiled code."""
        longest, wrapped = cache.longest, tuple(cache.longest + 1 >= keys.shape[2] for keys in cache.keys)
        with ExitStack() as settings:
            if (kind := (cache.keys[0].shape, cache.ragged, wrapped)) not in self.known:        # the settings cost a tenth of a step
                self.known.add(kind)
                settings.enter_context(torch.compiler.config.patch(dynamic_sources="L['cache'].longest"))     # type: ignore[attr-defined]
                if self.model.embed.weight.is_cpu:
                    import torch._inductor.config as inductor  # a second, which training without a compiler saves
                    settings.enter_context(inductor.patch(PACKED))
                    settings.enter_context(redirect_stderr(io.StringIO()))      # there the compiler prints what it has timed
            logits = self.compiled(tokens, cache=cache)
        cache.longest = min(longest + 1, cache.capacity)    # again: PyTorch 2.13 forgets attributes set after flex_attention
        return logits

    def replay(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """The captured step, or, where the cache has grown or is another one, a step and its capture."""
        if cache is not self.cache:
            self.adopt(cache)
        if not cache.ragged:
            cache.count()                                   # a graph is told positions by a tensor
        self.tokens = tokens.clone() if self.tokens is None else self.tokens.copy_(tokens)
        if (reach := self.reach(cache)) in self.graphs:
            graph, logits = self.graphs[reach]
            graph.replay()
            cache.longest = min(cache.longest + 1, cache.capacity)
            return logits.clone()
        said = self.run(self.tokens, cache).clone()
        if self.reach(cache) == reach:                      # what it needs is compiled and loaded now
            longest, graph = cache.longest, torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits = self.run(self.tokens, cache)
            self.graphs[reach], cache.longest = (graph, logits), longest
        return said

    @staticmethod
    def reach(cache: KVCache) -> tuple[int, ...]:
        return tuple(cache.reach(keys.shape[2]) for keys in cache.keys)
