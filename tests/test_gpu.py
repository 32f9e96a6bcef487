"""What only a GPU can show of training and sampling: `python -m pytest -m gpu`."""

from statistics import mean

import pytest
import torch
from commands import command
from conftest import metrics
from test_model import make

from model.compiled import GRAIN, CompiledStep
from model.kv_cache import KVCache

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


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


def test_replayed_steps_say_what_the_model_says():
    """A row that has ended beside one that goes on, past the end of a captured graph's slots."""
    model = make(n_layers=2, d_model=128, n_ctx=2 * GRAIN, vocab_size=257, window=[64, None]).cuda().pack()
    step, caches = CompiledStep(model), [KVCache(model.config, 2, 2 * GRAIN + 1, device="cuda") for _ in range(2)]
    with torch.inference_mode():
        tokens = torch.randint(257, (2, GRAIN - 8), device="cuda")
        for cache in caches:
            model(tokens, cache=cache, lengths=torch.tensor([GRAIN - 8, 20], device="cuda"))
        for n in range(16):
            replayed, expected = step(tokens[:, n:n + 1], caches[0]), model(tokens[:, n:n + 1], cache=caches[1])
            assert expected.std() > 0.1                 # a new model's logits are zero
            assert (replayed - expected).abs().max() < 1e-3 * expected.std()
    assert len(step.graphs) == 2
