"""Schedules, parameter groups, Muon, clipping, accumulation, restoring, 16-bit training."""

from math import cos, pi

import pytest
import torch

from model.config import ModelConfig
from model.gpt import GPT
from training.config import OptimizerConfig
from training.optimizer import Muon, Optimizer, lr_scale, momentum, orthogonalise


def small_model(**changes) -> GPT:
    config = {"n_layers": 2, "d_model": 32, "n_ctx": 16, "vocab_size": 40, "position": "learned",
              "qk_norm": True}
    return GPT(ModelConfig(**(config | changes)))


def test_schedules():
    def scale(step, **changes):
        return lr_scale(OptimizerConfig(**({"warmup_steps": 10} | changes)), step, 110)

    for schedule in ("constant", "linear", "cosine"):
        assert [scale(step, schedule=schedule) for step in (1, 5, 10)] == [0.1, 0.5, 1.0]
        assert scale(11, schedule=schedule) == 1.0
    assert scale(110, schedule="constant") == 1
    assert scale(61, schedule="linear") == pytest.approx(0.5)
    assert scale(110, schedule="linear") == pytest.approx(0.01)
    assert scale(61, schedule="linear", final_lr=0.2) == pytest.approx(0.6)
    cosine = 0.1 + 0.9 * (1 + cos(pi / 4)) / 2
    assert scale(36, schedule="cosine", final_lr=0.1) == pytest.approx(cosine)
    assert scale(90, schedule="linear", decay_share=0.2) == 1
    assert scale(101, schedule="linear", decay_share=0.2) == pytest.approx(0.5)
    # A warm-up longer than the run is cut.
    assert lr_scale(OptimizerConfig(warmup_steps=1000), 5, 5) == 1
    for warmup in (0, 3, 7, 9):
        config = OptimizerConfig(warmup_steps=warmup)
        assert all(0 < lr_scale(config, step, 7) <= 1 for step in range(1, 8))


def test_momentum_rises_from_085():
    config = OptimizerConfig(momentum_warmup_steps=100)
    assert momentum(config, 50) == pytest.approx(0.9)
    assert momentum(config, 100) == momentum(config, 9999) == pytest.approx(0.95)


@pytest.mark.parametrize("kind", ["muon", "adamw"])
@pytest.mark.parametrize("changes", [
    {}, {"tied_embeddings": True}, {"smear": True, "position": "none"},
    {"mlp": "none", "qk_norm": False},
    {"norm": "layernorm", "bias": "all", "position": "learned"}])
def test_groups_partition_the_parameters_and_only_matrices_decay(kind, changes):
    model = small_model(**changes)
    optimizer = Optimizer(model, OptimizerConfig(kind=kind, weight_decay=0.1), 10)
    names = {p: name for name, p in model.named_parameters()}
    optimized = []
    for part_name, part in optimizer.optimizers.items():
        for group in part.param_groups:
            for p in group["params"]:
                optimized.append(id(p))
                is_matrix = p.ndim == 2 and ".w_" in names[p]
                assert (group["weight_decay"] == 0.1) == is_matrix
                assert (part_name == "muon") == (kind == "muon" and is_matrix)
    assert sorted(optimized) == sorted(id(p) for p in model.parameters())


def test_orthogonalised_matrices_have_singular_values_near_one():
    torch.manual_seed(0)
    for shape in ((3, 16, 64), (2, 64, 16), (1, 32, 32)):
        g = torch.randn(shape)
        out = orthogonalise(g)
        assert out.shape == shape
        u, _, vh = torch.linalg.svd(g, full_matrices=False)
        values = torch.linalg.svdvals(out)
        assert values.max() < 1.25 and values.min() > 0.3 and 0.6 < values.mean() < 1.2
        # The same singular vectors: in their basis the result is diagonal.
        in_basis = u.mT @ out @ vh.mT
        off_diagonal = in_basis - torch.diag_embed(in_basis.diagonal(dim1=-2, dim2=-1))
        assert off_diagonal.abs().max() < 1e-3


def test_muon_is_torchs_muon():
    """To the accuracy of bf16, in which torch.optim.Muon runs its Newton–Schulz iteration."""
    torch.manual_seed(0)
    start = torch.randn(24, 16)
    p_ours, p_theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    ours = Muon([{"params": [p_ours], "lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}])
    theirs = torch.optim.Muon([p_theirs], lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True,
                              adjust_lr_fn="original")
    for n in range(3):
        gradient = torch.randn(24, 16, generator=torch.Generator().manual_seed(n))
        p_ours.grad, p_theirs.grad = gradient.clone(), gradient.clone()
        ours.step()
        theirs.step()
    update, expected = p_ours.detach() - start, p_theirs.detach() - start
    assert (update - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_the_gradient_is_the_mean_and_is_clipped(clip):
    model = small_model()
    tokens = torch.randint(40, (4, 16))
    optimizer = Optimizer(model, OptimizerConfig(kind="adamw", clip=clip), 10)
    model.loss(tokens, tokens).backward()
    mean = [p.grad / 64 for p in model.parameters()]
    used = {}

    def remember_gradients(*_) -> None:
        used.update({p: p.grad.clone() for p in model.parameters()})

    optimizer.optimizers["adam"].register_step_pre_hook(remember_gradients)
    norm = optimizer.step(1, 64)
    expected = torch.cat([gradient.flatten() for gradient in mean]).norm()
    assert norm.item() == pytest.approx(expected.item(), rel=1e-5)
    scale = min(1, clip / expected.item()) if clip else 1
    for p, gradient in zip(model.parameters(), mean):
        assert torch.allclose(used[p], gradient * scale, atol=1e-6)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_accumulating_is_one_big_batch(kind):
    tokens = torch.randint(40, (8, 16), generator=torch.Generator().manual_seed(0))
    weights = []
    for rows in (8, 2, 1):
        # Without zero_init no gradient is exactly zero, where AdamW would enlarge rounding errors.
        model = small_model(zero_init=False)
        optimizer = Optimizer(model, OptimizerConfig(kind=kind, lr=0.002, warmup_steps=0), 10)
        for step in range(1, 4):
            for part in tokens.split(rows):
                model.loss(part, part.roll(-1, 1)).backward()
            optimizer.step(step, tokens.numel())
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    for other in weights[1:]:
        assert (weights[0] - other).norm() < 1e-4 * weights[0].norm()


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_a_restored_optimizer_goes_on_bit_for_bit(kind):
    def train(model: GPT, optimizer: Optimizer, steps: range) -> None:
        for step in steps:
            tokens = torch.randint(40, (4, 16), generator=torch.Generator().manual_seed(step))
            model.loss(tokens, tokens).backward()
            optimizer.step(step, 64)

    model = small_model()
    optimizer = Optimizer(model, OptimizerConfig(kind=kind), 10)
    train(model, optimizer, range(1, 4))
    copy = small_model()
    copy.load_state_dict(model.state_dict())
    restored = Optimizer(copy, OptimizerConfig(kind=kind), 10)
    state = {name: value.clone() for name, value in optimizer.state_dict().items()}
    restored.load_state_dict(state)
    train(model, optimizer, range(4, 8))
    train(copy, restored, range(4, 8))
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
    assert losses[torch.float32] < 2
    assert losses[precision] == pytest.approx(losses[torch.float32], abs=0.05)
