"""Attention as one function of tensors: training, prefill, chunked prefill and decoding are the same call."""

import os
import sys
from importlib.util import find_spec
from math import inf
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from kernels.reference import reference_attention, visible

BACKENDS = ("auto", "reference", "sdpa", "triton")
PRECISIONS = ("tf32x3", "ieee")
HAS_TRITON = find_spec("triton") is not None                        # there is none for macOS and Windows
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"             # triton's kernels run on the CPU, for tests
HAS_FLEX = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") and sys.platform != "darwin"     # compiled, on a CPU
FEW_QUERIES = 32                # up to so many queries a key head, the keys are split over programs: kernels/decode.py


@overload
def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, window: int | None = None, segments: Tensor | None = None,
              scale: float | None = None, backend: str = "auto", return_lse: Literal[False] = False,
              precision: str = "tf32x3") -> Tensor: ...
@overload
def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, window: int | None = None, segments: Tensor | None = None,
              scale: float | None = None, backend: str = "auto", return_lse: Literal[True],
              precision: str = "tf32x3") -> tuple[Tensor, Tensor]: ...
def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, window: int | None = None,
              segments: Tensor | None = None, scale: float | None = None, backend: str = "auto",
              return_lse: bool = False, precision: str = "tf32x3") -> Tensor | tuple[Tensor, Tensor]:
    """Causal, grouped-query, windowed, document-masked attention.

    q (B, H, T, D); k, v (B, K, S, D) where K divides H, any strides → (B, H, T, D) in q's dtype, and with
    `return_lse` also (B, H, T) float32, the natural log of each row's softmax denominator (which has no gradient, but under
    `reference`).

    causal     query i sees keys j ≤ i + S − T: the queries are the last T of the S positions
    window     query i sees only the last `window` keys up to its own, itself included (and all later ones unless causal)
    segments   (B, S) integers of 32 bits: a query sees only keys of its own segment (packed documents)
    scale      what scores are multiplied by; 1/√D unless given
    backend    reference (the definition, holds T × S) · sdpa (PyTorch's fused kernels) · triton (ours: on a GPU, D ≤ 256,
               bf16, fp16 or fp32) · auto (triton where a GPU can run it, else sdpa)
    precision  of float32 products under triton: tf32x3 (three on the matrix units, near float32's error) or ieee (true
               float32, several times slower)

    Raises ValueError for shapes or arguments that cannot be served; no backend falls back on another in silence.
    """
    _check(q, k, v, causal, window, segments, backend, precision)
    if backend == "reference":
        out, lse = reference_attention(q, k, v, causal=causal, window=window, segments=segments, scale=scale)
        return (out, lse.float()) if return_lse else out
    if use_triton("attention", backend, q, k, v, segments):
        out, lse = _triton(q, k, v, causal, window, segments, scale, precision)
        return (out, lse) if return_lse else out
    return _sdpa(q, k, v, causal, window, segments, scale, return_lse)


def decode(q: Tensor, k: Tensor, v: Tensor, query_positions: Tensor, key_positions: Tensor | None = None, *,
           window: int | None = None, scale: float | None = None, backend: str = "auto", precision: str = "tf32x3") -> Tensor:
    """Attention against a cache whose slots are in any order: rows of different lengths, wrapped ring buffers.

    q (B, H, T, D); k, v (B, K, S, D); query_positions (B, T); key_positions (B, S), negative where a slot is empty, j for slot j
    unless given → (B, H, T, D). A query sees the keys at positions up to its own, at most `window` of them. No gradients: for generation.
    backend sdpa, triton or auto, and precision: as in `attention`, and it raises likewise. Under sdpa empty slots must hold
    finite numbers, and a query that sees nothing is undefined; under triton they may hold anything, and it is 0.
    """
    if backend not in BACKENDS or backend == "reference":
        raise ValueError(f"decode: backend={backend!r} is not one of auto, sdpa, triton")
    check_shapes("decode", q, k, v, window, precision)
    B, T, S = q.shape[0], q.shape[2], k.shape[2]
    if query_positions.shape != (B, T) or (key_positions is not None and key_positions.shape != (B, S)):
        raise ValueError(f"decode: query_positions must be {(B, T)} and key_positions {(B, S)}, got {tuple(query_positions.shape)} and "
                         f"{None if key_positions is None else tuple(key_positions.shape)}")
    if use_triton("decode", backend, q, k, v, query_positions, key_positions):
        from kernels import decode as ours
        q, scale = positive_scale(q, scale)
        return ours.decode(q, k, v, query_positions, key_positions, window, scale, precision)[0]
    if key_positions is None:                       # not by flex_attention: PyTorch 2.13 writes C++ for such masks that may not compile
        key_positions = torch.arange(S, device=q.device).expand(B, S)
    query, key = query_positions[:, None, :, None], key_positions[:, None, None, :]     # → (B, 1, T, S)
    sees = (key >= 0) & (key <= query)
    if window is not None:
        sees = sees & (key > query - window)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=sees, scale=scale, enable_gqa=True)


def one_compiled_query(q: Tensor, k: Tensor) -> bool:
    """Whether the compiler's own attention serves: for one query it reads a CPU's cache up to twice as fast, but has no gradient."""
    return torch.compiler.is_compiling() and HAS_FLEX and q.is_cpu and q.shape[2] == 1 < k.shape[2] and not torch.is_grad_enabled()


def use_triton(caller: str, backend: str, q: Tensor, *others: Tensor | None) -> bool:
    """Whether a call with this backend runs our kernels; ValueError where it asks for them and they cannot serve it."""
    tensors, reason = [q, *(t for t in others if t is not None)], ""
    dtypes = [t.dtype for t in tensors if t.dim() == 4]                 # of q, k and v
    if not HAS_TRITON:
        reason = "anything here: triton is not installed"
    elif not (q.is_cuda or INTERPRETED):
        reason = f"tensors on {q.device}: it needs a GPU"
    elif q.is_cuda and not torch.version.hip and torch.cuda.get_device_properties(q.device).major < 8:
        reason = f"tensors on {q.device}: it needs compute capability 8.0 (Ampere) or newer"
    elif q.shape[-1] > 256:
        reason = f"D={q.shape[-1]}: at most 256"
    elif q.dtype not in (torch.bfloat16, torch.float16, torch.float32) or any(dtype != q.dtype for dtype in dtypes):
        reason = f"{', '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)}: all bf16, all fp16 or all fp32"
    elif any(t.device != q.device for t in tensors):
        reason = f"tensors on {', '.join(str(t.device) for t in tensors)}: one device"
    if backend == "triton" and reason:
        raise ValueError(f"{caller}: triton cannot serve {reason} (auto finds a backend that can)")
    return not reason and (backend == "triton" or (backend == "auto" and q.is_cuda))


def positive_scale(q: Tensor, scale: float | None) -> tuple[Tensor, float]:
    """1/√D unless given; and a positive one, since our kernels take maxima before they scale."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if scale > 0:
        return q, scale
    return (-q, -scale) if scale < 0 else (q * 0, 1.0)


def _triton(q, k, v, causal, window, segments, scale, precision) -> tuple[Tensor, Tensor]:
    from kernels import decode as decoding
    from kernels import flash
    q, scale = positive_scale(q, scale)
    training = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if not training and causal and segments is None and q.shape[2] * (q.shape[1] // k.shape[1]) <= FEW_QUERIES:
        return decoding.decode(q, k, v, None, None, window, scale, precision)
    return flash.flash_attention(q, k, v, causal, window, segments, scale, precision)


def _sdpa(q, k, v, causal, window, segments, scale, return_lse):
    T, S = q.shape[2], k.shape[2]
    # Without a mask PyTorch takes its flash kernels. A lone last query sees every key, so causality is free.
    masked = segments is not None or (window is not None and window < S) or (causal and 1 < T < S)
    mask = visible(T, S, causal=causal, window=window, segments=segments, device=q.device) if masked else None
    is_causal = causal and T > 1 and T == S and mask is None
    gqa = q.shape[1] != k.shape[1]
    if not return_lse:
        if mask is None and one_compiled_query(q, k):
            return flex_attention(q, k, v, scale=scale, enable_gqa=gqa)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=gqa)
    if q.device.type == "cpu":                      # the same kernel, called where it also returns its lse
        bias = None if mask is None else torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, -inf)
        bias = bias if bias is None or bias.dim() == 4 else bias[None, None]
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, is_causal, attn_mask=bias, scale=scale)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=gqa)
    return out, _chunked_lse(q, k, causal, window, segments, scale)


@torch.no_grad()
def _chunked_lse(q, k, causal, window, segments, scale, chunk: int = 128) -> Tensor:
    """lse (B, H, T) float32 from `chunk` rows of scores at a time, so that memory grows with S and not with T × S."""
    (_, H, T, D), (_, K, S, _) = q.shape, k.shape
    grouped = q.unflatten(1, (K, H // K)).float()                                       # (B, K, H/K, T, D)
    keys = k[:, :, None].float().mT * (D ** -0.5 if scale is None else scale)           # (B, K, 1, D, S)
    lse = []
    for t in range(0, T, chunk):
        rows = slice(t, t + chunk)
        sees = visible(T, S, causal=causal, window=window, segments=segments, rows=rows, device=q.device)
        sees = sees if sees.dim() == 2 else sees[:, :, None]                            # (T, S) or (B, 1, 1, T, S)
        lse.append((grouped[..., rows, :] @ keys).masked_fill(~sees, -inf).logsumexp(-1))
    return torch.cat(lse, dim=-1).flatten(1, 2)


def _check(q, k, v, causal, window, segments, backend, precision) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"attention: backend={backend!r} is not one of {', '.join(BACKENDS)}")
    check_shapes("attention", q, k, v, window, precision)
    B, T, S = q.shape[0], q.shape[2], k.shape[2]
    if T > S and (causal or segments is not None):
        raise ValueError(f"attention: {T} queries cannot be the last of {S} keys; causal and segments need T ≤ S")
    if segments is not None and segments.shape != (B, S):
        raise ValueError(f"attention: segments {tuple(segments.shape)} must be (B, S) = ({B}, {S})")


def check_shapes(caller: str, q, k, v, window, precision) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"{caller}: precision={precision!r} is not one of {', '.join(PRECISIONS)}")
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        raise ValueError(f"{caller}: q (B, H, T, D), k and v (B, K, S, D) expected, got q {tuple(q.shape)}, "
                         f"k {tuple(k.shape)}, v {tuple(v.shape)}")
    B, H, _, D = q.shape
    if k.shape[0] != B or k.shape[3] != D or H % k.shape[1]:
        raise ValueError(f"{caller}: q {tuple(q.shape)} and k {tuple(k.shape)} must agree in B and D, and K must divide H")
    if window is not None and window < 1:
        raise ValueError(f"{caller}: window={window} must be at least 1 (a query sees itself)")
