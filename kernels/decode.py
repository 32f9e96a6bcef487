"""Attention of a few new tokens to a cache of many keys, in Triton: as fast as the cache is read.

One query against S keys is a matrix–vector product: the work is to read K and V once. So the
queries of a group, which share their keys (grouped queries, Ainslie et al. 2023), are packed into
the rows of one tile, and the keys are split over enough programs to keep every multiprocessor
reading ("Flash-Decoding", Dao et al. 2023). Each part leaves its output and its lse, from which a
second kernel computes the result: Σ_p exp(lse_p − lse) out_p, with lse = ln Σ_p exp(lse_p).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.arguments import for_pointers
from kernels.launch import VARYING, cdiv, launch, multiprocessors
from kernels.tiles import FLOOR, UNSEEN, address, finish, fold, load_tile

CHUNK = 128                         # keys are split at multiples of it, whatever the tile


@triton.jit(do_not_specialize=VARYING)
def decode_part(q, q_strides, k, k_strides, v, v_strides, out, lse, query_positions, key_positions,
                H, K, T, S, window, chunk, scale,
                D: tl.constexpr, DIMS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                WINDOW: tl.constexpr, ORDERED: tl.constexpr, TMA: tl.constexpr,
                PRECISION: tl.constexpr):
    """ROWS of the H/K · T queries of one key head against `chunk` keys.

    → out (parts, B, H, T, D) and lse (parts, B, H, T)
    """
    tiles = tl.cdiv(H // K * T, ROWS)
    part, place = tl.program_id(1), tl.program_id(0) // tiles
    batch, key_head = place // K, place % K
    # The queries of the group, head by head, T of each.
    packed = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    inside = packed < H // K * T
    head, t = key_head * (H // K) + packed // T, packed % T
    start, stop = part * chunk, tl.minimum(S, part * chunk + chunk)
    position = S - T + t                            # by default the queries are the last T
    if query_positions is not None:
        position = tl.load(query_positions + batch * T + t).to(tl.int32)
    first, last = tl.min(position), tl.max(position)
    if ORDERED:                                     # slot j holds position j
        stop = tl.minimum(stop, last + 1)
        if WINDOW:
            start = tl.maximum(start, first - window + 1)
    else:                                           # from the first to the last slot that is seen
        key_positions += batch.to(tl.int64) * S
        begin, end = stop, start
        for n in tl.range(start, stop, COLUMNS):
            slot = n + tl.arange(0, COLUMNS)
            key = tl.load(key_positions + slot, mask=slot < stop, other=-1).to(tl.int32)
            seen = (key >= 0) & (key <= last)
            if WINDOW:
                seen = seen & (key > first - window)
            begin = tl.minimum(begin, tl.min(tl.where(seen, slot, stop)))
            end = tl.maximum(end, tl.max(tl.where(seen, slot + 1, start)))
        start, stop = begin, end

    column = tl.arange(0, DIMS)
    in_row = inside[:, None] & (column < D)[None, :]
    q_at = address(q, q_strides, batch, head, t)
    q_tile = tl.load(q_at[:, None] + column[None, :] * q_strides[3], mask=in_row, other=0.0)
    acc = tl.zeros([ROWS, DIMS], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    top = tl.full([ROWS], FLOOR, tl.float32)
    for n in tl.range(start, stop, COLUMNS):
        slot = n + tl.arange(0, COLUMNS)
        k_tile = load_tile(k, k_strides, batch, key_head, n, stop, D, COLUMNS, DIMS, TMA)
        scores = tl.dot(q_tile, k_tile.T, input_precision=PRECISION)            # (ROWS, COLUMNS)
        key = slot
        if not ORDERED:
            key = tl.load(key_positions + slot, mask=slot < stop, other=-1).to(tl.int32)
        held = (slot < stop) & (key >= 0)
        seen = held[None, :] & (key[None, :] <= position[:, None])
        if WINDOW:
            seen = seen & (key[None, :] > position[:, None] - window)
        scores = tl.where(seen, scores, UNSEEN)
        weights, top, total, shrink = fold(scores, top, total, scale)
        v_tile = load_tile(v, v_strides, batch, key_head, n, stop, D, COLUMNS, DIMS, TMA)
        if not ORDERED:                             # an empty slot may hold NaN, and 0 · NaN is NaN
            v_tile = tl.where(held[:, None], v_tile, 0.0)
        acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc * shrink[:, None],
                     input_precision=PRECISION)

    total, row_lse = finish(top, total)
    row = (part * (tl.num_programs(0) // tiles // K) + batch).to(tl.int64) * H * T + head * T + t
    tl.store(lse + row, row_lse, mask=inside)
    tl.store(out + row[:, None] * D + column[None, :],
             (acc / total[:, None]).to(out.dtype.element_ty), mask=in_row)


@triton.jit(do_not_specialize=VARYING)
def decode_combine(part_out, part_lse, out, lse, parts, queries,
                 D: tl.constexpr, DIMS: tl.constexpr, COLUMNS: tl.constexpr):
    """The results of all parts for one query, COLUMNS parts at a time.

    part_out (parts, queries, D), part_lse (parts, queries) → out (queries, D), lse (queries)
    """
    row = tl.program_id(0).to(tl.int64)
    column, lane = tl.arange(0, DIMS), tl.arange(0, COLUMNS)
    top = tl.full([], FLOOR, tl.float32)
    for p in tl.range(0, parts, COLUMNS):
        row_lse = tl.load(part_lse + (p + lane) * queries + row, mask=p + lane < parts,
                          other=UNSEEN)
        top = tl.maximum(top, tl.max(row_lse))
    total = tl.zeros([], tl.float32)
    acc = tl.zeros([DIMS], tl.float32)
    for p in tl.range(0, parts, COLUMNS):
        inside = p + lane < parts
        row_lse = tl.load(part_lse + (p + lane) * queries + row, mask=inside, other=UNSEEN)
        weights = tl.exp(row_lse - top)
        values = tl.load(part_out + ((p + lane) * queries + row)[:, None] * D + column[None, :],
                         mask=inside[:, None] & (column < D)[None, :], other=0.0)
        total += tl.sum(weights)
        acc += tl.sum(weights[:, None] * values, 0)
    nothing = total == 0
    total = tl.where(nothing, 1.0, total)
    tl.store(out + row * D + column, (acc / total).to(out.dtype.element_ty), mask=column < D)
    tl.store(lse + row, tl.where(nothing, UNSEEN, top + tl.log(total)))


@torch.library.custom_op("kernels::decode", mutates_args=())
def decode(q: Tensor, k: Tensor, v: Tensor, query_positions: Tensor | None,
           key_positions: Tensor | None, window: int | None,
           scale: float) -> tuple[Tensor, Tensor]:
    """(out (B, H, T, D), lse (B, H, T)) of T queries against a cache of S slots.

    q (B, H, T, D), k and v (B, K, S, D); scale > 0. query_positions (B, T): by default the last T
    of the S positions. key_positions (B, S), negative for an empty slot: any order, as a wrapped
    ring has it. Without them slot j holds position j, and no program reads more than the queries of
    its row see. No gradients: it is for generation.
    """
    (B, H, T, D), (_, K, S, _) = q.shape, k.shape
    k, v = for_pointers(k), for_pointers(v)
    out, lse = q.new_empty(B, H, T, D), q.new_empty(B, H, T, dtype=torch.float32)
    if 0 in (*q.shape, S):
        return out.zero_(), lse.fill_(float("-inf"))
    packed = H // K * T
    rows = 32 if packed > 16 and D * q.itemsize <= 512 else 16  # 32 of float32 at D = 256 spill
    parts = max(1, 2 * multiprocessors(q.device) // (B * K * cdiv(packed, rows)))
    chunk = cdiv(cdiv(S, parts), CHUNK) * CHUNK
    parts = cdiv(S, chunk)
    part_out, part_lse = out, lse
    if parts > 1:
        part_out = q.new_empty(parts, *q.shape, dtype=torch.float32)
        part_lse = lse.new_empty(parts, *lse.shape)
    if query_positions is not None:
        query_positions = query_positions.contiguous()
    if key_positions is not None:
        key_positions = key_positions.contiguous()
    # By pointers: the rows of q belong to several heads, and a cache may have any layout.
    launch(decode_part, lambda tile: (B * K * cdiv(packed, tile.rows), parts, 1), q,
           columns={"k": k, "v": v}, allow_tma=False, n_rows=rows, q=q, q_strides=q.stride(),
           out=part_out, lse=part_lse, query_positions=query_positions,
           key_positions=key_positions, H=H, K=K, T=T, S=S, window=window or 0, chunk=chunk,
           scale=scale, WINDOW=window is not None, ORDERED=key_positions is None)
    if parts > 1:
        launch(decode_combine, lambda tile: (B * H * T, 1, 1), q, part_out=part_out,
               part_lse=part_lse, out=out, lse=lse, parts=parts, queries=B * H * T)
    return out, lse


@decode.register_fake
def _(q, k, v, query_positions, key_positions, window, scale):
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


@register_flop_formula(torch.ops.kernels.decode)
def _flops(q_shape, k_shape, *args, out_shape=None, **kwargs) -> int:
    """Two products of T × S × D per head, seen or not."""
    B, H, T, D = q_shape
    return 4 * B * H * T * k_shape[2] * D
