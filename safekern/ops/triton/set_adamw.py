"""``set_adamw_`` in Triton: one launch per combination of dtypes and step count."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from safekern.ops.triton.common import (
    FLOATS,
    HYPERPARAMETERS,
    SCATTER_BLOCK,
    SELECTED_ROWS,
    WORDS,
    Spec,
    adamw,
    adamw_bits,
    aligned,
    check_count,
    check_dtype,
    check_flags,
    check_float,
    check_indices,
    check_numel,
    check_tensor,
    groups,
    launch_selected,
    load_run,
    narrow,
    on,
    pointer,
    selected,
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
    count = len(params)
    check_count(grads, count, "gradients")
    check_count(indices, count, "index tensors")
    check_count(exp_avgs, count, "first moments")
    check_count(exp_avg_sqs, count, "second moments")
    check_count(masters, count, "master tensors")
    if not len(step_sizes) == len(bias_correction2_sqrts) == count:
        raise RuntimeError(f"safekern: expected {count} step sizes and bias corrections")
    for t, param in enumerate(params):
        check_tensor(param, params[0].device, "a parameter")
        check_float(param)
        check_indices(indices[t], params[0].device)
        for state in (grads[t], exp_avgs[t], exp_avg_sqs[t], masters[t]):
            if state is not masters[t] or state.numel():
                check_tensor(state, params[0].device, "a selected gradient or state tensor")
                check_dtype(state, torch.float32, "a selected gradient or state tensor")
                check_numel(state, indices[t].numel(), "a selected gradient or state tensor")
    if nonfinite is not None:
        check_flags(nonfinite, 1, params[0].device if params else nonfinite.device)
    present = [t for t, index in enumerate(indices) if index.numel()]
    if not present:
        return
    streams = [grads, indices, exp_avgs, exp_avg_sqs, masters]
    # What depends on the step is an argument, not in the table: the table then stays what it was.
    keys = [
        (
            params[t].dtype,
            indices[t].dtype,
            masters[t].numel() > 0,
            aligned(*(stream[t] for stream in streams)),
            step_sizes[t],
            bias_correction2_sqrts[t],
        )
        for t in present
    ]
    with on(params[0].device):
        skip = None if nonfinite is None else nonfinite.view(torch.uint8)
        for group in groups(keys):
            dtype, _, has_master, is_aligned, step_size, bias_correction2_sqrt = keys[group[0]]
            chosen = [present[position] for position in group]
            launch_selected(
                set_adamw_kernel,
                chosen,
                params,
                indices,
                [[state[t].data_ptr() for t in chosen] for state in (grads, exp_avgs, exp_avg_sqs, masters)],
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
            "WORD": WORDS[param.primitive_bitwidth // 8],
            "MASTER": master,
            "ALIGNED": True,
            "INDEX": index,
            "BLOCK": SCATTER_BLOCK,
        },
    )
    for param in FLOATS.values()
    for master in (False, True)
    for index in (tl.int32, tl.int64)
]
