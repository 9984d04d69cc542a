"""``set_adamw_`` in Triton: one launch per combination of dtypes and step count."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from safekern.ops.triton.common import (
    FLOATS,
    HYPERPARAMETERS,
    INDICES,
    SCATTER_BLOCK,
    SELECTED_ROWS,
    WORDS,
    Spec,
    adamw,
    adamw_bits,
    aligned,
    check_adamw,
    check_count,
    check_dtype,
    check_flags,
    check_numel,
    check_tensor,
    groups,
    launch_selected,
    load_run,
    narrow,
    on,
    pointer,
    selected,
    size_of,
    store_run,
)


def set_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    indices: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    masters: Sequence[Tensor],
    step_sizes: Sequence[float],
    bias_correction2_sqrts: Sequence[float],
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
    nonfinite: Tensor | None = None,
) -> None:
    """See :func:`safekern.ops.set_adamw.reference`. An index outside its parameter is left out."""
    check_adamw(params, grads, indices, exp_avgs, exp_avg_sqs, step_sizes, bias_correction2_sqrts)
    check_count(masters, len(params), "master tensors")
    if not params:
        return
    device = params[0].device
    if nonfinite is not None:
        check_flags(nonfinite, 1, device)
    for index, master, *streams in zip(indices, masters, grads, exp_avgs, exp_avg_sqs, strict=True):
        count = index.numel()
        # An empty master is none.
        for stream in (*streams, master) if master.numel() else streams:
            check_tensor(stream, device, "a selected gradient or state tensor")
            check_dtype(stream, torch.float32, "a selected gradient or state tensor")
            check_numel(stream, count, "a selected gradient or state tensor")
    present = [t for t, index in enumerate(indices) if index.numel()]
    kinds = (
        (
            params[t].dtype,
            indices[t].dtype,
            masters[t].numel() > 0,
            aligned(indices[t], grads[t], exp_avgs[t], exp_avg_sqs[t], masters[t]),
            step_sizes[t],
            bias_correction2_sqrts[t],
        )
        for t in present
    )
    with on(device):
        skip = None if nonfinite is None else nonfinite.view(torch.uint8)
        for kind, chosen in groups(present, kinds).items():
            dtype, _, has_master, is_aligned, step_size, bias_correction2_sqrt = kind
            launch_selected(
                set_adamw_kernel,
                chosen,
                params,
                indices,
                [[stream[t].data_ptr() for t in chosen] for stream in (grads, exp_avgs, exp_avg_sqs, masters)],
                *adamw_bits(decay, beta1, beta2, eps, step_size, bias_correction2_sqrt),
                skip,
                block=SCATTER_BLOCK,
                PARAM=FLOATS[dtype],
                WORD=WORDS[dtype.itemsize],
                MASTER=has_master,
                ALIGNED=is_aligned,
            )


@triton.jit(do_not_specialize=["tensors", "skip", *HYPERPARAMETERS])
def set_adamw_kernel(
    table,
    tensors: tl.int32,
    decay: tl.int64,
    one_minus_beta1: tl.int64,
    beta2: tl.int64,
    one_minus_beta2: tl.int64,
    eps: tl.int64,
    step_size: tl.int64,
    bias_correction2_sqrt: tl.int64,
    skip,
    PARAM: tl.constexpr,
    WORD: tl.constexpr,
    MASTER: tl.constexpr,
    ALIGNED: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Must move, and moves, 32 bytes per selected weight (24 without a master) and the sectors that hold one, twice.

    The 32: index and gradient, and both moments and the master read and written; 4 more for int64 indices. At a random
    1%, 15% of the 32-byte sectors of a bf16 tensor and 8% of an fp32 one hold a selected weight.
    """
    if skip is not None:  # noqa: SIM102 - Triton evaluates both sides of `and`
        if tl.load(skip) != 0:
            return
    t, begin, inside, full, index, valid = selected(table, tensors, INDEX, ALIGNED, BLOCK)
    param = pointer(table + 3 * tensors + t, PARAM, False)
    places = tl.arange(0, BLOCK)
    state = table + SELECTED_ROWS * tensors + t
    grad = load_run(pointer(state, tl.float32, ALIGNED) + begin, places, inside, full)
    exp_avg = load_run(pointer(state + tensors, tl.float32, ALIGNED) + begin, places, inside, full)
    exp_avg_sq = load_run(pointer(state + 2 * tensors, tl.float32, ALIGNED) + begin, places, inside, full)
    current = tl.load(param + index, mask=valid, other=0)
    if tl.float64 == PARAM:
        value = current
    else:
        value = current.to(tl.float32)
    if MASTER:
        master = load_run(pointer(state + 3 * tensors, tl.float32, ALIGNED) + begin, places, inside, full)
        # A master that no longer rounds to its weight is stale: the weight was loaded or edited from outside, and what
        # is in the model wins.
        fresh = narrow(master, PARAM).to(WORD, bitcast=True) == current.to(WORD, bitcast=True)
        value = tl.where(fresh, master.to(value.dtype), value)
    value, exp_avg, exp_avg_sq = adamw(
        value,
        grad,
        exp_avg,
        exp_avg_sq,
        decay,
        one_minus_beta1,
        beta2,
        one_minus_beta2,
        eps,
        step_size,
        bias_correction2_sqrt,
        tl.float32,
    )
    store_run(pointer(state + tensors, tl.float32, ALIGNED) + begin, places, exp_avg, inside, full)
    store_run(pointer(state + 2 * tensors, tl.float32, ALIGNED) + begin, places, exp_avg_sq, inside, full)
    if MASTER:
        store_run(pointer(state + 3 * tensors, tl.float32, ALIGNED) + begin, places, value.to(tl.float32), inside, full)
    tl.store(param + index, narrow(value, PARAM), mask=valid)


SPECS = [
    Spec(
        set_adamw_kernel,
        {"table": "*i64", "tensors": "i32", **dict.fromkeys(HYPERPARAMETERS, "i64"), "skip": "*u8"},
        {
            "PARAM": param,
            "WORD": WORDS[size_of(param)],
            "MASTER": master,
            "ALIGNED": True,
            "INDEX": index,
            "BLOCK": SCATTER_BLOCK,
        },
    )
    for param in FLOATS.values()
    for master in (False, True)
    for index in INDICES.values()
]
