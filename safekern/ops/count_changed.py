"""``count_changed``: how many selected weights of each tensor no longer have their saved bits.

Bytes moved: the cache lines that hold a selected element, the indices and the values.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from safekern.ops.registry import define

_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


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
        integer = _INTEGER[param.element_size()]
        counts[t] = (param.view(-1)[index].view(integer) != value.view(integer)).sum()
    return counts


def fake(params: Sequence[Tensor], indices: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    return torch.empty(len(params), dtype=torch.int64, device=params[0].device if params else None)


count_changed = define(
    "count_changed(Tensor[] params, Tensor[] indices, Tensor[] values) -> Tensor", reference=reference, fake=fake
)
