"""The loss of a large vocabulary without holding its logits: for 50,304 tokens they outweigh all
other activations."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_ELEMENTS = 2 ** 24        # logits held at a time: 64 MB in float32
# On a GPU 512 MB: every chunk reads and writes the whole gradient of w, and is compiled by itself.
GPU_CHUNK_ELEMENTS = 2 ** 27


def summed_cross_entropy(x: Tensor, w: Tensor, targets: Tensor) -> Tensor:
    """Σ over N rows of −ln softmax(x wᵀ)[target], float32: x (N, E), w (V, E), targets (N,).

    If N·V logits are many, they are made in chunks of rows, used for the loss and for both
    gradients, and dropped.
    """
    if x.shape[0] <= chunk_rows(w):
        logits = F.linear(x, w.to(x.dtype)).float()
        return F.cross_entropy(logits, targets, reduction="sum")
    return _ChunkedCrossEntropy.apply(x, w, targets)


def chunk_rows(w: Tensor) -> int:
    """How many rows of logits are held at a time: w (V, E)."""
    return max(1, (GPU_CHUNK_ELEMENTS if w.is_cuda else CHUNK_ELEMENTS) // w.shape[0])


def cross_entropies(x: Tensor, w: Tensor, targets: Tensor) -> Tensor:
    """−ln softmax(x wᵀ)[target] of each of N rows, float32 (N,), in the same chunks. Without
    gradients."""
    w, rows = w.to(x.dtype), chunk_rows(w)
    losses = [F.cross_entropy(F.linear(x_rows, w).float(), target_rows, reduction="none")
              for x_rows, target_rows in zip(x.split(rows), targets.split(rows))]
    return torch.cat(losses)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The gradient of the loss with respect to the logits is softmax − onehot. The forward pass
    knows it as soon as it has the logits, so it computes the gradients; the backward pass only
    scales them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, targets: Tensor) -> Tensor:
        w_cast = w.to(x.dtype)
        loss = torch.zeros((), dtype=torch.float32, device=x.device)
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        dw = torch.zeros_like(w, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        chunk = chunk_rows(w)
        for start in range(0, x.shape[0], chunk):
            rows = slice(start, start + chunk)
            logits = F.linear(x[rows], w_cast).float()                              # (chunk, V)
            lse = logits.logsumexp(dim=-1, keepdim=True)
            target = targets[rows, None]
            loss += (lse - logits.gather(1, target)).sum()
            if dx is not None or dw is not None:
                if torch.compiler.is_compiling():   # one pass, which writes p in the dtype of x
                    is_target = torch.arange(w.shape[0], device=w.device) == target
                    p = (logits - lse).exp() - is_target.float()
                else:
                    p = logits.sub_(lse).exp_()
                    p.scatter_add_(1, target, torch.full_like(target, -1, dtype=p.dtype))
                p = p.to(x.dtype)
                if dx is not None:
                    dx[rows] = p @ w_cast
                if dw is not None:
                    dw += p.mT @ x[rows]
        ctx.save_for_backward(dx, dw)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        dx, dw = ctx.saved_tensors
        return (None if dx is None else dx * grad.to(dx.dtype),
                None if dw is None else dw * grad,
                None)
