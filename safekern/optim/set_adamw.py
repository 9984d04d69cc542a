"""SETAdamW: AdamW on the selected weights only, with state for those only."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from safekern import ops
from safekern.eligibility import check_plain
from safekern.errors import InvalidArgumentError, MaskMismatchError, NonFiniteError, StepError
from safekern.mask import Mask
from safekern.optim.masked import NamedParameters, flat_like, flat_view, memory_indices, named_groups, overlaps_itself

_STATE = ("exp_avg", "exp_avg_sq", "master")


@dataclass(frozen=True, slots=True)
class _Target:
    """A masked parameter of one step."""

    name: str
    param: Tensor
    indices: Tensor
    state: dict[str, Tensor]


class SETAdamW(Optimizer):
    """AdamW that updates only the weights of a mask, in place; every other weight stays bit-identical.

    Safety Enhancement Tuning (arXiv 2604.08297): AdamW (arXiv 1711.05101) on the top 1% by ESI. State per selected
    weight: fp32 ``exp_avg`` and ``exp_avg_sq``, its index, and for 16-bit parameters an fp32 ``master`` value, so that
    steps smaller than the parameter's resolution add up. At most 16 bytes, and nothing for the other weights. With a
    full mask and fp32 parameters it equals ``torch.optim.AdamW``.

    Weights loaded or edited after construction are noticed, weight by weight: a master that no longer rounds to its
    weight takes the weight's value.

    Args:
        named_parameters: ``model.named_parameters()``, or parameter groups whose ``"params"`` are (name, parameter)
            pairs. Parameters outside the mask may be among them; ``zero_grad`` clears their gradients.
        mask: which weights to update. Every parameter it names must be given, with its shape.
        lr: learning rate.
        betas: decay rates of the moments.
        eps: added to the denominator.
        weight_decay: decoupled decay of the selected weights.
        master_weights: keep fp32 values of selected bfloat16 and float16 weights (4 bytes each).

    Raises:
        InvalidArgumentError: a hyperparameter out of range, or parameters without names.
        MaskMismatchError: the mask does not fit, or selects nothing that trains.

    Example:
        >>> opt = safekern.SETAdamW(model.named_parameters(), mask, lr=1e-4)      # doctest: +SKIP
        >>> for batch in batches:                                                 # doctest: +SKIP
        ...     safekern.objectives.refusal(model, batch).backward()
        ...     opt.step()
        ...     opt.zero_grad()
    """

    def __init__(
        self,
        named_parameters: NamedParameters,
        mask: Mask,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        master_weights: bool = True,
        in_backward: bool = False,
    ) -> None:
        if in_backward:
            raise InvalidArgumentError("in_backward=True is not available yet: leave it out to keep dense gradients")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "mask_fingerprint": mask.fingerprint,
        }
        _check_hyperparameters(defaults)
        groups = named_groups(named_parameters)
        for group in groups:
            _check_hyperparameters({**defaults, **group})
        named = {name: param for group in groups for name, param in group["params"]}
        given = mask.resolve({name: param.shape for name, param in named.items()})
        if not mask.numel or not any(named[name].requires_grad for name in given.values()):
            raise MaskMismatchError(
                "the mask selects no weight that trains: it is empty, or all its parameters have requires_grad=False"
            )
        for name in given.values():
            check_plain(name, named[name])
            if overlaps_itself(named[name]):
                raise InvalidArgumentError(f"parameter {name} has overlapping memory: make it contiguous first")
        super().__init__(groups, defaults)
        self._master_weights = master_weights
        self._indices = {name: memory_indices(named[name], mask.compact(masked)) for masked, name in given.items()}
        with torch.no_grad():
            for name, indices in self._indices.items():
                self.state[named[name]] = self._initial_state(named[name], indices)

    def _initial_state(self, param: Tensor, indices: Tensor) -> dict[str, Tensor]:
        # Made here and not at the first step: checkpoint loaders ask for the state before any step was taken.
        selected = torch.zeros(indices.numel(), dtype=torch.float32, device=param.device)
        state = {"step": torch.tensor(0.0), "exp_avg": selected, "exp_avg_sq": selected.clone()}
        if self._master_weights and param.element_size() == 2:
            state["master"] = selected.clone()
            flag = torch.zeros(1, dtype=torch.bool, device=param.device)
            ops.gather_([state["master"]], [flat_view(param.detach())], [indices], flag)
        return state

    def _targets(self, group: dict[str, Any]) -> Iterator[_Target]:
        for name, param in zip(group["param_names"], group["params"], strict=True):
            if name in self._indices and param.grad is not None:
                if param.grad.layout != torch.strided:
                    raise StepError(f"parameter {name} has a sparse gradient: build its module with sparse=False")
                yield _Target(name, param, self._indices[name], self.state[param])

    def _selected_gradients(self, targets: list[_Target]) -> tuple[list[Tensor], Tensor]:
        """The fp32 gradients at the selected weights, and a flag per target that is set if one is not finite."""
        grads = [torch.empty_like(target.state["exp_avg"]) for target in targets]
        nonfinite = torch.zeros(len(targets), dtype=torch.bool, device=grads[0].device)
        srcs = [flat_like(target.param.grad.detach(), target.param) for target in targets]  # type: ignore[union-attr]
        ops.gather_(grads, srcs, [target.indices for target in targets], nonfinite)
        return grads, nonfinite

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One optimization step.

        Args:
            closure: recomputes the loss and the gradients.

        Raises:
            StepError: no selected weight received a gradient.
            NonFiniteError: a selected gradient is NaN or infinite. Nothing was changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = [(group, targets) for group in self.param_groups if (targets := list(self._targets(group)))]
        if not work:
            raise StepError(
                "no selected weight received a gradient: call backward() before step(), and check that the mask's "
                "parameters are part of the loss and have requires_grad=True"
            )
        gathered = [self._selected_gradients(targets) for _, targets in work]
        bad = [
            target.name
            for (_, targets), (_, nonfinite) in zip(work, gathered, strict=True)
            for target, flag in zip(targets, nonfinite.tolist(), strict=True)
            if flag
        ]
        if bad:
            raise NonFiniteError(
                f"the gradient of {', '.join(bad[:3])}{' and others' if len(bad) > 3 else ''} holds NaN or infinity at "
                "selected weights; no weight was changed. Skip this batch (zero_grad), or lower the learning rate"
            )
        for (group, targets), (grads, _) in zip(work, gathered, strict=True):
            _update(group, targets, grads)
        return loss

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scales the gradients so that their norm over the selected weights is at most ``max_norm``.

        ``torch.nn.utils.clip_grad_norm_`` would measure all weights, most of which this optimizer does not update.

        Returns:
            The norm before clipping, a 0-d fp32 tensor.
        """
        targets = [target for group in self.param_groups for target in self._targets(group)]
        if not targets:
            raise StepError("no selected weight received a gradient: call backward() before clip_grad_norm_()")
        grads, _ = self._selected_gradients(targets)
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(grad) for grad in grads]))
        scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)  # as torch.nn.utils.clip_grad_norm_
        torch._foreach_mul_([target.param.grad for target in targets], scale)
        return norm

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what ``state_dict()`` returned for an optimizer with the same mask and parameters.

        The next step equals that of the uninterrupted run bit for bit: fp32 state stays fp32 where torch's own loading
        would cast it to the parameter's dtype.

        Raises:
            MaskMismatchError: the state belongs to another mask or to other parameters. Nothing was changed.
        """
        saved: dict[int, dict[str, Tensor]] = {}
        for group, loaded in zip(self.param_groups, state_dict["param_groups"], strict=False):
            if loaded.get("mask_fingerprint") != group["mask_fingerprint"]:
                raise MaskMismatchError("this optimizer state was saved with another mask: load the mask it belongs to")
            if loaded.get("param_names") != group["param_names"]:
                raise MaskMismatchError(
                    "this optimizer state was saved for other parameters, or for the same ones in another order"
                )
            for name, param, key in zip(group["param_names"], group["params"], loaded["params"], strict=True):
                if name in self._indices:
                    entry = state_dict["state"].get(key, {})
                    if any(
                        field not in entry or entry[field].shape != value.shape
                        for field, value in self.state[param].items()
                    ):
                        raise MaskMismatchError(f"the optimizer state of parameter {name} is incomplete")
                    saved[id(param)] = entry
        super().load_state_dict(state_dict)
        for param, state in self.state.items():
            for field in _STATE:
                if field in state:
                    state[field] = saved[id(param)][field].to(param.device, torch.float32, copy=True)

    def __getstate__(self) -> dict[str, Any]:
        return {
            **super().__getstate__(),  # type: ignore[no-untyped-call]
            "_indices": self._indices,
            "_master_weights": self._master_weights,
        }


def _update(group: dict[str, Any], targets: list[_Target], grads: list[Tensor]) -> None:
    lr, (beta1, beta2) = float(group["lr"]), group["betas"]
    steps = [int(target.state["step"]) + 1 for target in targets]
    params = [target.param.detach() for target in targets]
    none = torch.empty(0, device=params[0].device)
    ops.set_adamw_(
        [flat_view(param) for param in params],
        grads,
        [target.indices for target in targets],
        [target.state["exp_avg"] for target in targets],
        [target.state["exp_avg_sq"] for target in targets],
        [target.state.get("master", none) for target in targets],
        [lr / (1 - beta1**step) for step in steps],
        [math.sqrt(1 - beta2**step) for step in steps],
        beta1,
        beta2,
        group["eps"],
        1 - lr * group["weight_decay"],
    )
    # A custom op does not tell autograd that it wrote: without this, a graph that saved the old weights would go on.
    torch.autograd.graph.increment_version([target.param for target in targets])
    for target in targets:
        target.state["step"] += 1


def _check_hyperparameters(group: dict[str, Any]) -> None:
    for name in ("lr", "eps", "weight_decay"):
        if not 0 <= float(group[name]) < math.inf:
            raise InvalidArgumentError(f"{name} must be a finite number of at least 0, got {group[name]}")
    if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
        raise InvalidArgumentError(f"betas must be two numbers in [0, 1), got {group['betas']}")
