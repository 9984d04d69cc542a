"""Where the elements of a parameter lie in memory, which is what the kernels work on."""

from collections.abc import Iterable, Sequence
from types import SimpleNamespace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from safekern import ops
from safekern.indices import index_dtype
from safekern.sharding import local


def flat_view(param: Tensor) -> Tensor:
    """The parameter's memory as one contiguous 1-D tensor that shares its storage.

    For a contiguous parameter that is ``param.view(-1)``. Otherwise it spans from the first to the last element in
    memory, and :func:`memory_indices` says where the elements lie in it.
    """
    if param.is_contiguous():
        return param.view(-1)
    span = 1 + sum((size - 1) * stride for size, stride in zip(param.shape, param.stride(), strict=True))
    return param.as_strided((span,), (1,))


def memory(param: Tensor) -> Tensor:
    """What the kernels take for the parameter's memory: the parameter itself, or its :func:`flat_view`.

    They work on contiguous tensors of any shape, and making a view takes longer than passing a tensor to them.
    """
    return param if param.is_contiguous() else flat_view(param)


def memory_like(tensor: Tensor, param: Tensor) -> Tensor:
    """:func:`memory` of a tensor of the parameter's shape (its gradient), with elements where the parameter has them.

    A copy, if they lie elsewhere.
    """
    if tensor.is_contiguous() and param.is_contiguous():
        return tensor
    if tensor.stride() != param.stride():
        laid_out = torch.empty_strided(param.shape, param.stride(), dtype=tensor.dtype, device=tensor.device)
        tensor = laid_out.copy_(tensor)
    return flat_view(tensor)


def memory_indices(param: Tensor, indices: Tensor) -> Tensor:
    """Where in :func:`flat_view` the elements with these row-major indices lie, on the parameter's device."""
    if param.is_contiguous():
        return indices.to(param.device)
    rest, position = indices.long(), torch.zeros(indices.shape, dtype=torch.int64, device=indices.device)
    for size, stride in zip(reversed(param.shape), reversed(param.stride()), strict=True):
        position += rest % size * stride
        rest = rest // size
    return position.to(param.device, index_dtype(flat_view(param).numel()))


@torch.no_grad()
def read_selected(params: Sequence[Tensor], indices: Sequence[Tensor]) -> list[Tensor]:
    """The values of parameters at positions in their memory, bit for bit.

    Args:
        params: plain tensors on any devices, or the parts of sharded ones that this process holds.
        indices: for each, int32 or int64 [k] on its device, see :func:`memory_indices`.

    Returns:
        For each, [k] of its dtype on its device.
    """
    values = [
        torch.empty(index.shape, dtype=param.dtype, device=param.device)
        for param, index in zip(params, indices, strict=True)
    ]
    for here in by_device(values):
        flags = torch.zeros(len(here), dtype=torch.bool, device=values[here[0]].device)
        ops.gather_([values[t] for t in here], [memory(params[t]) for t in here], [indices[t] for t in here], flags)
    return values


@torch.no_grad()
def write_selected(params: Sequence[Tensor], indices: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """The inverse of :func:`read_selected`: what was read is written back, bit for bit.

    Args:
        params: as there; of a DTensor, the part that this process holds is written.
        indices: as there.
        values: for each parameter [k] of its dtype, on its device.
    """
    pieces = [local(param) for param in params]
    for here in by_device(pieces):
        ops.restore_([memory(pieces[t]) for t in here], [indices[t] for t in here], [values[t] for t in here])
        mark_written([params[t] for t in here])


def mark_written(params: Sequence[Tensor]) -> None:
    """Tells torch that a custom op has written to parameters, which it does not see by itself.

    A graph that saved the old weights would go on, and autocast would go on with its casts of them.
    """
    torch.autograd.graph.increment_version(params)
    torch.clear_autocast_cache()


def gather_selected(tensor: Tensor, param: Tensor, indices: Tensor) -> Tensor:
    """The fp32 values of a tensor of the parameter's shape at positions in the parameter's memory."""
    selected = torch.empty(indices.numel(), dtype=torch.float32, device=param.device)
    flag = torch.zeros(1, dtype=torch.bool, device=param.device)
    ops.gather_([selected], [memory_like(tensor.detach(), param)], [indices], flag)
    return selected


def overlaps_itself(param: Tensor) -> bool:
    """Whether two elements may share memory, as after ``expand``: an update would hit both."""
    dims = sorted((stride, size) for size, stride in zip(param.shape, param.stride(), strict=True) if size > 1)
    reach = 0
    for stride, size in dims:
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def sharing(named: Iterable[tuple[str, Tensor]]) -> list[tuple[str, str]]:
    """The names of pairs of parameters that have an element of memory in common, of sharded ones in this process.

    Those without memory of their own (on the meta device, wrappers of other tensors) are left out.
    """
    names, tensors = [], []
    for name, param in named:
        names.append(name)
        tensors.append(local(param))
    spans: dict[torch.device, list[tuple[int, int, int]]] = {}
    for t, tensor in enumerate(tensors):
        is_wrapper: bool = is_traceable_wrapper_subclass(tensor)
        if is_wrapper or tensor.layout != torch.strided or tensor.is_meta:
            continue
        if tensor.numel() and (start := tensor.data_ptr()):
            length = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            spans.setdefault(tensor.device, []).append((start, start + length * tensor.element_size(), t))
    found = []
    for of_device in spans.values():
        before: list[tuple[int, int]] = []
        for start, stop, t in sorted(of_device):
            before = [(end, other) for end, other in before if end > start]
            # Spans of strided tensors may interleave and have nothing in common.
            found += [
                (names[other], names[t])
                for _, other in before
                if np.shares_memory(_extent(tensors[other]), _extent(tensors[t]))
            ]
            before.append((stop, t))
    return found


def _extent(tensor: Tensor) -> NDArray[np.void]:
    """An array at the tensor's addresses, which may be those of another device: it is never read."""
    size = tensor.element_size()
    interface = {
        "version": 3,
        "data": (tensor.data_ptr(), True),
        "shape": tuple(tensor.shape),
        "strides": tuple(stride * size for stride in tensor.stride()),
        "typestr": f"|V{size}",
    }
    return np.asarray(SimpleNamespace(__array_interface__=interface))


def by_device(tensors: Sequence[Tensor]) -> list[list[int]]:
    """The positions of the tensors on each device."""
    positions: dict[torch.device, list[int]] = {}
    for t, tensor in enumerate(tensors):
        positions.setdefault(tensor.device, []).append(t)
    return list(positions.values())
