"""SETAdamW: AdamW on the selected weights only, with state for those only."""

import math
import weakref
from collections.abc import Callable, Mapping
from typing import Any, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from safekern import ops
from safekern.arguments import is_scalar
from safekern.eligibility import check_kept, check_plain
from safekern.errors import InvalidArgumentError, MaskMismatchError, NonFiniteError, StepError
from safekern.layout import flat_view, gather_selected, memory, overlaps_itself
from safekern.mask import Mask
from safekern.names import listed
from safekern.optim.gradients import Selection, Target, check_reduced, gather, nonfinite_names
from safekern.optim.masked import (
    MaskedOptimizer,
    NamedParameters,
    at,
    check_in_step,
    check_memory,
    check_strided,
    cut,
    held,
    loaded_others,
    making_state,
    named_groups,
    others_of,
    settled_gradient,
    step_arguments,
    step_counted,
)
from safekern.optim.replicas import average, check_averaged, is_replicated
from safekern.optim.selected_grad import GradientHooks, SelectedGrad, is_selected
from safekern.sharding import Processes, Shard, in_process_group, is_sharded, like, local

_COMPACT = ("exp_avg", "exp_avg_sq", "master")
_FIELDS = ("step", *_COMPACT)


class SETAdamW(MaskedOptimizer):
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
            than one dense gradient lives at a time. Each masked ``param.grad`` is then a
            :class:`~safekern.optim.selected_grad.SelectedGrad` of 4 bytes per selected weight, on which micro-batches
            add up in fp32, and ``zero_grad``, clipping (by the norm over the selected entries) and
            ``torch.amp.GradScaler`` work as usual. Gradients outside the mask are dropped: an empty ``SelectedGrad``
            takes their place, in a process group None. Other optimizers refuse a ``SelectedGrad``, as long as something
            refers to this one (its Trainer, too). With a model compiled as a whole, the gradients of a compiled
            backward live until it ends; compile its layers one by one to keep the saving. In several processes that
            each hold the whole model, ``step()`` averages the selected entries over all of them, which then see batches
            of their own without DistributedDataParallel; with it, see
            :func:`safekern.integrations.leave_to_set`.

    Parameters may be sharded (FSDP2's ``fully_shard``, tensor parallelism): make the optimizer afterwards. Each process
    keeps the state of the selected weights it holds; ``step()``, ``clip_grad_norm_``, ``state_dict()`` are then called
    by all processes together, a step is refused in all or in none, and it costs one all-reduce of a number per masked
    parameter. Give every process the same mask. Making the optimizer asks no other process: of an error that one alone
    has there, the others hear where they next wait for it, when it has ended or after the process group's timeout.
    ``Accelerator.prepare`` and the Trainer shard a model after the optimizer was made, and put the new parameters into
    it: it follows at its next use. So with ``in_backward`` the first gradients stay dense, unless ``zero_grad()`` is
    called before.

    Raises:
        InvalidArgumentError: a hyperparameter out of range; a parameter without a name, given twice, quantised, on the
            meta device, or one that FSDP2 gathered for an evaluation and frees later.
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
        self._master_weights = master_weights
        self._selections: dict[str, Selection] = {}
        self._hooks: GradientHooks | None = None
        # Whether clipping has averaged the gradients of processes with batches of their own, for step() to come. In a
        # list, which wrappers that take over the class, as Lightning's, share with the optimizer.
        self._averaged = [False]
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(named_groups(named_parameters), mask, defaults)
        if not any(param.requires_grad for _, name, param in self._named() if name in self._masked):
            raise MaskMismatchError(
                "the mask selects no weight that trains: all its parameters have requires_grad=False"
            )
        if in_backward:
            # Last, so that an optimizer that could not be made hooks nothing.
            self._place_hooks()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters that no mask refers to: their gradients are cleared with the others.

        Args:
            param_group: ``{"params": [(name, parameter), ...]}``, and hyperparameters that differ from the defaults.

        Raises:
            InvalidArgumentError: a parameter without a name or already given, or a hyperparameter out of range.
        """
        self._add(self._checked_group(param_group))

    @_disable_dynamo
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients of all parameters given to the optimizer.

        Args:
            set_to_none: free them, instead of filling them with zeros.
        """
        self._averaged[0] = False
        super().zero_grad(set_to_none)

    def _place_hooks(self) -> None:
        self._hooks = GradientHooks(self._collect)
        for _, name, param in self._named():
            self._hooks.place(name, param)

    def _follow(self, name: str, param: Tensor, *, swapped: bool) -> None:
        if name in self._masked:
            selection = self._select(name, param)
            state = self._moved_state(name, param, selection, swapped)
            self._selections[name], self._states[name] = selection, state
        else:
            check_kept(name, param, sharded=True)
            self._ensure_state(name, param)
        if self._hooks is not None:
            self._hooks.place(name, param)

    def _ensure_state(self, name: str, param: Tensor) -> None:
        # An empty one was cleared, which resets the parameter.
        if not self._states.get(name):
            selection = self._selections.get(name)
            with making_state():
                self._states[name] = (
                    _initial_step() if selection is None else self._initial_state(local(param), selection)
                )

    def _select(self, name: str, param: Tensor) -> Selection:
        masked, piece = self._masked[name], local(param)
        check_plain(name, param, sharded=True)
        if param.shape != self._mask.shapes[masked]:
            raise StepError(f"parameter {name} now has the shape {tuple(param.shape)}: make a new mask and optimizer")
        if overlaps_itself(piece):
            raise InvalidArgumentError(f"parameter {name} has overlapping memory: make it contiguous first")
        places, indices = held(param, self._mask.compact(masked))
        return Selection(places, indices, Shard.of(param).owner, piece.dtype)

    def _moved_state(self, name: str, param: Tensor, new: Selection, swapped: bool) -> dict[str, Tensor]:
        """The state of a parameter, cut down to the weights that this process still holds, and where they are now."""
        state, old = self._states.get(name), self._selections.get(name)
        if state is None or old is None or (swapped and not state["step"]):
            # Made here and not at the first step: checkpoint loaders ask for it before any step was taken.
            return self._initial_state(local(param), new)
        if old.dtype != new.dtype:
            raise StepError(
                f"parameter {name} is in {new.dtype}, and was in {old.dtype} when the optimizer was made: make the "
                "optimizer after the model was converted"
            )
        count = self._mask.compact(self._masked[name]).numel()
        moved = {"step": state["step"], **others_of(state, _FIELDS)}
        for field in [field for field in _COMPACT if field in state]:
            value = cut(state[field], old.places, new.places, count)
            if value is None:
                raise StepError(
                    f"parameter {name} was sharded anew: keep the state_dict(), make an optimizer for the new "
                    "parameters and load it there"
                )
            moved[field] = value.to(param.device)
        return moved

    def _initial_state(self, piece: Tensor, selection: Selection) -> dict[str, Tensor]:
        state = _initial_step()
        state["exp_avg"] = torch.zeros(selection.indices.numel(), dtype=torch.float32, device=piece.device)
        state["exp_avg_sq"] = torch.zeros_like(state["exp_avg"])
        if self._master_weights and piece.element_size() == 2:
            state["master"] = gather_selected(piece, piece, selection.indices)
        return state

    @torch.no_grad()
    def _collect(self, name: str, param: Tensor) -> None:
        """Replaces a gradient that is ready by its selected entries, inside backward."""
        self._averaged[0] = False
        grad = param.grad
        if grad is None:
            return
        self._bind_those([(name, param)])
        if self._is_selected(name, grad):
            return
        if grad.requires_grad:
            raise StepError("in_backward=True frees the gradients that backward(create_graph=True) is to keep")
        if name not in self._masked:
            if any(other in owner._masked for owner, other in self._others(param)):
                raise StepError(
                    f"parameter {name} was given to two optimizers with in_backward=True, and only the mask of the "
                    "other selects it: give every parameter to one of them"
                )
            # An empty one, since another optimizer would take None for nothing to do, and refuses this. In a process
            # group DistributedDataParallel would have to copy it.
            param.grad = None if in_process_group() else SelectedGrad.empty(param, grad.dtype)
            return
        check_strided(name, local(grad))
        if not (is_sharded(grad) and is_sharded(param)) or grad.placements == param.placements:
            # Gradients of other placements are partial sums: step() adds them up, as a hook must not communicate.
            param.grad = None
            piece, indices = local(param), self._selections[name].indices
            read = weakref.WeakMethod(self._average_to_read) if is_replicated(param) else None
            values = gather_selected(local(grad), piece, indices)
            param.grad = like(grad, SelectedGrad(piece, indices, values, read, dtype=grad.dtype))

    def _others(self, param: Tensor) -> "list[tuple[SETAdamW, str]]":
        return [] if self._hooks is None else self._hooks.others(param)

    def _is_selected(self, name: str, grad: Tensor) -> bool:
        selection = self._selections.get(name)
        return is_selected(name, grad, None if selection is None else selection.indices)

    def _average(self, *, complete: bool = False) -> None:
        if self._averaged[0] or self._hooks is None:
            return
        mine = {
            name: (param, self._selections[name].indices)
            for _, name, param in self._named()
            if name in self._masked and is_replicated(param)
        }
        if mine:
            average(mine, complete=complete)
            self._averaged[0] = True

    def _average_to_read(self) -> None:
        """Before torch's own clipping or a scaler looks at gradients that other processes have other values of."""
        if torch._C._current_graph_task_id() != -1:
            raise StepError("gradients of several processes cannot be read in a hook of backward: read them after it")
        self._average(complete=True)

    def _targets(self) -> list[Target]:
        named = self._bind()
        self._average()
        targets = []
        for group, name, param in named:
            grad = param.grad
            if grad is None or name not in self._masked:
                continue
            if self._hooks is None:
                check_averaged(name, param)
            if type(grad) is not SelectedGrad:
                grad = settled_gradient(param)
            if isinstance(grad, SelectedGrad) and self._is_selected(name, grad):
                selected = grad.selected
            else:
                check_strided(name, grad)
                selected = grad
            if not self._states[name]:
                self._ensure_state(name, param)
            selection, state = self._selections[name], self._states[name]
            targets.append(Target(name, group, param, local(param), grad, selection, state, selected))
        return targets

    def _processes(self) -> Processes:
        """Those that hold parts of the masked parameters."""
        return Processes.of([param for _, name, param in self._named() if name in self._masked])

    def _agree(self, processes: Processes, targets: list[Target], bad: list[str]) -> None:
        """Refuses a step in every process that takes part in it, or in none."""
        count = len(targets)
        if processes.size > 1:
            names = list(self._masked)
            votes = torch.tensor([count, *(name in bad for name in names)], dtype=torch.int32, device="cpu")
            count, *flags = processes.total(votes).tolist()
            bad = [name for name, flag in zip(names, flags, strict=True) if flag]
        if not count:
            raise _no_gradient()
        if bad:
            raise NonFiniteError(
                f"the gradient of {listed(bad)} holds NaN or infinity at selected weights; no weight was "
                "changed. Skip this batch (zero_grad), or lower the learning rate"
            )

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @_disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One optimization step.

        With sharded parameters, or several processes and ``in_backward``, all processes call it together.

        Args:
            closure: recomputes the loss and the gradients.

        Returns:
            What the closure returned, if there is one.

        Raises:
            StepError: no selected weight received a gradient, in any process; or the memory of a parameter was freed.
            InvalidArgumentError: a hyperparameter is out of range now.
            NonFiniteError: a selected gradient is NaN or infinite, in any process. Nothing was changed in any.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        targets = self._targets()
        # Before what processes agree on, so that the others do not take the step either.
        for group in self.param_groups:
            check_in_step(group)
        check_memory(targets)
        self._averaged[0] = False
        flags = [*gather(targets), *check_reduced(targets)]
        # Where no other device or process has a say, the device itself skips the update, and never waits for the host.
        processes = self._processes()
        alone = len(flags) == 1 and processes.size == 1
        if not alone:
            self._agree(processes, targets, nonfinite_names(targets, flags))
        together: dict[tuple[int, torch.device], list[Target]] = {}
        for target in targets:
            together.setdefault((id(target.group), target.piece.device), []).append(target)
        updates = [_arguments(some) for some in together.values()]
        with step_counted([target.param for target in targets], [target.state for target in targets]):
            for arguments in updates:
                ops.set_adamw_(*arguments, flags[0].on_device if alone else None)
            if alone:
                self._agree(processes, targets, nonfinite_names(targets, flags))
        return loss

    @_disable_dynamo
    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scales the gradients of the selected weights so that their norm is at most ``max_norm``.

        ``torch.nn.utils.clip_grad_norm_`` would measure all weights, most of which this optimizer does not update. With
        sharded parameters, or several processes and ``in_backward``, all processes call it together, and the norm is
        that over all of them.

        Args:
            max_norm: at least 0; infinity only measures.

        Returns:
            The norm before clipping, a 0-d fp32 tensor.

        Raises:
            InvalidArgumentError: ``max_norm`` is no number, negative or NaN.
            StepError: no selected weight received a gradient.

        Example:
            >>> loss.backward()                                                   # doctest: +SKIP
            >>> norm = opt.clip_grad_norm_(1.0)                                   # doctest: +SKIP
            >>> opt.step()                                                        # doctest: +SKIP
        """
        if not (is_scalar(max_norm) and max_norm >= 0):
            raise InvalidArgumentError(f"max_norm must be a number of at least 0, got {max_norm!r}")
        max_norm = float(max_norm)
        targets = self._targets()
        gather(targets)
        processes = self._processes()
        alone = processes.size == 1
        mine = [target.selected for target in targets if alone or target.selection.owner]
        device = targets[0].selected.device if targets else torch.device("cpu")
        norms = (
            [norm.to(device) for norm in torch._foreach_norm(mine)]
            if mine
            else [torch.zeros((), dtype=torch.float32, device=device)]
        )
        norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        if not alone:
            norm = processes.total(norm.double().square()).sqrt().float()
        if not targets:
            raise _no_gradient()
        if math.isinf(max_norm):
            return norm
        scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)  # as torch.nn.utils.clip_grad_norm_
        for target in targets:
            grad = target.selected
            grad.mul_(scale.to(grad.device))
            if not target.is_dense:
                continue
            if target.grad.stride() == target.piece.stride():
                flat_view(target.grad).index_copy_(0, target.selection.indices.long(), grad.to(target.grad.dtype))
            else:
                target.grad.mul_(scale.to(grad.device))
        return norm

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state, as ``torch.optim.Optimizer.state_dict``: tensors and plain values only.

        Per selected weight the fp32 state, in the mask's order; the mask itself is not in it, only its fingerprint.
        State of sharded parameters is put together from all processes, on the CPU, the same in each, so that it can be
        loaded whatever the number of processes then: all have to call this together.
        """
        return super().state_dict()

    def _saved_state(self, name: str, param: Tensor) -> dict[str, Tensor]:
        state, processes = self._states[name], self._processes()
        if processes.size == 1 or name not in self._masked:
            return state
        # All on the CPU, or torch.distributed.checkpoint would find state on two devices.
        compact = {field: state[field].cpu() for field in _COMPACT if field in state}
        if is_sharded(param):
            selection, count = self._selections[name], self._mask.compact(self._masked[name]).numel()
            for field, value in compact.items():
                # As integers, one of which is not zero: adding them up keeps every bit, also that of -0.0.
                whole = torch.zeros(count, dtype=torch.int32, device="cpu")
                if selection.owner:
                    whole[selection.places] = value.view(torch.int32)
                compact[field] = processes.total(whole).view(torch.float32)
        return {"step": state["step"], **compact, **others_of(state, _FIELDS)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what ``state_dict()`` returned for an optimizer with the same mask and groups of parameters.

        Parameters are matched by name, in any order, and each process takes the part of the state that it needs,
        however many there are now and were then. The next step equals that of the uninterrupted run bit for bit: fp32
        state stays fp32 where torch's own loading would cast it to the parameter's dtype.

        Args:
            state_dict: what ``state_dict()`` returned, also after a trip through ``torch.distributed.checkpoint``.

        Raises:
            InvalidArgumentError: not the state of an optimizer.
            MaskMismatchError: the state belongs to another mask or to other parameters. Nothing was changed.
        """
        super().load_state_dict(state_dict)

    def _loaded_state(self, name: str, param: Tensor, saved: Mapping[str, Any]) -> dict[str, Tensor]:
        count = self._mask.compact(self._masked[name]).numel() if name in self._masked else 0
        loaded = loaded_others(saved, _FIELDS, param)
        # It says what is to be loaded, and may have been cleared.
        self._ensure_state(name, param)
        own = self._states[name]
        for field in [field for field in _FIELDS if field in own or field in saved]:
            value, shape = saved.get(field), () if field == "step" else (count,)
            if field not in own or not isinstance(value, Tensor) or value.shape != shape:
                has = f"no {field} that fits" if field in own else f"a {field}, of which this optimizer keeps none"
                raise MaskMismatchError(
                    f"the saved state of parameter {name} has {has}: it was saved for other parameters, or with "
                    "another dtype or master_weights"
                )
            mine = value if field == "step" else at(value, self._selections[name].places)
            loaded[field] = mine.to(own[field].device, own[field].dtype, copy=True)
        return loaded

    def __getstate__(self) -> dict[str, Any]:
        own = {field: self.__dict__[field] for field in ("_averaged", "_master_weights", "_selections")}
        return {**super().__getstate__(), **own, "in_backward": self._hooks is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        in_backward = state.pop("in_backward")
        super().__setstate__(state)
        self._hooks = None
        self._bind()
        if in_backward:
            # A copy collects from its own parameters.
            self._place_hooks()


def _initial_step() -> dict[str, Tensor]:
    """What is kept for every parameter, those outside the mask too, as strict checkpoint loaders want."""
    return {"step": torch.tensor(0.0, dtype=torch.float32, device="cpu")}


def _no_gradient() -> StepError:
    return StepError(
        "no selected weight received a gradient: call backward() first, and check that the mask's parameters are part "
        "of the loss, have requires_grad=True and are still the model's: make the optimizer after fully_shard(), or "
        "what else puts other parameters into a model"
    )


def _arguments(targets: list[Target]) -> tuple[Any, ...]:
    """What ``set_adamw_`` takes for targets that share a group and a device."""
    group, states = targets[0].group, [target.state for target in targets]
    none = torch.empty(0, dtype=torch.float32, device=targets[0].piece.device)
    return (
        [memory(target.piece) for target in targets],
        [target.selected for target in targets],
        [target.selection.indices for target in targets],
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [state.get("master", none) for state in states],
        *step_arguments(group, states),
    )
