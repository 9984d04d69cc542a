"""The exact top of scores in several places: on devices of one process, or in the processes that share a model.

Every place gives a few more candidates than its share. Two histograms of their scores, added up over all places, give
the exact cutoff; a third, of positions, says which of those equal to it come first. Only if some place had to give all
its candidates, it may have had more, and is asked again for twice as many.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from safekern import ops
from safekern.indices import index_dtype
from safekern.layout import by_device
from safekern.ops.select import KEY_BITS, keys_of
from safekern.sharding import Processes, Shard, local

_DIGIT = 16


@dataclass(frozen=True)
class Held:
    """What this process holds of the gradients of one parameter.

    Attributes:
        values: fp32, 1-D.
        pieces: these cut into runs, in order, each of which has a sigma of its own: views.
        sigma: fp32 [len(pieces)] on the CPU.
    """

    values: Tensor
    pieces: list[Tensor]
    sigma: Tensor

    @classmethod
    def of(cls, gradient: Tensor, sigma: Tensor) -> "Held":
        """From a gradient, plain or sharded, and the sigma of the whole parameter: one, or (E, 1, 1) for E experts."""
        values, flat = local(gradient).reshape(-1).contiguous(), sigma.view(-1)
        if flat.numel() > 1:
            shard = Shard.of(gradient)
            flat = flat[shard.offset[0] :][: shard.local_shape[0]]
        if not values.numel():
            return cls.nothing(values.device)
        return cls(values, list(values.tensor_split(flat.numel())), flat)

    @classmethod
    def nothing(cls, device: torch.device) -> "Held":
        """Of a parameter that is held, or spoken for, elsewhere."""
        values = torch.empty(0, dtype=torch.float32, device=device)
        return cls(values, [values], torch.zeros(1, dtype=torch.float32, device="cpu"))

    def esi(self, positions: Tensor | None = None) -> Tensor:
        """The scores, fp32, of all values or of those at some positions."""
        if len(self.pieces) == 1:
            values = self.values if positions is None else self.values[positions]
            return values.abs().mul_(self.sigma[0])
        if positions is None:
            return torch.cat([piece.abs().mul_(sigma) for piece, sigma in zip(self.pieces, self.sigma, strict=True)])
        ends = torch.tensor([piece.numel() for piece in self.pieces], device=positions.device).cumsum(0)
        sigma = self.sigma.to(positions.device)[torch.searchsorted(ends, positions.long(), right=True)]
        return self.values[positions].abs().mul_(sigma)


def held_candidates(
    gradients: Mapping[str, Tensor],
    indices: Mapping[str, Tensor],
    sigma: Mapping[str, Tensor],
    shapes: Mapping[str, torch.Size],
) -> list[Held]:
    """For some elements of tensors of those shapes, at those ascending flat positions."""
    if not indices:
        return []
    cuts = []
    for name, index in indices.items():
        count = sigma[name].numel()
        starts = torch.arange(1, count, dtype=index.dtype, device=index.device) * (shapes[name].numel() // count)
        cuts.append(torch.searchsorted(index, starts))
    # Read in one go, since a read waits for the device.
    on_host = torch.cat(cuts).cpu().split([cut.numel() for cut in cuts])
    return [
        Held(gradient, list(gradient.tensor_split(cut)), sigma[name].view(-1))
        for (name, gradient), cut in zip(gradients.items(), on_host, strict=True)
    ]


def select_here(held: Sequence[Held], k: int, largest: bool) -> list[Tensor]:
    """``safekern.ops.select`` of what lies on one device; positions count from the start of ``values``."""
    pieces = [piece for part in held for piece in part.pieces]
    sigma = torch.cat([part.sigma for part in held]).to(pieces[0].device)
    picks = iter(ops.select(pieces, sigma, k, largest))
    return [_joined([(piece.numel(), next(picks)) for piece in part.pieces]) for part in held]


def _joined(picks: Sequence[tuple[int, Tensor]]) -> Tensor:
    """The positions in a whole tensor, given those in each of its pieces and the pieces' sizes."""
    if len(picks) == 1:
        return picks[0][1]
    starts = [0, *itertools.accumulate(size for size, _ in picks)]
    dtype = index_dtype(starts[-1])
    return torch.cat([pick.to(dtype) + start for start, (_, pick) in zip(starts, picks, strict=False)])


def select(gradients: Sequence[Tensor], sigma: Sequence[Tensor], k: int, largest: bool) -> list[Tensor]:
    """Ranks the fp32 values ``|gradients[t]| * sigma[t]`` over all tensors together; ties go to the earlier element.

    Args:
        gradients: fp32, contiguous; plain tensors on any devices, or DTensors, the same ones in every process.
        sigma: per tensor fp32 on the CPU, one value or (E, 1, 1) for a fused tensor of E experts.
        k: how many elements to select, from 1 to the number of elements.
        largest: select the largest, else the smallest.

    Returns:
        For each tensor the ascending row-major positions of its selected elements on the CPU, int32 or int64 as in
        ``safekern.ops.select``, in every process those in the whole tensor.

    Raises:
        RuntimeError: a value is NaN, or k is out of range. Where that is so in one process only, the others raise a
            ScoringError, which is one too.
        InvalidArgumentError: a device mesh leaves processes out.
    """
    processes = Processes.of(gradients)
    held = [Held.of(gradient, scale) for gradient, scale in zip(gradients, sigma, strict=True)]
    if processes.size == 1 and len(by_device([part.values for part in held])) == 1:
        return [pick.cpu() for pick in select_here(held, k, largest)]
    shards = [Shard.of(gradient) for gradient in gradients]
    held = [
        part if processes.speaks_for(shard) else Held.nothing(part.values.device)
        for part, shard in zip(held, shards, strict=True)
    ]
    numel = sum(gradient.numel() for gradient in gradients)
    picks, keys, cutoff, ties = _candidates(held, numel, k, largest, processes)
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
        selected.append(everywhere.to(index_dtype(gradient.numel())))
    return selected


def _candidates(
    held: Sequence[Held], numel: int, k: int, largest: bool, processes: Processes
) -> tuple[list[Tensor], list[Tensor], int, int]:
    """Enough of the best of each place; then the k-th best key of all, and how many that equal it are selected.

    Returns:
        Per tensor the ascending positions of its candidates in this process's part, and their keys; the cutoff; the
        number of ties.
    """
    lots = by_device([part.values for part in held])
    numels = [sum(held[t].values.numel() for t in members) for members in lots]
    most = [min(k, count) for count in numels]
    # A little over what an even spread would take, so that places need not be asked twice.
    wanted = [min(limit, int(1.25 * k / numel * count) + 1024) for limit, count in zip(most, numels, strict=True)]
    while True:
        (picks, keys), _ = processes.agreed(partial(_best, held, lots, wanted, largest))
        cutoff, ties = _kth_largest(keys, k, KEY_BITS, processes)
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


def _best(
    held: Sequence[Held], lots: Sequence[Sequence[int]], wanted: Sequence[int], largest: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Per tensor the ascending positions of candidates here, and their keys: so many of each lot of tensors."""
    picks = [torch.empty(0, dtype=torch.int32, device=part.values.device) for part in held]
    keys = list(picks)
    for members, count in zip(lots, wanted, strict=True):
        if count:
            here = select_here([held[t] for t in members], count, largest)
            for t, pick in zip(members, here, strict=True):
                picks[t], keys[t] = pick, keys_of(held[t].esi(pick), largest)
    return picks, keys


def _last_tie(
    positions: Sequence[Tensor], keys: Sequence[Tensor], cutoff: int, ties: int, processes: Processes
) -> tuple[int, int]:
    """The tensor and the position of the last selected element whose key is the cutoff."""
    tied = [position[key == cutoff] for position, key in zip(positions, keys, strict=True)]
    reached = processes.total(torch.tensor([position.numel() for position in tied], device="cpu")).cumsum(0)
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
