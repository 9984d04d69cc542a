"""Sigma, the standard deviation of each weight tensor, also of one that several processes hold."""

from collections.abc import Sequence

import torch
from torch import Tensor

from safekern import ops
from safekern.sharding import Processes, Shard, is_sharded, local

# Weights that are held in double precision at once.
_CHUNK = 1 << 22


def deviations(params: Sequence[Tensor]) -> Tensor:
    """The unbiased standard deviation of each parameter, 0 for a single element.

    Args:
        params: of any floating dtype, on any devices, plain or DTensors: the same ones in every process.

    Returns:
        fp32 [len(params)] on the CPU, the same in every process; NaN where a parameter holds NaN or infinity. A sharded
        parameter's moments are summed in fp64 shard by shard: the fp32 result is that of the whole one but for sums
        that fall within 1e-15 of the middle between two fp32 numbers.
    """
    sigma = torch.empty(len(params), device="cpu")
    sharded = [i for i, param in enumerate(params) if is_sharded(param)]
    for device in dict.fromkeys(param.device for param in params):
        here = [i for i, param in enumerate(params) if param.device == device and i not in set(sharded)]
        tensors = {i: params[i].detach() for i in here}
        dense = [i for i in here if tensors[i].is_contiguous()]
        # Those that have to be copied, one at a time: together, the copies could be as large as the model.
        groups = [dense, *([i] for i in here if not tensors[i].is_contiguous())]
        for group in filter(None, groups):
            sigma[group] = ops.sigma([tensors[i].contiguous() for i in group]).cpu()
    if sharded:
        sigma[sharded] = _across([params[i] for i in sharded])
    return sigma


def _across(params: Sequence[Tensor]) -> Tensor:
    mine = torch.zeros(len(params), 3, dtype=torch.float64, device="cpu")
    for row, param in zip(mine, params, strict=True):
        if Shard.of(param).owner:
            for chunk in local(param.detach()).reshape(-1).split(_CHUNK):
                _merge(row, _moments(chunk))
    total = torch.zeros_like(mine)
    for moments in Processes.of(params).stacked(mine):
        for row, part in zip(total, moments, strict=True):
            _merge(row, part)
    numel, _, squares = total.unbind(1)
    return (squares / (numel - 1).clamp(min=1)).sqrt().float()


def _moments(values: Tensor) -> Tensor:
    """How many values there are, their mean, and the sum of their squared distances from it."""
    exact = values.double()
    mean = exact.mean()
    return torch.stack([mean.new_tensor(exact.numel()), mean, (exact - mean).square_().sum()]).cpu()


def _merge(into: Tensor, part: Tensor) -> None:
    """Chan, Golub, LeVeque (1983): moments of two samples together."""
    if not part[0]:
        return
    numel, apart = into[0] + part[0], part[1] - into[1]
    into[2] += part[2] + apart * apart * (into[0] * part[0] / numel)
    into[1] += apart * (part[0] / numel)
    into[0] = numel
