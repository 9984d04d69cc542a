"""``accumulate_`` in Triton: one launch per tensor."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor, float32, uint8

from safekern.ops.triton.common import (
    BLOCK,
    FLOATS,
    LAUNCH,
    Spec,
    check_count,
    check_dtype,
    check_flags,
    check_float,
    check_numel,
    check_tensor,
    is_finite,
    load_run,
    on,
    run_of,
    size_of,
    store_run,
)


def accumulate_(accs: Sequence[Tensor], grads: Sequence[Tensor], nonfinite: Tensor, absolute: bool) -> None:
    """See :func:`safekern.ops.accumulate.reference`."""
    device = nonfinite.device
    check_count(grads, len(accs), "gradients")
    check_flags(nonfinite, len(accs), device)
    for acc, grad in zip(accs, grads, strict=True):
        check_dtype(acc, float32, "an accumulator")
        check_tensor(acc, device, "an accumulator")
        check_float(grad, device, "a gradient")
        check_numel(grad, acc.numel(), "a gradient")
    flags = nonfinite.view(uint8)
    with on(device):
        for t, (acc, grad) in enumerate(zip(accs, grads, strict=True)):
            blocks = -(-acc.numel() // BLOCK)
            if blocks:
                accumulate_kernel[(blocks,)](acc, grad, flags, t, acc.numel(), ABSOLUTE=absolute, BLOCK=BLOCK, **LAUNCH)


@triton.jit(do_not_specialize=["flags", "t", "numel"])
def accumulate_kernel(acc, grad, flags, t: tl.int64, numel: tl.int64, ABSOLUTE: tl.constexpr, BLOCK: tl.constexpr):
    """Must move, and moves, the gradient once and the accumulator twice: 10 bytes per element of a bf16 gradient."""
    begin, inside, full = run_of(numel, BLOCK)
    places = tl.arange(0, BLOCK)
    value = load_run(grad + begin, places, inside, full).to(tl.float32)
    if ABSOLUTE:
        value = tl.abs(value)
    total = load_run(acc + begin, places, inside, full) + value
    store_run(acc + begin, places, total, inside, full)
    # Programs that store here all store the same, so the order does not matter.
    if tl.max((inside & ~is_finite(total)).to(tl.int32), axis=0) > 0:
        tl.store(flags + t, 1)


SPECS = [
    Spec(
        accumulate_kernel,
        {"acc": "*fp32", "grad": f"*{grad}", "flags": "*u8", "t": "i64", "numel": "i64"},
        {"ABSOLUTE": absolute, "BLOCK": BLOCK},
        loads=BLOCK * size_of(tl.float32, grad),
        stores=BLOCK * size_of(tl.float32),
    )
    for grad in FLOATS.values()
    for absolute in (False, True)
]
