"""Muon for matrices, AdamW for the rest, and rates that are pure functions of the step."""

from math import cos, pi
from typing import Any

import torch
from torch import Tensor, nn

from training.config import OptimizerConfig
from training.distributed import ALONE, World, local, over_whole_matrices

NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 5    # quintic coefficients that bring singular values near 1 fastest (Jordan 2024)
MOMENTUM_START = 0.85


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The share (0 … 1) of its height that the rate has for update `step` (1 … steps). A longer warm-up than the run is cut."""
    warmup = min(config.warmup_steps, steps)
    if step <= warmup:
        return step / warmup
    decay_steps = max(1.0, (steps - warmup) * config.decay_share)
    progress = max(0.0, (step - 1 - (steps - decay_steps)) / decay_steps)       # the last update still moves
    match config.schedule:
        case "constant":
            return 1.0
        case "linear":
            return 1 - (1 - config.final_lr) * progress
        case "cosine":
            return config.final_lr + (1 - config.final_lr) * (1 + cos(pi * progress)) / 2


def momentum(config: OptimizerConfig, step: int) -> float:
    """Muon's momentum for update `step`: early gradients turn quickly and are better forgotten."""
    risen = min(1.0, step / max(1, config.momentum_warmup_steps))
    return min(config.momentum, MOMENTUM_START + risen * (config.momentum - MOMENTUM_START))


class Optimizer:
    """Every parameter of a model in exactly one group; `step` clips, sets the rates and updates."""

    def __init__(self, model: nn.Module, config: OptimizerConfig, steps: int, world: World = ALONE):
        self.config, self.steps, self.world = config, steps, world
        self.names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
        matrices = [p for p, name in self.names.items() if p.ndim == 2 and "embed" not in name and "lm_head" not in name]
        others = [p for p in self.names if all(p is not m for m in matrices)]
        assert len(matrices) + len(others) == len(self.names), "the groups must partition the parameters"
        decay = config.weight_decay
        device = next(iter(self.names)).device.type
        adam: dict[str, Any] = {"betas": tuple(config.betas), "fused": device in ("cuda", "cpu", "mps")}
        if config.kind == "muon":
            self.parts = {"muon": Muon([{"params": matrices, "height": config.lr, "weight_decay": decay}], world),
                          "adam": torch.optim.AdamW([{"params": others, "height": config.adam_lr, "weight_decay": 0.0}], **adam)}
        else:
            self.parts = {"adam": torch.optim.AdamW(
                [{"params": matrices, "height": config.lr, "weight_decay": decay},
                 {"params": others, "height": config.lr, "weight_decay": 0.0}], **adam)}

    @torch.no_grad()
    def step(self, step: int, tokens: int) -> Tensor:
        """Update `step` (1 for the first) with the gradients of a loss summed over `tokens` tokens; their mean's norm, ().

        Among several processes gradients are the mean of everyone's, so `tokens` are those of one. Dividing here and not in the loss
        keeps fp16 gradients in range without a loss scale to tune and to save.
        """
        gradients = [local(p.grad) for p in self.names if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients) / tokens
        if self.world.sharded:
            norm = self.world.sum(norm.square()).sqrt()
        shorten = (self.config.clip / (norm + 1e-6)).clamp(max=1.0) if self.config.clip else 1.0
        torch._foreach_mul_(gradients, torch.as_tensor(shorten / tokens, device=norm.device))
        share = learning_rate(self.config, step, self.steps)
        for part in self.parts.values():
            for group in part.param_groups:
                group["lr"] = group["height"] * share
                if "momentum" in group:
                    group["momentum"] = momentum(self.config, step)
            part.step()
            part.zero_grad(set_to_none=True)
        return norm

    def lr(self, step: int) -> float:
        """The learning rate of update `step`: of the matrices under muon, of everything under adamw."""
        return self.config.lr * learning_rate(self.config, step, self.steps)

    def state_dict(self) -> dict[str, Tensor]:
        """All that the next step depends on, as tensors by name: `adam.exp_avg.blocks.0.…`."""
        return {f"{kind}.{key}.{self.names[p]}": value.detach()
                for kind, part in self.parts.items() for p, state in part.state.items() for key, value in state.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        parameters = {name: p for p, name in self.names.items()}
        for full_name, value in state.items():
            kind, key, name = full_name.split(".", 2)
            p = parameters[name]
            of_parameter = value.shape == p.shape               # the others count steps
            held = torch.empty_like(p, dtype=value.dtype) if of_parameter else torch.empty_like(value, device=p.device)
            self.world.fill(held, value)
            self.parts[kind].state[p][key] = held


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: every singular value of a matrix's update becomes about 1 (Jordan et al. 2024).

    torch.optim.Muon orthogonalises in bf16, six times slower than fp32 on a CPU without bf16 units; and one matrix at a
    time, where here all of one shape go together and several processes share the work.
    """

    def __init__(self, groups: list[dict], world: World = ALONE):
        super().__init__(groups, {"lr": 0.0, "momentum": 0.95, "weight_decay": 0.0})
        self.world = world

    @torch.no_grad()
    def step(self) -> None:     # type: ignore[override]        # torch's may ask for the loss again
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for (rows, columns), matrices in by_shape.items():
                for p in matrices:
                    if "momentum" not in self.state[p]:
                        self.state[p]["momentum"] = torch.zeros_like(p)
                averages = [local(self.state[p]["momentum"]) for p in matrices]
                gradients, weights = [local(p.grad) for p in matrices if p.grad is not None], [local(p) for p in matrices]
                torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
                nesterov = torch._foreach_lerp(gradients, averages, group["momentum"])
                updates = over_whole_matrices(orthogonalise, torch.stack(nesterov), rows, self.world)
                # A tall matrix of orthonormal columns moves its outputs less than a wide one; this evens it out.
                rate = group["lr"] * max(1.0, rows / columns) ** 0.5
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(weights, list(updates.to(weights[0].dtype).unbind()), alpha=-rate)


def orthogonalise(g: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrices to g (N, R, C), roughly: Newton–Schulz, singular values end in about 0.7 … 1.2.

    In bf16 on CUDA, whose matrix units ask for it; in fp32 elsewhere.
    """
    x = g.bfloat16() if g.device.type == "cuda" else g.float()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x                                     # the Gram matrix of the short side
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    x = _newton_schulz_by_gram(x) if x.dtype == torch.float32 and x.shape[-1] >= 2 * x.shape[-2] else _newton_schulz(x)
    return x.mT if tall else x


def _newton_schulz(x: Tensor) -> Tensor:
    for a, b, c in NEWTON_SCHULZ:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _newton_schulz_by_gram(x: Tensor) -> Tensor:
    """The same for wide matrices with two thirds of the work: each step multiplies x by a polynomial q of its Gram matrix,
    and these commute, so the long side is needed at the beginning and at the end only. Squaring asks for fp32."""
    gram = x @ x.mT
    product: Tensor | None = None
    for a, b, c in NEWTON_SCHULZ:
        q = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        q.diagonal(dim1=-2, dim2=-1).add_(a)
        product = q if product is None else q @ product
        gram = q @ gram @ q
    return x if product is None else product @ x
