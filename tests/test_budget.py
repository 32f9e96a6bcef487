"""model/budget.py and training/plan.py, compared with published sizes and with real models."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from commands import ROOT, command, fails, succeeds
from small_models import saved_for_backward
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
from training.config import OptimizerConfig, load_config
from training.optimizer import Optimizer
from training.plan import USABLE, Cluster, Plan, devices_needed, plan_report, plans


def test_gpt3_has_its_published_size():
    config = load_config(ROOT / "configs/gpt3_175b.yaml").model
    parts = parameters(config.model_copy(update={"vocab_size": 50257}))
    assert parts.total() == pytest.approx(174.6e9, rel=1e-3)
    assert parts["attention"] == pytest.approx(58e9, rel=0.01)
    assert parts["attention"] / 96 == pytest.approx(604e6, rel=0.01)
    assert parts["attention"] / 96 / 96 == pytest.approx(6.29e6, rel=0.01)


def test_a_pattern_of_4096_in_16_bits_takes_33_megabytes_a_head():
    sizes = pattern_bytes(ModelConfig(n_layers=32, n_heads=32, d_model=4096), 2, 4096)
    assert sizes.one_head == 2 ** 25
    assert sizes.all_heads == 1024 * 2 ** 25
    assert sizes.flash == 4096 * 4 * 1024


def test_gpt2_has_its_published_size_with_its_biases():
    """124,439,808 parameters of the released gpt2.

    Its biases: 12 · (3E + E + 4E + E) of the matrices and E of each of the 25 norms.
    """
    parts = parameters(ModelConfig(
        n_layers=12, n_heads=12, d_model=768, n_ctx=1024, vocab_size=50257, mlp="gelu_tanh",
        norm="layernorm", bias="all", position="learned", tied_embeddings=True))
    assert parts.total() == 124_439_808
    assert parts["biases"] == 12 * 9 * 768 + 25 * 768 and parts["norms and gains"] == 25 * 768


@pytest.mark.parametrize("shape", [
    {}, {"bias": "all", "norm": "layernorm"}, {"mlp": "none"}, {"mlp": "gelu", "n_kv_heads": 1},
    {"tied_embeddings": True, "d_head": 16}])
def test_flops_are_those_that_pytorch_counts(shape):
    defaults = {"n_layers": 2, "d_model": 64, "n_ctx": 32, "vocab_size": 100}
    config = ModelConfig(**(defaults | shape))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        GPT(config)(torch.zeros(1, 32, dtype=torch.long))
    flops = flops_per_token(config)
    # The counter ignores the causal mask and the CPU's flash kernel: attention is checked by hand.
    matrices = flops.total() - flops["attention scores and sums"]
    counted = sum(n for operator, n in counter.get_flop_counts()["Global"].items()
                  if "attention" not in str(operator))
    assert matrices * 32 == counted
    visible = sum(range(1, 33)) / 32                            # keys per query
    attention = 4 * config.n_heads * config.head_size * visible * 2
    assert flops["attention scores and sums"] == attention


def test_windows_bound_flops_and_cache():
    full = ModelConfig(n_ctx=100, vocab_size=9)
    windowed = ModelConfig(n_ctx=100, vocab_size=9, window=10)
    per_key = 4 * full.n_heads * full.head_size * full.n_layers
    visible = sum(min(i + 1, 10) for i in range(100)) / 100     # keys per query
    assert flops_per_token(windowed)["attention scores and sums"] == int(per_key * visible)
    for config in (full, windowed):
        cache = KVCache(config, 1, 100)
        held = sum(tensor.numel() * 4 for tensor in cache.keys + cache.values)
        assert held == cache_bytes(config, config.kv_heads, 4)


def test_the_command():
    done = succeeds(
        command("-m training.plan", "configs/gpt3_175b.yaml", "model.n_ctx=4096", cwd=ROOT))
    assert "33,554,432 bytes" in done.stdout and "57,982,058,496" in done.stdout
    fails(command("-m training.plan", "configs/gpt3_175b.yaml", "model.n_cxt=1", cwd=ROOT),
          "did you mean model.n_ctx")


def saved_bytes(config: ModelConfig, windows: int, dtype: torch.dtype, checkpointed: bool) -> int:
    """Bytes that autograd saves in a real model's forward pass, without parameters and tables."""
    model = GPT(config)
    model.compute_dtype = dtype
    if checkpointed:
        for block in model.blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    tokens = torch.randint(config.vocab_size, (windows, config.n_ctx))
    with saved_for_backward() as saved:
        model.loss(tokens, tokens)
    sizes = {storage.data_ptr(): storage.nbytes()
             for storage in (tensor.untyped_storage() for tensor in saved)}
    for own in [*model.parameters(), *model.buffers()]:
        sizes.pop(own.untyped_storage().data_ptr(), None)
    return sum(sizes.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [
    {}, {"mlp": "gelu", "position": "learned"}, {"mlp": "none", "n_kv_heads": 1},
    {"mlp": "relu2", "qk_norm": True}, {"smear": True, "n_kv_heads": 2}])
def test_activations_are_those_that_autograd_saves(shape, dtype, monkeypatch):
    # The loss in chunks, as at full size.
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 2 ** 14)
    defaults = {"n_layers": 3, "d_model": 128, "n_ctx": 64, "vocab_size": 512}
    config = ModelConfig(**(defaults | shape))
    for checkpointed in (False, True):
        two, four = (saved_bytes(config, windows, dtype, checkpointed) for windows in (2, 4))
        counted = activation_bytes_per_token(config, dtype.itemsize, checkpointed)
        if checkpointed:                        # no block has been run again yet
            counted -= block_activation_bytes_per_token(config, dtype.itemsize)
        tolerance = 0.2 if checkpointed else 0.05
        assert (four - two) / 128 == pytest.approx(counted, rel=tolerance)
        if dtype == torch.bfloat16:
            # What does not grow with tokens are the 16-bit copies of weights, and the gradient of
            # W_U, which the loss already knows.
            plan = Plan(config, "adamw", 64, Cluster(1, 1e9, 1, 1, 1), "ddp", checkpointed)
            copies = 2 * two - four - 4 * 512 * 128
            expected = 0 if checkpointed else plan.pass_bytes["copies of weights"]
            assert copies == pytest.approx(expected, rel=0.01, abs=1000)


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_state_is_what_the_optimizers_hold(kind):
    config = ModelConfig(n_layers=2, d_model=64, n_ctx=16, vocab_size=100, n_kv_heads=2)
    model = GPT(config)
    optimizer = Optimizer(model, OptimizerConfig(kind=kind), 1)
    tokens = torch.zeros(1, 16, dtype=torch.long)
    model.loss(tokens, tokens).backward()
    optimizer.step(1, 16)
    held = 4 * sum(value.numel() for name, value in optimizer.state_dict().items()
                   if ".step." not in name)
    single, sharded = (Plan(config, kind, 256, Cluster(n, 1e9, 1, 1, 1), "fsdp", False).state_bytes
                       for n in (1, 8))
    weights = 4 * sum(p.numel() for p in model.parameters())
    assert single["optimizer"] == held and single["weights"] == single["gradients"] == weights
    assert sharded.total() == pytest.approx(single.total() / 8, abs=24)


def test_what_fits_does_and_one_window_more_does_not():
    config = ModelConfig(n_layers=8, d_model=512, n_ctx=512, vocab_size=8192)
    for plan in plans(config, "muon", 512 * 512, Cluster(8, 2.5e9, 1e9, 1e12, 0.5)):
        limit = USABLE * plan.cluster.memory
        fit = plan.windows_that_fit
        assert plan.peak_bytes(fit) <= limit < plan.peak_bytes(fit + 1)
        assert plan.windows_per_device == plan.micro_batch * plan.passes == 64
        assert plan.micro_batch <= fit
        sent = 7 * 8 * plan.parameters.total()          # × 1/8: the steps of a ring
        if plan.strategy == "fsdp":
            sent *= plan.passes
        assert plan.sent_bytes == sent // 8


def test_if_nothing_fits_the_number_of_devices_that_would_do_is_named():
    config = load_config(ROOT / "configs/gpt3_175b.yaml").model.model_copy(
        update={"vocab_size": 50257, "n_layers": 48})

    def cluster(devices: int, memory: float = 80e9) -> Cluster:
        return Cluster(devices, memory, 50e9, 989e12, 0.4)

    assert not any(plan.windows_that_fit for plan in plans(config, "muon", 3145728, cluster(8)))
    smallest = Plan(config, "muon", 3145728, cluster(8), "fsdp", True)
    enough = devices_needed(smallest)
    for devices, fits in ((enough // 2, False), (enough, True)):
        plan = replace(smallest, cluster=cluster(devices))
        assert bool(plan.windows_that_fit) == fits
    # With 8 GB one gathered block is too large.
    assert devices_needed(replace(smallest, cluster=cluster(8, memory=8e9))) is None


def test_the_report_recommends_one_line_of_settings():
    config = load_config(ROOT / "configs/gpt2_small.yaml").model

    def report(devices: int, gigabytes: float) -> str:
        cluster = Cluster(devices, gigabytes * 1e9, 50e9, 989e12, 0.4)
        return plan_report(config, "muon", 512 * 1024, cluster)

    assert ("distributed=ddp train.checkpoint_activations=false train.micro_batch=32"
            in report(8, 24))
    assert ("distributed=fsdp train.checkpoint_activations=true train.micro_batch=1"
            in report(8, 2.1))
    assert "nothing fits" in report(2, 2) and "16 such devices would be enough" in report(2, 2)
    assert "some wait for others (try train.batch_tokens=614400)" in report(200, 24)


def test_the_command_reports_what_fits_when_asked():
    done = succeeds(command("-m training.plan", "configs/gpt2_small.yaml", "--world-size", "8",
                            "train.batch_tokens=65536", cwd=ROOT))
    assert ("distributed=ddp train.checkpoint_activations=false train.micro_batch=8"
            in done.stdout)
    # Describing a device is asking.
    done = succeeds(command("-m training.plan", "configs/gpt2_small.yaml", "--device-memory", "24",
                            cwd=ROOT))
    assert "train.micro_batch=32" in done.stdout
    fails(command("-m training.plan", "configs/gpt2_small.yaml", "--world-size", "0", cwd=ROOT),
          "at least one")
