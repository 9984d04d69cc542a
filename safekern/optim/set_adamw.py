"""SETAdamW: AdamW on the selected weights only, with state for those only."""

import copy
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from safekern import names, ops
from safekern.eligibility import check_plain
from safekern.errors import InvalidArgumentError, MaskMismatchError, NonFiniteError, StepError
from safekern.mask import Mask
from safekern.optim.masked import (
    NamedParameters,
    by_device,
    check_hyperparameters,
    check_strided,
    count_step,
    flat_like,
    flat_view,
    gather_selected,
    memory_indices,
    named_groups,
    overlaps_itself,
)
from safekern.optim.selected_grad import GradientHooks, SelectedGrad

_COMPACT = ("exp_avg", "exp_avg_sq", "master")

_Form = tuple[torch.Size, tuple[int, ...], torch.dtype]


@dataclass(frozen=True, slots=True)
class _Selection:
    """Where a parameter's selected weights lie in its memory, and the form of the parameter that this holds for."""

    indices: Tensor
    form: _Form


@dataclass(slots=True)
class _Target:
    """A masked parameter that received a gradient."""

    name: str
    group: dict[str, Any]
    param: Tensor
    grad: Tensor
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
        in_backward: reduce every gradient to its selected entries as soon as backward has made it, so that no more
            than one dense gradient lives at a time; gradients of parameters outside the mask are dropped. Each masked
            ``param.grad`` is then a :class:`~safekern.optim.selected_grad.SelectedGrad` of 4 bytes per selected weight,
            on which micro-batches add up in fp32, and ``zero_grad``, clipping (by the norm over the selected entries)
            and ``torch.amp.GradScaler`` work as usual. With a model compiled as a whole, the gradients of a compiled
            backward live until it ends; compile its layers one by one to keep the saving.

    Raises:
        InvalidArgumentError: a hyperparameter out of range; a parameter without a name, given twice, or not a plain
            tensor; ``in_backward`` in one of several processes.
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
        if in_backward and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise InvalidArgumentError(
                "in_backward=True does not work with several processes yet: DistributedDataParallel would average "
                "gradients that were freed, and the processes would part company. Leave it out"
            )
        groups = named_groups(named_parameters)
        named = {name: param for group in groups for name, param in group["params"]}
        given = mask.resolve(named)
        if not any(named[name].requires_grad for name in given.values()):
            raise MaskMismatchError(
                "the mask selects no weight that trains: all its parameters have requires_grad=False"
            )
        for name in given.values():
            check_plain(name, named[name])
            if overlaps_itself(named[name]):
                raise InvalidArgumentError(f"parameter {name} has overlapping memory: make it contiguous first")
        self._master_weights = master_weights
        self._selections = {
            name: _Selection(memory_indices(named[name], mask.compact(masked)), _form(named[name]))
            for masked, name in given.items()
        }
        # State is kept by name, since tools that shard or wrap a model put other tensors into `param_groups` later.
        self._bound: dict[str, Tensor] = {}
        self._hooks: GradientHooks | None = None
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "mask_fingerprint": mask.fingerprint,
        }
        super().__init__(groups, defaults)
        # Last, so that an optimizer that could not be made hooks nothing.
        self._hooks = GradientHooks(self._collect) if in_backward else None
        self._bind()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters that no mask refers to: their gradients are cleared with the others.

        Args:
            param_group: ``{"params": [(name, parameter), ...]}``, and hyperparameters that differ from the defaults.

        Raises:
            InvalidArgumentError: a parameter without a name or already given, or a hyperparameter out of range.
        """
        given = [
            {"params": list(zip(group["param_names"], group["params"], strict=True))} for group in self.param_groups
        ]
        *_, group = named_groups([*given, param_group])
        check_hyperparameters({**self.defaults, **group})
        super().add_param_group({"param_names": [], **group})
        self._bind()

    @torch.no_grad()
    def _bind(self) -> None:
        """Follows parameters that were replaced in ``param_groups`` or moved, and gives state to those without.

        State is made here and not at the first step because checkpoint loaders ask for it before any step was taken.
        """
        for group in self.param_groups:
            for name, param in zip(group["param_names"], group["params"], strict=True):
                before = self._bound.setdefault(name, param)
                if before is not param:
                    self._bound[name] = param
                    self.state[param] = self.state.pop(before, {})
                if self._hooks is not None:
                    self._hooks.place(name, param)
                state = self.state[param]
                if not state:
                    state.update(self._initial_state(name, param))
                elif "exp_avg" in state and state["exp_avg"].device != param.device:
                    state.update({field: state[field].to(param.device) for field in _COMPACT if field in state})

    def _initial_state(self, name: str, param: Tensor) -> dict[str, Tensor]:
        # Strict checkpoint loaders want an entry for every parameter: those outside the mask have a step too.
        state = {"step": torch.tensor(0.0, device="cpu")}
        if name in self._selections:
            indices = self._indices(name, param)
            state["exp_avg"] = torch.zeros(indices.numel(), dtype=torch.float32, device=param.device)
            state["exp_avg_sq"] = torch.zeros_like(state["exp_avg"])
            if self._master_weights and param.element_size() == 2:
                state["master"] = gather_selected(param, param, indices)
        return state

    def _indices(self, name: str, param: Tensor) -> Tensor:
        selection = self._selections[name]
        if selection.form != _form(param):
            raise StepError(
                f"parameter {name} has another shape, layout or dtype than when the optimizer was made: make the "
                "optimizer after the model was converted"
            )
        if selection.indices.device != param.device:
            selection = self._selections[name] = replace(selection, indices=selection.indices.to(param.device))
        return selection.indices

    @torch.no_grad()
    def _collect(self, name: str, param: Tensor) -> None:
        """Replaces a gradient that is ready by its selected entries, inside backward."""
        grad = param.grad
        if grad is None or self._is_mine(name, grad):
            return
        if grad.requires_grad:
            raise StepError("in_backward=True frees the gradients that backward(create_graph=True) is to keep")
        check_strided(name, grad)
        param.grad = None
        if name in self._selections:
            indices = self._indices(name, param)
            param.grad = SelectedGrad(param, indices, gather_selected(grad, param, indices))

    def _is_mine(self, name: str, grad: Tensor) -> bool:
        """Whether it holds the entries that this optimizer selects; another optimizer's are of no use here."""
        if not isinstance(grad, SelectedGrad):
            return False
        if name not in self._selections or grad.positions is not self._selections[name].indices:
            raise StepError(
                f"the gradient of parameter {name} was already reduced to the entries that another optimizer selects: "
                "give a parameter to one optimizer with in_backward=True, and no other"
            )
        return True

    def _targets(self) -> list[_Target]:
        self._bind()
        targets = []
        for group in self.param_groups:
            for name, param in zip(group["param_names"], group["params"], strict=True):
                if name not in self._selections or param.grad is None:
                    continue
                indices = self._indices(name, param)
                grad = param.grad
                if not self._is_mine(name, grad):
                    check_strided(name, grad)
                targets.append(_Target(name, group, param, grad, indices, self.state[param]))
        if not targets:
            raise StepError(
                "no selected weight received a gradient: call backward() first, and check that the mask's parameters "
                "are part of the loss and have requires_grad=True"
            )
        return targets

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @_disable_dynamo
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
        targets = self._targets()
        grads, nonfinite = _selected_gradients(targets)
        _check_finite(targets, grads, nonfinite)
        launches: dict[tuple[int, torch.device], list[int]] = {}
        for i, target in enumerate(targets):
            launches.setdefault((id(target.group), target.param.device), []).append(i)
        for members in launches.values():
            _update([targets[i] for i in members], [grads[i] for i in members])
        return loss

    @_disable_dynamo
    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scales the gradients of the selected weights so that their norm is at most ``max_norm``.

        ``torch.nn.utils.clip_grad_norm_`` would measure all weights, most of which this optimizer does not update.

        Returns:
            The norm before clipping, a 0-d fp32 tensor.

        Raises:
            InvalidArgumentError: ``max_norm`` is negative or NaN.
            StepError: no selected weight received a gradient.
        """
        if not max_norm >= 0:
            raise InvalidArgumentError(f"max_norm must be at least 0, got {max_norm}")
        targets = self._targets()
        grads, _ = _selected_gradients(targets)
        norms = [norm.to(grads[0].device) for norm in torch._foreach_norm(grads)]
        norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)  # as torch.nn.utils.clip_grad_norm_
        for target, grad in zip(targets, grads, strict=True):
            grad.mul_(scale.to(grad.device))
            if isinstance(target.grad, SelectedGrad):
                continue
            if target.grad.stride() == target.param.stride():
                flat_view(target.grad).index_copy_(0, target.indices.long(), grad.to(target.grad.dtype))
            else:
                target.grad.mul_(scale.to(grad.device))
        return norm

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state, as ``torch.optim.Optimizer.state_dict``: tensors and plain values only.

        Per selected weight the fp32 state, in the mask's order; the mask itself is not in it, only its fingerprint.
        """
        self._bind()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what ``state_dict()`` returned for an optimizer with the same mask and groups of parameters.

        Parameters are matched by name, in any order. The next step equals that of the uninterrupted run bit for bit:
        fp32 state stays fp32 where torch's own loading would cast it to the parameter's dtype.

        Raises:
            InvalidArgumentError: not the state of an optimizer.
            MaskMismatchError: the state belongs to another mask or to other parameters. Nothing was changed.
        """
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        if not {"state", "param_groups"} <= state_dict.keys():
            raise InvalidArgumentError("this is no optimizer state: pass what the optimizer's state_dict() returned")
        self._bind()
        groups: list[dict[str, Any]] = []
        state: defaultdict[Tensor, dict[str, Tensor]] = defaultdict(dict)
        for group, (saved, keys) in zip(self.param_groups, self._match(state_dict["param_groups"]), strict=True):
            for name, param, key in zip(group["param_names"], group["params"], keys, strict=True):
                state[param] = _restored(name, state_dict["state"].get(key, {}), self.state[param])
            saved = copy.deepcopy({field: value for field, value in saved.items() if field != "params"})
            groups.append({**saved, "params": group["params"], "param_names": group["param_names"]})
            check_hyperparameters(groups[-1])
        self.__setstate__({"state": state, "param_groups": groups})
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _match(self, saved_groups: list[dict[str, Any]]) -> list[tuple[dict[str, Any], list[Any]]]:
        """For each group the saved one with the same parameters, and the keys of their state in this one's order."""
        keys_by_name = []
        for saved in saved_groups:
            if saved.get("mask_fingerprint") != self.defaults["mask_fingerprint"]:
                raise MaskMismatchError("this optimizer state was saved with another mask: load the mask it belongs to")
            keys = saved["params"]
            # torch.distributed.checkpoint puts names in place of numbers, in an order of its own.
            given = keys if all(isinstance(key, str) for key in keys) else saved.get("param_names", [])
            keys_by_name.append(dict(zip(given, keys, strict=False)))
        found = names.resolve(self._bound, [name for keys in keys_by_name for name in keys])
        matches = []
        for group in self.param_groups:
            wanted = [found.get(name) for name in group["param_names"]]
            for saved, keys in zip(saved_groups, keys_by_name, strict=True):
                if keys.keys() == set(wanted):
                    matches.append((saved, [keys[name] for name in wanted]))
                    break
        if len(matches) != len(self.param_groups) or len(matches) != len(saved_groups):
            raise MaskMismatchError(
                "this optimizer state was saved for other parameters, or for other groups of them: give the optimizer "
                "the parameters and groups that it was saved with"
            )
        return matches

    def __getstate__(self) -> dict[str, Any]:
        own = {field: self.__dict__[field] for field in ("_bound", "_master_weights", "_selections")}
        return {**super().__getstate__(), **own, "in_backward": self._hooks is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        in_backward = state.pop("in_backward", None)
        super().__setstate__(state)
        if in_backward is not None:
            # A copy collects from its own parameters.
            self._hooks = GradientHooks(self._collect) if in_backward else None
        self._bind()


def _form(param: Tensor) -> _Form:
    return param.shape, param.stride(), param.dtype


def _selected_gradients(targets: list[_Target]) -> tuple[list[Tensor], list[tuple[list[int], Tensor]]]:
    """The fp32 gradients at the selected weights.

    Also, per device, which targets had a dense gradient, and a flag for each that holds NaN or infinity at them.
    """
    grads = [target.grad.selected if isinstance(target.grad, SelectedGrad) else target.grad for target in targets]
    nonfinite = []
    for members in by_device(grads):
        dense = [i for i in members if not isinstance(targets[i].grad, SelectedGrad)]
        if not dense:
            continue
        device = grads[dense[0]].device
        sizes = [targets[i].indices.numel() for i in dense]
        srcs = [flat_like(grads[i], targets[i].param) for i in dense]
        outs = torch.empty(sum(sizes), dtype=torch.float32, device=device).split(sizes)
        flags = torch.zeros(len(dense), dtype=torch.bool, device=device)
        ops.gather_(outs, srcs, [targets[i].indices for i in dense], flags)
        nonfinite.append((dense, flags))
        for i, out in zip(dense, outs, strict=True):
            grads[i] = out
    return grads, nonfinite


def _check_finite(targets: list[_Target], grads: list[Tensor], nonfinite: list[tuple[list[int], Tensor]]) -> None:
    # At one read per device.
    bad = [i for dense, flags in nonfinite for i, flag in zip(dense, flags.tolist(), strict=True) if flag]
    reduced = [i for i, target in enumerate(targets) if isinstance(target.grad, SelectedGrad)]
    for together in by_device([grads[i] for i in reduced]):
        members = [reduced[r] for r in together]
        # A finite norm vouches for all its values; it may also overflow where they do not.
        norms = torch.stack(torch._foreach_norm([grads[i] for i in members]))
        suspects = [i for i, finite in zip(members, norms.isfinite().tolist(), strict=True) if not finite]
        bad += [i for i in suspects if not grads[i].isfinite().all()]
    if bad:
        names = [targets[i].name for i in sorted(bad)]
        raise NonFiniteError(
            f"the gradient of {', '.join(names[:3])}{' and others' if len(names) > 3 else ''} holds NaN or infinity at "
            "selected weights; no weight was changed. Skip this batch (zero_grad), or lower the learning rate"
        )


def _update(targets: list[_Target], grads: list[Tensor]) -> None:
    """One step of targets that share a group and a device."""
    group = targets[0].group
    lr, beta1, beta2 = float(group["lr"]), *map(float, group["betas"])
    steps = [int(target.state["step"]) + 1 for target in targets]
    none = torch.empty(0, device=grads[0].device)
    ops.set_adamw_(
        [flat_view(target.param) for target in targets],
        grads,
        [target.indices for target in targets],
        [target.state["exp_avg"] for target in targets],
        [target.state["exp_avg_sq"] for target in targets],
        [target.state.get("master", none) for target in targets],
        [lr / (1 - beta1**step) for step in steps],
        [math.sqrt(1 - beta2**step) for step in steps],
        beta1,
        beta2,
        float(group["eps"]),
        1 - lr * group["weight_decay"],
    )
    # A custom op does not tell autograd that it wrote: without this, a graph that saved the old weights would go on.
    torch.autograd.graph.increment_version([target.param for target in targets])
    count_step([target.state for target in targets])


def _restored(name: str, saved: dict[str, Any], current: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of the saved tensors in the form of the current ones."""
    for field, tensor in current.items():
        if not isinstance(saved.get(field), Tensor) or saved[field].shape != tensor.shape:
            raise MaskMismatchError(
                f"the saved state of parameter {name} has no {field} that fits: it was saved for other parameters, or "
                "with another dtype or master_weights"
            )
    return {field: saved[field].to(tensor.device, tensor.dtype, copy=True) for field, tensor in current.items()}
