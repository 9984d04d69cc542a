"""Processes that each hold the whole model and see batches of their own: the mean of what they selected in backward."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from safekern.errors import StepError
from safekern.layout import by_device
from safekern.optim.selected_grad import SelectedGrad, is_selected
from safekern.sharding import in_process_group, is_sharded

# The attribute of the parameters that `safekern.integrations.leave_to_set` was called for.
LEFT_TO_SET = "_left_to_set"


def is_replicated(param: Tensor) -> bool:
    """Whether other processes hold the same parameter whole, each with a gradient of its own."""
    return in_process_group() and dist.get_world_size() > 1 and not is_sharded(param)


def check_averaged(name: str, param: Tensor) -> None:
    """Refuses a dense gradient that `safekern.integrations.leave_to_set` keeps DistributedDataParallel away from.

    Raises:
        StepError: nobody averages it over the processes, whose weights would drift apart.
    """
    if getattr(param, LEFT_TO_SET, False) and is_replicated(param):
        raise StepError(
            f"leave_to_set told DistributedDataParallel to leave parameter {name} alone, so nobody averages its dense "
            "gradient over the processes: make SETAdamW with in_backward=True; or, for another optimizer, call "
            "remove() of what leave_to_set returned, and wrap the model anew"
        )


def average(replicated: Mapping[str, tuple[Tensor, Tensor]], *, complete: bool) -> None:
    """Makes gradients that processes selected from their own batches the mean over all of them.

    One all-reduce per device. A gradient that some process lacks counts as zero there; what all lack, they lack after.

    Args:
        replicated: parameters and the positions of their selected weights, the same ones in every process.
        complete: refuse gradients that some process does not have.

    Raises:
        StepError: a gradient is dense, or missing somewhere though it should be complete.
    """
    for name, (param, positions) in replicated.items():
        if param.grad is not None and not is_selected(name, param.grad, positions):
            raise StepError(
                f"parameter {name} has a dense gradient, where in_backward=True keeps its selected entries only: "
                "DistributedDataParallel writes one back. Call safekern.integrations.leave_to_set(model, mask) right "
                "before wrapping the model, after torch.compile and the like, or do not wrap it: the optimizer "
                "averages over the processes"
            )
    params, positions_of = [param for param, _ in replicated.values()], [index for _, index in replicated.values()]
    for together in by_device(params):
        sizes = [positions_of[t].numel() for t in together]
        flat = torch.zeros(sum(sizes) + len(together), dtype=torch.float32, device=params[together[0]].device)
        *means, holders = flat.split([*sizes, len(together)])
        for i, t in enumerate(together):
            grad = params[t].grad
            if isinstance(grad, SelectedGrad):
                means[i].copy_(grad.selected)
                holders[i] = 1
        dist.all_reduce(flat)
        size = dist.get_world_size()
        flat[: sum(sizes)].div_(size)
        for t, mean, count in zip(together, means, holders.tolist(), strict=True):
            grad = params[t].grad
            if complete and 0 < count < size:
                raise StepError(
                    "a parameter received a gradient in some processes only, so that these would not agree on how to "
                    "clip or unscale it: use the optimizer's clip_grad_norm_"
                )
            if isinstance(grad, SelectedGrad):
                grad.selected = mean
            elif count:
                params[t].grad = SelectedGrad(params[t], positions_of[t], mean, dtype=params[t].grad_dtype)
