"""Compiled decoding says what the model says."""

import os
import time
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from commands import command, fails
from test_model import make
from test_sample import SHAPES, said_alone, said_together
from torch._dynamo.utils import counters

from model import compiled
from model.compiled import CompiledStep
from model.kv_cache import KVCache
from training.device import training_loss


@pytest.mark.long
@pytest.mark.parametrize(("shape", "batch_size", "kinds"), [
    ({"n_layers": 1, "d_mlp": 32}, 3, 1),                                                               # ragged rows
    ({"n_layers": 2, "window": [5, None], "smear": True, "qk_norm": True, "mlp": "none"}, 1, 2)], ids=str)
def test_a_compiled_step_says_what_the_model_says(shape, batch_size, kinds):
    """And is compiled once, however often contexts fill; with a ring, once more for when that is full."""
    model = make(n_ctx=16, vocab_size=64, **shape)          # matrices of two shapes: the compiler writes and times code for each shape
    expected = said_alone(model, slide=True)
    torch._dynamo.reset()
    counters.clear()
    step = CompiledStep(model.pack())
    assert said_together(model, True, batch_size, step) == expected
    assert counters["stats"]["unique_graphs"] == len(step.known) == kinds
    with torch.inference_mode():
        caches = [step.new_cache(batch_size, 17), KVCache(model.config, batch_size, 17)]
        tokens = torch.randint(50, (batch_size, 12))
        for cache in caches:
            model(tokens, cache=cache)
        assert torch.allclose(step(tokens[:, :1], caches[0]), model(tokens[:, :1], cache=caches[1]), atol=1e-5)


class Capture:
    """A CUDA graph without a device: what is captured runs again on the same memory, and sees none of Python's counting since."""

    def __init__(self):
        self.cache = None

    def addresses(self) -> list[int]:
        """Of everything that the step reads."""
        cache, model = self.step.cache, self.step.model
        return [part.data_ptr() for part in (*cache.keys, *cache.values, *cache.last_raw_key, cache._lengths, self.step.tokens,
                                             *model.parameters(), *model.buffers())]

    def replay(self) -> None:
        assert self.addresses() == self.captured
        longest, self.cache.longest = self.cache.longest, self.longest
        self.logits.copy_(self.step.run(self.step.tokens, self.cache))
        self.cache.longest = longest


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("slide", [False, True])
def test_captured_steps_say_what_the_model_says(shape, slide, monkeypatch):
    """All that a GPU adds but the GPU (tests/test_gpu.py)."""
    @contextmanager
    def capturing(graph: Capture):
        step = graph.step = captured[-1]
        cache = graph.cache = step.cache
        graph.longest = cache.longest
        held = [part.clone() for part in (*cache.keys, *cache.values, *cache.last_raw_key, cache._lengths)]
        run = step.run

        def keeps_logits(*arguments):
            graph.logits = run(*arguments)
            return graph.logits

        step.run, graph.captured = keeps_logits, graph.addresses()
        yield
        step.run = run
        for part, before in zip((*cache.keys, *cache.values, *cache.last_raw_key, cache._lengths), held):
            part.copy_(before)                              # capturing computes nothing

    captured: list[CompiledStep] = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Capture)
    monkeypatch.setattr(torch.cuda, "graph", capturing)
    monkeypatch.setattr(compiled, "GRAIN", 4)
    model = make(n_ctx=16, **shape)
    expected = said_alone(model, slide)
    for batch_size in (1, 3, 8):
        step = CompiledStep(model)
        step.on_gpu = True
        captured.append(step)
        assert said_together(model, slide, batch_size, step) == expected, batch_size
        cache, graphs = step.cache, dict(step.graphs)
        assert said_together(model, slide, batch_size, step) == expected, batch_size
        assert step.cache is cache and graphs and graphs.items() <= step.graphs.items()


@pytest.mark.long
def test_code_for_another_vector_width_is_not_read_back(tmp_path):
    script, new = tmp_path / "script.py", os.getpid() + time.time()         # code that no process has compiled before
    script.write_text(f"""
import torch
from model.compiled import keep_apart_by_cpu
keep_apart_by_cpu()
torch.compile(lambda x: x + {new})(torch.ones(1))
print(torch.backends.cpu.get_cpu_capability())
""")
    done = command(str(script), env={"ATEN_CPU_CAPABILITY": "avx2"})
    assert done.returncode == 0, done.stderr

    def is_read_back() -> bool:
        torch._dynamo.reset()
        counters.clear()
        torch.compile(lambda x: x + new)(torch.ones(1))
        return counters["inductor"]["fxgraph_cache_hit"] == 1

    avx2, ours = done.stdout.strip(), torch.backends.cpu.get_cpu_capability()
    assert is_read_back() == (ours == avx2)
    with torch.compiler.config.patch(cache_key_tag=avx2):
        assert is_read_back()                   # nothing else kept it apart


@pytest.mark.parametrize("compile", [CompiledStep, partial(training_loss, compile=True)])
def test_all_that_is_compiled_is_kept_apart(compile):
    with torch.compiler.config.patch(cache_key_tag=""):
        compile(make())
        assert torch.compiler.config.cache_key_tag == torch.backends.cpu.get_cpu_capability()


def test_without_a_compiler(trained, tmp_path):
    fails(command("sample.py", str(trained), "x", "--compile", env={"PATH": "", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}),
          "--compile", "g++")
