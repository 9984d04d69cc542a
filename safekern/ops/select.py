"""``select``: the exact k largest or smallest ESI values over a whole model.

Bytes moved: every accumulator once, plus a few bytes per selected element.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from safekern.indices import index_dtype
from safekern.ops.cases import DENORMAL, Case, Inputs
from safekern.ops.registry import define

# |x| * sigma as its 31 bits: non-negative floats order as their bits do.
KEY_BITS = 31
_KEY_MASK = (1 << KEY_BITS) - 1


def reference(grads: Sequence[Tensor], sigma: Tensor, k: int, largest: bool) -> list[Tensor]:
    """Ranks the fp32 values ``|grads[t]| * sigma[t]`` over all tensors together; ties go to the earlier element.

    Args:
        grads: contiguous fp32 tensors on one device.
        sigma: fp32 [len(grads)].
        k: how many elements to select, from 1 to the number of elements.
        largest: select the largest; else the smallest, where ties go to the earlier element too.

    Returns:
        For every tensor the ascending flat positions of its selected elements, int32, or int64 for a tensor whose
        positions do not fit.

    Raises:
        RuntimeError: a value is NaN, or k is out of range.
    """
    numel = sum(grad.numel() for grad in grads)
    if not 1 <= k <= numel:
        raise RuntimeError(f"safekern: cannot select {k} of {numel} elements")

    def keys(t: int) -> Tensor:
        score = (grads[t].abs() * sigma[t]).view(-1)
        if bool(score.isnan().any()):
            raise RuntimeError("safekern: a score is NaN")
        return keys_of(score, largest)

    cutoff, ties = _find_cutoff(keys, len(grads), k)
    outputs = []
    for t, grad in enumerate(grads):
        key = keys(t)
        tied = torch.nonzero(key == cutoff).view(-1)[:ties]
        ties -= tied.numel()
        chosen = key > cutoff
        chosen[tied] = True
        outputs.append(torch.nonzero(chosen).view(-1).to(index_dtype(grad.numel())))
    return outputs


def keys_of(scores: Tensor, largest: bool) -> Tensor:
    """Integers of 31 bits that order as scores do: fp32, none negative or NaN, the best one largest."""
    key = scores.view(torch.int32) & _KEY_MASK
    return key if largest else _KEY_MASK - key


def _find_cutoff(keys: Callable[[int], Tensor], count: int, k: int) -> tuple[int, int]:
    """The k-th largest key and how many elements equal to it are selected, from a histogram per 16-bit digit."""
    prefix, rank = 0, k
    for shift, bins in ((16, 1 << 15), (0, 1 << 16)):
        counts = torch.zeros(bins, dtype=torch.int64, device="cpu")
        for t in range(count):
            key = keys(t)
            if shift == 0:
                key = key[(key >> 16) == prefix]
            counts += torch.bincount(key >> shift & (bins - 1), minlength=bins).cpu()
        reached = counts.flip(0).cumsum(0)
        above = int(torch.searchsorted(reached, rank))
        rank -= int(reached[above - 1]) if above else 0
        prefix = prefix << 16 | (bins - 1 - above)
    return prefix, rank


def fake(grads: Sequence[Tensor], sigma: Tensor, k: int, largest: bool) -> list[Tensor]:
    context = torch.library.get_ctx()
    return [
        torch.empty(context.new_dynamic_size(), dtype=index_dtype(grad.numel()), device=grad.device) for grad in grads
    ]


def cases(large: bool) -> Iterator[Case]:
    inputs = Inputs(large)
    normal = inputs.normal()
    sigma = torch.linspace(0.5, 1.5, len(normal))
    rounded = [grad.bfloat16().float() for grad in normal]
    few = [grad * (torch.arange(grad.numel()).view(grad.shape) % 1000 == 500) for grad in normal]
    values = torch.tensor([0.0, -0.0, DENORMAL, -DENORMAL, 1.0, -1.0, 1.0000001, 3e38, float("inf"), 1e-30])
    nasty = [values.repeat(count) for count in (1, 7, 300)]
    for name, grads, scale in (
        ("normal", normal, sigma),
        ("ties", rounded, torch.ones_like(sigma)),
        ("few are not zero", few, sigma),
        ("all are equal", [torch.full_like(grad, 2.0) for grad in normal], torch.ones_like(sigma)),
        ("zeros", [torch.zeros_like(grad) for grad in normal], sigma),
        ("extremes", nasty, torch.tensor([1.0, 0.5, 1e-8])),
        ("many tensors", Inputs(many=True).normal(), torch.ones(300)),
    ):
        numel = sum(grad.numel() for grad in grads)
        for k in (1, numel // 100 + 1, numel // 3, numel - 1, numel):
            for largest in (True, False):
                yield Case(f"{name}, k={k}, largest={largest}", (grads, scale, k, largest))
    if large:
        # Beyond the size from which kernels sample.
        generator = torch.Generator("cpu").manual_seed(0)
        grads = [torch.randn(numel, generator=generator) for numel in (1_300_007, 0, 700_001)]
        clustered = [grad * 1e-3 for grad in grads]
        clustered[0][600_000:610_000] += 10
        for name, chosen in (("sampled", grads), ("clustered", clustered)):
            for k in (1, 20_000, 1_000_000):
                yield Case(f"{name}, k={k}", (chosen, torch.tensor([1.0, 7.0, 0.5]), k, True))
    numel = sum(grad.numel() for grad in normal)
    for k in (0, -1, numel + 1):
        yield Case(f"k={k}", (normal, sigma, k, True), refused="cannot select")
    broken = [grad.clone() for grad in normal]
    broken[-1][1234] = float("nan")
    for largest in (True, False):
        yield Case(f"NaN, largest={largest}", (broken, sigma, 3, largest), refused="NaN")


select = define(
    "select(Tensor[] grads, Tensor sigma, int k, bool largest) -> Tensor[]",
    reference=reference,
    fake=fake,
    cases=cases,
)
