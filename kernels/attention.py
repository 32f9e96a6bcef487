"""Attention as one function of tensors: training, prefill and decoding are the same call."""

import os
import sys
from importlib.util import find_spec
from math import inf
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from kernels.problem import Problem
from kernels.reference import reference_attention, visible

HAS_TRITON = find_spec("triton") is not None            # not on macOS and Windows
if HAS_TRITON:
    from kernels import decode as decode_kernels
    from kernels import flash as flash_kernels

BACKENDS = ("auto", "reference", "sdpa", "triton")
# Triton's interpreter runs the kernels on the CPU, for tests.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Whether the compiler's own attention runs on this CPU.
HAS_FLEX = (torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
            and sys.platform != "darwin")
# With at most this many queries per key head, kernels/decode.py splits the keys over programs.
FEW_QUERIES = 32


@overload
def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, window: int | None = None,
              segments: Tensor | None = None, scale: float | None = None, backend: str = "auto",
              return_lse: Literal[False] = False) -> Tensor: ...
@overload
def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, window: int | None = None,
              segments: Tensor | None = None, scale: float | None = None, backend: str = "auto",
              return_lse: Literal[True]) -> tuple[Tensor, Tensor]: ...
def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, window: int | None = None,
              segments: Tensor | None = None, scale: float | None = None, backend: str = "auto",
              return_lse: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """Causal, grouped-query, windowed, document-masked attention.

    q (B, H, T, D); k, v (B, K, S, D), K divides H, any strides → (B, H, T, D) in q's dtype. With
    `return_lse` also lse (B, H, T) float32, the natural log of each row's softmax denominator. lse
    has a gradient only under `reference`.

    causal     query i sees keys j ≤ i + S − T: the queries are the last T of the S positions
    window     query i sees only the last `window` keys up to its own, itself included (and all
               later ones unless causal)
    segments   (B, S) integers of 32 bits: a query sees only keys of its own segment (a document)
    scale      what scores are multiplied by; 1/√D unless given
    backend    reference: the definition, holds T × S
               sdpa: PyTorch's fused kernels
               triton: ours, on a GPU, D ≤ 256, bf16, fp16 or fp32 (on NVIDIA each fp32 product is
               three tf32 products, with an error near float32's)
               auto: triton if a GPU can run it, else sdpa

    Raises ValueError for shapes or arguments that the backend cannot serve. No backend falls back
    on another silently.
    """
    problem = Problem(q, k, causal, window, segments, scale)
    _check(problem, v, backend)
    if backend == "reference":
        out, lse = reference_attention(q, k, v, causal=causal, window=window, segments=segments,
                                       scale=scale)
        return (out, lse.float()) if return_lse else out
    if use_triton("attention", backend, q, k, v, segments):
        out, lse = _triton(problem, v)
        return (out, lse) if return_lse else out
    return _sdpa(problem, v, return_lse)


def decode(q: Tensor, k: Tensor, v: Tensor, query_positions: Tensor,
           key_positions: Tensor | None = None, *, window: int | None = None,
           scale: float | None = None, backend: str = "auto") -> Tensor:
    """Attention to a cache whose slots are in any order: rows of different lengths, ring buffers.

    q (B, H, T, D); k, v (B, K, S, D); query_positions (B, T); key_positions (B, S), negative for an
    empty slot, by default j for slot j → (B, H, T, D). A query sees the keys at positions up to its
    own, at most `window` of them. No gradients: it is for generation.

    backend (sdpa, triton or auto) and errors are as in `attention`. Under sdpa empty slots must
    hold finite numbers, and the result for a query that sees nothing is undefined; under triton
    slots may hold anything, and that result is 0.
    """
    if backend not in BACKENDS or backend == "reference":
        raise ValueError(f"decode: backend={backend!r} is not one of auto, sdpa, triton")
    check_shapes("decode", q, k, v, window)
    B, T, S = q.shape[0], q.shape[2], k.shape[2]
    if query_positions.shape != (B, T) or (
            key_positions is not None and key_positions.shape != (B, S)):
        keys_shape = None if key_positions is None else tuple(key_positions.shape)
        raise ValueError(f"decode: query_positions must be {(B, T)} and key_positions {(B, S)}, "
                         f"got {tuple(query_positions.shape)} and {keys_shape}")
    if use_triton("decode", backend, q, k, v, query_positions, key_positions):
        q, scale = positive_scale(q, scale)
        return decode_kernels.decode(q, k, v, query_positions, key_positions, window, scale)[0]
    # Not flex_attention: for such masks PyTorch 2.13 writes C++ that may not compile.
    if key_positions is None:
        key_positions = torch.arange(S, device=q.device).expand(B, S)
    query, key = query_positions[:, None, :, None], key_positions[:, None, None, :]
    sees = (key >= 0) & (key <= query)                                          # (B, 1, T, S)
    if window is not None:
        sees = sees & (key > query - window)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=sees, scale=scale, enable_gqa=True)


# --- which backend ---

def use_triton(caller: str, backend: str, q: Tensor, *others: Tensor | None) -> bool:
    """Whether a call with this backend runs our kernels.

    Raises ValueError if backend is "triton" and our kernels cannot serve the call.
    """
    tensors = [q, *(t for t in others if t is not None)]
    dtypes = [t.dtype for t in tensors if t.dim() == 4]                 # of q, k and v
    reason = ""
    if not HAS_TRITON:
        reason = "anything here: triton is not installed"
    elif not (q.is_cuda or INTERPRETED):
        reason = f"tensors on {q.device}: it needs a GPU"
    elif (q.is_cuda and not torch.version.hip
          and torch.cuda.get_device_properties(q.device).major < 8):
        reason = f"tensors on {q.device}: it needs compute capability 8.0 (Ampere) or newer"
    elif q.shape[-1] > 256:
        reason = f"D={q.shape[-1]}: at most 256"
    elif (q.dtype not in (torch.bfloat16, torch.float16, torch.float32)
          or any(dtype != q.dtype for dtype in dtypes)):
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        reason = f"{names}: all bf16, all fp16 or all fp32"
    elif any(t.device != q.device for t in tensors):
        reason = f"tensors on {', '.join(str(t.device) for t in tensors)}: one device"
    if backend == "triton" and reason:
        raise ValueError(f"{caller}: triton cannot serve {reason} (auto finds a backend that can)")
    return not reason and (backend == "triton" or (backend == "auto" and q.is_cuda))


def one_compiled_query(q: Tensor, k: Tensor) -> bool:
    """Whether the compiler's own attention serves a call.

    For one query it reads a CPU's cache up to twice as fast, but it has no gradient.
    """
    return (torch.compiler.is_compiling() and HAS_FLEX and q.is_cpu
            and q.shape[2] == 1 < k.shape[2] and not torch.is_grad_enabled())


# --- the backends ---

def positive_scale(q: Tensor, scale: float | None) -> tuple[Tensor, float]:
    """q and a scale above 0 (1/√D unless given): our kernels take maxima before they scale."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if scale > 0:
        return q, scale
    return (-q, -scale) if scale < 0 else (q * 0, 1.0)


def _triton(problem: Problem, v: Tensor) -> tuple[Tensor, Tensor]:
    q, k, causal, window, segments, scale = problem
    q, scale = positive_scale(q, scale)
    training = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    queries_per_key_head = q.shape[2] * (q.shape[1] // k.shape[1])
    if not training and causal and segments is None and queries_per_key_head <= FEW_QUERIES:
        return decode_kernels.decode(q, k, v, None, None, window, scale)
    return flash_kernels.flash_attention(q, k, v, causal, window, segments, scale)


def _sdpa(problem: Problem, v: Tensor, return_lse: bool) -> Tensor | tuple[Tensor, Tensor]:
    q, k, causal, window, segments, scale = problem
    T, S = q.shape[2], k.shape[2]
    # Without a mask PyTorch uses its flash kernels. A single last query sees every key: no mask.
    masked = (segments is not None or (window is not None and window < S)
              or (causal and 1 < T < S))
    mask = None
    if masked:
        mask = visible(T, S, causal=causal, window=window, segments=segments, device=q.device)
    is_causal = causal and T > 1 and T == S and mask is None
    gqa = q.shape[1] != k.shape[1]
    if not return_lse:
        if mask is None and one_compiled_query(q, k):
            return flex_attention(q, k, v, scale=scale, enable_gqa=gqa)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal,
                                              scale=scale, enable_gqa=gqa)
    if q.device.type == "cpu":              # the same kernel, called so that it also returns lse
        bias = None
        if mask is not None:
            bias = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, -inf)
            bias = bias if bias.dim() == 4 else bias[None, None]
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, is_causal, attn_mask=bias, scale=scale)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale,
                                         enable_gqa=gqa)
    return out, _chunked_lse(problem)


@torch.no_grad()
def _chunked_lse(problem: Problem, chunk: int = 128) -> Tensor:
    """lse (B, H, T) float32, from `chunk` rows of scores at a time: memory grows with S."""
    q, k, causal, window, segments, scale = problem
    (_, H, T, D), (_, K, S, _) = q.shape, k.shape
    grouped = q.unflatten(1, (K, H // K)).float()                           # (B, K, H/K, T, D)
    keys = k[:, :, None].float().mT * (D ** -0.5 if scale is None else scale)   # (B, K, 1, D, S)
    lse = []
    for t in range(0, T, chunk):
        rows = slice(t, t + chunk)
        sees = visible(T, S, causal=causal, window=window, segments=segments, rows=rows,
                       device=q.device)
        sees = sees if sees.dim() == 2 else sees[:, :, None]        # (T, S) or (B, 1, 1, T, S)
        lse.append((grouped[..., rows, :] @ keys).masked_fill(~sees, -inf).logsumexp(-1))
    return torch.cat(lse, dim=-1).flatten(1, 2)


# --- what is refused ---

def _check(problem: Problem, v: Tensor, backend: str) -> None:
    q, k, causal, window, segments, _ = problem
    if backend not in BACKENDS:
        raise ValueError(f"attention: backend={backend!r} is not one of {', '.join(BACKENDS)}")
    check_shapes("attention", q, k, v, window)
    B, T, S = q.shape[0], q.shape[2], k.shape[2]
    if T > S and (causal or segments is not None):
        raise ValueError(f"attention: {T} queries cannot be the last of {S} keys; "
                         "causal and segments need T ≤ S")
    if segments is not None and segments.shape != (B, S):
        raise ValueError(f"attention: segments {tuple(segments.shape)} must be "
                         f"(B, S) = ({B}, {S})")


def check_shapes(caller: str, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> None:
    """Raise ValueError if q, k and v do not agree or the window is empty."""
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        raise ValueError(f"{caller}: q (B, H, T, D), k and v (B, K, S, D) expected, got "
                         f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}")
    B, H, _, D = q.shape
    if k.shape[0] != B or k.shape[3] != D or H % k.shape[1]:
        raise ValueError(f"{caller}: q {tuple(q.shape)} and k {tuple(k.shape)} must agree in "
                         "B and D, and K must divide H")
    if window is not None and window < 1:
        raise ValueError(f"{caller}: window={window} must be at least 1 (a query sees itself)")
