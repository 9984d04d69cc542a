"""What the masked optimizers share: named parameter groups, and the selected weights of a parameter in memory."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from safekern import ops
from safekern.errors import InvalidArgumentError, StepError

# Made once: a plain number would be made a tensor anew for every parameter.
_ONE = torch.ones(())

NamedParameters = Iterable[tuple[str, Tensor]] | Iterable[Mapping[str, Any]]


def named_groups(named_parameters: NamedParameters) -> list[dict[str, Any]]:
    """Parameter groups in the form torch keeps names in: ``{"params": [(name, param), ...], ...}``.

    Raises:
        InvalidArgumentError: no parameters, parameters without names, or a name or a parameter given twice.
    """
    entries = list(named_parameters)
    if not entries:
        raise InvalidArgumentError("the optimizer got no parameters: pass model.named_parameters()")
    mappings = [entry for entry in entries if isinstance(entry, Mapping)]
    if len(mappings) == len(entries):
        groups = [{**entry, "params": list(entry.get("params", ()))} for entry in mappings]
    else:
        groups = [{"params": entries}]
    names: set[str] = set()
    given: dict[Tensor, str] = {}
    for group in groups:
        for entry in group["params"]:
            if not (
                isinstance(entry, (tuple, list))
                and len(entry) == 2
                and isinstance(entry[0], str)
                and isinstance(entry[1], Tensor)
            ):
                raise InvalidArgumentError(
                    "a mask refers to parameters by name: pass model.named_parameters(), or groups whose 'params' are "
                    f"(name, parameter) pairs; got {type(entry).__name__}"
                )
            name, param = entry
            if name in names or param in given:
                alias = f", also as {given[param]}" if given.get(param, name) != name else ""
                raise InvalidArgumentError(
                    f"parameter {name} was given twice{alias}: give every parameter once, under a name of its own"
                )
            names.add(name)
            given[param] = name
        group["params"] = [tuple(entry) for entry in group["params"]]
    return groups


def flat_view(param: Tensor) -> Tensor:
    """The parameter's memory as one contiguous 1-D tensor that shares its storage.

    For a contiguous parameter that is ``param.view(-1)``. Otherwise it spans from the first to the last element in
    memory, and :func:`memory_indices` says where the elements lie in it.
    """
    if param.is_contiguous():
        return param.view(-1)
    span = 1 + sum((size - 1) * stride for size, stride in zip(param.shape, param.stride(), strict=True))
    return param.as_strided((span,), (1,))


def flat_like(tensor: Tensor, param: Tensor) -> Tensor:
    """A tensor of the parameter's shape (its gradient, say), flat, with elements where the parameter has them."""
    contiguous = tensor.is_contiguous() and param.is_contiguous()
    if not contiguous and tensor.stride() != param.stride():
        laid_out = torch.empty_strided(param.shape, param.stride(), dtype=tensor.dtype, device=tensor.device)
        tensor = laid_out.copy_(tensor)
    return flat_view(tensor)


def gather_selected(tensor: Tensor, param: Tensor, indices: Tensor) -> Tensor:
    """The fp32 values of a tensor of the parameter's shape at positions in the parameter's memory."""
    selected = torch.empty(indices.numel(), dtype=torch.float32, device=param.device)
    flag = torch.zeros(1, dtype=torch.bool, device=param.device)
    ops.gather_([selected], [flat_like(tensor.detach(), param)], [indices], flag)
    return selected


def memory_indices(param: Tensor, indices: Tensor) -> Tensor:
    """Where in :func:`flat_view` the elements with these row-major indices lie, on the parameter's device."""
    if param.is_contiguous():
        return indices.to(param.device)
    rest, position = indices.long(), torch.zeros(indices.shape, dtype=torch.int64, device=indices.device)
    for size, stride in zip(reversed(param.shape), reversed(param.stride()), strict=True):
        position += rest % size * stride
        rest = rest // size
    fits = flat_view(param).numel() <= torch.iinfo(torch.int32).max
    return position.to(param.device, torch.int32 if fits else torch.int64)


def overlaps_itself(param: Tensor) -> bool:
    """Whether two elements may share memory, as after ``expand``: an update would hit both."""
    dims = sorted((stride, size) for size, stride in zip(param.shape, param.stride(), strict=True) if size > 1)
    reach = 0
    for stride, size in dims:
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def count_step(states: Sequence[Mapping[str, Tensor]]) -> None:
    """Adds one to ``state["step"]`` of each, in one call."""
    torch._foreach_add_([state["step"] for state in states], _ONE, alpha=1.0)


def check_hyperparameters(group: Mapping[str, Any]) -> None:
    """Refuses hyperparameters of AdamW that are out of range."""
    for name in ("lr", "eps", "weight_decay"):
        if not 0 <= float(group[name]) < math.inf:
            raise InvalidArgumentError(f"{name} must be a finite number of at least 0, got {group[name]}")
    if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
        raise InvalidArgumentError(f"betas must be two numbers in [0, 1), got {group['betas']}")


def check_strided(name: str, grad: Tensor) -> None:
    """Refuses the gradients that ``sparse=True`` gives."""
    if grad.layout != torch.strided:
        raise StepError(f"parameter {name} has a sparse gradient: build its module with sparse=False")


def by_device(tensors: Sequence[Tensor]) -> list[list[int]]:
    """The positions of the tensors on each device."""
    positions: dict[torch.device, list[int]] = {}
    for t, tensor in enumerate(tensors):
        positions.setdefault(tensor.device, []).append(t)
    return list(positions.values())
