"""The kernels behind `head_statistics`: flash attention's walk over the keys, without values."""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels import planes
from kernels.arguments import kernel_arguments
from kernels.launch import VARYING, heads_together, launch, query_grid, readable
from kernels.planes import PLANES, Plane
from kernels.problem import Problem
from kernels.tiles import (
    DIAGONAL,
    LN_2,
    LOG2_E,
    UNSEEN,
    WHOLE_TILES,
    WINDOW_EDGE,
    KeyRange,
    Masks,
    address,
    hide_unseen,
    load_tile,
    part_of,
    query_tile,
    sees,
)

# What kernels/planes.py defines, in the only form in which a kernel reads names of its module.
PREFIX_MATCHING = tl.constexpr(int(Plane.PREFIX_MATCHING))
DUPLICATE_TOKEN = tl.constexpr(int(Plane.DUPLICATE_TOKEN))
PREVIOUS_TOKEN = tl.constexpr(int(Plane.PREVIOUS_TOKEN))
FIRST_TOKEN = tl.constexpr(int(Plane.FIRST_TOKEN))
ENTROPY = tl.constexpr(int(Plane.ENTROPY))
DISTANCE = tl.constexpr(int(Plane.DISTANCE))
OFFSET_PROFILE = tl.constexpr(int(Plane.OFFSET_PROFILE))
REACH = tl.constexpr(planes.REACH)
# log2 of a weight that is zero; finite, so that weight · log2 weight is zero too.
NEVER = tl.constexpr(-1e30)


@triton.jit(do_not_specialize=VARYING)
def statistics_rows(q, q_strides, k, k_strides, lse, tokens, before, out, segments, least, most,
                    H, K, T, S, padded, blocks, window, together, scale,
                    D: tl.constexpr, DIMS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SEGMENTS: tl.constexpr,
                    TMA: tl.constexpr, PRECISION: tl.constexpr):
    """The sums over all keys for one tile of ROWS queries of one head.

    They fill the planes PREFIX_MATCHING, DUPLICATE_TOKEN, ENTROPY and DISTANCE of
    out (PLANES, B, H, T). tokens, before (B, padded): each position's token and the one before it,
    −1 if there is none and past the end.
    """
    masks = Masks(S, window, segments, least, most, blocks)
    tile = query_tile(H, T, masks, together, ROWS, COLUMNS, CAUSAL, WINDOW, SEGMENTS)
    place, batch, head, start_row = tile.place, tile.batch, tile.head, tile.start_row
    key_head = head // (H // K)
    row, first_position = start_row + tl.arange(0, ROWS), start_row + S - T
    # A duplicate is *before* its query: tiles with the first query's own position are masked too.
    start, whole_start, whole_stop, stop = tile.keys
    has_own = (whole_stop > first_position) & (whole_stop > whole_start)
    whole_stop = tl.where(has_own, whole_stop - COLUMNS, whole_stop)
    keys = KeyRange(start, whole_start, whole_stop, stop)

    tokens += batch.to(tl.int64) * padded
    before += batch.to(tl.int64) * padded
    token = tl.load(tokens + tile.position)
    row_lse = tl.load(lse + place.to(tl.int64) * T + row, mask=row < T, other=1e30) * LOG2_E
    q_tile = load_tile(q, q_strides, batch, head, start_row, T, D, ROWS, DIMS, TMA)
    follows = tl.zeros([ROWS], tl.float32)
    repeats = tl.zeros([ROWS], tl.float32)
    information = tl.zeros([ROWS], tl.float32)
    distance = tl.zeros([ROWS], tl.float32)
    column, row_position = tl.arange(0, COLUMNS), tile.position.to(tl.float32)
    for part in tl.static_range(DIAGONAL if SEGMENTS else WINDOW_EDGE if WINDOW else WHOLE_TILES,
                                DIAGONAL + 1):
        part_start, part_stop = part_of(part, keys)
        for n in tl.range(part_start, part_stop, COLUMNS):
            key = n + column
            k_tile = load_tile(k, k_strides, batch, key_head, n, S, D, COLUMNS, DIMS, TMA,
                               part == WHOLE_TILES)
            scores = tl.dot(q_tile, k_tile.T, input_precision=PRECISION)        # (ROWS, COLUMNS)
            bits = scores * (scale * LOG2_E) - row_lse[:, None]                 # log2 A
            repeat = token[:, None] == tl.load(tokens + key)[None, :]
            if part != WHOLE_TILES:
                bits = hide_unseen(bits, n, tile, masks, NEVER, COLUMNS, CAUSAL, WINDOW,
                                   SEGMENTS)
                repeat = repeat & (key[None, :] < tile.position[:, None])
            weights = tl.exp2(bits)
            follow = token[:, None] == tl.load(before + key)[None, :]
            follows += tl.sum(tl.where(follow, weights, 0.0), 1)
            repeats += tl.sum(tl.where(repeat, weights, 0.0), 1)
            information += tl.sum(weights * bits, 1)
            gap = row_position[:, None] - key.to(tl.float32)[None, :]
            distance += tl.sum(weights * gap, 1)

    plane = (tl.num_programs(0) // tl.cdiv(T, ROWS)).to(tl.int64) * T           # B · H · T numbers
    at = out + place.to(tl.int64) * T + row
    tl.store(at + PREFIX_MATCHING * plane, follows, mask=row < T)
    tl.store(at + DUPLICATE_TOKEN * plane, repeats, mask=row < T)
    tl.store(at + ENTROPY * plane, information * -LN_2, mask=row < T)
    tl.store(at + DISTANCE * plane, distance, mask=row < T)


@triton.jit(do_not_specialize=VARYING)
def statistics_places(q, q_strides, k, k_strides, lse, targets, out, segments,
                      H, K, T, S, window, scale,
                      D: tl.constexpr, DIMS: tl.constexpr, ROWS: tl.constexpr,
                      COLUMNS: tl.constexpr, WINDOW: tl.constexpr, SEGMENTS: tl.constexpr,
                      PRECISION: tl.constexpr):
    """Entries of the pattern at known places, one product q_i·k_j each.

    They fill the planes PREVIOUS_TOKEN, FIRST_TOKEN and those from OFFSET_PROFILE on. A kernel of
    its own: it waits for scattered rows of k, and many small programs hide that better than a few
    large ones. If the targets of its rows follow each other, as in text that repeats, the places of
    all rows are among COLUMNS adjacent keys, which are read once and not 17 times per row.
    """
    tiles = tl.cdiv(T, ROWS)
    place, start_row = tl.program_id(0) // tiles, tl.program_id(0) % tiles * ROWS
    batch, head = place // H, place % H
    lane, dim = tl.arange(0, ROWS), tl.arange(0, DIMS)
    row = start_row + lane
    last = tl.minimum(row, T - 1)
    position = last + S - T
    q_at = address(q, q_strides, batch, head, 0) + last[:, None].to(tl.int64) * q_strides[2]
    q_tile = tl.load(q_at + dim[None, :] * q_strides[3], mask=(dim < D)[None, :], other=0.0)
    k_head = address(k, k_strides, batch, head // (H // K), 0)
    row_lse = tl.load(lse + place.to(tl.int64) * T + last)
    target = tl.load(targets + batch.to(tl.int64) * S + position).to(tl.int32)
    segment = position
    if SEGMENTS:
        segments += batch.to(tl.int64) * S
        segment = tl.load(segments + position)
    plane = (tl.num_programs(0) // tiles).to(tl.int64) * T
    at = out + place.to(tl.int64) * T + row

    entries = entries_at(q_tile, k_head, k_strides, position - 1, position > 0, position, segment,
                         segments, row_lse, S, window, scale, dim, D, WINDOW, SEGMENTS)
    tl.store(at + PREVIOUS_TOKEN * plane, entries, mask=row < T)
    entries = entries_at(q_tile, k_head, k_strides, position * 0, position >= 0, position, segment,
                         segments, row_lse, S, window, scale, dim, D, WINDOW, SEGMENTS)
    tl.store(at + FIRST_TOKEN * plane, entries, mask=row < T)

    at += OFFSET_PROFILE * plane
    first = tl.sum(tl.where(lane == 0, target, 0))
    in_a_row = (first >= 0) & (tl.max(tl.where((target == first + lane) | (row >= T), 0, 1)) == 0)
    if in_a_row:
        tl.static_assert(COLUMNS >= ROWS + 2 * REACH)
        column = tl.arange(0, COLUMNS)
        band = first - REACH + column               # the keys around all rows' targets
        inside = (band >= 0) & (band < S)
        at_band = tl.where(inside, band, 0)
        k_at = k_head + at_band[:, None].to(tl.int64) * k_strides[2] + dim[None, :] * k_strides[3]
        k_tile = tl.load(k_at, mask=inside[:, None] & (dim < D)[None, :], other=0.0)
        band_segment = tl.load(segments + at_band) if SEGMENTS else band
        seen = inside[None, :] & sees(position[:, None], band[None, :], S, window,
                                      segment[:, None], band_segment[None, :], True, WINDOW,
                                      SEGMENTS)
        scores = tl.dot(q_tile, k_tile.T, input_precision=PRECISION) * scale - row_lse[:, None]
        weights = tl.exp(tl.where(seen, scores, UNSEEN))
        for offset in tl.static_range(2 * REACH + 1):
            diagonal = column[None, :] == lane[:, None] + offset
            tl.store(at + offset * plane, tl.sum(tl.where(diagonal, weights, 0.0), 1),
                     mask=row < T)
    else:
        for offset in tl.static_range(2 * REACH + 1):
            key = target + (offset - REACH)
            exists = (target >= 0) & (key >= 0) & (key <= position)
            entries = entries_at(q_tile, k_head, k_strides, key, exists, position, segment,
                                 segments, row_lse, S, window, scale, dim, D, WINDOW, SEGMENTS)
            tl.store(at + offset * plane, entries, mask=row < T)


@triton.jit
def entries_at(q_tile, k_head, k_strides, key, exists, position, segment, segments, row_lse, S,
               window, scale, dim, D: tl.constexpr, WINDOW: tl.constexpr, SEGMENTS: tl.constexpr):
    """One entry of the pattern per row, at `key` (ROWS,); 0 unless the key `exists` and is seen."""
    key = tl.where(exists, key, 0)
    key_segment = tl.load(segments + key) if SEGMENTS else key
    exists = exists & sees(position, key, S, window, segment, key_segment, True, WINDOW, SEGMENTS)
    k_at = k_head + key[:, None].to(tl.int64) * k_strides[2] + dim[None, :] * k_strides[3]
    k_rows = tl.load(k_at, mask=exists[:, None] & (dim < D)[None, :], other=0.0)
    products = tl.sum(q_tile.to(tl.float32) * k_rows.to(tl.float32), 1)
    return tl.where(exists, tl.exp(products * scale - row_lse), 0.0)


@torch.library.custom_op("kernels::head_statistics", mutates_args=())
def statistics(q: Tensor, k: Tensor, lse: Tensor, tokens: Tensor, before: Tensor, targets: Tensor,
               window: int | None, segments: Tensor | None, scale: float) -> Tensor:
    """(PLANES, B, H, T) float32, as kernels/planes.py names the planes.

    before, targets (B, S) are from `tokens_before` and `induction_targets`; scale > 0.
    """
    (B, H, T, _), (_, K, S, _) = q.shape, k.shape
    out = q.new_empty(PLANES, B, H, T, dtype=torch.float32)
    if out.numel() == 0:
        return out
    q, k = readable(q, k)
    arguments = kernel_arguments(Problem(q, k, True, window, segments, scale))
    arguments |= {"out": out, "lse": lse.contiguous()}
    # Padded past the last tile, so that no read needs a check, and so that rows begin 64 bytes
    # apart.
    padding = 256 - tokens.shape[1] % 16
    padded_tokens = F.pad(tokens.to(torch.int32), (0, padding), value=-1)
    before = F.pad(before.to(torch.int32), (0, padding), value=-1)
    launch(statistics_rows, query_grid(q), q, rows={"q": q}, columns={"k": k},
           tokens=padded_tokens, before=before, padded=padded_tokens.shape[1],
           together=heads_together(k, S, B * H, H // K), **arguments)
    launch(statistics_places, query_grid(q), q, q=q, q_strides=q.stride(), k=k,
           k_strides=k.stride(), targets=targets.to(torch.int32).contiguous(), **arguments)
    return out


@statistics.register_fake
def _(q, k, lse, tokens, before, targets, window, segments, scale):
    return q.new_empty(PLANES, *q.shape[:3], dtype=torch.float32)


@register_flop_formula(torch.ops.kernels.head_statistics)
def _flops(q_shape, k_shape, *args, out_shape=None, **kwargs) -> int:
    """One product with every key, and one with each of the known places."""
    B, H, T, D = q_shape
    return 2 * B * H * T * (k_shape[2] + 2 * planes.REACH + 3) * D
