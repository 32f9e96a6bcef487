"""Compiled decoding computes what the model computes."""

import os
import time
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from commands import command, fails, succeeds
from small_models import SHAPES, cache_tensors, generated, perturbed_model, recomputed
from torch._dynamo.utils import counters  # noqa: TID253  the test needs it anyway

from model import compiled
from model.compiled import CompiledStep
from model.kv_cache import KVCache
from training.device import training_loss


@pytest.mark.long
@pytest.mark.parametrize(("shape", "batch_size", "graphs"), [
    ({"n_layers": 1, "d_mlp": 32}, 3, 1),                                       # ragged rows
    ({"n_layers": 2, "window": [5, None], "smear": True, "qk_norm": True, "mlp": "none"}, 1, 2),
], ids=str)
def test_a_compiled_step_computes_what_the_model_computes(shape, batch_size, graphs):
    """And is compiled only once, however often contexts fill.

    With a ring it is compiled once more, for when the ring is full.
    """
    # Few matrix shapes: the compiler writes and times code for each.
    model = perturbed_model(n_ctx=16, vocab_size=64, **shape)
    expected = recomputed(model, slide=True)
    torch._dynamo.reset()
    counters.clear()
    step = CompiledStep(model.pack())
    assert generated(model, True, batch_size, step) == expected
    assert counters["stats"]["unique_graphs"] == len(step.compiled_for) == graphs
    with torch.inference_mode():
        caches = [step.new_cache(batch_size, 17), KVCache(model.config, batch_size, 17)]
        tokens = torch.randint(50, (batch_size, 12))
        for cache in caches:
            model(tokens, cache=cache)
        compiled_logits = step(tokens[:, :1], caches[0])
        assert torch.allclose(compiled_logits, model(tokens[:, :1], cache=caches[1]), atol=1e-5)


class Capture:
    """A CUDA graph without a device.

    A replay runs the captured step on the same memory, and does not see what Python has counted
    since.
    """

    def __init__(self):
        self.cache = None

    def addresses(self) -> list[int]:
        """Those of everything that the step reads."""
        model = self.step.model
        read = [*cache_tensors(self.step.cache), self.step.tokens, *model.parameters(),
                *model.buffers()]
        return [tensor.data_ptr() for tensor in read]

    def replay(self) -> None:
        assert self.addresses() == self.captured
        longest, self.cache.longest = self.cache.longest, self.longest
        self.logits.copy_(self.step.run(self.step.tokens, self.cache))
        self.cache.longest = longest


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("slide", [False, True])
def test_captured_steps_compute_what_the_model_computes(shape, slide, monkeypatch):
    """Everything that decoding on a GPU adds, without the GPU (see tests/test_gpu.py)."""
    steps: list[CompiledStep] = []

    @contextmanager
    def capturing(graph: Capture):
        step = graph.step = steps[-1]
        cache = graph.cache = step.cache
        graph.longest = cache.longest
        before = [tensor.clone() for tensor in cache_tensors(cache)]
        run = step.run

        def keeps_logits(*arguments):
            graph.logits = run(*arguments)
            return graph.logits

        step.run, graph.captured = keeps_logits, graph.addresses()
        yield
        step.run = run
        for tensor, value in zip(cache_tensors(cache), before):
            tensor.copy_(value)                             # capturing computes nothing

    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Capture)
    monkeypatch.setattr(torch.cuda, "graph", capturing)
    monkeypatch.setattr(compiled, "GRAIN", 4)
    model = perturbed_model(n_ctx=16, **shape)
    expected = recomputed(model, slide)
    for batch_size in (1, 3, 8):
        step = CompiledStep(model)
        step.on_gpu = True
        steps.append(step)
        assert generated(model, slide, batch_size, step) == expected, batch_size
        cache, graphs = step.cache, dict(step.graphs)
        assert generated(model, slide, batch_size, step) == expected, batch_size
        assert step.cache is cache and graphs and graphs.items() <= step.graphs.items()


@pytest.mark.long
def test_code_for_another_vector_width_is_not_read_back(tmp_path):
    script = tmp_path / "script.py"
    new = os.getpid() + time.time()             # so that no process has compiled this code before
    script.write_text(f"""
import torch
from model.compiled import keep_apart_by_cpu
keep_apart_by_cpu()
torch.compile(lambda x: x + {new})(torch.ones(1))
print(torch.backends.cpu.get_cpu_capability())
""")
    done = succeeds(command(str(script), env={"ATEN_CPU_CAPABILITY": "avx2"}))

    def is_read_back() -> bool:
        torch._dynamo.reset()
        counters.clear()
        torch.compile(lambda x: x + new)(torch.ones(1))
        return counters["inductor"]["fxgraph_cache_hit"] == 1

    avx2, ours = done.stdout.strip(), torch.backends.cpu.get_cpu_capability()
    assert is_read_back() == (ours == avx2)
    with torch.compiler.config.patch(cache_key_tag=avx2):
        assert is_read_back()                   # only the tag kept it apart


@pytest.mark.parametrize("compile", [CompiledStep, partial(training_loss, compile=True)])
def test_everything_that_compiles_keeps_its_code_apart(compile):
    with torch.compiler.config.patch(cache_key_tag=""):
        compile(perturbed_model())
        assert torch.compiler.config.cache_key_tag == torch.backends.cpu.get_cpu_capability()


def test_without_a_compiler(trained, tmp_path):
    empty = {"PATH": "", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    fails(command("sample.py", str(trained), "x", "--compile", env=empty), "--compile", "g++")
