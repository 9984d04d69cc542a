"""``perturb``: a model with noise on the weights of a mask, for as long as a block runs."""

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from safekern import names, ops
from safekern.arguments import is_number, is_whole_number
from safekern.claims import claimed
from safekern.eligibility import check_plain
from safekern.errors import InvalidArgumentError, NonFiniteError, ProtectionError
from safekern.faults import put_back
from safekern.layout import by_device, mark_written, read_selected, write_selected
from safekern.mask import Mask, check_mask


@contextmanager
def perturb(model: nn.Module, mask: Mask, noise: float = 0.38, seed: int = 0) -> Iterator[None]:
    """Adds normal noise to the masked weights while a block runs, and gives them back their exact bits after it.

    Each masked weight gets ``N(0, (noise * sigma)^2)``, with ``sigma`` the standard deviation (``Tensor.std()``) of the
    tensor that holds it: how much a model's safety suffers tells whether the mask holds it (arXiv 2604.08297). It is
    always that of the whole tensor as it is now, fused experts together, also for masks that were ranked with
    ``sigma_per="expert"``. The noise is computed in fp32, added, and rounded to the weight's dtype.

    The noise of a weight is a function of the seed, its parameter's name and its index alone. So two masks put the same
    noise on the weights that they share, and every backend, device and number of threads the same bits (where sigma
    agrees to the bit).

    Besides the model it takes the masked weights' values and indices. The weights are restored also after an exception
    or a ``KeyboardInterrupt``. Blocks may be nested and must end in reverse order, as ``with`` makes them. The block
    may train the model: on leaving it the masked weights are what they were before the block, all others keep what
    training made of them. Weights loaded inside the block are lost where they are masked.

    Args:
        model: a module with plain, contiguous parameters; its names may be wrapped by DDP, ``torch.compile`` or PEFT.
            A tied parameter gets its noise once.
        mask: which weights get noise.
        noise: standard deviation of the noise in units of sigma, from 0 on.
        seed: a whole number of 64 bits.

    Raises:
        InvalidArgumentError: noise is negative or not finite, the seed has more bits, or a masked parameter is not
            contiguous or not a plain tensor on a real device. Nothing was changed.
        MaskMismatchError: the mask does not fit the model. Nothing was changed.
        NonFiniteError: a tensor with masked weights holds a NaN or an infinity. Nothing was changed.
        ModelInUseError: another thread is scoring or perturbing the model. Nothing was changed.
        ProtectionError: on leaving, a masked parameter has another dtype, shape or layout than on entering, or its name
            is gone, so that its weights cannot be restored; all others are.

    Example:
        >>> with safekern.perturb(model, mask, noise=0.38):                                     # doctest: +SKIP
        ...     noisy = safekern.attack_success_rate(model, tokenizer, prompts)
    """
    check_mask(mask)
    if not (is_number(noise) and 0 <= noise < math.inf):
        raise InvalidArgumentError(f"noise must be a finite number of at least 0, got {noise!r}")
    if not (is_whole_number(seed) and -(2**63) <= seed < 2**63):
        raise InvalidArgumentError(f"seed must be a whole number of 64 bits, got {seed!r}")
    noise, seed = float(noise), int(seed)
    selected = _select(model, mask)
    claim = claimed({entry.name: entry.param for entry in selected}, "perturbed")
    with claim, _noise_on(model, selected, noise, seed):
        yield


@contextmanager
def _noise_on(model: nn.Module, selected: "list[_Selected]", noise: float, seed: int) -> Iterator[None]:
    groups = [[selected[t] for t in group] for group in by_device([entry.param for entry in selected])]
    scales = [_scales(group, noise) for group in groups]
    saved = read_selected([entry.param for entry in selected], [entry.indices for entry in selected])
    for entry, values in zip(selected, saved, strict=True):
        entry.values = values
    try:
        for group, scale in zip(groups, scales, strict=True):
            ops.perturb_(
                [entry.param.detach() for entry in group],
                [entry.indices for entry in group],
                scale,
                [entry.stream for entry in group],
                seed,
            )
            mark_written([entry.param for entry in group])
        yield
    finally:
        put_back(lambda: _restore(model, selected))


@dataclass(slots=True)
class _Selected:
    """The masked weights of one parameter."""

    name: str
    param: Tensor
    shape: torch.Size
    indices: Tensor
    values: Tensor

    @property
    def stream(self) -> int:
        """The random stream of a parameter, whatever its wrappers and whatever else is masked."""
        digest = hashlib.blake2b(names.canonical(self.name).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little", signed=True)


def _select(model: nn.Module, mask: Mask) -> list[_Selected]:
    selected = []
    for name, (param, indices) in mask.parameters(model).items():
        check_plain(name, param)
        if not param.is_contiguous():
            raise InvalidArgumentError(
                f"parameter {name} is not contiguous, so noise cannot be added in place: "
                "make it so first (param.data = param.data.contiguous())"
            )
        selected.append(_Selected(name, param, param.shape, indices.to(param.device), param.detach().new_empty(0)))
    return selected


def _scales(group: list[_Selected], noise: float) -> list[float]:
    scales = []
    for entry, sigma in zip(group, ops.sigma([entry.param.detach() for entry in group]).tolist(), strict=True):
        if not math.isfinite(sigma):
            raise NonFiniteError(
                f"parameter {entry.name} holds a NaN or an infinity, so it has no standard deviation: repair the model"
            )
        if noise * sigma > torch.finfo(torch.float32).max:
            raise InvalidArgumentError(f"noise {noise} is too large for parameter {entry.name} with sigma {sigma:.3g}")
        scales.append(noise * sigma)
    return scales


def _restore(model: nn.Module, selected: list[_Selected]) -> None:
    # The block may have given the model other parameters, as load_state_dict(assign=True) does.
    named = dict(model.named_parameters(remove_duplicate=False))
    there = set(map(id, named.values()))
    for entry in selected:
        if id(entry.param) not in there:
            entry.param = named.get(entry.name, entry.param.new_empty(0))
    lost = [entry for entry in selected if not _is_restorable(entry)]
    rest = [entry for entry in selected if _is_restorable(entry)]
    write_selected(
        [entry.param for entry in rest],
        # The block may have moved the model to another device.
        [entry.indices.to(entry.param.device) for entry in rest],
        [entry.values.to(entry.param.device) for entry in rest],
    )
    if lost:
        raise ProtectionError(
            f"{', '.join(entry.name for entry in lost)}: changed dtype, shape or layout inside perturb(), or were "
            "replaced, so the original weights cannot be written back: load the model again"
        )


def _is_restorable(entry: _Selected) -> bool:
    param = entry.param
    return param.dtype == entry.values.dtype and param.shape == entry.shape and param.is_contiguous()
