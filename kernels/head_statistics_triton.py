"""The kernel behind `kernels.head_statistics`: flash attention's walk over the keys, with questions in place of values."""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.head_statistics import PLAIN, REACH
from kernels.launch import VARYING, cdiv, heads_together, launch, readable
from kernels.tiles import LN_2, LOG2_E, UNSEEN, address, hide_unseen, load_tile, masks_of, part_of, query_tile, sees

PROFILE_REACH = tl.constexpr(REACH)
PROFILE_START = tl.constexpr(PLAIN)
NEVER = tl.constexpr(-1e30)         # log2 of a weight that is zero; finite, so that weight · log2 weight is zero too


@triton.jit(do_not_specialize=VARYING)
def statistics_rows(q, q_strides, k, k_strides, lse, tokens, before, out, segments, least, most,
                    H, K, T, S, padded, blocks, window, together, scale,
                    D: tl.constexpr, DIMS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CAUSAL: tl.constexpr,
                    WINDOW: tl.constexpr, SEGMENTS: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr):
    """The sums over all keys for one tile of ROWS queries of one head → planes 0, 1, 4 and 5 of out (…, B, H, T).

    tokens, before (B, padded): each position's token and the one before it, −1 where there is none, and past the end.
    """
    place, batch, head, start_row, position, segment, start, whole_start, whole_stop, stop = query_tile(
        H, T, S, blocks, window, segments, least, most, together, ROWS, COLUMNS, CAUSAL, WINDOW, SEGMENTS)
    key_head = head // (H // K)
    row, here = start_row + tl.arange(0, ROWS), start_row + S - T
    # A duplicate is *before* its query: tiles that hold the first query's own position are masked too.
    whole_stop = tl.where((whole_stop > here) & (whole_stop > whole_start), whole_stop - COLUMNS, whole_stop)

    tokens, before = tokens + batch.to(tl.int64) * padded, before + batch.to(tl.int64) * padded
    token = tl.load(tokens + position)
    row_lse = tl.load(lse + place.to(tl.int64) * T + row, mask=row < T, other=1e30) * LOG2_E
    q_tile = load_tile(q, q_strides, batch, head, start_row, T, D, ROWS, DIMS, TMA)
    follows, repeats, information, distance = (tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32),
                                               tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32))
    column, row_position = tl.arange(0, COLUMNS), position.to(tl.float32)
    for part in tl.static_range(2 if SEGMENTS else 0 if WINDOW else 1, 3):
        part_start, part_stop = part_of(part, start, whole_start, whole_stop, stop)
        for n in tl.range(part_start, part_stop, COLUMNS):
            key = n + column
            k_tile = load_tile(k, k_strides, batch, key_head, n, S, D, COLUMNS, DIMS, TMA, part == 1)
            bits = tl.dot(q_tile, k_tile.T, input_precision=PRECISION) * (scale * LOG2_E) - row_lse[:, None]       # log2 A
            repeat = token[:, None] == tl.load(tokens + key)[None, :]
            if part != 1:
                bits = hide_unseen(bits, n, position, segment, segments, batch, S, window, NEVER, COLUMNS, CAUSAL, WINDOW, SEGMENTS)
                repeat = repeat & (key[None, :] < position[:, None])
            weights = tl.exp2(bits)
            follows += tl.sum(tl.where(token[:, None] == tl.load(before + key)[None, :], weights, 0.0), 1)
            repeats += tl.sum(tl.where(repeat, weights, 0.0), 1)
            information += tl.sum(weights * bits, 1)
            distance += tl.sum(weights * (row_position[:, None] - key.to(tl.float32)[None, :]), 1)

    plane = (tl.num_programs(0) // tl.cdiv(T, ROWS)).to(tl.int64) * T
    at = out + place.to(tl.int64) * T + row
    tl.store(at, follows, mask=row < T)
    tl.store(at + plane, repeats, mask=row < T)
    tl.store(at + 4 * plane, information * -LN_2, mask=row < T)
    tl.store(at + 5 * plane, distance, mask=row < T)


@triton.jit(do_not_specialize=VARYING)
def statistics_places(q, q_strides, k, k_strides, lse, targets, out, segments, H, K, T, S, window, scale, D: tl.constexpr,
                      DIMS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WINDOW: tl.constexpr, SEGMENTS: tl.constexpr,
                      PRECISION: tl.constexpr):
    """Entries of the pattern at known places, one product q_i·k_j each → the other planes: previous, first, profile.

    A kernel of its own: it waits for scattered rows of k, and many small programs wait better than few large ones. Where the
    targets of its rows follow each other, as in text that repeats, the places of all rows are among COLUMNS keys in a row,
    which are read once and not 17 times a row.
    """
    tiles = tl.cdiv(T, ROWS)
    place, start_row = tl.program_id(0) // tiles, tl.program_id(0) % tiles * ROWS
    batch, head = place // H, place % H
    lane, dim = tl.arange(0, ROWS), tl.arange(0, DIMS)
    row = start_row + lane
    last = tl.minimum(row, T - 1)
    position = last + S - T
    q_tile = tl.load(address(q, q_strides, batch, head, 0) + last[:, None].to(tl.int64) * q_strides[2] + dim[None, :] * q_strides[3],
                     mask=(dim < D)[None, :], other=0.0)
    k_head = address(k, k_strides, batch, head // (H // K), 0)
    row_lse = tl.load(lse + place.to(tl.int64) * T + last)
    target = tl.load(targets + batch.to(tl.int64) * S + position).to(tl.int32)
    segment = position
    if SEGMENTS:
        segments += batch.to(tl.int64) * S
        segment = tl.load(segments + position)
    plane = (tl.num_programs(0) // tiles).to(tl.int64) * T
    at = out + place.to(tl.int64) * T + row

    entries = entries_at(q_tile, k_head, k_strides, position - 1, position > 0, position, segment, segments, row_lse, S, window, scale,
                         dim, D, WINDOW, SEGMENTS)
    tl.store(at + 2 * plane, entries, mask=row < T)
    entries = entries_at(q_tile, k_head, k_strides, position * 0, position >= 0, position, segment, segments, row_lse, S, window, scale,
                         dim, D, WINDOW, SEGMENTS)
    tl.store(at + 3 * plane, entries, mask=row < T)

    at += PROFILE_START * plane
    first = tl.sum(tl.where(lane == 0, target, 0))
    if (first >= 0) & (tl.max(tl.where((target == first + lane) | (row >= T), 0, 1)) == 0):
        tl.static_assert(COLUMNS >= ROWS + 2 * PROFILE_REACH)
        column = tl.arange(0, COLUMNS)
        band = first - PROFILE_REACH + column
        inside = (band >= 0) & (band < S)
        at_band = tl.where(inside, band, 0)
        k_tile = tl.load(k_head + at_band[:, None].to(tl.int64) * k_strides[2] + dim[None, :] * k_strides[3],
                         mask=inside[:, None] & (dim < D)[None, :], other=0.0)
        band_segment = tl.load(segments + at_band) if SEGMENTS else band
        seen = inside[None, :] & sees(position[:, None], band[None, :], S, window, segment[:, None], band_segment[None, :], True,
                                      WINDOW, SEGMENTS)
        scores = tl.dot(q_tile, k_tile.T, input_precision=PRECISION) * scale - row_lse[:, None]
        weights = tl.exp(tl.where(seen, scores, UNSEEN))
        for offset in tl.static_range(2 * PROFILE_REACH + 1):
            diagonal = column[None, :] == lane[:, None] + offset
            tl.store(at + offset * plane, tl.sum(tl.where(diagonal, weights, 0.0), 1), mask=row < T)
    else:
        for offset in tl.static_range(2 * PROFILE_REACH + 1):
            key = target + (offset - PROFILE_REACH)
            there = (target >= 0) & (key >= 0) & (key <= position)
            entries = entries_at(q_tile, k_head, k_strides, key, there, position, segment, segments, row_lse, S, window, scale,
                                 dim, D, WINDOW, SEGMENTS)
            tl.store(at + offset * plane, entries, mask=row < T)


@triton.jit
def entries_at(q_tile, k_head, k_strides, key, there, position, segment, segments, row_lse, S, window, scale, dim, D: tl.constexpr,
               WINDOW: tl.constexpr, SEGMENTS: tl.constexpr):
    """One entry of the pattern a row, at `key` (ROWS,); zero where it is not `there` or not seen."""
    key = tl.where(there, key, 0)
    key_segment = tl.load(segments + key) if SEGMENTS else key
    there = there & sees(position, key, S, window, segment, key_segment, True, WINDOW, SEGMENTS)
    k_rows = tl.load(k_head + key[:, None].to(tl.int64) * k_strides[2] + dim[None, :] * k_strides[3],
                     mask=there[:, None] & (dim < D)[None, :], other=0.0)
    weights = tl.exp(tl.sum(q_tile.to(tl.float32) * k_rows.to(tl.float32), 1) * scale - row_lse)
    return tl.where(there, weights, 0.0)


@torch.library.custom_op("kernels::head_statistics", mutates_args=())
def statistics(q: Tensor, k: Tensor, lse: Tensor, tokens: Tensor, before: Tensor, targets: Tensor, window: int | None,
               segments: Tensor | None, scale: float, precision: str) -> Tensor:
    """(PLAIN + 2 REACH + 1, B, H, T) float32; before, targets (B, S) from `tokens_before`, `induction_targets`; scale > 0."""
    B, H, T, _ = q.shape
    out = q.new_empty(PLAIN + 2 * REACH + 1, B, H, T, dtype=torch.float32)
    if out.numel() == 0:
        return out
    q, k = readable(q, k)
    masks = masks_of(q, k, True, window, segments, scale, precision)
    lse = lse.contiguous()
    padding = 256 - tokens.shape[1] % 16            # past the last tile, so that no read needs a check; rows 64 bytes apart
    padded_tokens, before = (F.pad(x.to(torch.int32), (0, padding), value=-1) for x in (tokens, before))
    launch(statistics_rows, lambda tile: (B * H * cdiv(T, tile.rows), 1, 1), q, rows={"q": q}, columns={"k": k}, lse=lse,
           tokens=padded_tokens, before=before, padded=padded_tokens.shape[1], out=out,
           together=heads_together(k, masks["S"], B * H, H // masks["K"]), **masks)
    launch(statistics_places, lambda tile: (B * H * cdiv(T, tile.rows), 1, 1), q, q=q, q_strides=q.stride(), k=k,
           k_strides=k.stride(), lse=lse, targets=targets.to(torch.int32).contiguous(), out=out,
           **{name: masks[name] for name in ("segments", "H", "K", "T", "S", "window", "scale", "WINDOW", "SEGMENTS", "PRECISION")})
    return out


@statistics.register_fake
def _(q, k, lse, tokens, before, targets, window, segments, scale, precision):
    return q.new_empty(PLAIN + 2 * REACH + 1, *q.shape[:3], dtype=torch.float32)


@register_flop_formula(torch.ops.kernels.head_statistics)
def _flops(q_shape, k_shape, *args, out_shape=None, **kwargs) -> int:
    B, H, T, D = q_shape
    return 2 * B * H * T * (k_shape[2] + 2 * REACH + 3) * D
