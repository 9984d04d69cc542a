"""``spa_adamw_`` in Triton: one launch per combination of dtypes and step count, and one that looks up the indices."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from safekern.ops.triton.common import (
    FLOATS,
    HYPERPARAMETERS,
    INDICES,
    WARP_SIZE,
    Spec,
    adamw,
    adamw_bits,
    aligned,
    check_adamw,
    check_dtype,
    check_numel,
    check_tensor,
    dtype_name,
    find,
    first_at_least,
    first_blocks,
    groups,
    launch_options,
    load_run,
    narrow,
    on,
    pointer,
    size_of,
    store_run,
    table,
)

# Elements per program, 8 for each of its threads: 16 bytes of bf16.
BLOCK, THREADS = 1024, 128
# Blocks per program that looks up their indices.
SEARCHES = 128


def spa_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    indices: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    step_sizes: Sequence[float],
    bias_correction2_sqrts: Sequence[float],
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
) -> None:
    """See :func:`safekern.ops.spa_adamw.reference`. That the indices ascend is not checked: it would wait for them."""
    check_adamw(params, grads, indices, exp_avgs, exp_avg_sqs, step_sizes, bias_correction2_sqrts)
    if not params:
        return
    device = params[0].device
    for param, grad, exp_avg, exp_avg_sq in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        numel, dtype = param.numel(), param.dtype
        for stream in (grad, exp_avg, exp_avg_sq):
            check_tensor(stream, device, "a gradient or moment")
            check_numel(stream, numel, "a gradient or moment")
            if stream.dtype not in (dtype, torch.float32):
                raise RuntimeError(
                    "safekern: a gradient or moment must be Float or its parameter's "
                    f"{dtype_name(dtype)}, got {dtype_name(stream.dtype)}"
                )
        check_dtype(exp_avg_sq, exp_avg.dtype, "a second moment")
    present = [t for t, param in enumerate(params) if param.numel()]
    kinds = (
        (
            params[t].dtype,
            grads[t].dtype,
            exp_avgs[t].dtype,
            indices[t].dtype,
            aligned(params[t], grads[t], exp_avgs[t], exp_avg_sqs[t]),
            step_sizes[t],
            bias_correction2_sqrts[t],
        )
        for t in present
    )
    with on(device):
        for kind, chosen in groups(present, kinds).items():
            param_type, grad_type, moment_type, index_type, is_aligned, step_size, bias_correction2_sqrt = kind
            first = first_blocks((params[t].numel() for t in chosen), BLOCK)
            entries = table(
                [
                    first[:-1],
                    [params[t].numel() for t in chosen],
                    [indices[t].data_ptr() for t in chosen],
                    [indices[t].numel() for t in chosen],
                    *([stream[t].data_ptr() for t in chosen] for stream in (params, grads, exp_avgs, exp_avg_sqs)),
                ],
                device,
            )
            spared = torch.empty(first[-1], dtype=torch.int64, device=device)
            places = (entries, len(chosen), spared, first[-1])
            constants = {"INDEX": INDICES[index_type], "BLOCK": BLOCK, **launch_options(WARP_SIZE, THREADS)}
            search_kernel[(triton.cdiv(first[-1], SEARCHES),)](*places, SEARCHES=SEARCHES, **constants)
            spa_adamw_kernel[(first[-1],)](
                *places,
                *adamw_bits(decay, beta1, beta2, eps, step_size, bias_correction2_sqrt),
                PARAM=FLOATS[param_type],
                GRAD=FLOATS[grad_type],
                MOMENT=FLOATS[moment_type],
                ALIGNED=is_aligned,
                **constants,
            )


@triton.jit(do_not_specialize=["tensors", "blocks"])
def search_kernel(
    table,
    tensors: tl.int32,
    spared,
    blocks: tl.int64,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
    SEARCHES: tl.constexpr,
):
    """Where each block's indices begin in the list of its tensor.

    A thread per block searches: that waits for memory some twenty times, which a program of `spa_adamw_kernel` would do
    with nothing else under way. Moves 8 bytes per block and sectors that are mostly in L2.
    """
    block = tl.program_id(0).to(tl.int64) * SEARCHES + tl.arange(0, SEARCHES)
    exists = block < blocks
    # The last tensor whose first block is at most this one.
    t = first_at_least(table, tl.zeros((SEARCHES,), tl.int32) + tensors, block + 1) - 1
    begin = (block - tl.load(table + t)) * BLOCK
    index = tl.load(table + 2 * tensors + t).to(tl.pointer_type(INDEX))
    count = tl.where(exists, tl.load(table + 3 * tensors + t), 0)
    tl.store(spared + block, first_at_least(index, count, begin), mask=exists)


@triton.jit(do_not_specialize=["tensors", "blocks", *HYPERPARAMETERS])
def spa_adamw_kernel(
    table,
    tensors: tl.int32,
    spared,
    blocks: tl.int64,
    decay: tl.int64,
    one_minus_beta1: tl.int64,
    beta2: tl.int64,
    one_minus_beta2: tl.int64,
    eps: tl.int64,
    step_size: tl.int64,
    bias_correction2_sqrt: tl.int64,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    MOMENT: tl.constexpr,
    INDEX: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Must move, and moves, the gradient once, parameter and moments twice, and the indices: 14 bytes per bf16 element.

    Also 16 bytes per block of 1024 elements.
    """
    block = tl.program_id(0).to(tl.int64)
    place = tl.load(spared + block)
    next_place = tl.load(spared + block + 1, mask=block + 1 < blocks, other=0)
    t = find(table, tensors, block)
    begin = (block - tl.load(table + t)) * BLOCK
    left = tl.load(table + tensors + t) - begin
    size = tl.minimum(left, BLOCK).to(tl.int32)
    # What follows the last block of a tensor is the first one of another.
    end = tl.where(left > BLOCK, next_place, tl.load(table + 3 * tensors + t))
    index = tl.load(table + 2 * tensors + t).to(tl.pointer_type(INDEX))
    param = pointer(table + 4 * tensors + t, PARAM, ALIGNED) + begin
    grad = pointer(table + 5 * tensors + t, GRAD, ALIGNED) + begin
    exp_avg = pointer(table + 6 * tensors + t, MOMENT, ALIGNED) + begin
    exp_avg_sq = pointer(table + 7 * tensors + t, MOMENT, ALIGNED) + begin
    word = tl.arange(0, BLOCK // 32)
    bit = tl.arange(0, 32)
    element = word[:, None] * 32 + bit[None, :]
    inside = element < size
    full = size == BLOCK

    # These are under way while the indices are fetched.
    old = load_run(param, element, inside, full)
    gradient = load_run(grad, element, inside, full)
    first = load_run(exp_avg, element, inside, full)
    second = load_run(exp_avg_sq, element, inside, full)

    # One bit per element of the block.
    kept = tl.zeros((BLOCK // 32,), tl.int32)
    while place < end:
        found = tl.load(index + place + bit, mask=bit < end - place, other=-1).to(tl.int64) - begin
        # A repeated index would carry into the bit of its neighbour.
        before = tl.load(index + place + bit - 1, mask=(bit < end - place) & (place + bit > 0), other=-1) - begin
        here = (found >= 0) & (found < BLOCK) & (found != before)
        relative = tl.where(here, found, -1).to(tl.int32)
        mine = (relative >> 5)[None, :] == word[:, None]
        # The indices differ, so that adding their bits is joining them.
        kept += tl.sum(tl.where(mine, (1 << (relative & 31))[None, :], 0), axis=1)
        place += 32
    keep = ((kept[:, None] >> bit[None, :]) & 1) != 0

    REAL: tl.constexpr = tl.float64 if old.dtype == tl.float64 else tl.float32
    new, first_after, second_after = adamw(
        old.to(REAL),
        gradient.to(REAL),
        first.to(REAL),
        second.to(REAL),
        decay,
        one_minus_beta1,
        beta2,
        one_minus_beta2,
        eps,
        step_size,
        bias_correction2_sqrt,
        REAL,
    )
    # All before the first store: the branches between stores would keep more in registers.
    first_after = narrow(first_after, first.dtype)
    second_after = narrow(second_after, second.dtype)
    # A masked store would be one of single elements.
    new = tl.where(keep, old, narrow(new, old.dtype))
    store_run(exp_avg, element, first_after, inside, full)
    store_run(exp_avg_sq, element, second_after, inside, full)
    store_run(param, element, new, inside, full)


_PLACES = {"table": "*i64", "tensors": "i32", "spared": "*i64", "blocks": "i64"}
SPECS = [
    Spec(search_kernel, _PLACES, {"INDEX": index, "BLOCK": BLOCK, "SEARCHES": SEARCHES}, threads=THREADS)
    for index in INDICES.values()
] + [
    Spec(
        spa_adamw_kernel,
        {**_PLACES, **dict.fromkeys(HYPERPARAMETERS, "i64")},
        {
            "PARAM": param,
            "GRAD": grad,
            "MOMENT": moment,
            "INDEX": index,
            "ALIGNED": True,
            "BLOCK": BLOCK,
        },
        loads=BLOCK * size_of(param, grad, moment, moment),
        stores=BLOCK * size_of(param, moment, moment),
        threads=THREADS,
    )
    for param in FLOATS.values()
    for grad in sorted({param, tl.float32}, key=str)
    for moment in sorted({param, tl.float32}, key=str)
    for index in INDICES.values()
]
