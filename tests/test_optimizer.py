"""Rates as functions of the step, groups, Muon, clipping, accumulation."""

from math import cos, pi

import pytest
import torch

from model.config import ModelConfig
from model.gpt import GPT
from training.config import OptimizerConfig
from training.optimizer import Muon, Optimizer, learning_rate, momentum, orthogonalise


def small_model(**changes) -> GPT:
    config = {"n_layers": 2, "d_model": 32, "n_ctx": 16, "vocab_size": 40, "position": "learned", "qk_norm": True}
    return GPT(ModelConfig(**(config | changes)))


def test_schedules():
    def rate(step, **changes):
        return learning_rate(OptimizerConfig(**({"warmup_steps": 10} | changes)), step, 110)

    for schedule in ("constant", "linear", "cosine"):
        assert [rate(s, schedule=schedule) for s in (1, 5, 10)] == [0.1, 0.5, 1.0]
        assert rate(11, schedule=schedule) == 1.0
    assert rate(110, schedule="constant") == 1
    assert rate(61, schedule="linear") == pytest.approx(0.5) and rate(110, schedule="linear") == pytest.approx(0.01)
    assert rate(61, schedule="linear", final_lr=0.2) == pytest.approx(0.6)
    assert rate(36, schedule="cosine", final_lr=0.1) == pytest.approx(0.1 + 0.9 * (1 + cos(pi / 4)) / 2)
    assert rate(90, schedule="linear", decay_share=0.2) == 1 and rate(101, schedule="linear", decay_share=0.2) == pytest.approx(0.5)
    assert learning_rate(OptimizerConfig(warmup_steps=1000), 5, 5) == 1         # a warm-up longer than the run is cut
    assert all(0 < learning_rate(OptimizerConfig(warmup_steps=w), s, 7) <= 1 for w in (0, 3, 7, 9) for s in range(1, 8))


def test_momentum_rises_from_085():
    config = OptimizerConfig(momentum_warmup_steps=100)
    assert momentum(config, 50) == pytest.approx(0.9) and momentum(config, 100) == momentum(config, 9999) == pytest.approx(0.95)


@pytest.mark.parametrize("kind", ["muon", "adamw"])
@pytest.mark.parametrize("changes", [{}, {"tied_embeddings": True}, {"smear": True, "position": "none"}, {"mlp": "none", "qk_norm": False},
                                     {"norm": "layernorm", "bias": "all", "position": "learned"}])
def test_groups_partition_the_parameters_and_only_matrices_decay(kind, changes):
    model = small_model(**changes)
    optimizer = Optimizer(model, OptimizerConfig(kind=kind, weight_decay=0.1), 10)
    groups = [g for part in optimizer.parts.values() for g in part.param_groups]
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(id(p) for p in model.parameters())
    names = {p: n for n, p in model.named_parameters()}
    for group in groups:
        for p in group["params"]:
            is_matrix = p.ndim == 2 and ".w_" in names[p]
            assert (group["weight_decay"] == 0.1) == is_matrix
            assert ("muon" in optimizer.parts and group in optimizer.parts["muon"].param_groups) == (kind == "muon" and is_matrix)


def test_orthogonalised_matrices_have_singular_values_near_one():
    torch.manual_seed(0)
    for shape in ((3, 16, 64), (2, 64, 16), (1, 32, 32)):
        g = torch.randn(shape)
        out = orthogonalise(g)
        assert out.shape == shape
        u, _, vh = torch.linalg.svd(g, full_matrices=False)
        values = torch.linalg.svdvals(out)
        assert values.max() < 1.25 and values.min() > 0.3 and 0.6 < values.mean() < 1.2
        # same singular vectors: what remains is diagonal in them
        inside = u.mT @ out @ vh.mT
        off = inside - torch.diag_embed(inside.diagonal(dim1=-2, dim2=-1))
        assert off.abs().max() < 1e-3


def test_muon_is_torchs_muon():
    """Against torch.optim.Muon, whose Newton–Schulz runs in bf16: the same direction and length to bf16's accuracy."""
    torch.manual_seed(0)
    ours, theirs = torch.nn.Parameter(torch.randn(24, 16)), torch.nn.Parameter(torch.zeros(24, 16))
    theirs.data.copy_(ours)
    start = ours.detach().clone()
    a = Muon([{"params": [ours], "lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}])
    b = torch.optim.Muon([theirs], lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True, adjust_lr_fn="original")
    for n in range(3):
        gradient = torch.randn(24, 16, generator=torch.Generator().manual_seed(n))
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        a.step()
        b.step()
    moved, expected = ours.detach() - start, theirs.detach() - start
    assert (moved - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_the_gradient_is_the_mean_and_is_clipped(clip):
    model = small_model()
    tokens = torch.randint(40, (4, 16))
    optimizer = Optimizer(model, OptimizerConfig(kind="adamw", clip=clip), 10)
    model.loss(tokens, tokens).backward()
    mean = [p.grad / 64 for p in model.parameters()]
    seen = {}
    optimizer.parts["adam"].register_step_pre_hook(lambda *_: seen.update({p: p.grad.clone() for p in model.parameters()}))
    norm = optimizer.step(1, 64)
    expected = torch.cat([g.flatten() for g in mean]).norm()
    assert norm.item() == pytest.approx(expected.item(), rel=1e-5)
    share = min(1, clip / expected.item()) if clip else 1
    assert all(torch.allclose(seen[p], g * share, atol=1e-6) for p, g in zip(model.parameters(), mean))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_accumulating_is_one_big_batch(kind):
    tokens = torch.randint(40, (8, 16), generator=torch.Generator().manual_seed(0))
    ends = []
    for rows in (8, 2, 1):
        model = small_model(zero_init=False)        # no gradient is exactly zero, where AdamW would make rounding errors large
        optimizer = Optimizer(model, OptimizerConfig(kind=kind, lr=0.002, warmup_steps=0), 10)
        for step in range(1, 4):
            for part in tokens.split(rows):
                model.loss(part, part.roll(-1, 1)).backward()
            optimizer.step(step, tokens.numel())
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert all((ends[0] - end).norm() < 1e-4 * ends[0].norm() for end in ends[1:])


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_a_restored_optimizer_goes_on_bit_for_bit(kind):
    def steps(model, optimizer, first, last):
        for step in range(first, last):
            tokens = torch.randint(40, (4, 16), generator=torch.Generator().manual_seed(step))
            model.loss(tokens, tokens).backward()
            optimizer.step(step, 64)

    model = small_model()
    optimizer = Optimizer(model, OptimizerConfig(kind=kind), 10)
    steps(model, optimizer, 1, 4)
    copy = small_model()
    copy.load_state_dict(model.state_dict())
    restored = Optimizer(copy, OptimizerConfig(kind=kind), 10)
    restored.load_state_dict({k: v.clone() for k, v in optimizer.state_dict().items()})
    steps(model, optimizer, 4, 8)
    steps(copy, restored, 4, 8)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), copy.parameters()))


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_half_precision_trains_as_fp32_does(precision):
    losses = {}
    for dtype in (torch.float32, precision):
        model = small_model()
        model.compute_dtype = dtype
        optimizer = Optimizer(model, OptimizerConfig(kind="adamw", lr=0.01, warmup_steps=0), 40)
        assert model(torch.zeros(1, 4, dtype=torch.long)).dtype == dtype
        for step in range(1, 31):
            tokens = torch.randint(10, (8, 16), generator=torch.Generator().manual_seed(step))
            loss = model.loss(tokens, tokens)
            loss.backward()
            optimizer.step(step, 128)
        losses[dtype] = loss.item() / 128
    assert losses[torch.float32] < 2 and losses[precision] == pytest.approx(losses[torch.float32], abs=0.05)
