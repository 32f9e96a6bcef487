"""Flash attention in Triton, forward and backward: exact attention without ever holding the T × S pattern.

Dao et al. 2022, "FlashAttention" (algorithm 1, and section 3.1 for the backward pass), with the loop order of Dao 2023,
"FlashAttention-2" (section 3.2). docs/kernels.md derives it.

Each program owns a tile of queries (forward, backward_q) or of keys (backward_kv) and walks over the tiles of the other
side that it may see. No two programs write the same number, so there are no atomics and the same inputs give the same bits.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.launch import VARYING, cdiv, has_tiles, heads_together, launch, readable
from kernels.tiles import (
    FLOOR,
    LOG2_E,
    UNSEEN,
    finish,
    fold,
    hide_unseen,
    load_tile,
    masks_of,
    narrow,
    part_of,
    program_place,
    query_tile,
    sees,
    store_tile,
)

# A second forward kernel, for Hopper alone, off until a GPU has shown that it is right and faster.
USE_GLUON = os.environ.get("KERNELS_GLUON") == "1"


@triton.jit(do_not_specialize=VARYING)
def forward(q, q_strides, k, k_strides, v, v_strides, out, out_strides, lse, segments, least, most,
            H, K, T, S, blocks, window, together, scale,
            D: tl.constexpr, DIMS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CAUSAL: tl.constexpr,
            WINDOW: tl.constexpr, SEGMENTS: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr):
    """One tile of ROWS queries of one head against all keys they see → out (B, H, T, D) and lse (B, H, T)."""
    place, batch, head, start_row, position, segment, start, whole_start, whole_stop, stop = query_tile(
        H, T, S, blocks, window, segments, least, most, together, ROWS, COLUMNS, CAUSAL, WINDOW, SEGMENTS)
    key_head = head // (H // K)                                     # a group of H/K query heads reads one key head
    row = start_row + tl.arange(0, ROWS)

    q_tile = load_tile(q, q_strides, batch, head, start_row, T, D, ROWS, DIMS, TMA)
    acc = tl.zeros([ROWS, DIMS], tl.float32)                        # Σ weight · value, so far, in units of exp2(top)
    total = tl.zeros([ROWS], tl.float32)                            # Σ weight, likewise
    top = tl.full([ROWS], FLOOR, tl.float32)                        # the largest score so far, times log2 e
    for part in tl.static_range(2 if SEGMENTS else 0 if WINDOW else 1, 3):      # the window's edge, whole tiles, the diagonal
        part_start, part_stop = part_of(part, start, whole_start, whole_stop, stop)
        for n in tl.range(part_start, part_stop, COLUMNS):
            k_tile = load_tile(k, k_strides, batch, key_head, n, S, D, COLUMNS, DIMS, TMA, part == 1)
            scores = tl.dot(q_tile, k_tile.T, input_precision=PRECISION)        # (ROWS, COLUMNS)
            if part != 1:
                scores = hide_unseen(scores, n, position, segment, segments, batch, S, window, UNSEEN, COLUMNS, CAUSAL, WINDOW, SEGMENTS)
            weights, top, total, shrink = fold(scores, top, total, scale)
            v_tile = load_tile(v, v_strides, batch, key_head, n, S, D, COLUMNS, DIMS, TMA, part == 1)
            acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc * shrink[:, None], input_precision=PRECISION)

    total, row_lse = finish(top, total)
    store_tile(out, out_strides, batch, head, start_row, T, acc / total[:, None], D, ROWS, DIMS)
    tl.store(lse + place.to(tl.int64) * T + row, row_lse, mask=row < T)


@triton.jit(do_not_specialize=VARYING)
def backward_q(q, q_strides, k, k_strides, v, v_strides, out, out_strides, grad, grad_strides, dq, dq_strides, lse, row_sums,
               segments, least, most, H, K, T, S, padded, blocks, window, together, scale,
               D: tl.constexpr, DIMS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CAUSAL: tl.constexpr,
               WINDOW: tl.constexpr, SEGMENTS: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr):
    """dq of one tile of queries, and what backward_kv needs to know of each: row_sums (2, B, H, padded).

    With A the pattern: d_scores = A ∘ (grad vᵀ − delta), dq = scale · d_scores k (Dao et al. 2022, appendix B.2).
    row_sums[0] is lse as a power of two, row_sums[1] is delta = Σ_d out · grad. Past T the first is inf and the second
    finite: rows that are not there have weight exp2(−inf) = 0, without a compare for each.
    """
    place, batch, head, start_row, position, segment, start, whole_start, whole_stop, stop = query_tile(
        H, T, S, blocks, window, segments, least, most, together, ROWS, COLUMNS, CAUSAL, WINDOW, SEGMENTS)
    key_head = head // (H // K)
    row = start_row + tl.arange(0, ROWS)

    lse_at = row_sums + place.to(tl.int64) * padded + tl.arange(0, ROWS)
    delta_at = lse_at + (tl.num_programs(0) // tl.cdiv(T, ROWS)).to(tl.int64) * padded
    if start_row + ROWS >= T:                                       # the last tile fills up what is past it, too
        for past in tl.range(start_row + ROWS, padded, ROWS):
            tl.store(lse_at + past, tl.full([ROWS], float("inf"), tl.float32))
            tl.store(delta_at + past, tl.zeros([ROWS], tl.float32))
    row_lse = tl.load(lse + place.to(tl.int64) * T + row, mask=row < T, other=float("inf")) * LOG2_E
    tl.store(lse_at + start_row, row_lse)
    grad_tile = load_tile(grad, grad_strides, batch, head, start_row, T, D, ROWS, DIMS, TMA)
    out_tile = load_tile(out, out_strides, batch, head, start_row, T, D, ROWS, DIMS, TMA)
    row_delta = tl.sum(out_tile.to(tl.float32) * grad_tile.to(tl.float32), 1)
    tl.store(delta_at + start_row, row_delta)
    q_tile = load_tile(q, q_strides, batch, head, start_row, T, D, ROWS, DIMS, TMA)
    acc = tl.zeros([ROWS, DIMS], tl.float32)
    for part in tl.static_range(2 if SEGMENTS else 0 if WINDOW else 1, 3):
        part_start, part_stop = part_of(part, start, whole_start, whole_stop, stop)
        for n in tl.range(part_start, part_stop, COLUMNS):
            k_tile = load_tile(k, k_strides, batch, key_head, n, S, D, COLUMNS, DIMS, TMA, part == 1)
            v_tile = load_tile(v, v_strides, batch, key_head, n, S, D, COLUMNS, DIMS, TMA, part == 1)
            scores = tl.dot(q_tile, k_tile.T, input_precision=PRECISION)        # (ROWS, COLUMNS)
            if part != 1:
                scores = hide_unseen(scores, n, position, segment, segments, batch, S, window, UNSEEN, COLUMNS, CAUSAL, WINDOW, SEGMENTS)
            weights = tl.exp2(scores * (scale * LOG2_E) - row_lse[:, None])
            d_weights = tl.dot(grad_tile, v_tile.T, input_precision=PRECISION)
            d_scores = weights * (d_weights - row_delta[:, None])
            acc = tl.dot(d_scores.to(k_tile.dtype), k_tile, acc, input_precision=PRECISION)
    store_tile(dq, dq_strides, batch, head, start_row, T, acc * scale, D, ROWS, DIMS)


@triton.jit(do_not_specialize=VARYING)
def backward_kv(q, q_strides, k, k_strides, v, v_strides, grad, grad_strides, dk, dk_strides, dv, dv_strides, row_sums,
                segments, least, most, H, K, T, S, padded, blocks, window, together, scale,
                D: tl.constexpr, DIMS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CAUSAL: tl.constexpr,
                WINDOW: tl.constexpr, SEGMENTS: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr):
    """dk and dv of one tile of COLUMNS keys of one key head, summed over the queries of all its heads: written once.

    dv = Aᵀ grad, dk = scale · (d scores)ᵀ q. Everything is held transposed, keys by queries. One flat loop over heads and
    query tiles, masked in every tile where there is a mask: two loops, or one inside the other, make the compiler serialise wgmma or spill.
    """
    place, tile = program_place(tl.cdiv(S, COLUMNS), together)
    batch, key_head = place // K, place % K
    n = tile * COLUMNS                                              # the first keys are seen by most queries: longest first
    key = n + tl.arange(0, COLUMNS)
    lse, delta = row_sums, row_sums + (tl.num_programs(0) // tl.cdiv(S, COLUMNS) // K * H).to(tl.int64) * padded
    start, stop = S - T, S                                          # positions of the queries that see some of these keys
    if CAUSAL:
        start = tl.maximum(n, S - T)
    if WINDOW:
        stop = tl.minimum(S, n + COLUMNS + window - 1)
    key_segment = key
    if SEGMENTS:
        segments, least, most = segments + batch.to(tl.int64) * S, least + batch * blocks, most + batch * blocks
        key_segment = tl.load(segments + tl.minimum(key, S - 1))
        start, stop = narrow(start, stop, least, most, tl.min(key_segment), tl.max(key_segment))
    start_row = start - (S - T)
    tiles = tl.cdiv(tl.maximum(0, stop - start), ROWS)

    k_tile = load_tile(k, k_strides, batch, key_head, n, S, D, COLUMNS, DIMS, TMA)
    v_tile = load_tile(v, v_strides, batch, key_head, n, S, D, COLUMNS, DIMS, TMA)
    dk_acc, dv_acc = tl.zeros([COLUMNS, DIMS], tl.float32), tl.zeros([COLUMNS, DIMS], tl.float32)
    for visit in tl.range(0, tiles * (H // K)):
        head = key_head * (H // K) + visit // tl.maximum(tiles, 1)              # with no tiles the first may be read ahead
        m = start_row + visit % tl.maximum(tiles, 1) * ROWS
        row = m + tl.arange(0, ROWS)
        at = (batch * H + head).to(tl.int64) * padded + row
        q_tile = load_tile(q, q_strides, batch, head, m, T, D, ROWS, DIMS, TMA)
        scores = tl.dot(k_tile, q_tile.T, input_precision=PRECISION)            # (COLUMNS, ROWS)
        if CAUSAL or WINDOW or SEGMENTS:
            segment = tl.load(segments + tl.minimum(row + S - T, S - 1)) if SEGMENTS else row
            # Positions of both sides, and their end, counted from the first query's: S − T less.
            seen = sees(row[None, :], (key - (S - T))[:, None], T, window, segment[None, :], key_segment[:, None], CAUSAL, WINDOW, SEGMENTS)
            scores = tl.where(seen, scores, UNSEEN)
        weights = tl.exp2(scores * (scale * LOG2_E) - tl.load(lse + at)[None, :])
        grad_tile = load_tile(grad, grad_strides, batch, head, m, T, D, ROWS, DIMS, TMA)
        dv_acc = tl.dot(weights.to(grad_tile.dtype), grad_tile, dv_acc, input_precision=PRECISION)
        d_weights = tl.dot(v_tile, grad_tile.T, input_precision=PRECISION)
        d_scores = weights * (d_weights - tl.load(delta + at)[None, :])
        dk_acc = tl.dot(d_scores.to(q_tile.dtype), q_tile, dk_acc, input_precision=PRECISION)
    store_tile(dk, dk_strides, batch, key_head, n, S, dk_acc * scale, D, COLUMNS, DIMS)
    store_tile(dv, dv_strides, batch, key_head, n, S, dv_acc, D, COLUMNS, DIMS)


@torch.library.custom_op("kernels::flash_attention", mutates_args=())
def flash_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None, segments: Tensor | None,
                    scale: float, precision: str) -> tuple[Tensor, Tensor]:
    """(out, lse) of `kernels.attention.attention`, which checks the arguments; scale > 0. lse has no gradient."""
    q, k, v = readable(q, k, v)
    (B, H, T, _), (_, K, S, _) = q.shape, k.shape
    out, lse = _empty_like(q), q.new_empty((B, H, T), dtype=torch.float32)
    if 0 in (*out.shape, S):
        return out.zero_(), lse.fill_(float("-inf"))
    masks = masks_of(q, k, causal, window, segments, scale, precision)
    if USE_GLUON and has_tiles("forward_gluon", q):
        from kernels.flash_gluon import launch_gluon  # an experimental part of triton, which may change
        launch_gluon(q, k, v, out, lse, masks)
    else:
        launch(forward, lambda tile: (B * H * cdiv(T, tile.rows), 1, 1), q, rows={"q": q}, columns={"k": k, "v": v},
               out=out, out_strides=out.stride(), lse=lse, together=heads_together(k, S, B * H, H // K), **masks)
    return out, lse


@torch.library.custom_op("kernels::flash_attention_backward", mutates_args=())
def flash_attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, window: int | None,
                             segments: Tensor | None, scale: float, precision: str) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) from the gradient of out. In fp16 a gradient past 65504 is inf, as in any fp16 backward: scale the loss."""
    grad, q, k, v, out = readable(grad, q, k, v, out)
    dq, dk, dv = _empty_like(q), _empty_like(k), _empty_like(v)
    (B, H, T, _), (_, K, S, _) = q.shape, k.shape
    if 0 in (*q.shape, S):
        return dq.zero_(), dk.zero_(), dv.zero_()
    padded = cdiv(T + 128, 128) * 128                        # no tile of rows that begins before T ends after it
    masks = masks_of(q, k, causal, window, segments, scale, precision) | {"padded": padded}
    row_sums = q.new_empty((2, B, H, padded), dtype=torch.float32)
    launch(backward_q, lambda tile: (B * H * cdiv(T, tile.rows), 1, 1), q, rows={"q": q, "out": out, "grad": grad},
           columns={"k": k, "v": v}, dq=dq, dq_strides=dq.stride(), lse=lse.contiguous(), row_sums=row_sums,
           together=heads_together(k, S, B * H, H // K), **masks)
    launch(backward_kv, lambda tile: (B * K * cdiv(S, tile.columns), 1, 1), q, rows={"q": q, "grad": grad},
           columns={"k": k, "v": v}, dk=dk, dk_strides=dk.stride(), dv=dv, dv_strides=dv.stride(), row_sums=row_sums,
           together=heads_together(q, T * (H // K), B * K), **masks)
    return dq, dk, dv


def _empty_like(x: Tensor) -> Tensor:
    """(B, heads, T, D) over (B, T, heads, D) memory: as the projections around attention read and write it."""
    _, heads, T, D = x.shape
    return x.new_empty_strided(x.shape, (heads * T * D, D, heads * D, 1))


@flash_attention.register_fake
def _(q, k, v, causal, window, segments, scale, precision):
    return _empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@flash_attention_backward.register_fake
def _(grad, q, k, v, out, lse, causal, window, segments, scale, precision):
    return _empty_like(q), _empty_like(k), _empty_like(v)


def _save(ctx, inputs, output):
    q, k, v, ctx.causal, ctx.window, segments, ctx.scale, ctx.precision = inputs
    ctx.save_for_backward(q, k, v, segments, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad, _):
    q, k, v, segments, out, lse = ctx.saved_tensors
    grads = flash_attention_backward(grad, q, k, v, out, lse, ctx.causal, ctx.window, segments, ctx.scale, ctx.precision)
    return *grads, None, None, None, None, None


flash_attention.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.kernels.flash_attention)
def _flops(q_shape, k_shape, *args, out_shape=None, **kwargs) -> int:
    """Two products of T × S × D a head, masked or not: PyTorch's own convention for its attention."""
    B, H, T, D = q_shape
    return 4 * B * H * T * k_shape[2] * D


@register_flop_formula(torch.ops.kernels.flash_attention_backward)
def _backward_flops(grad_shape, q_shape, k_shape, *args, out_shape=None, **kwargs) -> int:
    """Five products, likewise."""
    return _flops(q_shape, k_shape) * 5 // 2
