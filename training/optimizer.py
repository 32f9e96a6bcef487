"""Muon for matrices, AdamW for the rest, and learning rates that are functions of the step."""

from math import cos, pi
from typing import Any

import torch
from torch import Tensor, nn

from training.config import OptimizerConfig
from training.parallel import ONE_PROCESS, Parallel, local

# Coefficients of the quintic polynomial that brings singular values near 1 fastest (Jordan 2024).
NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 5
MOMENTUM_START = 0.85


def lr_scale(config: OptimizerConfig, step: int, steps: int) -> float:
    """Fraction of the peak learning rate at update `step`, one of 1 … `steps`.

    A warm-up longer than the run is cut short.
    """
    warmup = min(config.warmup_steps, steps)
    if step <= warmup:
        return step / warmup
    decay_steps = max(1.0, (steps - warmup) * config.decay_share)
    # Counted from step − 1, so that the last update still moves.
    progress = max(0.0, (step - 1 - (steps - decay_steps)) / decay_steps)
    match config.schedule:
        case "constant":
            return 1.0
        case "linear":
            return 1 - (1 - config.final_lr) * progress
        case "cosine":
            return config.final_lr + (1 - config.final_lr) * (1 + cos(pi * progress)) / 2


def momentum(config: OptimizerConfig, step: int) -> float:
    """Muon's momentum at update `step`. It starts lower: early gradients turn quickly, and old ones
    are better forgotten."""
    risen = min(1.0, step / max(1, config.momentum_warmup_steps))
    return min(config.momentum, MOMENTUM_START + risen * (config.momentum - MOMENTUM_START))


def is_hidden_matrix(name: str, p: Tensor) -> bool:
    """Whether Muon moves the parameter: a matrix of a block, not an embedding or the head."""
    return p.ndim == 2 and "embed" not in name and "lm_head" not in name


class Optimizer:
    """Puts every parameter in exactly one group; `step` clips, sets learning rates and updates."""

    def __init__(self, model: nn.Module, config: OptimizerConfig, steps: int,
                 parallel: Parallel = ONE_PROCESS):
        self.config, self.steps, self.parallel = config, steps, parallel
        self.names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
        matrices = [p for p, name in self.names.items() if is_hidden_matrix(name, p)]
        others = [p for p, name in self.names.items() if not is_hidden_matrix(name, p)]
        matrix_group = {"params": matrices, "base_lr": config.lr,
                        "weight_decay": config.weight_decay}
        device = next(iter(self.names)).device.type
        adamw: dict[str, Any] = {"betas": tuple(config.betas),
                                 "fused": device in ("cuda", "cpu", "mps")}
        if config.kind == "muon":
            other_group = {"params": others, "base_lr": config.adam_lr, "weight_decay": 0.0}
            self.optimizers = {"muon": Muon([matrix_group], parallel),
                               "adam": torch.optim.AdamW([other_group], **adamw)}
        else:
            other_group = {"params": others, "base_lr": config.lr, "weight_decay": 0.0}
            self.optimizers = {"adam": torch.optim.AdamW([matrix_group, other_group], **adamw)}

    @torch.no_grad()
    def step(self, step: int, tokens: int) -> Tensor:
        """Make update `step` (the first is 1). Returns the mean loss's gradient norm, a scalar.

        The gradients are those of a loss summed over `tokens` tokens. Dividing them here, not the
        loss, keeps fp16 gradients in range without a loss scale to tune and to save. Among several
        processes they are the mean of every process's gradients, so `tokens` are one process's.
        """
        gradients = [local(p.grad) for p in self.names if p.grad is not None]
        norm = self.parallel.total_norm(torch.nn.utils.get_total_norm(gradients) / tokens)
        clip = self.config.clip
        clip_scale = (clip / (norm + 1e-6)).clamp(max=1.0) if clip else 1.0
        torch._foreach_mul_(gradients, torch.as_tensor(clip_scale / tokens, device=norm.device))
        scale = lr_scale(self.config, step, self.steps)
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * scale
                if "momentum" in group:
                    group["momentum"] = momentum(self.config, step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return norm

    def lr(self, step: int) -> float:
        """The learning rate at update `step`: of matrices under muon, of everything under adamw."""
        return self.config.lr * lr_scale(self.config, step, self.steps)

    def state_dict(self) -> dict[str, Tensor]:
        """All that the next step depends on, as tensors by name: `adam.exp_avg.blocks.0.…`."""
        return {f"{part}.{key}.{self.names[p]}": value.detach()
                for part, optimizer in self.optimizers.items()
                for p, state in optimizer.state.items()
                for key, value in state.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` gave, whole tensors by name; a process keeps its share."""
        parameters = {name: p for p, name in self.names.items()}
        for full_name, value in state.items():
            part, key, name = full_name.split(".", 2)
            p = parameters[name]
            if value.shape == p.shape:
                target = torch.empty_like(p, dtype=value.dtype)
            else:                                               # a step counter
                target = torch.empty_like(value, device=p.device)
            self.parallel.fill(target, value)
            self.optimizers[part].state[p][key] = target


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: every singular value of a matrix's update is about 1 (Jordan et al.
    2024, "Muon: An optimizer for hidden layers in neural networks").

    torch.optim.Muon computes in bf16, which is six times slower than fp32 on a CPU without bf16
    units, and one matrix at a time. Here all matrices of one shape go together, and several
    processes share the work.
    """

    def __init__(self, groups: list[dict[str, Any]], parallel: Parallel = ONE_PROCESS):
        super().__init__(groups, {"lr": 0.0, "momentum": 0.95, "weight_decay": 0.0})
        self.parallel = parallel

    @torch.no_grad()
    def step(self) -> None:     # type: ignore[override]    # torch's may evaluate the loss again
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for matrices in by_shape.values():
                self._step_matrices(matrices, group)

    def _step_matrices(self, matrices: list[Tensor], group: dict[str, Any]) -> None:
        """Update matrices of one shape, together."""
        rows, columns = matrices[0].shape
        for p in matrices:
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        averages = [local(self.state[p]["momentum"]) for p in matrices]
        gradients = [local(p.grad) for p in matrices if p.grad is not None]
        weights = [local(p) for p in matrices]
        torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
        nesterov = torch._foreach_lerp(gradients, averages, group["momentum"])
        updates = self.parallel.map_matrices(orthogonalise, torch.stack(nesterov), rows)
        # A tall matrix with orthonormal columns moves its outputs less than a wide one does.
        lr = group["lr"] * max(1.0, rows / columns) ** 0.5
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, list(updates.to(weights[0].dtype).unbind()), alpha=-lr)


def orthogonalise(g: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrices to g (N, R, C), roughly, by Newton–Schulz iteration:
    singular values end between 0.7 and 1.2.

    In bf16 on CUDA, whose matrix units are fastest there; in fp32 elsewhere.
    """
    x = g.bfloat16() if g.device.type == "cuda" else g.float()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x                             # so the Gram matrix is the smaller one
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    if x.dtype == torch.float32 and x.shape[-1] >= 2 * x.shape[-2]:
        x = _newton_schulz_by_gram(x)
    else:
        x = _newton_schulz(x)
    return x.mT if tall else x


def _newton_schulz(x: Tensor) -> Tensor:
    for a, b, c in NEWTON_SCHULZ:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _newton_schulz_by_gram(x: Tensor) -> Tensor:
    """The same for wide matrices, with two thirds of the work.

    Each step multiplies x by a polynomial q of its Gram matrix. These polynomials commute, so the
    long side is needed only at the beginning and at the end. Squaring needs fp32.
    """
    gram = x @ x.mT
    product: Tensor | None = None
    for a, b, c in NEWTON_SCHULZ:
        q = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        q.diagonal(dim1=-2, dim2=-1).add_(a)
        product = q if product is None else q @ product
        gram = q @ gram @ q
    return x if product is None else product @ x
