"""A compiled decoding step: `generate(model, …, step=CompiledStep(model))`.

A step of one token a row is many small operations, and starting each costs more than its work. On a
CPU the compiler fuses them, and generates matrix products that read the weights faster than
PyTorch's own. On a GPU the step is also captured, and replayed as one CUDA graph.
"""

import io
from contextlib import ExitStack, redirect_stderr

import torch
import torch.compiler.config
from torch import Tensor

from model.gpt import GPT
from model.kv_cache import KVCache

GRAIN = 512             # slots: a captured step serves for this many tokens
# Weights become constants, laid out for generated products.
CPU_OPTIONS = {"freezing": True, "max_autotune": True, "cpp_wrapper": True}


def keep_apart_by_cpu() -> None:
    """Call it before torch.compile. PyTorch caches compiled code in a folder without saying for
    which vector width.

    Code for vectors of 8 floats, read back where a vector holds 16 (under another
    `ATEN_CPU_CAPABILITY`, or from a folder shared with another machine), gives wrong numbers and
    writes past the ends of its tensors.
    """
    torch.compiler.config.cache_key_tag = torch.backends.cpu.get_cpu_capability()


class CompiledStep:
    """`step(tokens (B, 1), cache)` → logits (B, 1, V), as the model's own. The model's parameters
    must not change afterwards.

    Another number of rows, or another capacity of the cache, is compiled anew: half a minute on a
    CPU. Raises what torch.compile raises where there is no C++ compiler.
    """

    def __init__(self, model: GPT):
        self.model, self.on_gpu = model, model.embed.weight.is_cuda
        keep_apart_by_cpu()
        self.compiled = torch.compile(model.forward, fullgraph=True)
        self.compiled_for: set[tuple[object, ...]] = set()
        self.cache: KVCache | None = None           # the newest: graphs read and write its memory
        self.tokens: Tensor | None = None           # likewise
        self.graphs: dict[tuple[int, ...], tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache. If its shape is that of the newest one, that one is emptied and returned,
        so that captured graphs stay valid."""
        cache = self.cache
        if cache is None or (cache.keys[0].shape[0], cache.capacity) != (batch, capacity):
            cache = KVCache(self.model.config, batch, capacity, self.model.compute_dtype,
                            self.model.embed.weight.device)
            self._adopt(cache)
        cache.reset()
        return cache

    def _adopt(self, cache: KVCache) -> None:
        self.cache, self.tokens, self.graphs = cache, None, {}
        cache.grain = GRAIN if self.on_gpu else 1

    def __call__(self, tokens: Tensor, cache: KVCache) -> Tensor:
        if cache.longest < 2:                       # 0 and 1 would be compiled as constants
            return self.model(tokens, cache=cache)
        return self.replay(tokens, cache) if self.on_gpu else self.run(tokens, cache)

    def run(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """One step of compiled code."""
        longest = cache.longest
        wrapped = tuple(longest + 1 >= keys.shape[2] for keys in cache.keys)
        program = (cache.keys[0].shape, cache.ragged, wrapped)
        with ExitStack() as settings:
            if program not in self.compiled_for:    # the settings cost a tenth of a step
                self.compiled_for.add(program)
                settings.enter_context(torch.compiler.config.patch(     # type: ignore[attr-defined]
                    dynamic_sources="L['cache'].longest"))
                if self.model.embed.weight.is_cpu:
                    import torch._inductor.config as inductor
                    settings.enter_context(inductor.patch(CPU_OPTIONS))
                    # The compiler prints what it has timed.
                    settings.enter_context(redirect_stderr(io.StringIO()))
            logits = self.compiled(tokens, cache=cache)
        # Set once more: PyTorch 2.13 forgets attributes that are set after flex_attention.
        cache.longest = min(longest + 1, cache.capacity)
        return logits

    def replay(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """The captured step; or, for a new cache or a longer one, a step and its capture."""
        if cache is not self.cache:
            self._adopt(cache)
        if not cache.ragged:
            cache.make_ragged()                     # a graph reads positions from a tensor
        if self.tokens is None:
            self.tokens = tokens.clone()
        else:
            self.tokens.copy_(tokens)
        slots = self.slots_to_read(cache)
        if slots in self.graphs:
            graph, logits = self.graphs[slots]
            graph.replay()
            cache.longest = min(cache.longest + 1, cache.capacity)
            return logits.clone()
        result = self.run(self.tokens, cache).clone()
        if self.slots_to_read(cache) == slots:      # what the step needs is compiled and loaded now
            longest, graph = cache.longest, torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits = self.run(self.tokens, cache)
            self.graphs[slots], cache.longest = (graph, logits), longest
        return result

    @staticmethod
    def slots_to_read(cache: KVCache) -> tuple[int, ...]:
        """Slots that a step reads, by layer: a graph serves as long as they stay the same."""
        return tuple(cache.slots_to_read(keys.shape[2]) for keys in cache.keys)
