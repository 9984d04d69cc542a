"""``count_changed`` in Triton: one launch per combination of element sizes."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from safekern.ops.triton.common import (
    BLOCK,
    INDICES,
    SELECTED_ROWS,
    WORDS,
    Spec,
    check_saved,
    load_run,
    pointer,
    selected,
    size_of,
)
from safekern.ops.triton.restore import launch


def count_changed(params: Sequence[Tensor], indices: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    """See :func:`safekern.ops.count_changed.reference`. An index outside its parameter counts as changed."""
    check_saved(params, indices, values)
    counts = torch.zeros(len(params), dtype=torch.int64, device=params[0].device if params else None)
    launch(count_changed_kernel, BLOCK, params, indices, values, counts)
    return counts


@triton.jit(do_not_specialize=["tensors"])
def count_changed_kernel(
    table,
    tensors: tl.int32,
    counts,
    WORD: tl.constexpr,
    ALIGNED: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Must move, and moves, 4 (or 8) bytes of index, the values, and the 32-byte sectors with a selected element."""
    t, begin, inside, full, index, valid = selected(table, tensors, INDEX, ALIGNED, BLOCK)
    values = pointer(table + SELECTED_ROWS * tensors + t, WORD, ALIGNED) + begin
    value = load_run(values, tl.arange(0, BLOCK), inside, full)
    param = tl.load(pointer(table + 3 * tensors + t, WORD, False) + index, mask=valid, other=0)
    changed = inside & ((param != value) | ~valid)
    # Integers add up to the same in any order.
    total = tl.sum(changed.to(tl.int32), axis=0).to(tl.int64)
    tl.atomic_add(counts + tl.load(table + (SELECTED_ROWS + 1) * tensors + t), total)


SPECS = [
    Spec(
        count_changed_kernel,
        {"table": "*i64", "tensors": "i32", "counts": "*i64"},
        {"WORD": word, "ALIGNED": True, "INDEX": index, "BLOCK": BLOCK},
        loads=BLOCK * size_of(word, index),
    )
    for word in WORDS.values()
    for index in INDICES.values()
]
