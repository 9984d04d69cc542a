"""``sigma`` in Triton: one launch per dtype, and one that merges."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from safekern.ops.triton.common import (
    FLOATS,
    LAUNCH,
    THREADS,
    Spec,
    aligned,
    check_float,
    check_tensor,
    find,
    first_blocks,
    groups,
    on,
    pointer,
    table,
)

# The order of all sums is that of the CPU kernel, so that both give the same bits: chunks of CHUNK elements, LANES sums
# in each, and one chunk after the other.
CHUNK, LANES, PIVOT = 4096, 8, 64
# One thread per chunk holds its sums.
CHUNKS = THREADS


def sigma(params: Sequence[Tensor]) -> Tensor:
    """See :func:`safekern.ops.sigma.reference`. The same bits as the CPU kernel's."""
    if not params:
        return torch.empty(0)
    device = params[0].device
    for param in params:
        check_tensor(param, device, "a parameter")
        check_float(param)
    numels = [param.numel() for param in params]
    first_chunks = first_blocks(numels, CHUNK)
    means, squares = (torch.empty(first_chunks[-1], dtype=torch.float64, device=device) for _ in range(2))
    result = torch.empty(len(params), dtype=torch.float32, device=device)
    present = [t for t, numel in enumerate(numels) if numel]
    with on(device):
        for group in groups((params[t].dtype, aligned(params[t])) for t in present):
            chosen = [present[position] for position in group]
            first = first_blocks([numels[t] for t in chosen], CHUNK * CHUNKS)
            entries = table(
                [
                    first[:-1],
                    [params[t].data_ptr() for t in chosen],
                    [numels[t] for t in chosen],
                    [first_chunks[t] for t in chosen],
                ],
                device,
            )
            chunks_kernel[(first[-1],)](
                entries,
                len(chosen),
                means,
                squares,
                TYPE=FLOATS[params[chosen[0]].dtype],
                ALIGNED=aligned(params[chosen[0]]),
                CHUNK=CHUNK,
                LANES=LANES,
                PIVOT=PIVOT,
                CHUNKS=CHUNKS,
                ROWS=_rows(params[chosen[0]].dtype),
                **LAUNCH,
            )
        merge_kernel[(len(params),)](
            table([first_chunks[:-1], numels], device),
            len(params),
            means,
            squares,
            result,
            CHUNK=CHUNK,
            **LAUNCH,
        )
    return result


def _rows(dtype: torch.dtype) -> int:
    """How many of a chunk's rows of LANES elements a thread has under way at a time: what its registers hold."""
    return 2 if dtype == torch.float64 else 4


@triton.jit(do_not_specialize=["tensors"])
def chunks_kernel(
    table,
    tensors: tl.int32,
    means,
    squares,
    TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    LANES: tl.constexpr,
    PIVOT: tl.constexpr,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Mean and sum of squared deviations of every chunk. Must move, and moves, every weight once.

    The 16 bytes per chunk that it writes are 0.2% of a bf16 tensor.
    """
    block = tl.program_id(0).to(tl.int64)
    t = find(table, tensors, block)
    base = pointer(table + tensors + t, TYPE, ALIGNED)
    numel = tl.load(table + 2 * tensors + t)
    chunk = (block - tl.load(table + t)) * CHUNKS + tl.arange(0, CHUNKS)
    begin = chunk * CHUNK
    count = tl.minimum(tl.maximum(numel - begin, 0), CHUNK)

    # Deviations are taken from the mean of the chunk's first elements, see the CPU kernel.
    head = tl.minimum(count, PIVOT)
    pivot = tl.zeros((CHUNKS,), tl.float64)
    for i in range(PIVOT):
        pivot += tl.load(base + begin + i, mask=i < head, other=0).to(tl.float64)
    pivot = pivot / tl.maximum(head, 1).to(tl.float64)

    lane = tl.arange(0, LANES)
    sums = tl.zeros((CHUNKS, LANES), tl.float64)
    sums_of_squares = tl.zeros((CHUNKS, LANES), tl.float64)
    rows = count // LANES
    places = base + begin[:, None] + lane[None, :]
    row = numel * 0
    while row < tl.max(rows, axis=0):
        # Several loads under way at a time; each is whole or absent, so that it may take 16 bytes.
        for r in tl.static_range(ROWS):
            present = ((row + r < rows) & (count > 0))[:, None]
            values = tl.load(places + (row + r) * LANES, mask=present, other=0).to(tl.float64)
            deviation = tl.where(present, values - pivot[:, None], 0.0)
            sums += deviation
            sums_of_squares += deviation * deviation
        row += ROWS
    present = lane[None, :] < (count - rows * LANES)[:, None]
    values = tl.load(places + (rows * LANES)[:, None], mask=present, other=0).to(tl.float64)
    deviation = tl.where(present, values - pivot[:, None], 0.0)
    sums += deviation
    sums_of_squares += deviation * deviation

    # One lane after the other; a sum with zeros is exact in any order.
    total = tl.zeros((CHUNKS,), tl.float64)
    total_of_squares = tl.zeros((CHUNKS,), tl.float64)
    for i in tl.static_range(LANES):
        total += tl.sum(tl.where(lane[None, :] == i, sums, 0.0), axis=1)
        total_of_squares += tl.sum(tl.where(lane[None, :] == i, sums_of_squares, 0.0), axis=1)
    size = tl.maximum(count, 1).to(tl.float64)
    spread = total_of_squares - total * total / size
    place = tl.load(table + 3 * tensors + t) + chunk
    tl.store(means + place, pivot + total / size, mask=count > 0)
    tl.store(squares + place, tl.where(spread > 0, spread, 0.0), mask=count > 0)


@triton.jit(do_not_specialize=["tensors"])
def merge_kernel(table, tensors: tl.int32, means, squares, out, CHUNK: tl.constexpr):
    """Merges the chunks of one tensor, one after the other. Moves 16 bytes per chunk."""
    t = tl.program_id(0).to(tl.int64)
    first = tl.load(table + t)
    numel = tl.load(table + tensors + t)
    chunks = (numel + CHUNK - 1) // CHUNK
    zero = numel.to(tl.float64) * 0.0
    count = zero
    mean = zero
    square = zero
    c = chunks * 0
    while c < chunks:
        # Unrolled, so that loads of several chunks are under way at a time.
        for i in tl.static_range(8):
            present = c + i < chunks
            place = first + c + i
            other_mean = tl.load(means + place, mask=present, other=0.0)
            other_square = tl.load(squares + place, mask=present, other=0.0)
            other_count = tl.minimum(numel - (c + i) * CHUNK, CHUNK).to(tl.float64)
            total = count + other_count
            delta = other_mean - mean
            square = tl.where(present, square + (other_square + delta * delta * (count * other_count / total)), square)
            mean = tl.where(present, mean + delta * (other_count / total), mean)
            count = tl.where(present, total, count)
        c += 8
    freedom = count - 1
    deviation = tl.sqrt(square / tl.maximum(freedom, 1.0)).to(tl.float32)
    tl.store(out + t, tl.where(freedom > 0, deviation, 0.0))


SPECS = [
    Spec(
        chunks_kernel,
        {"table": "*i64", "tensors": "i32", "means": "*fp64", "squares": "*fp64"},
        {
            "TYPE": kind,
            "ALIGNED": True,
            "CHUNK": CHUNK,
            "LANES": LANES,
            "PIVOT": PIVOT,
            "CHUNKS": CHUNKS,
            "ROWS": _rows(dtype),
        },
        # What one round of the loop reads.
        loads=_rows(dtype) * CHUNKS * LANES * dtype.itemsize,
    )
    for dtype, kind in FLOATS.items()
] + [
    Spec(
        merge_kernel,
        {"table": "*i64", "tensors": "i32", "means": "*fp64", "squares": "*fp64", "out": "*fp32"},
        {"CHUNK": CHUNK},
    )
]
