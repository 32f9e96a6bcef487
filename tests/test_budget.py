"""The published figures of GPT-3, and the model's own parameters."""

import pytest
import torch
from conftest import ROOT, command, fails
from torch.utils.flop_counter import FlopCounterMode

from model.budget import cache_bytes, flops_per_token, parameters, pattern_bytes
from model.config import ModelConfig
from model.gpt import GPT
from model.kv_cache import KVCache
from training.config import load_config


def test_gpt3_has_its_published_size():
    config = load_config(ROOT / "configs/gpt3_175b.yaml").model.model_copy(update={"vocab_size": 50257})
    parts = parameters(config)
    assert parts.total() == pytest.approx(174.6e9, rel=1e-3)
    assert parts["attention"] == pytest.approx(58e9, rel=0.01)
    assert parts["attention"] / 96 == pytest.approx(604e6, rel=0.01)
    assert parts["attention"] / 96 / 96 == pytest.approx(6.29e6, rel=0.01)


def test_a_pattern_of_4096_in_16_bits_takes_33_megabytes_a_head():
    bytes_ = pattern_bytes(ModelConfig(n_layers=32, n_heads=32, d_model=4096), 2, 4096)
    assert bytes_["one head"] == 2 ** 25 and bytes_["all heads and layers"] == 1024 * 2 ** 25 and bytes_["flash"] == 4096 * 4 * 1024


def test_gpt2_has_its_published_size_with_its_biases():
    """124,439,808 parameters of the released gpt2; 12 · (3E + E + 4E + E) + 25 norms' E of them are biases."""
    parts = parameters(ModelConfig(n_layers=12, n_heads=12, d_model=768, n_ctx=1024, vocab_size=50257, mlp="gelu_tanh", norm="layernorm",
                                   bias="all", position="learned", tied_embeddings=True))
    assert parts.total() == 124_439_808 and parts["biases"] == 12 * 9 * 768 + 25 * 768 and parts["norms and gains"] == 25 * 768


@pytest.mark.parametrize("kind", [{}, {"bias": "all", "norm": "layernorm"}, {"mlp": "none"}, {"mlp": "gelu", "n_kv_heads": 1},
                                  {"tied_embeddings": True, "d_head": 16}])
def test_flops_are_those_that_pytorch_counts(kind):
    config = ModelConfig(**({"n_layers": 2, "d_model": 64, "n_ctx": 32, "vocab_size": 100} | kind))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        GPT(config)(torch.zeros(1, 32, dtype=torch.long))
    flops = flops_per_token(config)
    # the counter knows no causal mask, and nothing of the CPU's flash kernel
    matrices = flops.total() - flops["attention scores and sums"]
    counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
    assert matrices * 32 == counted
    seen = sum(min(i + 1, 32) for i in range(32)) / 32
    assert flops["attention scores and sums"] == 4 * config.n_heads * config.head_size * seen * 2


def test_windows_bound_flops_and_cache():
    full, windowed = ModelConfig(n_ctx=100, vocab_size=9), ModelConfig(n_ctx=100, vocab_size=9, window=10)
    per_key = 4 * full.n_heads * full.head_size * full.n_layers
    assert flops_per_token(windowed)["attention scores and sums"] == int(per_key * sum(min(i + 1, 10) for i in range(100)) / 100)
    for config in (full, windowed):
        cache = KVCache(config, 1, 100)
        assert sum(t.numel() * 4 for t in cache.keys + cache.values) == cache_bytes(config, config.kv_heads, 4)


def test_the_command():
    done = command("-m model.budget", "configs/gpt3_175b.yaml", "model.n_ctx=4096", cwd=ROOT)
    assert done.returncode == 0 and "33,554,432 bytes" in done.stdout and "57,982,058,496" in done.stdout
    fails(command("-m model.budget", "configs/gpt3_175b.yaml", "model.n_cxt=1", cwd=ROOT), "did you mean model.n_ctx")
