"""``restore_`` in Triton: one launch per combination of element sizes."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from safekern.ops.triton.common import (
    INDICES,
    SCATTER_BLOCK,
    SELECTED_ROWS,
    WORDS,
    Spec,
    aligned,
    check_saved,
    groups,
    launch_selected,
    load_run,
    on,
    pointer,
    selected,
)


def restore_(params: Sequence[Tensor], indices: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """See :func:`safekern.ops.restore.reference`. An index outside its parameter is left out."""
    check_saved(params, indices, values)
    launch(restore_kernel, SCATTER_BLOCK, params, indices, values)


def launch(
    kernel: object,
    block: int,
    params: Sequence[Tensor],
    indices: Sequence[Tensor],
    values: Sequence[Tensor],
    *args: Tensor,
) -> None:
    """Launches `restore_kernel`, or that of `count_changed`, whose table has the values and the tensors' positions."""
    present = [t for t, index in enumerate(indices) if index.numel()]
    if not present:
        return
    with on(params[0].device):
        kinds = ((params[t].element_size(), indices[t].dtype, aligned(indices[t], values[t])) for t in present)
        for (size, _, is_aligned), chosen in groups(present, kinds).items():
            launch_selected(
                kernel,
                chosen,
                params,
                indices,
                [[values[t].data_ptr() for t in chosen], chosen],
                *args,
                block=block,
                WORD=WORDS[size],
                ALIGNED=is_aligned,
            )


@triton.jit(do_not_specialize=["tensors"])
def restore_kernel(
    table,
    tensors: tl.int32,
    WORD: tl.constexpr,
    ALIGNED: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Must move 4 (or 8) bytes of index, the values, and the 32-byte sectors with a selected element twice.

    A GPU writes parts of a sector without reading it first, until the cache line leaves L2: what is moved lies between
    one and two times the sectors.
    """
    t, begin, inside, full, index, valid = selected(table, tensors, INDEX, ALIGNED, BLOCK)
    values = pointer(table + SELECTED_ROWS * tensors + t, WORD, ALIGNED) + begin
    value = load_run(values, tl.arange(0, BLOCK), inside, full)
    tl.store(pointer(table + 3 * tensors + t, WORD, False) + index, value, mask=valid)


SPECS = [
    Spec(
        restore_kernel,
        {"table": "*i64", "tensors": "i32"},
        {"WORD": word, "ALIGNED": True, "INDEX": index, "BLOCK": SCATTER_BLOCK},
    )
    for word in WORDS.values()
    for index in INDICES.values()
]
