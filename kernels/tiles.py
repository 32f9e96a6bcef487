"""What the Triton kernels share: reading and writing tiles, and which keys a tile of queries sees.

A tile is a small array of fixed size, such as 128 queries × 64 keys of the attention pattern. The
NamedTuples exist only while a kernel is compiled: they cost no instructions. What triton has to
know then (CAUSAL, WINDOW, SEGMENTS) cannot be in one: it would become a number in a register.
"""

from typing import NamedTuple

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)   # exp(x) = exp2(x log2 e), and exp2 is one instruction
LN_2 = tl.constexpr(0.6931471805599453)
UNSEEN = tl.constexpr(float("-inf"))        # score of a key that is not seen: exp2(−inf) = 0
FLOOR = tl.constexpr(-1e20)                 # first running maximum: finite, or −inf − (−inf) = NaN
SEGMENT_BLOCK = tl.constexpr(64)            # positions whose smallest and largest id are kept

# The parts of a walk over the keys, in order. Only whole tiles need no mask.
WINDOW_EDGE, WHOLE_TILES, DIAGONAL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


class Masks(NamedTuple):
    """Which keys queries see, with CAUSAL, WINDOW and SEGMENTS: a kernel's arguments."""

    S: tl.tensor                    # keys
    window: tl.tensor
    segments: tl.tensor             # (B, S); None unless SEGMENTS, as are the next two
    least: tl.tensor                # (B, blocks): the smallest id in each SEGMENT_BLOCK positions
    most: tl.tensor                 # (B, blocks): the largest
    blocks: tl.tensor


class KeyRange(NamedTuple):
    """What a tile of queries walks over: start ≤ whole_start ≤ whole_stop ≤ stop.

    No query of the tile sees a key outside start … stop. All of them see all keys of the tiles in
    whole_start … whole_stop.
    """

    start: tl.tensor
    whole_start: tl.tensor
    whole_stop: tl.tensor
    stop: tl.tensor


class QueryTile(NamedTuple):
    """The queries that a program owns."""

    place: tl.tensor                # among the B · H heads
    batch: tl.tensor
    head: tl.tensor
    start_row: tl.tensor            # the first of them, of T
    position: tl.tensor             # (ROWS,): where they are among the S positions
    segment: tl.tensor              # (ROWS,): their segments
    keys: KeyRange


@triton.jit
def load_tile(source, strides, batch, head, start, stop, D: tl.constexpr, ROWS: tl.constexpr,
              DIMS: tl.constexpr, TMA: tl.constexpr, WHOLE: tl.constexpr = False):
    """Positions start … start + ROWS of one head: (ROWS, DIMS), with zeros from column D on.

    With TMA, `source` is a tensor descriptor and TMA fetches the tile. Otherwise it is
    a pointer, read with any strides. Rows from position `stop` on hold zeros or repeat the last
    row: finite numbers that the caller masks. A repeat needs no bounds check; on sm_80 the check
    makes the compiler spill registers. WHOLE: there are no such rows.
    """
    if TMA:
        tile = source.load([batch, head, start, 0]).reshape(ROWS, DIMS)
    else:
        row, column = tl.arange(0, ROWS), tl.arange(0, DIMS)
        if not WHOLE:
            row = tl.minimum(row, stop - 1 - start)
        at = address(source, strides, batch, head, start)
        at = at + row[:, None] * strides[2] + column[None, :] * strides[3]
        if D == DIMS:
            tile = tl.load(at)
        else:
            tile = tl.load(at, mask=column[None, :] < D, other=0.0)
    return tile


@triton.jit
def store_tile(target, strides, batch, head, start, stop, tile, D: tl.constexpr, ROWS: tl.constexpr,
               DIMS: tl.constexpr):
    """Write a (ROWS, DIMS) tile to positions start … of one head, up to `stop` and column D."""
    row, column = tl.arange(0, ROWS), tl.arange(0, DIMS)
    at = address(target, strides, batch, head, start)
    at = at + row[:, None] * strides[2] + column[None, :] * strides[3]
    inside = (start + row < stop)[:, None] & (column < D)[None, :]
    tl.store(at, tile.to(target.dtype.element_ty), mask=inside)


@triton.jit
def address(tensor, strides, batch, head, position):
    """Where a position of one head begins. 64 bits: a large batch has more than 2³¹ numbers."""
    return (tensor + tl.cast(batch, tl.int64) * strides[0] + tl.cast(head, tl.int64) * strides[1]
            + tl.cast(position, tl.int64) * strides[2])


@triton.jit
def sees(position, key, end, window, segment, key_segment, CAUSAL: tl.constexpr,
         WINDOW: tl.constexpr, SEGMENTS: tl.constexpr):
    """Whether the query at `position` sees `key`, of `end` keys, for tiles of either orientation.

    The same as `visible` of kernels/reference.py. If causal, only a query past the end could see a
    key past the end, and its row is never stored: that saves a compare.
    """
    if CAUSAL:
        seen = key <= position
    else:
        seen = key < end
    if WINDOW:
        seen = seen & (key > position - window)
    if SEGMENTS:
        seen = seen & (segment == key_segment)
    return seen


@triton.jit
def hide_unseen(scores, n, tile, masks, hidden: tl.constexpr, COLUMNS: tl.constexpr,
                CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SEGMENTS: tl.constexpr):
    """Scores (ROWS, COLUMNS) of a tile's queries and the keys from n on.

    `hidden` takes the place of the score if the query does not see the key.
    """
    key = n + tl.arange(0, COLUMNS)
    key_segment = key
    if SEGMENTS:
        at = masks.segments + tile.batch.to(tl.int64) * masks.S + key
        key_segment = tl.load(at, mask=key < masks.S, other=0)
    seen = sees(tile.position[:, None], key[None, :], masks.S, masks.window, tile.segment[:, None],
                key_segment[None, :], CAUSAL, WINDOW, SEGMENTS)
    return tl.where(seen, scores, hidden)


@triton.jit
def program_place(tiles, together):
    """(head of B · H, tile of `tiles`) that this program of a grid of B · H · tiles owns.

    Programs go through `together` heads at a time, whose keys and values fit the L2 cache, so that
    all their tiles read memory once. Of these heads the first tiles come first, then the second.
    """
    heads = tl.num_programs(0) // tiles
    first = tl.program_id(0) // (together * tiles) * together       # head of this program's group
    within = tl.program_id(0) - first * tiles
    size = tl.minimum(together, heads - first)
    return first + within % size, within // size


@triton.jit
def query_tile(H, T, masks, together, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
               CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SEGMENTS: tl.constexpr):
    """The `QueryTile` of this program. The last queries see most keys and come first."""
    tiles = tl.cdiv(T, ROWS)
    place, tile = program_place(tiles, together)
    batch, head = place // H, place % H
    start_row = (tiles - 1 - tile) * ROWS
    position = start_row + tl.arange(0, ROWS) + masks.S - T
    segment = position
    if SEGMENTS:
        at = masks.segments + batch.to(tl.int64) * masks.S + tl.minimum(position, masks.S - 1)
        segment = tl.load(at)
    last = tl.minimum(start_row + ROWS, T) - 1 + masks.S - T
    keys = keys_to_visit(start_row + masks.S - T, last, batch, segment, masks, COLUMNS, CAUSAL,
                         WINDOW, SEGMENTS)
    return QueryTile(place, batch, head, start_row, position, segment, keys)


@triton.jit
def keys_to_visit(first, last, batch, segment, masks, COLUMNS: tl.constexpr, CAUSAL: tl.constexpr,
                  WINDOW: tl.constexpr, SEGMENTS: tl.constexpr):
    """The `KeyRange` of queries at positions first … last.

    With segments no tile is taken to be whole.
    """
    start, stop = first * 0, masks.S            # both must be tensors, which a plain 0 is not
    if CAUSAL:
        stop = tl.minimum(masks.S, last + 1)
    if WINDOW:
        start = tl.maximum(0, first - masks.window + 1)
    if SEGMENTS:
        start, stop = narrow(start, stop, batch, masks, segment)
        whole_start, whole_stop = start, start
    else:
        whole_start, whole_stop = start, stop
        if CAUSAL:
            whole_stop = tl.minimum(stop, first + 1)
        if WINDOW:
            edge = tl.maximum(0, last - masks.window + 1 - start)
            whole_start = start + tl.cdiv(edge, COLUMNS) * COLUMNS
        whole_start = tl.minimum(whole_start, stop)
        whole = tl.maximum(0, whole_stop - start) // COLUMNS * COLUMNS
        whole_stop = tl.maximum(whole_start, start + whole)
    return KeyRange(start, whole_start, whole_stop, stop)


@triton.jit
def part_of(part: tl.constexpr, keys):
    """(from, to) of one part of a `KeyRange`: WINDOW_EDGE, WHOLE_TILES or DIAGONAL."""
    if part == WINDOW_EDGE:
        bounds = (keys.start, keys.whole_start)
    elif part == WHOLE_TILES:
        bounds = (keys.whole_start, keys.whole_stop)
    else:                                       # the diagonal and the last tile
        bounds = (keys.whole_stop, keys.stop)
    return bounds


@triton.jit
def narrow(start, stop, batch, masks, segment):
    """start … stop reduced to the blocks that may hold ids between the least and most `segment`.

    The result is tight for packed documents, whose ids never fall. With ids in another order it is
    wider than necessary, and still correct.
    """
    least, most = masks.least + batch * masks.blocks, masks.most + batch * masks.blocks
    smallest, largest = tl.min(segment), tl.max(segment)
    first, past = stop, start
    for b in range(start // SEGMENT_BLOCK, tl.cdiv(stop, SEGMENT_BLOCK), 128):
        block = b + tl.arange(0, 128)
        inside = block < tl.cdiv(stop, SEGMENT_BLOCK)
        hit = (inside & (tl.load(least + block, mask=inside, other=0) <= largest)
               & (tl.load(most + block, mask=inside, other=0) >= smallest))
        block_start = block * SEGMENT_BLOCK
        first = tl.minimum(first, tl.min(tl.where(hit, block_start, stop)))
        past = tl.maximum(past, tl.max(tl.where(hit, block_start + SEGMENT_BLOCK, start)))
    first = tl.maximum(first, start)
    return first, tl.maximum(tl.minimum(past, stop), first)


@triton.jit
def fold(scores, top, total, scale):
    """One step of the online softmax with new `scores` (ROWS, COLUMNS).

    top (ROWS,): the largest score so far, times scale · log2 e. total (ROWS,): Σ exp2(score − top).
    Returns the weights (ROWS, COLUMNS), the new top, the new total, and `shrink` (ROWS,), by which
    any sum that was taken under the old top has to be multiplied.
    """
    higher = tl.maximum(top, tl.max(scores, 1) * (scale * LOG2_E))
    weights = tl.exp2(scores * (scale * LOG2_E) - higher[:, None])
    shrink = tl.exp2(top - higher)
    return weights, higher, total * shrink + tl.sum(weights, 1), shrink


@triton.jit
def finish(top, total):
    """(divisor of the sums of weights, natural lse) of each row.

    1 and −inf for a row that has seen nothing, whose output is then 0.
    """
    nothing = total == 0
    total = tl.where(nothing, 1.0, total)
    return total, tl.where(nothing, UNSEEN, top * LN_2 + tl.log(total))
