"""The loss of a large vocabulary without its logits: at 50,304 tokens of vocabulary they outweigh all activations."""

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_ELEMENTS = 2 ** 24        # logits held at a time: 64 MB in float32


def summed_cross_entropy(x: Tensor, w: Tensor, targets: Tensor) -> Tensor:
    """Σ over N rows of −ln softmax(x wᵀ)[target], float32: x (N, E), w (V, E), targets (N,).

    Where N·V logits would be large they are made, used for the loss and for both gradients, and dropped, a chunk of
    rows at a time.
    """
    if x.shape[0] * w.shape[0] <= CHUNK_ELEMENTS:
        return F.cross_entropy(F.linear(x, w.to(x.dtype)).float(), targets, reduction="sum")
    return _ChunkedCrossEntropy.apply(x, w, targets)


def cross_entropies(x: Tensor, w: Tensor, targets: Tensor) -> Tensor:
    """−ln softmax(x wᵀ)[target] of each of N rows, float32 (N,), in the same chunks; no gradients."""
    w, rows = w.to(x.dtype), max(1, CHUNK_ELEMENTS // w.shape[0])
    return torch.cat([F.cross_entropy(F.linear(x_, w).float(), target, reduction="none")
                      for x_, target in zip(x.split(rows), targets.split(rows))])


class _ChunkedCrossEntropy(torch.autograd.Function):
    """d loss / d logits = softmax − onehot is known as soon as the logits are, so the backward pass has nothing left to do."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, targets: Tensor) -> Tensor:
        cast = w.to(x.dtype)
        loss = torch.zeros((), dtype=torch.float32, device=x.device)
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        dw = torch.zeros_like(w, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        chunk = max(1, CHUNK_ELEMENTS // w.shape[0])
        for start in range(0, x.shape[0], chunk):
            rows = slice(start, start + chunk)
            logits = F.linear(x[rows], cast).float()                                # (chunk, V)
            lse = logits.logsumexp(dim=-1, keepdim=True)
            target = targets[rows, None]
            loss += (lse - logits.gather(1, target)).sum()
            if dx is not None or dw is not None:
                p = logits.sub_(lse).exp_()
                p.scatter_add_(1, target, torch.full_like(target, -1, dtype=p.dtype))
                p = p.to(x.dtype)
                if dx is not None:
                    dx[rows] = p @ cast
                if dw is not None:
                    dw += p.mT @ x[rows]
        ctx.save_for_backward(dx, dw)
        return loss

    @staticmethod
    def backward(ctx, grad: Tensor):
        dx, dw = ctx.saved_tensors
        return (None if dx is None else dx * grad.to(dx.dtype)), (None if dw is None else dw * grad), None
