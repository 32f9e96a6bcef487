"""Flash attention in Triton, forward and backward: exact, and it never holds the T × S pattern.

Dao et al. 2022, "FlashAttention" (algorithm 1, and section 3.1 for the backward pass), with the
loop order of Dao 2023, "FlashAttention-2" (section 3.2). docs/kernels.md derives it.

Each program owns a tile of queries (forward, backward_q) or of keys (backward_kv) and walks over
the tiles of the other side that it may see. No two programs write the same number, so there are no
atomics and the same inputs give the same bits.
"""

import os
from collections.abc import Callable
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.arguments import kernel_arguments
from kernels.launch import VARYING, cdiv, has_tiles, heads_together, launch, query_grid, readable
from kernels.problem import Problem
from kernels.tiles import (
    DIAGONAL,
    FLOOR,
    LOG2_E,
    UNSEEN,
    WHOLE_TILES,
    WINDOW_EDGE,
    Masks,
    finish,
    fold,
    hide_unseen,
    load_tile,
    narrow,
    part_of,
    program_place,
    query_tile,
    sees,
    store_tile,
)


@triton.jit(do_not_specialize=VARYING)
def forward(q, q_strides, k, k_strides, v, v_strides, out, out_strides, lse, segments, least, most,
            H, K, T, S, blocks, window, together, scale,
            D: tl.constexpr, DIMS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
            CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SEGMENTS: tl.constexpr, TMA: tl.constexpr,
            PRECISION: tl.constexpr):
    """One tile of ROWS queries of one head against all keys they see.

    → out (B, H, T, D) and lse (B, H, T)
    """
    masks = Masks(S, window, segments, least, most, blocks)
    tile = query_tile(H, T, masks, together, ROWS, COLUMNS, CAUSAL, WINDOW, SEGMENTS)
    batch, head, start_row = tile.batch, tile.head, tile.start_row
    key_head = head // (H // K)                     # a group of H/K query heads reads one key head
    row = start_row + tl.arange(0, ROWS)

    q_tile = load_tile(q, q_strides, batch, head, start_row, T, D, ROWS, DIMS, TMA)
    acc = tl.zeros([ROWS, DIMS], tl.float32)        # Σ weight · value so far, relative to exp2(top)
    total = tl.zeros([ROWS], tl.float32)            # Σ weight, likewise
    top = tl.full([ROWS], FLOOR, tl.float32)        # the largest score so far, times log2 e
    for part in tl.static_range(DIAGONAL if SEGMENTS else WINDOW_EDGE if WINDOW else WHOLE_TILES,
                                DIAGONAL + 1):
        part_start, part_stop = part_of(part, tile.keys)
        for n in tl.range(part_start, part_stop, COLUMNS):
            k_tile = load_tile(k, k_strides, batch, key_head, n, S, D, COLUMNS, DIMS, TMA,
                               part == WHOLE_TILES)
            scores = tl.dot(q_tile, k_tile.T, input_precision=PRECISION)        # (ROWS, COLUMNS)
            if part != WHOLE_TILES:
                scores = hide_unseen(scores, n, tile, masks, UNSEEN, COLUMNS, CAUSAL, WINDOW,
                                     SEGMENTS)
            weights, top, total, shrink = fold(scores, top, total, scale)
            v_tile = load_tile(v, v_strides, batch, key_head, n, S, D, COLUMNS, DIMS, TMA,
                               part == WHOLE_TILES)
            acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc * shrink[:, None],
                         input_precision=PRECISION)

    total, row_lse = finish(top, total)
    store_tile(out, out_strides, batch, head, start_row, T, acc / total[:, None], D, ROWS, DIMS)
    tl.store(lse + tile.place.to(tl.int64) * T + row, row_lse, mask=row < T)


@triton.jit(do_not_specialize=VARYING)
def backward_q(q, q_strides, k, k_strides, v, v_strides, out, out_strides, grad, grad_strides,
               dq, dq_strides, lse, row_sums, segments, least, most,
               H, K, T, S, padded, blocks, window, together, scale,
               D: tl.constexpr, DIMS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
               CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SEGMENTS: tl.constexpr,
               TMA: tl.constexpr, PRECISION: tl.constexpr):
    """dq of one tile of queries, and what backward_kv needs to know of each query: row_sums.

    With A the pattern: d_scores = A ∘ (grad vᵀ − delta), dq = scale · d_scores k (Dao et al. 2022,
    appendix B.2). row_sums (2, B, H, padded): [0] is lse as a power of two, [1] is
    delta = Σ_d out · grad. Past T, [0] is inf and [1] is finite, so that rows that do not exist
    have weight exp2(−inf) = 0 without a compare for each.
    """
    masks = Masks(S, window, segments, least, most, blocks)
    tile = query_tile(H, T, masks, together, ROWS, COLUMNS, CAUSAL, WINDOW, SEGMENTS)
    batch, head, start_row = tile.batch, tile.head, tile.start_row
    key_head = head // (H // K)
    row = start_row + tl.arange(0, ROWS)

    lse_at = row_sums + tile.place.to(tl.int64) * padded + tl.arange(0, ROWS)
    delta_at = lse_at + (tl.num_programs(0) // tl.cdiv(T, ROWS)).to(tl.int64) * padded
    if start_row + ROWS >= T:                       # the last tile also writes the padding
        for past in tl.range(start_row + ROWS, padded, ROWS):
            tl.store(lse_at + past, tl.full([ROWS], float("inf"), tl.float32))
            tl.store(delta_at + past, tl.zeros([ROWS], tl.float32))
    row_lse = tl.load(lse + tile.place.to(tl.int64) * T + row, mask=row < T,
                      other=float("inf")) * LOG2_E
    tl.store(lse_at + start_row, row_lse)
    grad_tile = load_tile(grad, grad_strides, batch, head, start_row, T, D, ROWS, DIMS, TMA)
    out_tile = load_tile(out, out_strides, batch, head, start_row, T, D, ROWS, DIMS, TMA)
    row_delta = tl.sum(out_tile.to(tl.float32) * grad_tile.to(tl.float32), 1)
    tl.store(delta_at + start_row, row_delta)
    q_tile = load_tile(q, q_strides, batch, head, start_row, T, D, ROWS, DIMS, TMA)
    acc = tl.zeros([ROWS, DIMS], tl.float32)
    for part in tl.static_range(DIAGONAL if SEGMENTS else WINDOW_EDGE if WINDOW else WHOLE_TILES,
                                DIAGONAL + 1):
        part_start, part_stop = part_of(part, tile.keys)
        for n in tl.range(part_start, part_stop, COLUMNS):
            k_tile = load_tile(k, k_strides, batch, key_head, n, S, D, COLUMNS, DIMS, TMA,
                               part == WHOLE_TILES)
            v_tile = load_tile(v, v_strides, batch, key_head, n, S, D, COLUMNS, DIMS, TMA,
                               part == WHOLE_TILES)
            scores = tl.dot(q_tile, k_tile.T, input_precision=PRECISION)        # (ROWS, COLUMNS)
            if part != WHOLE_TILES:
                scores = hide_unseen(scores, n, tile, masks, UNSEEN, COLUMNS, CAUSAL, WINDOW,
                                     SEGMENTS)
            weights = tl.exp2(scores * (scale * LOG2_E) - row_lse[:, None])
            d_weights = tl.dot(grad_tile, v_tile.T, input_precision=PRECISION)
            d_scores = weights * (d_weights - row_delta[:, None])
            acc = tl.dot(d_scores.to(k_tile.dtype), k_tile, acc, input_precision=PRECISION)
    store_tile(dq, dq_strides, batch, head, start_row, T, acc * scale, D, ROWS, DIMS)


@triton.jit(do_not_specialize=VARYING)
def backward_kv(q, q_strides, k, k_strides, v, v_strides, grad, grad_strides,
                dk, dk_strides, dv, dv_strides, row_sums, segments, least, most,
                H, K, T, S, padded, blocks, window, together, scale,
                D: tl.constexpr, DIMS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SEGMENTS: tl.constexpr,
                TMA: tl.constexpr, PRECISION: tl.constexpr):
    """dk and dv of one tile of COLUMNS keys of one key head, over the queries of all its heads.

    dv = Aᵀ grad, dk = scale · (d_scores)ᵀ q, each written once. Everything is held transposed, keys
    by queries. One flat loop over heads and query tiles, masked in every tile if there is a mask:
    two loops, or nested loops, make the compiler serialise wgmma or spill.
    """
    masks = Masks(S, window, segments, least, most, blocks)
    place, tile = program_place(tl.cdiv(S, COLUMNS), together)
    batch, key_head = place // K, place % K
    n = tile * COLUMNS                              # most queries see the first keys: longest first
    key = n + tl.arange(0, COLUMNS)
    heads = tl.num_programs(0) // tl.cdiv(S, COLUMNS) // K * H
    lse, delta = row_sums, row_sums + heads.to(tl.int64) * padded
    start, stop = S - T, S                          # positions of queries that see some of the keys
    if CAUSAL:
        start = tl.maximum(n, S - T)
    if WINDOW:
        stop = tl.minimum(S, n + COLUMNS + window - 1)
    key_segment = key
    if SEGMENTS:
        segments += batch.to(tl.int64) * S
        key_segment = tl.load(segments + tl.minimum(key, S - 1))
        start, stop = narrow(start, stop, batch, masks, key_segment)
    start_row = start - (S - T)
    tiles = tl.cdiv(tl.maximum(0, stop - start), ROWS)

    k_tile = load_tile(k, k_strides, batch, key_head, n, S, D, COLUMNS, DIMS, TMA)
    v_tile = load_tile(v, v_strides, batch, key_head, n, S, D, COLUMNS, DIMS, TMA)
    dk_acc = tl.zeros([COLUMNS, DIMS], tl.float32)
    dv_acc = tl.zeros([COLUMNS, DIMS], tl.float32)
    for visit in tl.range(0, tiles * (H // K)):
        # At least 1: even with no tiles the first may be read ahead.
        head = key_head * (H // K) + visit // tl.maximum(tiles, 1)
        m = start_row + visit % tl.maximum(tiles, 1) * ROWS
        row = m + tl.arange(0, ROWS)
        at = (batch * H + head).to(tl.int64) * padded + row
        q_tile = load_tile(q, q_strides, batch, head, m, T, D, ROWS, DIMS, TMA)
        scores = tl.dot(k_tile, q_tile.T, input_precision=PRECISION)            # (COLUMNS, ROWS)
        if CAUSAL or WINDOW or SEGMENTS:
            segment = tl.load(segments + tl.minimum(row + S - T, S - 1)) if SEGMENTS else row
            # Positions of both sides are counted from the first query: S − T less, T at the end.
            seen = sees(row[None, :], (key - (S - T))[:, None], T, window, segment[None, :],
                        key_segment[:, None], CAUSAL, WINDOW, SEGMENTS)
            scores = tl.where(seen, scores, UNSEEN)
        weights = tl.exp2(scores * (scale * LOG2_E) - tl.load(lse + at)[None, :])
        grad_tile = load_tile(grad, grad_strides, batch, head, m, T, D, ROWS, DIMS, TMA)
        dv_acc = tl.dot(weights.to(grad_tile.dtype), grad_tile, dv_acc, input_precision=PRECISION)
        d_weights = tl.dot(v_tile, grad_tile.T, input_precision=PRECISION)
        d_scores = weights * (d_weights - tl.load(delta + at)[None, :])
        dk_acc = tl.dot(d_scores.to(q_tile.dtype), q_tile, dk_acc, input_precision=PRECISION)
    store_tile(dk, dk_strides, batch, key_head, n, S, dk_acc * scale, D, COLUMNS, DIMS)
    store_tile(dv, dv_strides, batch, key_head, n, S, dv_acc, D, COLUMNS, DIMS)


# --- the operators that PyTorch sees ---

@torch.library.custom_op("kernels::flash_attention", mutates_args=())
def flash_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None,
                    segments: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """(out, lse) of `kernels.attention.attention`, which checks the arguments.

    scale > 0. lse has no gradient.
    """
    q, k, v = readable(q, k, v)
    (B, H, T, _), S = q.shape, k.shape[2]
    out, lse = _empty_like(q), q.new_empty((B, H, T), dtype=torch.float32)
    if 0 in (*out.shape, S):
        return out.zero_(), lse.fill_(float("-inf"))
    problem = Problem(q, k, causal, window, segments, scale)
    launch_gluon = gluon_launcher() if has_tiles("forward_gluon", q) else None
    (launch_gluon or launch_forward)(problem, v, out, lse)
    return out, lse


@cache
def gluon_launcher() -> Callable[[Problem, Tensor, Tensor, Tensor], None] | None:
    """`launch_gluon` of kernels/flash_gluon.py; None with KERNELS_GLUON=0.

    On Hopper it takes the place of `launch_forward`, and the forward pass is 2% to 12% faster
    (docs/kernels.md). It is imported at its first use: Gluon is an experimental part of triton,
    which may change, and its import takes 40 ms.
    """
    if os.environ.get("KERNELS_GLUON") == "0":
        return None
    from kernels.flash_gluon import launch_gluon  # noqa: PLC0415
    return launch_gluon


def launch_forward(problem: Problem, v: Tensor, out: Tensor, lse: Tensor) -> None:
    """Start `forward`, which writes out (B, H, T, D) and lse (B, H, T).

    q, k and v are `readable`, scale > 0, and lse is contiguous.
    """
    q, k = problem.q, problem.k
    (B, H, _, _), (_, K, S, _) = q.shape, k.shape
    launch(forward, query_grid(q), q, rows={"q": q}, columns={"k": k, "v": v}, out=out,
           out_strides=out.stride(), lse=lse, together=heads_together(k, S, B * H, H // K),
           **kernel_arguments(problem))


@torch.library.custom_op("kernels::flash_attention_backward", mutates_args=())
def flash_attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor,
                             lse: Tensor, causal: bool, window: int | None,
                             segments: Tensor | None,
                             scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) from the gradient of out.

    In fp16 a gradient past 65504 is inf, as in any fp16 backward pass: scale the loss.
    """
    grad, q, k, v, out = readable(grad, q, k, v, out)
    dq, dk, dv = _empty_like(q), _empty_like(k), _empty_like(v)
    (B, H, T, _), (_, K, S, _) = q.shape, k.shape
    if 0 in (*q.shape, S):
        return dq.zero_(), dk.zero_(), dv.zero_()
    padded = cdiv(T + 128, 128) * 128       # no tile of rows that begins before T ends after it
    arguments = kernel_arguments(Problem(q, k, causal, window, segments, scale))
    arguments["padded"] = padded
    arguments["row_sums"] = q.new_empty((2, B, H, padded), dtype=torch.float32)
    launch(backward_q, query_grid(q), q, rows={"q": q, "out": out, "grad": grad},
           columns={"k": k, "v": v}, dq=dq, dq_strides=dq.stride(), lse=lse.contiguous(),
           together=heads_together(k, S, B * H, H // K), **arguments)
    launch(backward_kv, lambda tile: (B * K * cdiv(S, tile.columns), 1, 1), q,
           rows={"q": q, "grad": grad}, columns={"k": k, "v": v}, dk=dk, dk_strides=dk.stride(),
           dv=dv, dv_strides=dv.stride(), together=heads_together(q, T * (H // K), B * K),
           **arguments)
    return dq, dk, dv


def _empty_like(x: Tensor) -> Tensor:
    """(B, heads, T, D) over (B, T, heads, D) memory, as the layers around attention use it."""
    _, heads, T, D = x.shape
    return x.new_empty_strided(x.shape, (heads * T * D, D, heads * D, 1))


@flash_attention.register_fake
def _(q, k, v, causal, window, segments, scale):
    return _empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@flash_attention_backward.register_fake
def _(grad, q, k, v, out, lse, causal, window, segments, scale):
    return _empty_like(q), _empty_like(k), _empty_like(v)


def _save(ctx, inputs, output):
    q, k, v, ctx.causal, ctx.window, segments, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, segments, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad, _):
    q, k, v, segments, out, lse = ctx.saved_tensors
    grads = flash_attention_backward(grad, q, k, v, out, lse, ctx.causal, ctx.window, segments,
                                     ctx.scale)
    return *grads, None, None, None, None


flash_attention.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.kernels.flash_attention)
def _flops(q_shape, k_shape, *args, out_shape=None, **kwargs) -> int:
    """Two products of T × S × D per head, masked or not, as PyTorch counts its own attention."""
    B, H, T, D = q_shape
    return 4 * B * H * T * k_shape[2] * D


@register_flop_formula(torch.ops.kernels.flash_attention_backward)
def _backward_flops(grad_shape, q_shape, k_shape, *args, out_shape=None, **kwargs) -> int:
    """Five products, likewise."""
    return _flops(q_shape, k_shape) * 5 // 2
