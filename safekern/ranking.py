"""The exact top of scores in several places: on devices of one process, or in the processes that share a model.

Every place gives a few more candidates than its share. Two histograms of their scores, added up over all places, give
the exact cutoff; a third, of positions, says which of those equal to it come first. Only if some place had to give all
its candidates, it may have had more, and is asked again for twice as many.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from safekern import ops
from safekern.sharding import Processes, Shard, local

_DIGIT = 16
_KEY_BITS = 31
_KEY_MASK = (1 << _KEY_BITS) - 1


def select(gradients: Sequence[Tensor], sigma: Tensor, k: int, largest: bool) -> list[Tensor]:
    """Ranks the fp32 values ``|gradients[t]| * sigma[t]`` over all tensors together; ties go to the earlier element.

    Args:
        gradients: fp32, contiguous; plain tensors on any devices, or DTensors, the same ones in every process.
        sigma: fp32 [len(gradients)] on the CPU.
        k: how many elements to select, from 1 to the number of elements.
        largest: select the largest, else the smallest.

    Returns:
        For each tensor the ascending row-major positions of its selected elements on the CPU, int32 or int64 as in
        ``safekern.ops.select``, in every process those in the whole tensor.

    Raises:
        RuntimeError: a value is NaN, or k is out of range.
        InvalidArgumentError: a device mesh leaves processes out.
    """
    processes = Processes.of(gradients)
    if processes.size == 1 and len(_by_place(gradients)) == 1:
        picks = ops.select([local(gradient) for gradient in gradients], sigma.to(gradients[0].device), k, largest)
        return [pick.cpu() for pick in picks]
    shards = [Shard.of(gradient) for gradient in gradients]
    held = [
        local(gradient).reshape(-1) if processes.speaks_for(shard) else local(gradient).new_empty(0)
        for gradient, shard in zip(gradients, shards, strict=True)
    ]
    numel = sum(gradient.numel() for gradient in gradients)
    picks, keys, cutoff, ties = _candidates(held, sigma, numel, k, largest, processes)
    positions = [shard.to_global(pick).long() for pick, shard in zip(picks, shards, strict=True)]
    last_tensor, last = _last_tie(positions, keys, cutoff, ties, processes)
    selected = []
    for t, (gradient, position, key) in enumerate(zip(gradients, positions, keys, strict=True)):
        kept = key > cutoff
        if t < last_tensor:
            kept |= key == cutoff
        elif t == last_tensor:
            kept |= (key == cutoff) & (position <= last)
        everywhere = processes.joined(position[kept].cpu()).sort().values
        small = gradient.numel() <= torch.iinfo(torch.int32).max
        selected.append(everywhere.to(torch.int32 if small else torch.int64))
    return selected


def _candidates(
    held: Sequence[Tensor], sigma: Tensor, numel: int, k: int, largest: bool, processes: Processes
) -> tuple[list[Tensor], list[Tensor], int, int]:
    """Enough of the best of each place; then the k-th best key of all, and how many that equal it are selected.

    Returns:
        Per tensor the ascending positions of its candidates in this process's part, and their keys; the cutoff; the
        number of ties.
    """
    lots = _by_place(held)
    numels = [sum(held[t].numel() for t in members) for members in lots]
    most = [min(k, count) for count in numels]
    # A little over what an even spread would take, so that places need not be asked twice.
    wanted = [min(limit, int(1.25 * k / numel * count) + 1024) for limit, count in zip(most, numels, strict=True)]
    while True:
        picks = [torch.empty(0, dtype=torch.int32, device=part.device) for part in held]
        keys = list(picks)
        for members, count in zip(lots, wanted, strict=True):
            if count:
                parts = [held[t] for t in members]
                here = ops.select(parts, sigma[members].to(parts[0].device), count, largest)
                for t, pick in zip(members, here, strict=True):
                    picks[t], keys[t] = pick, _keys(held[t][pick], sigma[t], largest)
        cutoff, ties = _kth_largest(keys, k, _KEY_BITS, processes)
        # Whoever gave something worse than the cutoff has nothing left that reaches it.
        short = [
            lot
            for lot, members in enumerate(lots)
            if wanted[lot] < most[lot] and min(int(keys[t].min()) for t in members if keys[t].numel()) >= cutoff
        ]
        if processes.every(not short):
            return picks, keys, cutoff, ties
        for lot in short:
            wanted[lot] = min(most[lot], 2 * wanted[lot])


def _by_place(tensors: Sequence[Tensor]) -> list[list[int]]:
    """The positions of the tensors that one call of a kernel can take together."""
    places: dict[torch.device, list[int]] = {}
    for t, tensor in enumerate(tensors):
        places.setdefault(tensor.device, []).append(t)
    return list(places.values())


def _keys(values: Tensor, sigma: Tensor, largest: bool) -> Tensor:
    """Integers that order as the scores do: non-negative floats order as their bits."""
    key = (values.abs() * sigma).view(torch.int32) & _KEY_MASK
    return key if largest else _KEY_MASK - key


def _last_tie(
    positions: Sequence[Tensor], keys: Sequence[Tensor], cutoff: int, ties: int, processes: Processes
) -> tuple[int, int]:
    """The tensor and the position of the last selected element whose key is the cutoff."""
    tied = [position[key == cutoff] for position, key in zip(positions, keys, strict=True)]
    reached = processes.total(torch.tensor([position.numel() for position in tied])).cumsum(0)
    t = int(torch.searchsorted(reached, ties))
    rank = ties - (int(reached[t - 1]) if t else 0)
    bits = torch.iinfo(torch.int64).bits - 1
    largest = torch.iinfo(torch.int64).max
    last, _ = _kth_largest([largest - tied[t]], rank, bits, processes)
    return t, largest - last


def _kth_largest(values: Sequence[Tensor], k: int, bits: int, processes: Processes) -> tuple[int, int]:
    """The k-th largest of non-negative integers in all processes, and how many of those equal to it it takes."""
    prefix, rank = 0, k
    for shift in reversed(range(0, bits, _DIGIT)):
        digits = [value >> shift & (1 << _DIGIT) - 1 for value in values]
        counts = torch.zeros(1 << _DIGIT, dtype=torch.int64, device="cpu")
        for digit in digits:
            counts += torch.bincount(digit, minlength=1 << _DIGIT).cpu()
        reached = processes.total(counts).flip(0).cumsum(0)
        above = int(torch.searchsorted(reached, rank))
        rank -= int(reached[above - 1]) if above else 0
        chosen = (1 << _DIGIT) - 1 - above
        prefix = prefix << _DIGIT | chosen
        values = [value[digit == chosen] for value, digit in zip(values, digits, strict=True)]
    return prefix, rank
