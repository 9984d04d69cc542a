"""``sigma``: the standard deviation of every weight tensor of a model.

Bytes moved: every weight once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from safekern.ops.registry import define


def reference(params: Sequence[Tensor]) -> Tensor:
    """Unbiased standard deviations, computed in fp64 and rounded to fp32; 0 for a tensor of fewer than two elements.

    Args:
        params: contiguous floating-point tensors on one device.

    Returns:
        fp32 [len(params)].
    """
    if not params:
        return torch.empty(0)
    return torch.stack(
        [
            (param.double().std() if param.numel() > 1 else param.new_zeros((), dtype=torch.float64)).float()
            for param in params
        ]
    )


def fake(params: Sequence[Tensor]) -> Tensor:
    device = params[0].device if params else None
    return torch.empty(len(params), dtype=torch.float32, device=device)


sigma = define("sigma(Tensor[] params) -> Tensor", reference=reference, fake=fake)
