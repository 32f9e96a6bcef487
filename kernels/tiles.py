"""What the Triton kernels share: reading and writing tiles, which keys a query sees, and which tiles are worth a visit."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

LOG2_E = tl.constexpr(1.4426950408889634)       # exp(x) = exp2(x log2 e), and exp2 is one instruction
LN_2 = tl.constexpr(0.6931471805599453)
UNSEEN = tl.constexpr(float("-inf"))            # the score of a key that a query does not see: its weight is exp2(−inf) = 0
FLOOR = tl.constexpr(-1e20)                     # where running maxima begin: finite, so that −inf − maximum is never NaN
SEGMENT_BLOCK = tl.constexpr(64)                # positions whose smallest and largest segment id are kept aside


@triton.jit
def load_tile(source, strides, batch, head, start, stop, D: tl.constexpr, ROWS: tl.constexpr, DIMS: tl.constexpr,
              TMA: tl.constexpr, WHOLE: tl.constexpr = False):
    """Positions start … start + ROWS of one head: (ROWS, DIMS), zeros from column D on.

    TMA: `source` is a tensor descriptor, and the copy engine fetches the tile; otherwise a pointer, read by any strides.
    Rows from position `stop` on hold zeros or repeat the last row: finite numbers, for the caller to mask. A repeat needs
    no bounds check, which on sm_80 is the difference between spilling registers and not. WHOLE: there are no such rows.
    """
    if TMA:
        tile = source.load([batch, head, start, 0]).reshape(ROWS, DIMS)
    else:
        row, column = tl.arange(0, ROWS), tl.arange(0, DIMS)
        if not WHOLE:
            row = tl.minimum(row, stop - 1 - start)
        at = address(source, strides, batch, head, start) + row[:, None] * strides[2] + column[None, :] * strides[3]
        if D == DIMS:
            tile = tl.load(at)
        else:
            tile = tl.load(at, mask=column[None, :] < D, other=0.0)
    return tile


@triton.jit
def store_tile(target, strides, batch, head, start, stop, tile, D: tl.constexpr, ROWS: tl.constexpr, DIMS: tl.constexpr):
    """Write a (ROWS, DIMS) tile to positions start … of one head, up to position `stop` and column D."""
    row, column = tl.arange(0, ROWS), tl.arange(0, DIMS)
    at = address(target, strides, batch, head, start) + row[:, None] * strides[2] + column[None, :] * strides[3]
    tl.store(at, tile.to(target.dtype.element_ty), mask=(start + row < stop)[:, None] & (column < D)[None, :])


@triton.jit
def address(tensor, strides, batch, head, position):
    """Where a position of one head begins; 64 bits, since a large batch has more than 2³¹ numbers."""
    return tensor + tl.cast(batch, tl.int64) * strides[0] + tl.cast(head, tl.int64) * strides[1] + tl.cast(position, tl.int64) * strides[2]


@triton.jit
def sees(position, key, S, window, segment, key_segment, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SEGMENTS: tl.constexpr):
    """Whether the query at `position` sees `key`: `visible` of kernels/reference.py, for tiles of either orientation.

    A causal query that sees a key past the end is past the end itself, and its row is never stored: one compare less.
    """
    if CAUSAL:
        seen = key <= position
    else:
        seen = key < S
    if WINDOW:
        seen = seen & (key > position - window)
    if SEGMENTS:
        seen = seen & (segment == key_segment)
    return seen


@triton.jit
def hide_unseen(scores, n, position, segment, segments, batch, S, window, hidden: tl.constexpr, COLUMNS: tl.constexpr, CAUSAL: tl.constexpr,
                WINDOW: tl.constexpr, SEGMENTS: tl.constexpr):
    """Scores (ROWS, COLUMNS) of the queries at `position` and the keys from n on, `hidden` where a query does not see the key."""
    key = n + tl.arange(0, COLUMNS)
    key_segment = key
    if SEGMENTS:
        key_segment = tl.load(segments + batch.to(tl.int64) * S + key, mask=key < S, other=0)
    seen = sees(position[:, None], key[None, :], S, window, segment[:, None], key_segment[None, :], CAUSAL, WINDOW, SEGMENTS)
    return tl.where(seen, scores, hidden)


@triton.jit
def program_place(tiles, together):
    """(head of B · H, tile of `tiles`) that this program of a grid of B · H · tiles owns.

    `together` heads at a time, whose keys and values fit the L2 cache, so that memory is read once for all their tiles; of
    these heads the first tiles, then the second ones, and so on.
    """
    heads = tl.num_programs(0) // tiles
    first = tl.program_id(0) // (together * tiles) * together       # of the heads that this one is together with
    within = tl.program_id(0) - first * tiles
    size = tl.minimum(together, heads - first)
    return first + within % size, within // size


@triton.jit
def query_tile(H, T, S, blocks, window, segments, least, most, together, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
               CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SEGMENTS: tl.constexpr):
    """Which queries a program owns, and which keys they see.

    → its place among the B · H heads, batch, head, the first row, positions and segments of the ROWS rows, and start,
    whole_start, whole_stop, stop of `keys_to_visit`. The last queries see most keys and come first.
    """
    tiles = tl.cdiv(T, ROWS)
    place, tile = program_place(tiles, together)
    batch, head = place // H, place % H
    start_row = (tiles - 1 - tile) * ROWS
    position = start_row + tl.arange(0, ROWS) + S - T
    segment = position
    if SEGMENTS:
        segment = tl.load(segments + batch.to(tl.int64) * S + tl.minimum(position, S - 1))
        least, most = least + batch * blocks, most + batch * blocks
    last = tl.minimum(start_row + ROWS, T) - 1 + S - T
    start, whole_start, whole_stop, stop = keys_to_visit(start_row + S - T, last, S, window, segment, least, most,
                                                         COLUMNS, CAUSAL, WINDOW, SEGMENTS)
    return place, batch, head, start_row, position, segment, start, whole_start, whole_stop, stop


@triton.jit
def keys_to_visit(first, last, S, window, segment, least, most, COLUMNS: tl.constexpr, CAUSAL: tl.constexpr,
                  WINDOW: tl.constexpr, SEGMENTS: tl.constexpr):
    """start ≤ whole_start ≤ whole_stop ≤ stop, for queries at positions first … last.

    Keys outside start … stop are seen by none of them. The tiles in whole_start … whole_stop are seen in full by all of
    them and need no mask; with segments none are taken to be.
    """
    start, stop = first * 0, S                  # a tensor on every path, which 0 is not
    if CAUSAL:
        stop = tl.minimum(S, last + 1)
    if WINDOW:
        start = tl.maximum(0, first - window + 1)
    if SEGMENTS:
        start, stop = narrow(start, stop, least, most, tl.min(segment), tl.max(segment))
        whole_start, whole_stop = start, start
    else:
        whole_start, whole_stop = start, stop
        if CAUSAL:
            whole_stop = tl.minimum(stop, first + 1)
        if WINDOW:
            whole_start = start + tl.cdiv(tl.maximum(0, last - window + 1 - start), COLUMNS) * COLUMNS
        whole_start = tl.minimum(whole_start, stop)
        whole_stop = tl.maximum(whole_start, start + tl.maximum(0, whole_stop - start) // COLUMNS * COLUMNS)
    return start, whole_start, whole_stop, stop


@triton.jit
def part_of(part: tl.constexpr, start, whole_start, whole_stop, stop):
    """(from, to) of the keys of part 0, the window's edge; part 1, the whole tiles; part 2, the diagonal and the last tile."""
    if part == 0:
        bounds = (start, whole_start)
    elif part == 1:
        bounds = (whole_start, whole_stop)
    else:
        bounds = (whole_stop, stop)
    return bounds


@triton.jit
def fold(scores, top, total, scale):
    """One step of the online softmax: weights of new `scores` (ROWS, COLUMNS), and what rows have summed up so far.

    top: the largest score so far, times scale · log2 e; total: Σ exp2(score − top). → weights, the new top and total, and
    `shrink`, by which whatever was summed under the old top is multiplied.
    """
    higher = tl.maximum(top, tl.max(scores, 1) * (scale * LOG2_E))
    weights = tl.exp2(scores * (scale * LOG2_E) - higher[:, None])
    shrink = tl.exp2(top - higher)
    return weights, higher, total * shrink + tl.sum(weights, 1), shrink


@triton.jit
def finish(top, total):
    """(what sums of weights are divided by, natural lse) of rows; 1 and −inf where a row has seen nothing, so that it is zero."""
    nothing = total == 0
    total = tl.where(nothing, 1.0, total)
    return total, tl.where(nothing, UNSEEN, top * LN_2 + tl.log(total))


@triton.jit
def narrow(start, stop, least, most, smallest, largest):
    """start … stop cut down to the span of blocks that may hold a segment id between `smallest` and `largest`.

    least, most: the ends of each block's ids, from `segment_ends`. The span is tight for packed documents, whose ids never
    fall; with ids in another order it is wider than need be, and right.
    """
    first, past = stop, start
    for b in range(start // SEGMENT_BLOCK, tl.cdiv(stop, SEGMENT_BLOCK), 128):
        block = b + tl.arange(0, 128)
        inside = block < tl.cdiv(stop, SEGMENT_BLOCK)
        hit = inside & (tl.load(least + block, mask=inside, other=0) <= largest) & (tl.load(most + block, mask=inside, other=0) >= smallest)
        first = tl.minimum(first, tl.min(tl.where(hit, block * SEGMENT_BLOCK, stop)))
        past = tl.maximum(past, tl.max(tl.where(hit, block * SEGMENT_BLOCK + SEGMENT_BLOCK, start)))
    first = tl.maximum(first, start)
    return first, tl.maximum(tl.minimum(past, stop), first)


def masks_of(q: Tensor, k: Tensor, causal: bool, window: int | None, segments: Tensor | None, scale: float, precision: str) -> dict:
    """The arguments by which every kernel knows shapes and masks."""
    S = k.shape[2]
    if window is not None and window >= S:
        window = None                                               # every query sees as far back as there are keys
    least = most = None
    if segments is not None:
        segments = segments.to(torch.int32).contiguous()            # of 64 bits they would take registers that wide tiles lack
        least, most = segment_ends(segments)
    return {"segments": segments, "least": least, "most": most,
            "blocks": 0 if least is None else least.shape[1], "H": q.shape[1], "K": k.shape[1], "T": q.shape[2], "S": S,
            "window": window or 0, "scale": scale, "CAUSAL": causal, "WINDOW": window is not None, "SEGMENTS": segments is not None,
            "PRECISION": precision}


def segment_ends(segments: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and the largest id in each SEGMENT_BLOCK positions of segments (B, S): (B, blocks) each."""
    padding = segments[:, -1:].expand(-1, -segments.shape[1] % SEGMENT_BLOCK.value)
    blocks = torch.cat([segments, padding], 1).unflatten(1, (-1, SEGMENT_BLOCK.value))
    return blocks.amin(-1), blocks.amax(-1)


def for_copy_engine(tensor: Tensor) -> Tensor:
    """The tensor itself where the copy engine can read it: columns side by side, all else a multiple of 16 bytes apart.

    So lies whatever a projection of D a multiple of 8 writes. Anything else is copied to where it can be read.
    """
    size, (batch, head, position, column) = tensor.itemsize, tensor.stride()
    # Nearly always it is this, which takes 1 µs less a tensor than leaving out dimensions of one.
    if column == 1 and min(batch, head, position) > 0 and (tensor.data_ptr() | (batch | head | position) * size) % 16 == 0:
        return tensor
    apart = [stride * size for stride, n in zip((batch, head, position), tensor.shape) if n > 1]
    if column == 1 and tensor.data_ptr() % 16 == 0 and all(a > 0 and a % 16 == 0 for a in apart):
        return tensor
    D, per_16_bytes = tensor.shape[3], 16 // size
    copy = tensor.new_empty(*tensor.shape[:3], -(-D // per_16_bytes) * per_16_bytes)[..., :D]
    return copy.copy_(tensor)


def descriptor(tensor: Tensor, rows: int, dims: int) -> TensorDescriptor:
    """A (B, heads, positions, D) tensor as the copy engine reads it, `rows` positions at a time.

    Made without triton's checks, 3 µs for each of a call's up to nine: `for_copy_engine` has checked the same.
    """
    shape, strides = list(tensor.shape), list(tensor.stride())
    if 1 in shape:                                                  # a stride of one alone may be anything: any will do
        strides[:3] = [16 if n == 1 else stride for stride, n in zip(strides[:3], shape)]
    made = object.__new__(TensorDescriptor)
    made.__dict__ = {"base": tensor, "shape": shape, "strides": strides, "block_shape": [1, 1, rows, dims]}
    return made


def for_pointers(tensor: Tensor) -> Tensor:
    """The tensor itself, or a copy where a tile would span more than the 32 bits that offsets inside one have."""
    return tensor if max(tensor.stride()[2:]) * 256 < 2 ** 31 else tensor.contiguous()
