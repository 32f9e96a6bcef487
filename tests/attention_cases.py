"""Attention calls to check kernels with: every memory layout, NaN on all sides, error bounds."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
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
    documents: int = 0              # number of segments, in order; 0: none
    shuffled: bool = False          # segment ids in no order
    dtype: str = "fp32"
    layout: str = "projection"
    scale: float | None = None
    seed: int = 0

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v and a gradient of the output."""
        draw = torch.Generator().manual_seed(self.seed)
        H, dtype = self.K * self.groups, DTYPES[self.dtype]
        tensors = []
        for heads, length in ((H, self.T), (self.K, self.S), (self.K, self.S), (H, self.T)):
            numbers = torch.randn(self.B, heads, length, self.D, generator=draw).to(dtype)
            tensors.append(placed(numbers, self.layout))
        return tuple(tensors)

    def masks(self) -> dict:
        """causal, window and segments, in the order in which the operators take them."""
        segments = None
        if self.documents:
            draw = torch.Generator().manual_seed(self.seed)
            segments = torch.randint(0, self.documents, (self.B, self.S), generator=draw)
            segments = (segments if self.shuffled else segments.sort(1)[0]).to(DEVICE)
        return {"causal": self.causal, "window": self.window, "segments": segments}


# Every kind of mask and layout, and lengths around a tile.
CASES = [
    Case(1, 1, 16), Case(65, 65, 32, groups=3), Case(77, 77, 48, B=2, K=2, groups=2),
    Case(33, 100, 16), Case(1, 40, 32, groups=2),
    Case(40, 54, 16), Case(40, 55, 16),     # the first query sees a key less than a tile, or a tile
    Case(50, 50, 80, window=7), Case(50, 50, 16, window=1), Case(40, 90, 16, window=40),
    Case(30, 70, 16, causal=False), Case(70, 30, 16, causal=False, window=9),
    Case(90, 90, 16, documents=5), Case(60, 130, 16, B=2, documents=3, window=20),
    Case(70, 70, 16, documents=3, shuffled=True, causal=False),
    Case(40, 40, 20, layout="columns"), Case(40, 40, 24, layout="sparse"),
]


@st.composite
def any_case(draw, longest: int, dtypes: tuple[str, ...] = ("bf16", "fp16", "fp32")) -> Case:
    """Whatever the operators allow, up to `longest` positions."""
    causal, documents = draw(st.booleans()), draw(st.integers(0, 4))
    S = draw(st.integers(1, longest))
    T = draw(st.integers(1, S if causal or documents else longest))
    return Case(T, S, D=draw(st.integers(1, 40)), B=draw(st.integers(1, 2)),
                K=draw(st.integers(1, 2)), groups=draw(st.integers(1, 3)), causal=causal,
                window=draw(st.none() | st.integers(1, S + 3)), documents=documents,
                shuffled=draw(st.booleans()), dtype=draw(st.sampled_from(dtypes)),
                layout=draw(st.sampled_from(LAYOUTS)),
                scale=draw(st.none() | st.floats(0.01, 2)), seed=draw(st.integers(0, 99)))


def placed(x: Tensor, layout: str) -> Tensor:
    """The numbers of x (B, heads, T, D) on the device in a memory layout, NaN around each head.

    projection   (B, T, heads, D) memory, as a matrix product writes it
    heads        (B, heads, T, D) memory
    columns      (B, heads, D, T) memory
    sparse       every second number of a larger tensor
    """
    B, heads, T, D = x.shape
    step = 2 if layout == "sparse" else 1
    order = {"projection": (0, 2, 1, 3), "heads": (0, 1, 2, 3), "columns": (0, 1, 3, 2),
             "sparse": (0, 1, 2, 3)}[layout]
    padded = (B, heads, T + 16, D * step + 16)
    memory = torch.full([padded[i] for i in order], torch.nan, dtype=x.dtype, device=DEVICE)
    view = memory.permute(*[order.index(i) for i in range(4)])          # (B, heads, T, D) again
    return view[:, :, 8:8 + T, 8:8 + D * step:step].copy_(x)


def exact_and_plain(case: Case, q, k, v, grad) -> tuple[list[Tensor], list[Tensor]]:
    """out, lse, dq, dk, dv by the definition: in float64, and in the case's own dtype."""
    results = []
    for dtype in (torch.float64, q.dtype):
        inputs = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
        out, lse = reference_attention(*inputs, scale=case.scale, **case.masks())
        grads = torch.autograd.grad(out, inputs, grad.to(dtype))
        results.append([out.detach(), lse.detach(), *grads])
    return tuple(results)


def assert_as_good(got: Tensor, exact: Tensor, plain: Tensor, label: str = "") -> None:
    """`got` may be twice as far from the exact result as the plain computation in its dtype.

    A rounding step or so is allowed in addition.
    """
    finite = exact.isfinite()
    assert torch.equal(got[~finite].double(), exact[~finite]), f"{label}: infinite elsewhere"
    got, exact, plain = got[finite], exact[finite], plain[finite]
    assert got.isfinite().all(), f"{label}: not finite"
    if exact.numel():
        # 64 steps of float32 and not one: in dA − δ two numbers cancel that are √D times larger
        # than their difference.
        steps = 64 if got.dtype == torch.float32 else 0.5
        step = max(1.0, exact.abs().max().item()) * torch.finfo(got.dtype).eps * steps
        error = (got.double() - exact).abs().max().item()
        plain_error = (plain.double() - exact).abs().max().item()
        assert error <= 2 * plain_error + step, (
            f"{label}: off by {error:.2e}, the plain computation by {plain_error:.2e}")
