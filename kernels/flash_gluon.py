"""The forward kernel of kernels/flash.py in Gluon, for Hopper: softmax beside the tensor cores.

Triton computes a tile's scores, then its softmax, then its sums; meanwhile the tensor cores idle.
Here softmax of one tile runs beside the product of weights and values of the tile before (Shah et
al. 2024, "FlashAttention-3", section 3.2). Gluon is Triton in which memory, copies and waits are
written out.

tests/gluon_machine.py runs the source below on the CPU; a missing wait is an error there.
"""

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

from kernels.launch import VARYING, cdiv, heads_together, launch
from kernels.tiles import (
    FLOOR,
    SEGMENT_BLOCK,
    UNSEEN,
    address,
    descriptor,
    finish,
    fold,
    keys_to_visit,
    part_of,
    program_place,
    sees,
)

# Its name until triton 3.6, and since.
thread_barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier


@gluon.jit
def expect(tensor, arrived, needed=True):
    """Let the barrier `arrived` wait for one tile of `tensor`."""
    mbarrier.expect(arrived, tensor.block_type.nbytes, pred=needed)


@gluon.jit
def copy(tensor, batch, head, position, arrived, tile, needed=True):
    """Let the copy engine fill a tile of shared memory and tell the barrier `arrived`."""
    at = [batch, head, position, 0]
    tma.async_copy_global_to_shared(tensor, at, arrived, tile, pred=needed)


@gluon.jit
def narrow_to_segments(start, stop, least, most, smallest, largest, WARPS: gl.constexpr):
    """`narrow` of kernels/tiles.py, in a layout: without one Gluon makes no range of numbers."""
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
def tiles_to_visit(start_row, position, T, S, batch, blocks, window, segments, least, most,
                   ROWS: gl.constexpr, COLUMNS: gl.constexpr, CAUSAL: gl.constexpr,
                   WINDOW: gl.constexpr, SEGMENTS: gl.constexpr, WARPS: gl.constexpr):
    """`keys_to_visit` of kernels/tiles.py, counted in tiles.

    → the segments of the queries, the first key, and how many tiles have been visited after the
    window's edge, after the whole tiles, and at the end. Tile 0 is visited whatever it holds.
    """
    segment = position
    first, last = start_row + S - T, gl.minimum(start_row + ROWS, T) - 1 + S - T
    start, whole_start, whole_stop, stop = keys_to_visit(
        first, last, S, window, segment, least, most, COLUMNS, CAUSAL, WINDOW, False)
    if SEGMENTS:
        at = gl.minimum(position, S - 1)
        segment = gl.load(segments + gl.cast(batch, gl.int64) * S + at)
        start, stop = narrow_to_segments(start, stop, least + batch * blocks, most + batch * blocks,
                                         gl.min(segment), gl.max(segment), WARPS)
        whole_start, whole_stop = start, start
    edge = gl.maximum(1, gl.cdiv(whole_start - start, COLUMNS))
    whole = gl.maximum(1, gl.cdiv(whole_stop - start, COLUMNS))
    tiles = gl.maximum(1, gl.cdiv(stop - start, COLUMNS))
    return segment, start, edge, whole, tiles


@gluon.jit
def hide(scores, n, position, segment, segments, batch, S, window, layout: gl.constexpr,
         COLUMNS: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, SEGMENTS: gl.constexpr):
    """`hide_unseen` of kernels/tiles.py, likewise in a layout."""
    key = n + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout))
    key_segment = key
    if SEGMENTS:
        at = segments + gl.cast(batch, gl.int64) * S + key
        key_segment = gl.load(at, mask=key < S, other=0)
    seen = sees(position[:, None], key[None, :], S, window, segment[:, None], key_segment[None, :],
                CAUSAL, WINDOW, SEGMENTS)
    return gl.where(seen, scores, UNSEEN)


@gluon.jit
def store_rows(target, strides, batch, head, start, stop, tile, D: gl.constexpr,
               ROWS: gl.constexpr, DIMS: gl.constexpr, WARPS: gl.constexpr):
    """`store_tile` of kernels/tiles.py, 16 bytes a thread; accumulators have 4 side by side."""
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
    fence_async_shared()                            # the copy engine sees what `init` wrote

    row_tiles = gl.cdiv(T, ROWS)
    place, row_tile = program_place(row_tiles, together)
    batch, head = place // H, place % H
    key_head = head // (H // K)                     # a group of H/K query heads reads one key head
    start_row = (row_tiles - 1 - row_tile) * ROWS   # those with most keys first
    expect(q, q_here)
    copy(q, batch, head, start_row, q_here, q_tile)
    row = start_row + gl.arange(0, ROWS, layout=row_layout)
    position = row + S - T
    segment, start, edge, whole, tiles = tiles_to_visit(
        start_row, position, T, S, batch, blocks, window, segments, least, most, ROWS, COLUMNS,
        CAUSAL, WINDOW, SEGMENTS, WARPS)
    for n in gl.static_range(STAGES):
        n_start, needed = start + n * COLUMNS, n < tiles
        expect(k, k_here.index(n), needed)
        copy(k, batch, key_head, n_start, k_here.index(n), k_tiles.index(n), needed)
        expect(v, v_here.index(n), needed)
        copy(v, batch, key_head, n_start, v_here.index(n), v_tiles.index(n), needed)

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
    scores = hide(scores, start, position, segment, segments, batch, S, window, score_layout,
                  COLUMNS, CAUSAL, WINDOW, SEGMENTS)
    weights, top, total, _ = fold(scores, top, total, scale)
    weights = gl.convert_layout(weights.to(v.dtype), weight_layout)
    # A loop for the window's edge, one for whole tiles, one for the diagonal. Each turn begins with
    # the weights of the tile before, whose values are not in `acc` yet.
    for part in gl.static_range(2 if SEGMENTS else 0 if WINDOW else 1, 3):
        part_start, part_stop = part_of(part, 1, edge, whole, tiles)
        for i in range(part_start, part_stop):
            buffer, before = i % STAGES, (i - 1) % STAGES
            mbarrier.wait(k_here.index(buffer), i // STAGES & 1)
            k_columns = k_tiles.index(buffer).reshape([COLUMNS, DIMS]).permute((1, 0))
            new_scores = warpgroup_mma(q_rows, k_columns, no_scores, use_acc=False, is_async=True)
            mbarrier.wait(v_here.index(before), (i - 1) // STAGES & 1)
            v_rows = v_tiles.index(before).reshape([COLUMNS, DIMS])
            new_acc = warpgroup_mma(weights, v_rows, acc, is_async=True)
            scores = warpgroup_mma_wait(1, deps=[new_scores])           # `new_acc` runs on
            if part != 1:
                scores = hide(scores, start + i * COLUMNS, position, segment, segments, batch, S,
                              window, score_layout, COLUMNS, CAUSAL, WINDOW, SEGMENTS)
            weights, top, total, shrink = fold(scores, top, total, scale)
            # q's tile is long there, but no instruction crosses the loop that asks for it. Without
            # it ptxas moves the next wait up, to D = 128 before the exponentials.
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
    buffer = (tiles - 1) % STAGES
    mbarrier.wait(v_here.index(buffer), (tiles - 1) // STAGES & 1)
    acc = warpgroup_mma(weights, v_tiles.index(buffer).reshape([COLUMNS, DIMS]), acc)

    total, row_lse = finish(top, total)
    gl.store(lse + gl.cast(place, gl.int64) * T + row, row_lse, mask=row < T)
    acc = acc / gl.convert_layout(total, acc_row_layout)[:, None]
    store_rows(out, out_strides, batch, head, start_row, T, acc.to(v.dtype), D, ROWS, DIMS, WARPS)


def launch_gluon(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, masks: dict) -> None:
    """Start `forward_gluon`, in place of `launch(forward, …)`, on a device of the family "hopper".

    q, k, v are `readable` and of 2 bytes, out (B, H, T, D) has any strides, lse (B, H, T) is
    contiguous, and `masks` is what `masks_of` returns.
    """
    (B, H, T, _), (_, K, S, _) = q.shape, k.shape
    launch(forward_gluon, lambda tile: (B * H * cdiv(T, tile.rows), 1, 1), q, rows={"q": q},
           columns={"k": k, "v": v}, describe=described, out=out, out_strides=out.stride(), lse=lse,
           together=heads_together(k, S, B * H, H // K), **masks)


def described(tensor: Tensor, rows: int, dims: int) -> TensorDescriptor:
    """`descriptor` of kernels/tiles.py, which also says how a tile lies in shared memory."""
    plain = descriptor(tensor, rows, dims)
    layout = gl.NVMMASharedLayout.get_default_for(plain.block_shape, gl.bfloat16)       # fp16's too
    return TensorDescriptor(tensor, plain.shape, plain.strides, plain.block_shape, layout)
