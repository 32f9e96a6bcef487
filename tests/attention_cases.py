"""Attention calls to check kernels with: every layout in memory, NaN on all sides, and the error that rounding allows."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.reference import reference_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LAYOUTS = ("projection", "heads", "columns", "sparse")


@dataclass(frozen=True)
class Case:
    T: int
    S: int
    D: int
    B: int = 1
    K: int = 1
    groups: int = 1
    causal: bool = True
    window: int | None = None
    documents: int = 0              # > 0: so many segments, in order
    shuffled: bool = False          # segment ids in no order
    dtype: str = "fp32"
    layout: str = "projection"
    scale: float | None = None
    seed: int = 0

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v and a gradient of the output."""
        draw = torch.Generator().manual_seed(self.seed)
        H = self.K * self.groups
        return tuple(placed(torch.randn(self.B, heads, length, self.D, generator=draw).to(DTYPES[self.dtype]), self.layout)
                     for heads, length in ((H, self.T), (self.K, self.S), (self.K, self.S), (H, self.T)))

    def masks(self) -> dict:
        segments = None
        if self.documents:
            segments = torch.randint(0, self.documents, (self.B, self.S), generator=torch.Generator().manual_seed(self.seed))
            segments = (segments if self.shuffled else segments.sort(1)[0]).to(DEVICE)
        return {"causal": self.causal, "window": self.window, "segments": segments}


def placed(x: Tensor, layout: str) -> Tensor:
    """The numbers of x (B, heads, T, D) on the device, laid out otherwise and with NaN around every head.

    projection: (B, T, heads, D) memory, as a matrix product writes it · heads: (B, heads, T, D) · columns: a column's
    positions side by side · sparse: every second number of a larger tensor.
    """
    B, heads, T, D = x.shape
    step = 2 if layout == "sparse" else 1
    order = {"projection": (0, 2, 1, 3), "heads": (0, 1, 2, 3), "columns": (0, 1, 3, 2), "sparse": (0, 1, 2, 3)}[layout]
    padded = (B, heads, T + 16, D * step + 16)
    memory = torch.full([padded[i] for i in order], torch.nan, dtype=x.dtype, device=DEVICE)
    view = memory.permute(*[order.index(i) for i in range(4)])[:, :, 8:8 + T, 8:8 + D * step:step]
    return view.copy_(x)


def exact_and_plain(case: Case, q, k, v, grad) -> tuple[list[Tensor], list[Tensor]]:
    """out, lse, dq, dk, dv by the definition: in float64, and in the case's own dtype."""
    results = []
    for dtype in (torch.float64, q.dtype):
        inputs = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
        out, lse = reference_attention(*inputs, scale=case.scale, **case.masks())
        results.append([out.detach(), lse.detach(), *torch.autograd.grad(out, inputs, grad.to(dtype))])
    return tuple(results)


def assert_as_good(got: Tensor, exact: Tensor, plain: Tensor, what: str = "") -> None:
    """`got` may be twice as far from the truth as the plain computation in its dtype, and a rounding step or so on top."""
    finite = exact.isfinite()
    assert torch.equal(got[~finite].double(), exact[~finite]), f"{what}: infinite elsewhere"
    got, exact, plain = got[finite], exact[finite], plain[finite]
    assert got.isfinite().all(), f"{what}: not finite"
    if exact.numel():
        # In dA − δ two numbers cancel that are √D times larger than what is left: hence 64 steps of float32, and not one.
        step = max(1.0, exact.abs().max().item()) * torch.finfo(got.dtype).eps * (64 if got.dtype == torch.float32 else 0.5)
        error, plain_error = (got.double() - exact).abs().max().item(), (plain.double() - exact).abs().max().item()
        assert error <= 2 * plain_error + step, f"{what}: off by {error:.2e}, the plain computation by {plain_error:.2e}"
