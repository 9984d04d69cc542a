"""Sigma, the standard deviation of each weight tensor, also of one that several processes hold."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from safekern import names, ops
from safekern.layout import by_device
from safekern.sharding import Processes, Shard, is_sharded, local

SigmaPer = Literal["tensor", "expert"]

# Weights that are held in double precision at once.
_CHUNK = 1 << 22


def deviations(params: Mapping[str, Tensor], per: SigmaPer) -> dict[str, Tensor]:
    """The unbiased standard deviation of each parameter, 0 for a single element.

    Args:
        params: of any floating dtype, on any devices, plain or DTensors: the same ones in every process.
        per: ``"expert"`` takes each expert of a fused tensor by itself.

    Returns:
        For each parameter fp32 on the CPU, the same in every process: 0-d, or (E, 1, 1) for E experts; NaN where there
        is a NaN or an infinity. The moments of a sharded parameter are summed in fp64 shard by shard: the fp32 result
        is that of the whole one but for sums that fall within 1e-15 of the middle between two fp32 numbers.
    """
    experts = {name: names.fused_experts(name, p.shape) if per == "expert" else None for name, p in params.items()}
    counts = [experts[name] or 1 for name in params]
    sigma = torch.empty(sum(counts), dtype=torch.float32, device="cpu")
    rows = dict(zip(params, torch.arange(len(sigma), device="cpu").split(counts), strict=True))
    sharded = [name for name, param in params.items() if is_sharded(param)]
    if sharded:
        values = _across([params[name] for name in sharded], [len(rows[name]) for name in sharded])
        sigma[torch.cat([rows[name] for name in sharded])] = values
    plain = [name for name in params if name not in set(sharded)]
    if plain:
        pieces = [
            piece
            for name in plain
            for piece in ([params[name].detach()] if experts[name] is None else params[name].detach().unbind())
        ]
        sigma[torch.cat([rows[name] for name in plain])] = _here(pieces)
    return {
        name: sigma[rows[name]].squeeze(0) if experts[name] is None else sigma[rows[name]].view(-1, 1, 1)
        for name in params
    }


def _here(tensors: Sequence[Tensor]) -> Tensor:
    sigma = torch.empty(len(tensors), dtype=torch.float32, device="cpu")
    for here in by_device(tensors):
        dense = [i for i in here if tensors[i].is_contiguous()]
        # Those that have to be copied, one at a time: together, the copies could be as large as the model.
        groups = [dense, *([i] for i in here if not tensors[i].is_contiguous())]
        values = [ops.sigma([tensors[i].contiguous() for i in group]) for group in groups if group]
        sigma[[i for group in groups for i in group]] = torch.cat(values).cpu()
    return sigma


def _across(params: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    mine = torch.zeros(sum(counts), 3, dtype=torch.float64, device="cpu")
    for rows, param in zip(mine.split(list(counts)), params, strict=True):
        shard, held = Shard.of(param), local(param.detach())
        if not shard.owner:
            continue
        experts = [held] if len(rows) == 1 else held.unbind()
        for row, piece in zip(rows[shard.offset[0] if len(rows) > 1 else 0 :], experts, strict=False):
            for moments in _moments(piece):
                _merge(row, moments)
    total = torch.zeros_like(mine)
    for theirs in Processes.of(params).stacked(mine):
        for row, part in zip(total, theirs, strict=True):
            _merge(row, part)
    numel, _, squares = total.unbind(1)
    return (squares / (numel - 1).clamp(min=1)).sqrt().float()


def _moments(values: Tensor) -> Tensor:
    """Of each chunk how many values there are, their mean, and the sum of their squared distances from it."""
    chunks = values.reshape(-1).split(_CHUNK)
    found = torch.empty(len(chunks), 2, dtype=torch.float64, device=values.device)
    for chunk, row in zip(chunks, found, strict=True):
        exact = chunk.double()
        row[0] = exact.mean()
        row[1] = (exact - row[0]).square_().sum()
    numel = torch.tensor([[chunk.numel()] for chunk in chunks], dtype=torch.float64, device="cpu")
    # Read once, since a read waits for the device.
    return torch.cat([numel, found.cpu()], 1)


def _merge(into: Tensor, part: Tensor) -> None:
    """Chan, Golub, LeVeque (1983): moments of two samples together."""
    if not part[0]:
        return
    numel, apart = into[0] + part[0], part[1] - into[1]
    into[2] += part[2] + apart * apart * (into[0] * part[0] / numel)
    into[1] += apart * (part[0] / numel)
    into[0] = numel
