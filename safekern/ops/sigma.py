"""``sigma``: the standard deviation of every weight tensor of a model.

Bytes moved: every weight once.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from safekern.ops.cases import DTYPES, Case, Inputs
from safekern.ops.registry import define


def reference(params: Sequence[Tensor]) -> Tensor:
    """Unbiased standard deviations, computed in fp64 and rounded to fp32; 0 for a tensor of fewer than two elements.

    Args:
        params: contiguous floating-point tensors on one device.

    Returns:
        fp32 [len(params)].
    """
    if not params:
        return torch.empty(0, dtype=torch.float32)
    return torch.stack(
        [
            (param.double().std() if param.numel() > 1 else param.new_zeros((), dtype=torch.float64)).float()
            for param in params
        ]
    )


def fake(params: Sequence[Tensor]) -> Tensor:
    device = params[0].device if params else None
    return torch.empty(len(params), dtype=torch.float32, device=device)


def cases(large: bool) -> Iterator[Case]:
    for dtype in DTYPES:
        yield Case(str(dtype), (Inputs(large).normal(dtype, 0.02),), relative=1e-6)
    yield Case("many tensors", (Inputs(many=True).normal(DTYPES[0]),), relative=1e-6)
    normal = torch.randn(10_000, generator=torch.Generator("cpu").manual_seed(0))
    outlier = normal * 0.01
    outlier[0] = 1e6
    extreme = [outlier, normal * 0.01 + 1e4, torch.full_like(normal, 3.0), normal * 1e-30, normal * 1e37]
    extreme += [normal[:4097].double() * 1e-12 + 1]
    yield Case("outliers, offsets and extremes", (extreme,), relative=1e-6)
    broken = [normal.to(dtype) for dtype in DTYPES]
    for param, value in zip(broken, ("nan", "inf", "-inf", "nan"), strict=True):
        param[7777] = float(value)
    yield Case("not finite", (broken,), relative=1e-6)


sigma = define("sigma(Tensor[] params) -> Tensor", reference=reference, fake=fake, cases=cases)
