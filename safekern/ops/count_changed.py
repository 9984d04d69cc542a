"""``count_changed``: how many selected weights of each tensor no longer have their saved bits.

Bytes moved: the cache lines that hold a selected element, the indices and the values.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from safekern.ops.cases import DTYPES, INDEX_DTYPES, INTEGERS, Case, Inputs, at
from safekern.ops.registry import define


def reference(params: Sequence[Tensor], indices: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    """Compares ``params[t].flatten()[indices[t]]`` with ``values[t]``, bit for bit.

    Args:
        params: contiguous floating-point tensors on one device.
        indices: int32 or int64 [k_t], flat positions.
        values: [k_t], of the parameter's dtype.

    Returns:
        int64 [len(params)].
    """
    device = params[0].device if params else None
    counts = torch.zeros(len(params), dtype=torch.int64, device=device)
    for t, (param, index, value) in enumerate(zip(params, indices, values, strict=True)):
        integer = INTEGERS[param.element_size()]
        counts[t] = (param.view(-1)[index].view(integer) != value.view(integer)).sum()
    return counts


def fake(params: Sequence[Tensor], indices: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    return torch.empty(len(params), dtype=torch.int64, device=params[0].device if params else None)


def cases(large: bool) -> Iterator[Case]:
    for dtype in DTYPES:
        for index_dtype in INDEX_DTYPES:
            inputs = Inputs(large)
            params, indices = inputs.normal(dtype), inputs.indices(0.5, index_dtype)
            params[4].view(-1)[:3] = torch.tensor([float("nan"), 0.0, -0.0]).to(dtype)
            indices[4] = torch.arange(params[4].numel(), dtype=index_dtype)
            values = at(params, indices)
            yield Case(f"{dtype}, {index_dtype}, none", (params, indices, values), verbatim=True)
            # A bit of a NaN, a sign of zero, last bits.
            changed = [value.clone() for value in values]
            changed[4].view(INTEGERS[dtype.itemsize])[0] ^= 1
            changed[4][1] = -0.0
            changed[-1].view(INTEGERS[dtype.itemsize])[::3] ^= 1
            yield Case(f"{dtype}, {index_dtype}, some", (params, indices, changed), verbatim=True)
    many = Inputs(many=True)
    params, indices = many.normal(), many.indices(0.5)
    yield Case("many tensors", (params, indices, many.normal_at(indices)))


count_changed = define(
    "count_changed(Tensor[] params, Tensor[] indices, Tensor[] values) -> Tensor",
    reference=reference,
    fake=fake,
    cases=cases,
)
