"""``restore_``: write saved bits back into the selected weights of many tensors.

Bytes moved: the cache lines that hold a selected element, twice, the indices and the values.
"""

from collections.abc import Iterator, Sequence

from torch import Tensor

from safekern.ops.cases import DTYPES, INDEX_DTYPES, INTEGERS, Case, Inputs
from safekern.ops.registry import define


def reference(params: Sequence[Tensor], indices: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Writes ``values[t]`` into ``params[t].flatten()[indices[t]]``, bit for bit.

    Args:
        params: contiguous floating-point tensors.
        indices: int32 or int64 [k_t], flat positions without repetition.
        values: [k_t], of the parameter's dtype.
    """
    for param, index, value in zip(params, indices, values, strict=True):
        # As integers: torch's CUDA assignment by index gives 16-bit NaNs other bits. Through `data`, as autograd sees
        # nothing of what kernels write either: `mark_written` says what a graph that saved the tensor has to know.
        integer = INTEGERS[param.element_size()]
        param.data.view(-1).view(integer)[index] = value.view(integer)


def fake(params: Sequence[Tensor], indices: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    return None


def cases(large: bool) -> Iterator[Case]:
    for dtype in DTYPES:
        for index_dtype in INDEX_DTYPES:
            inputs = Inputs(large)
            params, indices = inputs.normal(dtype), inputs.indices(0.5, index_dtype)
            values = inputs.bits_at(indices, dtype)
            yield Case(f"{dtype}, {index_dtype}", (params, indices, values), verbatim=True)
    many = Inputs(many=True)
    params, indices = many.normal(DTYPES[0]), many.indices(0.5)
    yield Case("many tensors", (params, indices, many.bits_at(indices, DTYPES[0])), verbatim=True)


restore_ = define(
    "restore_(Tensor(a!)[] params, Tensor[] indices, Tensor[] values) -> ()",
    reference=reference,
    fake=fake,
    cases=cases,
)
