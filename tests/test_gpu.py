"""What only a GPU can show: `python -m pytest -m gpu` there runs these, and the kernels' whole grid on the device."""

import os
import shutil
import subprocess
import sys
from statistics import mean

import pytest
import torch
from commands import ROOT, command
from conftest import metrics

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.skipif(not shutil.which("compute-sanitizer"), reason="needs NVIDIA's compute-sanitizer")
def test_no_kernel_reaches_outside_its_tensors():
    """memcheck, with an allocation of its own for every tensor."""
    tests = [f"tests/{name}.py" for name in ("test_flash", "test_decode", "test_head_statistics")]
    few = ["-m", "gpu and not grid", "-k", "T=65 or T=50 or T=9 or half or documents"]
    memcheck = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"]
    done = subprocess.run([*memcheck, sys.executable, "-m", "pytest", "-q", *few, *tests], cwd=ROOT, text=True, capture_output=True,
                          env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    assert done.returncode == 0, done.stdout[-4000:]
    assert "ERROR SUMMARY: 0 errors" in done.stdout and " passed" in done.stdout


def test_training_with_our_kernels_and_with_pytorchs(workplace):
    """200 steps in bf16: the curves are no further apart than two seeds are."""
    ends = {}
    for name, backend, seed in (("sdpa", "sdpa", 1), ("triton", "triton", 1), ("sdpa2", "sdpa", 2)):
        done = command("train.py", "tiny.yaml", f"run={name}", f"seed={seed}", f"train.attention={backend}", "train.steps=200",
                       "model.d_model=128", "model.d_head=64", "model.n_ctx=64", "train.batch_tokens=4096", "train.precision=bf16",
                       cwd=workplace)
        assert done.returncode == 0, done.stderr
        losses = [record["train/loss"] for record in metrics(workplace / "runs" / name).values() if "train/loss" in record]
        ends[name] = mean(losses[-50:])
        assert losses[-1] < losses[0] - 1
    assert abs(ends["triton"] - ends["sdpa"]) <= abs(ends["sdpa2"] - ends["sdpa"]) + 0.01, ends


def test_long_contexts_take_memory_by_the_token():
    """Forward and backward at 64k tokens, whose pattern would take 8 GB a head."""
    from kernels.attention import attention
    q, k, v = (torch.randn(1, 65536, heads, 64, device="cuda", dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
               for heads in (4, 2, 2))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attention(q, k, v, backend="triton").sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 16 * q.nbytes


def test_replayed_steps_say_what_the_model_says():
    """A row that has ended beside one that goes on, past the end of a captured graph's slots."""
    from model.compiled import GRAIN, CompiledStep
    from model.config import ModelConfig
    from model.gpt import GPT
    from model.kv_cache import KVCache
    config = ModelConfig(n_layers=2, n_heads=4, n_kv_heads=2, d_model=128, n_ctx=2 * GRAIN, vocab_size=257, window=[64, None])
    model = GPT(config).cuda().pack()
    step, caches = CompiledStep(model), [KVCache(config, 2, 2 * GRAIN + 1, device="cuda") for _ in range(2)]
    with torch.inference_mode():
        tokens = torch.randint(257, (2, GRAIN - 8), device="cuda")
        for cache in caches:
            model(tokens, cache=cache, lengths=torch.tensor([GRAIN - 8, 20], device="cuda"))
        for n in range(16):
            assert torch.allclose(step(tokens[:, n:n + 1], caches[0]), model(tokens[:, n:n + 1], cache=caches[1]), atol=1e-3)
    assert len(step.graphs) == 2
