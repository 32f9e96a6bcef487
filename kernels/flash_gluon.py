"""The forward kernel of kernels/flash.py in Gluon, for Hopper: softmax beside the tensor cores.

Triton computes a tile's scores, then its softmax, then its sums; during softmax the tensor cores
idle. Here softmax of one tile runs beside the product of weights and values of the previous tile
(Shah et al. 2024, "FlashAttention-3", section 3.2). Gluon is Triton in which shared memory, copies
and waits are written out.

tests/gluon_machine.py runs the source below on the CPU; a missing wait is an error there.
"""

from functools import cache
from typing import NamedTuple

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.arguments import descriptor_fields, kernel_arguments
from kernels.launch import VARYING, heads_together, launch, query_grid
from kernels.problem import Problem
from kernels.tiles import (
    DIAGONAL,
    FLOOR,
    SEGMENT_BLOCK,
    UNSEEN,
    WHOLE_TILES,
    WINDOW_EDGE,
    KeyRange,
    Masks,
    address,
    finish,
    fold,
    keys_to_visit,
    part_of,
    program_place,
    sees,
)

# The first is its name up to triton 3.6, the second from 3.7 on.
thread_barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier


class Shared(NamedTuple):
    """A program's shared memory: tiles, and for each a barrier that says when its copy is there."""

    q_tile: gl.shared_memory_descriptor
    k_tiles: gl.shared_memory_descriptor        # STAGES buffers
    v_tiles: gl.shared_memory_descriptor        # STAGES buffers
    q_here: gl.shared_memory_descriptor
    k_here: gl.shared_memory_descriptor         # STAGES barriers
    v_here: gl.shared_memory_descriptor         # STAGES barriers


@gluon.jit
def allocate(q, k, v, ROWS: gl.constexpr, COLUMNS: gl.constexpr, DIMS: gl.constexpr,
             STAGES: gl.constexpr):
    """A program's `Shared`, with barriers that TMA can see."""
    q_tile = gl.allocate_shared_memory(q.dtype, [1, 1, ROWS, DIMS], q.layout)
    k_tiles = gl.allocate_shared_memory(k.dtype, [STAGES, 1, 1, COLUMNS, DIMS], k.layout)
    v_tiles = gl.allocate_shared_memory(v.dtype, [STAGES, 1, 1, COLUMNS, DIMS], v.layout)
    q_here = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_here = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_here = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_here, count=1)
    for n in gl.static_range(STAGES):
        mbarrier.init(k_here.index(n), count=1)
        mbarrier.init(v_here.index(n), count=1)
    fence_async_shared()                            # TMA sees what `init` wrote
    return Shared(q_tile, k_tiles, v_tiles, q_here, k_here, v_here)


@gluon.jit
def expect(tensor, arrived, needed=True):
    """Make the barrier `arrived` wait for one tile of `tensor`."""
    mbarrier.expect(arrived, tensor.block_type.nbytes, pred=needed)


@gluon.jit
def copy(tensor, batch, head, position, arrived, tile, needed=True):
    """Make TMA fill a tile of shared memory and then signal the barrier `arrived`."""
    at = [batch, head, position, 0]
    tma.async_copy_global_to_shared(tensor, at, arrived, tile, pred=needed)


@gluon.jit
def fetch_first(k, v, shared, batch, key_head, start, tiles, COLUMNS: gl.constexpr,
                STAGES: gl.constexpr):
    """Start the copies of the first STAGES tiles of keys and of values, or of all if fewer."""
    for n in gl.static_range(STAGES):
        n_start, needed = start + n * COLUMNS, n < tiles
        k_arrived, v_arrived = shared.k_here.index(n), shared.v_here.index(n)
        expect(k, k_arrived, needed)
        copy(k, batch, key_head, n_start, k_arrived, shared.k_tiles.index(n), needed)
        expect(v, v_arrived, needed)
        copy(v, batch, key_head, n_start, v_arrived, shared.v_tiles.index(n), needed)


@gluon.jit
def narrow_to_segments(start, stop, batch, masks, segment, WARPS: gl.constexpr):
    """`narrow` of kernels/tiles.py with a layout, without which Gluon makes no range of numbers."""
    least, most = masks.least + batch * masks.blocks, masks.most + batch * masks.blocks
    smallest, largest = gl.min(segment), gl.max(segment)
    first, past = stop, start
    for b in range(start // SEGMENT_BLOCK, gl.cdiv(stop, SEGMENT_BLOCK), 128):
        block = b + gl.arange(0, 128, layout=gl.BlockedLayout([1], [32], [WARPS], [0]))
        inside = block < gl.cdiv(stop, SEGMENT_BLOCK)
        reaches_up = gl.load(most + block, mask=inside, other=0) >= smallest
        reaches_down = gl.load(least + block, mask=inside, other=0) <= largest
        hit = inside & reaches_up & reaches_down
        first = gl.minimum(first, gl.min(gl.where(hit, block * SEGMENT_BLOCK, stop)))
        past = gl.maximum(past, gl.max(gl.where(hit, (block + 1) * SEGMENT_BLOCK, start)))
    first = gl.maximum(first, start)
    return first, gl.maximum(gl.minimum(past, stop), first)


@gluon.jit
def tiles_to_visit(start_row, position, T, batch, masks, ROWS: gl.constexpr, COLUMNS: gl.constexpr,
                   CAUSAL: gl.constexpr, WINDOW: gl.constexpr, SEGMENTS: gl.constexpr,
                   WARPS: gl.constexpr):
    """`keys_to_visit` of kernels/tiles.py, counted in tiles.

    Returns the segments of the queries, the first key, and a `KeyRange` of numbers of tiles, which
    starts at 1: tile 0 is always visited, whatever it holds.
    """
    segment = position
    first = start_row + masks.S - T
    last = gl.minimum(start_row + ROWS, T) - 1 + masks.S - T
    start, whole_start, whole_stop, stop = keys_to_visit(first, last, batch, segment, masks,
                                                         COLUMNS, CAUSAL, WINDOW, False)
    if SEGMENTS:
        at = gl.minimum(position, masks.S - 1)
        segment = gl.load(masks.segments + gl.cast(batch, gl.int64) * masks.S + at)
        start, stop = narrow_to_segments(start, stop, batch, masks, segment, WARPS)
        whole_start, whole_stop = start, start
    edge = gl.maximum(1, gl.cdiv(whole_start - start, COLUMNS))
    whole = gl.maximum(1, gl.cdiv(whole_stop - start, COLUMNS))
    tiles = gl.maximum(1, gl.cdiv(stop - start, COLUMNS))
    return segment, start, KeyRange(1, edge, whole, tiles)


@gluon.jit
def hide(scores, n, position, segment, batch, masks, layout: gl.constexpr, COLUMNS: gl.constexpr,
         CAUSAL: gl.constexpr, WINDOW: gl.constexpr, SEGMENTS: gl.constexpr):
    """`hide_unseen` of kernels/tiles.py, likewise with a layout."""
    key = n + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout))
    key_segment = key
    if SEGMENTS:
        at = masks.segments + gl.cast(batch, gl.int64) * masks.S + key
        key_segment = gl.load(at, mask=key < masks.S, other=0)
    seen = sees(position[:, None], key[None, :], masks.S, masks.window, segment[:, None],
                key_segment[None, :], CAUSAL, WINDOW, SEGMENTS)
    return gl.where(seen, scores, UNSEEN)


@gluon.jit
def store_rows(target, strides, batch, head, start, stop, tile, D: gl.constexpr,
               ROWS: gl.constexpr, DIMS: gl.constexpr, WARPS: gl.constexpr):
    """`store_tile` of kernels/tiles.py, 16 bytes per thread; accumulators have 4 adjacent ones."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIMS, DIMS // 8], [WARPS, 1], [1, 0])
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    column = gl.arange(0, DIMS, layout=gl.SliceLayout(0, layout))
    at = address(target, strides, batch, head, start)
    at = at + row[:, None] * strides[2] + column[None, :] * strides[3]
    tile = gl.convert_layout(tile, layout)
    gl.store(at, tile, mask=(start + row < stop)[:, None] & (column < D)[None, :])


@gluon.jit(do_not_specialize=VARYING)
def forward_gluon(q, k, v, out, out_strides, lse, segments, least, most, H, K, T, S, blocks, window,
                  together, scale, D: gl.constexpr, DIMS: gl.constexpr, ROWS: gl.constexpr,
                  COLUMNS: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
                  WINDOW: gl.constexpr, SEGMENTS: gl.constexpr):
    """One tile of ROWS queries of one head against all keys they see → out and lse, as `forward`.

    q, k, v are tensor descriptors of (B, heads, positions, D); a tile has DIMS columns, zeros from
    D on. Tile i of the keys is the (i // STAGES)th in buffer i % STAGES; the phase to wait for is
    whether that is even or odd.
    """
    WARPS: gl.constexpr = gl.num_warps()
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, COLUMNS, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, DIMS, 16])
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, score_layout)
    acc_row_layout: gl.constexpr = gl.SliceLayout(1, acc_layout)
    masks = Masks(S, window, segments, least, most, blocks)

    # Which queries; the first copies.
    shared = allocate(q, k, v, ROWS, COLUMNS, DIMS, STAGES)
    q_tile, k_tiles, v_tiles, q_here, k_here, v_here = shared
    row_tiles = gl.cdiv(T, ROWS)
    place, row_tile = program_place(row_tiles, together)
    batch, head = place // H, place % H
    key_head = head // (H // K)                     # a group of H/K query heads reads one key head
    start_row = (row_tiles - 1 - row_tile) * ROWS   # those with most keys first
    expect(q, q_here)
    copy(q, batch, head, start_row, q_here, q_tile)
    row = start_row + gl.arange(0, ROWS, layout=row_layout)
    position = row + S - T
    segment, start, visits = tiles_to_visit(start_row, position, T, batch, masks, ROWS, COLUMNS,
                                            CAUSAL, WINDOW, SEGMENTS, WARPS)
    tiles = visits.stop
    fetch_first(k, v, shared, batch, key_head, start, tiles, COLUMNS, STAGES)

    # Tile 0 of the keys.
    q_rows = q_tile.reshape([ROWS, DIMS])
    no_scores = gl.zeros([ROWS, COLUMNS], gl.float32, score_layout)
    acc = gl.zeros([ROWS, DIMS], gl.float32, acc_layout)            # the three sums of `forward`
    total = gl.zeros([ROWS], gl.float32, row_layout)
    top = gl.full([ROWS], FLOOR, gl.float32, row_layout)
    mbarrier.wait(q_here, 0)
    mbarrier.wait(k_here.index(0), 0)
    k_columns = k_tiles.index(0).reshape([COLUMNS, DIMS]).permute((1, 0))
    scores = warpgroup_mma(q_rows, k_columns, no_scores, use_acc=False)
    expect(k, k_here.index(0), tiles > STAGES)
    thread_barrier()                                # until all warps have read k's tile 0
    n_start = start + STAGES * COLUMNS
    copy(k, batch, key_head, n_start, k_here.index(0), k_tiles.index(0), tiles > STAGES)
    scores = hide(scores, start, position, segment, batch, masks, score_layout, COLUMNS, CAUSAL,
                  WINDOW, SEGMENTS)
    weights, top, total, _ = fold(scores, top, total, scale)
    weights = gl.convert_layout(weights.to(v.dtype), weight_layout)

    # The other tiles: a loop for the window's edge, one for whole tiles, one for the diagonal. Each
    # turn begins with the weights of the previous tile, whose values are not in `acc` yet.
    for part in gl.static_range(DIAGONAL if SEGMENTS else WINDOW_EDGE if WINDOW else WHOLE_TILES,
                                DIAGONAL + 1):
        part_start, part_stop = part_of(part, visits)
        for i in range(part_start, part_stop):
            buffer, before = i % STAGES, (i - 1) % STAGES
            mbarrier.wait(k_here.index(buffer), i // STAGES & 1)
            k_columns = k_tiles.index(buffer).reshape([COLUMNS, DIMS]).permute((1, 0))
            new_scores = warpgroup_mma(q_rows, k_columns, no_scores, use_acc=False, is_async=True)
            mbarrier.wait(v_here.index(before), (i - 1) // STAGES & 1)
            v_rows = v_tiles.index(before).reshape([COLUMNS, DIMS])
            new_acc = warpgroup_mma(weights, v_rows, acc, is_async=True)
            scores = warpgroup_mma_wait(1, deps=[new_scores])           # `new_acc` runs on
            if part != WHOLE_TILES:
                scores = hide(scores, start + i * COLUMNS, position, segment, batch, masks,
                              score_layout, COLUMNS, CAUSAL, WINDOW, SEGMENTS)
            weights, top, total, shrink = fold(scores, top, total, scale)
            # q's tile arrived long ago, but no instruction crosses the loop that asks for it.
            # Without it ptxas moves the next wait up, to D = 128 before the exponentials.
            mbarrier.wait(q_here, 0)
            acc = warpgroup_mma_wait(0, deps=[new_acc])
            acc = acc * gl.convert_layout(shrink, acc_row_layout)[:, None]
            weights = gl.convert_layout(weights.to(v.dtype), weight_layout)
            ahead = i + STAGES
            expect(k, k_here.index(buffer), ahead < tiles)
            expect(v, v_here.index(before), ahead - 1 < tiles)
            thread_barrier()                # until all warps have read k's tile i and v's i − 1
            n_start = start + ahead * COLUMNS
            copy(k, batch, key_head, n_start, k_here.index(buffer), k_tiles.index(buffer),
                 ahead < tiles)
            copy(v, batch, key_head, n_start - COLUMNS, v_here.index(before), v_tiles.index(before),
                 ahead - 1 < tiles)

    # The values of the last tile.
    buffer = (tiles - 1) % STAGES
    mbarrier.wait(v_here.index(buffer), (tiles - 1) // STAGES & 1)
    acc = warpgroup_mma(weights, v_tiles.index(buffer).reshape([COLUMNS, DIMS]), acc)

    total, row_lse = finish(top, total)
    gl.store(lse + gl.cast(place, gl.int64) * T + row, row_lse, mask=row < T)
    acc = acc / gl.convert_layout(total, acc_row_layout)[:, None]
    store_rows(out, out_strides, batch, head, start_row, T, acc.to(v.dtype), D, ROWS, DIMS, WARPS)


def launch_gluon(problem: Problem, v: Tensor, out: Tensor, lse: Tensor) -> None:
    """Start `forward_gluon`, in place of `launch(forward, …)`, on a device of the family "hopper".

    q, k and v are `readable` and of 2 bytes, scale > 0, out (B, H, T, D) has any strides, and
    lse (B, H, T) is contiguous.
    """
    q, k = problem.q, problem.k
    (B, H, _, _), (_, K, S, _) = q.shape, k.shape
    launch(forward_gluon, query_grid(q), q, rows={"q": q}, columns={"k": k, "v": v},
           describe=described, out=out, out_strides=out.stride(), lse=lse,
           together=heads_together(k, S, B * H, H // K), **kernel_arguments(problem))


def described(tensor: Tensor, rows: int, dims: int) -> TensorDescriptor:
    """`descriptor` of kernels/arguments.py, with the layout of a tile in shared memory.

    Likewise without triton's checks, which take 10 µs.
    """
    made = object.__new__(TensorDescriptor)
    made.__dict__ = descriptor_fields(tensor, rows, dims)
    made.layout = tile_layout(rows, dims)
    return made


@cache
def tile_layout(rows: int, dims: int) -> gl.NVMMASharedLayout:
    """The layout of a tile of 16-bit numbers in shared memory."""
    return gl.NVMMASharedLayout.get_default_for([1, 1, rows, dims], gl.bfloat16)    # fp16's too
