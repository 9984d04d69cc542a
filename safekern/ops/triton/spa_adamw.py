"""``spa_adamw_`` in Triton: one launch per tensor."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from safekern.ops.triton.common import (
    BLOCK,
    LAUNCH,
    Spec,
    adamw,
    adamw_bits,
    check_count,
    check_dtype,
    check_float,
    check_indices,
    check_numel,
    check_tensor,
    dtype_name,
    load_run,
    narrow,
    on,
    store_run,
)


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
    count = len(params)
    check_count(grads, count, "gradients")
    check_count(indices, count, "index tensors")
    check_count(exp_avgs, count, "first moments")
    check_count(exp_avg_sqs, count, "second moments")
    if not len(step_sizes) == len(bias_correction2_sqrts) == count:
        raise RuntimeError(f"safekern: expected {count} step sizes and bias corrections")
    for t, param in enumerate(params):
        check_tensor(param, params[0].device, "a parameter")
        check_float(param)
        for other in (grads[t], exp_avgs[t], exp_avg_sqs[t]):
            check_tensor(other, params[0].device, "a gradient or moment")
            check_numel(other, param.numel(), "a gradient or moment")
            if other.dtype not in (param.dtype, torch.float32):
                raise RuntimeError(
                    "safekern: a gradient or moment must be Float or its parameter's "
                    f"{dtype_name(param.dtype)}, got {dtype_name(other.dtype)}"
                )
        check_dtype(exp_avg_sqs[t], exp_avgs[t].dtype, "a second moment")
        check_indices(indices[t], params[0].device)
    for t, param in enumerate(params):
        blocks = -(-param.numel() // BLOCK)
        if blocks:
            with on(param.device):
                spa_adamw_kernel[(blocks,)](
                    param,
                    grads[t],
                    exp_avgs[t],
                    exp_avg_sqs[t],
                    indices[t],
                    indices[t].numel(),
                    param.numel(),
                    *adamw_bits(decay, beta1, beta2, eps, step_sizes[t], bias_correction2_sqrts[t]),
                    BLOCK=BLOCK,
                    **LAUNCH,
                )


@triton.jit
def first_at_least(index, count, value, WIDTH: tl.constexpr):
    """Where in ``count`` ascending indices the first one of at least ``value`` is.

    A search with WIDTH probes at a time: a round waits for memory as long as a round of a binary search does.
    """
    low = count * 0
    high = count
    # The answer lies in [low, high].
    while high > low:
        stride = (high - low + WIDTH - 1) // WIDTH
        probes = low + tl.arange(0, WIDTH) * stride
        found = tl.load(index + probes, mask=probes < high, other=0)
        smaller = tl.sum(((probes < high) & (found < value)).to(tl.int64), axis=0)
        # The last smaller probe and the one behind it enclose the answer.
        high = tl.minimum(high, low + smaller * stride)
        low = tl.where(smaller > 0, low + (smaller - 1) * stride + 1, low)
    return low


@triton.jit(
    do_not_specialize=[
        "count",
        "numel",
        "decay",
        "one_minus_beta1",
        "beta2",
        "one_minus_beta2",
        "eps",
        "step_size",
        "bias_correction2_sqrt",
    ]
)
def spa_adamw_kernel(
    param,
    grad,
    exp_avg,
    exp_avg_sq,
    index,
    count: tl.int64,
    numel: tl.int64,
    decay: tl.int64,
    one_minus_beta1: tl.int64,
    beta2: tl.int64,
    one_minus_beta2: tl.int64,
    eps: tl.int64,
    step_size: tl.int64,
    bias_correction2_sqrt: tl.int64,
    BLOCK: tl.constexpr,
):
    """Must move the gradient once, parameter and moments twice, and the indices: 14 bytes per element of bf16.

    It also reads up to 32 sectors per round of the search for the block's first index, mostly from L2: with 600,000
    indices 4 KB per block of 2048 elements, whose streams are 28 KB.
    """
    WORDS: tl.constexpr = BLOCK // 32
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    word = tl.arange(0, WORDS)
    bit = tl.arange(0, 32)
    element = word[:, None] * 32 + bit[None, :]
    size = tl.minimum(numel - begin, BLOCK).to(tl.int32)
    inside = element < size
    full = size == BLOCK

    # One bit per element of the block.
    spared = tl.zeros((WORDS,), tl.int32)
    place = first_at_least(index, count.to(tl.int64), begin, 32)
    end = tl.minimum(begin + BLOCK, numel)
    # Past the last index this is past the block too.
    following = tl.load(index + place, mask=place < count, other=0).to(tl.int64)
    more = (place < count) & (following < end)
    while more:
        places = place + bit
        found = tl.load(index + places, mask=places < count, other=0).to(tl.int64)
        # A repeated index would carry into the bit of its neighbour.
        before = tl.load(index + places - 1, mask=(places > 0) & (places < count), other=-1).to(tl.int64)
        here = (places < count) & (found >= begin) & (found < end) & (found != before)
        relative = tl.where(here, found - begin, -1).to(tl.int32)
        mine = (relative >> 5)[:, None] == word[None, :]
        # The indices differ, so that adding their bits is joining them.
        spared += tl.sum(tl.where(mine, (1 << (relative & 31))[:, None], 0), axis=0)
        place += 32
        following = tl.load(index + place, mask=place < count, other=0).to(tl.int64)
        more = (place < count) & (following < end)
    keep = ((spared[:, None] >> bit[None, :]) & 1) != 0

    old = load_run(param + begin, element, inside, full)
    first = load_run(exp_avg + begin, element, inside, full)
    second = load_run(exp_avg_sq + begin, element, inside, full)
    REAL: tl.constexpr = tl.float64 if old.dtype == tl.float64 else tl.float32
    new, first_after, second_after = adamw(
        old.to(REAL),
        load_run(grad + begin, element, inside, full).to(REAL),
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
    store_run(exp_avg + begin, element, narrow(first_after, first.dtype), inside, full)
    store_run(exp_avg_sq + begin, element, narrow(second_after, second.dtype), inside, full)
    # A masked store would be one of single elements.
    store_run(param + begin, element, tl.where(keep, old, narrow(new, old.dtype)), inside, full)


_SIZES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}
SPECS = [
    Spec(
        spa_adamw_kernel,
        {
            "param": f"*{param}",
            "grad": f"*{grad}",
            "exp_avg": f"*{moment}",
            "exp_avg_sq": f"*{moment}",
            "index": index,
            **dict.fromkeys(
                (
                    "count",
                    "numel",
                    "decay",
                    "one_minus_beta1",
                    "beta2",
                    "one_minus_beta2",
                    "eps",
                    "step_size",
                    "bias_correction2_sqrt",
                ),
                "i64",
            ),
        },
        {"BLOCK": BLOCK},
        loads=BLOCK * (_SIZES[param] + _SIZES[grad] + 2 * _SIZES[moment]),
        stores=BLOCK * (_SIZES[param] + 2 * _SIZES[moment]),
    )
    for param in _SIZES
    for grad in sorted({param, "fp32"})
    for moment in sorted({param, "fp32"})
    for index in ("*i32", "*i64")
]
