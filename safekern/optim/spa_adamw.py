"""SPAAdamW: AdamW on everything except the weights of a mask."""

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from safekern import names, ops
from safekern.eligibility import check_plain
from safekern.errors import InvalidArgumentError, MaskMismatchError, StepError
from safekern.mask import Mask
from safekern.optim.masked import (
    NamedParameters,
    check_hyperparameters,
    check_strided,
    count_step,
    flat_like,
    flat_view,
    memory_indices,
    named_groups,
    overlaps_itself,
)

_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True)
class _Binding:
    """A parameter as it lay in memory when the positions of its protected weights were worked out."""

    param: Tensor
    layout: tuple[Any, ...]
    protected: Tensor


@dataclass(frozen=True, slots=True)
class _Target:
    """A parameter of one step."""

    param: Tensor
    grad: Tensor
    protected: Tensor
    state: dict[str, Tensor]


class SPAAdamW(Optimizer):
    """AdamW on everything except the weights of a mask, which stay bit-identical.

    Safety Preserving Adaptation (arXiv 2604.08297): fine-tuning with the top 1% by ESI frozen. One pass over the
    weights, which are updated as ``torch.optim.AdamW`` updates them (arXiv 1711.05101) with arithmetic in fp32, or fp64
    for fp64 parameters. Parameters outside the mask are trained whole; those with ``requires_grad=False`` are ignored.
    The moments of protected weights are kept like all others, so that a mask costs no time and no layout of its own.

    Args:
        named_parameters: ``model.named_parameters()``, or parameter groups whose ``"params"`` are (name, parameter)
            pairs.
        mask: which weights to protect. Every parameter it names must be given, with its shape.
        lr: learning rate.
        betas: decay rates of the moments.
        eps: added to the denominator.
        weight_decay: decoupled decay of the weights that are not protected.
        state_dtype: dtype of the moments: the parameter's, as in ``torch.optim.AdamW``, or ``torch.float32``. In
            bfloat16, ``exp_avg_sq`` cannot decay by 0.1% per step, which is less than it can express.

    Raises:
        InvalidArgumentError: a hyperparameter out of range, or parameters without names or with a memory layout that
            cannot be updated in one pass.
        MaskMismatchError: the mask does not fit, or protects nothing that trains.

    Example:
        >>> opt = safekern.SPAAdamW(model.named_parameters(), mask, lr=1e-5)      # doctest: +SKIP
        >>> for batch in batches:                                                 # doctest: +SKIP
        ...     model(**batch).loss.backward()
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
        state_dtype: torch.dtype | None = None,
    ) -> None:
        if state_dtype not in (None, torch.float32):
            raise InvalidArgumentError(
                f"state_dtype must be torch.float32, or None for the parameters' dtype, got {state_dtype}"
            )
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "mask_fingerprint": mask.fingerprint,
        }
        self._mask = mask
        self._state_dtype = state_dtype
        self._bindings: dict[str, _Binding] = {}
        groups = named_groups(named_parameters)
        named = {name: param for group in groups for name, param in group["params"]}
        # The name in the mask of each parameter that has protected weights.
        self._masked = {given: masked for masked, given in mask.resolve(named).items()}
        if not any(named[name].requires_grad for name in self._masked):
            raise MaskMismatchError(
                "the mask protects no weight that trains: all its parameters have requires_grad=False (their weights "
                "are safe from this optimizer without it)"
            )
        super().__init__(groups, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters to train, which the mask does not cover.

        Args:
            param_group: ``{"params": [(name, parameter), ...], ...}`` with its own hyperparameters, if any.

        Raises:
            InvalidArgumentError: a hyperparameter out of range, a parameter without a name, or one given before.
            MaskMismatchError: a new parameter could be the one that the mask means.
        """
        pairs = list(param_group["params"])
        if pairs:
            named_groups([{"params": pairs}])
        check_hyperparameters({**self.defaults, **param_group})
        given = {
            param: name
            for group in self.param_groups
            for name, param in zip(group["param_names"], group["params"], strict=True)
        }
        taken, meant = set(given.values()), {names.canonical(name) for name in self._masked}
        for name, param in pairs:
            if name in taken or param in given:
                alias = f", also as {given[param]}" if given.get(param, name) != name else ""
                raise InvalidArgumentError(
                    f"parameter {name} was given twice{alias}: give every parameter once, under a name of its own"
                )
            if name not in self._masked and names.canonical(name) in meant:
                raise MaskMismatchError(f"parameter {name} may be one that the mask means, which is protected already")
            if param.requires_grad or name in self._masked:
                _check_usable(name, param)
        # Without names of its own torch would refuse an empty group beside named ones.
        super().add_param_group({**param_group, "params": pairs} if pairs else {**param_group, "param_names": []})
        self._bind()

    def _bind(self) -> None:
        """Finds where in memory the protected weights lie, and makes the state of parameters that have none.

        Repeated before every use: after the optimizer was made, parameters are unfrozen, moved, laid out anew, or
        swapped for others of the same name (by accelerate).
        """
        for group in self.param_groups:
            for name, param in zip(group["param_names"], group["params"], strict=True):
                layout = (param.shape, param.stride(), param.dtype, param.device, param.requires_grad)
                bound = self._bindings.get(name)
                if bound is None or bound.param is not param or bound.layout != layout:
                    self._bindings[name] = self._binding(name, param, layout, bound)

    def _binding(self, name: str, param: Tensor, layout: tuple[Any, ...], before: _Binding | None) -> _Binding:
        if param.requires_grad or name in self._masked:
            _check_usable(name, param)
        if before is not None and before.layout[0] != param.shape:
            raise MaskMismatchError(
                f"parameter {name} changed its shape from {tuple(before.layout[0])} to {tuple(param.shape)}: "
                "make a new mask and optimizer"
            )
        if before is not None and before.param is not param and before.param in self.state:
            self.state[param] = self.state.pop(before.param)
        if param.requires_grad and param not in self.state:
            # Made here and not at the first step: checkpoint loaders ask for the state before any step was taken.
            self.state[param] = self._state_of(param, {})
        if name not in self._masked:
            return _Binding(param, layout, torch.empty(0, dtype=torch.int32, device=param.device))
        protected = memory_indices(param, self._mask.compact(self._masked[name]))
        return _Binding(param, layout, protected if param.is_contiguous() else protected.sort().values)

    def _state_of(self, param: Tensor, values: Mapping[str, Any]) -> dict[str, Tensor]:
        """State that lies in memory as the parameter does, with these values or zeros."""
        state = {"step": torch.as_tensor(values.get("step", 0.0), dtype=torch.float32, device="cpu").clone()}
        for moment in _MOMENTS:
            state[moment] = torch.zeros_like(param, dtype=self._state_dtype or param.dtype, requires_grad=False)
            if moment in values:
                state[moment].copy_(values[moment])
        return state

    def _targets(self, group: dict[str, Any]) -> Iterator[_Target]:
        for name, param in zip(group["param_names"], group["params"], strict=True):
            if param.grad is None or not param.requires_grad:
                continue
            check_strided(name, param.grad)
            if not all(_lies_like(self.state[param][moment], param) for moment in _MOMENTS):
                self.state[param] = self._state_of(param, self.state[param])
            grad = param.grad.detach()
            if grad.dtype not in (param.dtype, torch.float32):
                grad = grad.to(param.dtype)
            yield _Target(param, grad, self._bindings[name].protected, self.state[param])

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
            StepError: no parameter received a gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._bind()
        work = [(group, targets) for group in self.param_groups if (targets := list(self._targets(group)))]
        if not work:
            raise StepError(
                "no parameter received a gradient: call backward() before step(), and check that the optimizer's "
                "parameters are part of the loss"
            )
        for group, targets in work:
            for device in dict.fromkeys(target.param.device for target in targets):
                _update(group, [target for target in targets if target.param.device == device])
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The state, with the parameters' names and the mask's fingerprint: tensors and plain types only."""
        self._bind()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what ``state_dict()`` returned for an optimizer with the same mask.

        Parameters are matched by name, whatever their order. The next step equals that of the uninterrupted run bit for
        bit: moments keep their dtype, where torch's own loading would cast them to the parameter's.

        Raises:
            MaskMismatchError: the state belongs to another mask or to other parameters. Nothing was changed.
            InvalidArgumentError: the state has fp32 moments, which this optimizer would round. Nothing was changed.
        """
        self._bind()
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        groups, state = self._matched(state_dict)
        self.__setstate__({"param_groups": groups, "state": state})
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _matched(self, state_dict: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[Tensor, dict[str, Tensor]]]:
        """The saved groups and state, in the order of this optimizer's parameters."""
        keys, homes = {}, {}
        for position, group in enumerate(state_dict["param_groups"]):
            if group.get("mask_fingerprint") != self.defaults["mask_fingerprint"]:
                raise MaskMismatchError("this optimizer state was saved with another mask: load the mask it belongs to")
            for name, key in zip(group["param_names"], group["params"], strict=True):
                keys[name], homes[name] = key, position
        found = names.resolve((name for group in self.param_groups for name in group["param_names"]), keys)

        groups: list[dict[str, Any]] = []
        state: dict[Tensor, dict[str, Tensor]] = defaultdict(dict)
        for position, group in enumerate(self.param_groups):
            sources = {homes[found[name]] if name in found else None for name in group["param_names"]} or {position}
            source = sources.pop()
            if sources or source is None or len(state_dict["param_groups"][source]["params"]) != len(group["params"]):
                raise MaskMismatchError(
                    "this optimizer state was saved for other parameters, or for the same ones in other groups: give "
                    f"the parameters as they were given then. In group {position} are {', '.join(group['param_names'])}"
                )
            hyperparameters = copy.deepcopy(state_dict["param_groups"][source])
            groups.append({**hyperparameters, "params": group["params"], "param_names": group["param_names"]})
            for name, param in zip(group["param_names"], group["params"], strict=True):
                values = state_dict["state"].get(keys[found[name]])
                if values is not None or param in self.state:
                    self._check_loadable(name, param, values or {})
                    state[param] = self._state_of(param, values)
        return groups, state

    def _check_loadable(self, name: str, param: Tensor, values: Mapping[str, Any]) -> None:
        if "step" not in values or any(
            moment not in values or values[moment].shape != param.shape for moment in _MOMENTS
        ):
            raise MaskMismatchError(f"the optimizer state of parameter {name} is incomplete or of another shape")
        dtype = self._state_dtype or param.dtype
        if any(torch.promote_types(values[moment].dtype, dtype) != dtype for moment in _MOMENTS):
            raise InvalidArgumentError(
                f"the moments of parameter {name} were saved in {values[_MOMENTS[0]].dtype}, and would be rounded to "
                f"{dtype}: make the optimizer with state_dtype=torch.float32"
            )

    def __getstate__(self) -> dict[str, Any]:
        own = {"_mask": self._mask, "_masked": self._masked, "_state_dtype": self._state_dtype}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # A copy has parameters of its own, to which it binds anew.
        self.__dict__.setdefault("_bindings", {})


def _update(group: dict[str, Any], targets: list[_Target]) -> None:
    lr, (beta1, beta2) = float(group["lr"]), group["betas"]
    steps = [int(target.state["step"]) + 1 for target in targets]
    params = [target.param.detach() for target in targets]
    ops.spa_adamw_(
        [flat_view(param) for param in params],
        [flat_like(target.grad, target.param) for target in targets],
        [target.protected for target in targets],
        [flat_view(target.state["exp_avg"]) for target in targets],
        [flat_view(target.state["exp_avg_sq"]) for target in targets],
        [lr / (1 - beta1**step) for step in steps],
        [math.sqrt(1 - beta2**step) for step in steps],
        beta1,
        beta2,
        group["eps"],
        1 - lr * group["weight_decay"],
    )
    # A custom op does not tell autograd that it wrote: without this, a graph that saved the old weights would go on.
    torch.autograd.graph.increment_version([target.param for target in targets])
    count_step([target.state for target in targets])


def _lies_like(tensor: Tensor, param: Tensor) -> bool:
    return tensor.stride() == param.stride() or (tensor.is_contiguous() and param.is_contiguous())


def _check_usable(name: str, param: Tensor) -> None:
    check_plain(name, param)
    if overlaps_itself(param) or flat_view(param.detach()).numel() != param.numel():
        raise InvalidArgumentError(
            f"parameter {name} has overlapping elements or gaps in memory: make it contiguous first"
        )
