"""The published figures of GPT-3, and the model's own parameters."""

import pytest
import torch
from commands import ROOT, command, fails
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from model import cross_entropy
from model.budget import (
    activation_bytes_per_token,
    block_activation_bytes_per_token,
    cache_bytes,
    flops_per_token,
    parameters,
    pattern_bytes,
)
from model.config import ModelConfig
from model.gpt import GPT
from model.kv_cache import KVCache
from training.config import load_config
from training.plan import FREE, Cluster, Plan, devices_needed, fit_report, plans


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
    done = command("-m training.plan", "configs/gpt3_175b.yaml", "model.n_ctx=4096", cwd=ROOT)
    assert done.returncode == 0 and "33,554,432 bytes" in done.stdout and "57,982,058,496" in done.stdout
    fails(command("-m training.plan", "configs/gpt3_175b.yaml", "model.n_cxt=1", cwd=ROOT), "did you mean model.n_ctx")


def saved_bytes(config: ModelConfig, windows: int, dtype: torch.dtype, checkpointed: bool) -> int:
    """What autograd holds between a real model's forward and backward pass, parameters and tables left out."""
    model, held = GPT(config), {}
    model.compute_dtype = dtype
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    if checkpointed:
        for block in model.blocks:
            block.forward = lambda x, context, run=block.forward: checkpoint(run, x, context, use_reentrant=False)
    tokens = torch.randint(config.vocab_size, (windows, config.n_ctx))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t):
        model.loss(tokens, tokens)
    return sum(t.untyped_storage().nbytes() for pointer, t in held.items() if pointer not in own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [{}, {"mlp": "gelu", "position": "learned"}, {"mlp": "none", "n_kv_heads": 1},
                                  {"mlp": "relu2", "qk_norm": True}, {"smear": True, "n_kv_heads": 2}])
def test_activations_are_those_that_autograd_saves(kind, dtype, monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 2 ** 14)       # the loss in chunks, as at full size
    config = ModelConfig(**({"n_layers": 3, "d_model": 128, "n_ctx": 64, "vocab_size": 512} | kind))
    element, block = dtype.itemsize, block_activation_bytes_per_token(config, dtype.itemsize)
    for checkpointed in (False, True):
        few, many = (saved_bytes(config, windows, dtype, checkpointed) for windows in (2, 4))
        counted = activation_bytes_per_token(config, element, checkpointed) - (block if checkpointed else 0)    # not run again yet
        assert (many - few) / 128 == pytest.approx(counted, rel=0.2 if checkpointed else 0.05)
        if dtype == torch.bfloat16:                     # what does not grow with tokens: weights as they were multiplied
            plan = Plan(config, "adamw", 64, Cluster(1, 1e9, 1, 1, 1), "ddp", checkpointed)
            weights = 2 * few - many - 4 * 512 * 128    # without the gradient of W_U, which the loss already knows
            assert weights == pytest.approx(0 if checkpointed else plan.passing["copies of weights"], rel=0.01, abs=1000)


def test_state_is_what_the_optimizers_hold():
    from training.config import OptimizerConfig
    from training.optimizer import Optimizer
    config = ModelConfig(n_layers=2, d_model=64, n_ctx=16, vocab_size=100, n_kv_heads=2)
    for kind in ("muon", "adamw"):
        model = GPT(config)
        optimizer, tokens = Optimizer(model, OptimizerConfig(kind=kind), 1), torch.zeros(1, 16, dtype=torch.long)
        model.loss(tokens, tokens).backward()
        optimizer.step(1, 16)
        held = 4 * sum(t.numel() for name, t in optimizer.state_dict().items() if ".step." not in name)
        one, eight = (Plan(config, kind, 256, Cluster(n, 1e9, 1, 1, 1), "fsdp", False).state for n in (1, 8))
        assert one["optimizer"] == held and one["weights"] == one["gradients"] == 4 * sum(p.numel() for p in model.parameters())
        assert eight.total() == pytest.approx(one.total() / 8, abs=24)


def test_what_fits_does_and_one_window_more_does_not():
    config = ModelConfig(n_layers=8, d_model=512, n_ctx=512, vocab_size=8192)
    for plan in plans(config, "muon", 512 * 512, Cluster(8, 2.5e9, 1e9, 1e12, 0.5)):
        limit = FREE * plan.cluster.memory
        assert plan.bytes(plan.room) <= limit < plan.bytes(plan.room + 1) and plan.share == 64
        assert plan.micro_batch <= plan.room and plan.micro_batch * plan.accumulation == 64
        total = plan.parameters.total()
        sent = 7 * 8 * total if plan.distributed == "ddp" else 7 * 8 * total * plan.accumulation       # × 1/8: a ring's steps
        assert plan.moved == sent // 8


def test_where_nothing_fits_the_number_of_devices_that_would_do_is_said():
    config = load_config(ROOT / "configs/gpt3_175b.yaml").model.model_copy(update={"vocab_size": 50257, "n_layers": 48})
    few = Cluster(8, 80e9, 50e9, 989e12, 0.4)
    assert not any(plan.room for plan in plans(config, "muon", 3145728, few))
    enough = devices_needed(config, "muon", 3145728, few)
    for n, fits in ((enough // 2, False), (enough, True)):
        assert bool(Plan(config, "muon", 3145728, Cluster(n, 80e9, 50e9, 989e12, 0.4), "fsdp", True).room) == fits
    assert devices_needed(config, "muon", 3145728, Cluster(8, 8e9, 50e9, 989e12, 0.4)) is None     # one gathered block is too large


def test_the_report_recommends_one_line_of_settings():
    config = load_config(ROOT / "configs/gpt2_small.yaml").model

    def says(devices: int, gigabytes: float) -> str:
        return fit_report(config, "muon", 512 * 1024, Cluster(devices, gigabytes * 1e9, 50e9, 989e12, 0.4))

    assert "distributed=ddp train.checkpoint_activations=false train.micro_batch=32" in says(8, 24)
    assert "distributed=fsdp train.checkpoint_activations=true train.micro_batch=1" in says(8, 1.1)
    assert "nothing fits" in says(2, 1) and "16 such devices would do" in says(2, 1)
    assert "some wait for others (try train.batch_tokens=614400)" in says(200, 24)


def test_the_command_says_what_fits_when_it_is_asked():
    done = command("-m training.plan", "configs/gpt2_small.yaml", "--world-size", "8", "train.batch_tokens=65536", cwd=ROOT)
    assert done.returncode == 0 and "distributed=ddp train.checkpoint_activations=false train.micro_batch=8" in done.stdout, done.stderr
    one = command("-m training.plan", "configs/gpt2_small.yaml", "--device-memory", "24", cwd=ROOT)      # described, so asked about
    assert one.returncode == 0 and "train.micro_batch=32" in one.stdout, one.stderr
    fails(command("-m training.plan", "configs/gpt2_small.yaml", "--world-size", "0", cwd=ROOT), "at least one")
