"""SPAAdamW: AdamW on everything except the weights of a mask."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from safekern import names, ops
from safekern.eligibility import check_plain
from safekern.errors import InvalidArgumentError, MaskMismatchError, StepError
from safekern.layout import by_device, flat_view, memory, memory_like, overlaps_itself
from safekern.mask import Mask
from safekern.optim.masked import (
    MaskedOptimizer,
    NamedParameters,
    check_in_step,
    check_memory,
    check_strided,
    held,
    loaded_others,
    making_state,
    named_groups,
    settled_gradient,
    step_arguments,
    step_counted,
)
from safekern.optim.replicas import check_averaged
from safekern.sharding import local, part

_MOMENTS = ("exp_avg", "exp_avg_sq")
_FIELDS = ("step", *_MOMENTS)


@dataclass(slots=True)
class _Target:
    """A parameter of one step: this process's parts of it and of what belongs to it."""

    name: str
    param: Tensor
    piece: Tensor
    grad: Tensor
    protected: Tensor
    state: dict[str, Tensor]


class SPAAdamW(MaskedOptimizer):
    """AdamW on everything except the weights of a mask, which stay bit-identical.

    Safety Preserving Adaptation (arXiv 2604.08297): fine-tuning with the top 1% by ESI frozen. One pass over the
    weights, which are updated as ``torch.optim.AdamW`` updates them (arXiv 1711.05101) with arithmetic in fp32, or fp64
    for fp64 parameters. Parameters outside the mask are trained whole; those with ``requires_grad=False`` are ignored.
    The moments of protected weights are kept like all others, so that a mask costs no time and no layout of its own.
    There are no fp32 masters: as with ``torch.optim.AdamW``, a 16-bit weight stays where a step is less than half of
    its distance to the next one (bfloat16: 0.2 to 0.4% of its value), as most steps of a usual learning rate are.
    Parameters may be sharded (FSDP2's ``fully_shard``, tensor parallelism), before or after the optimizer is made by
    tools that swap its parameters, such as accelerate; the moments are sharded as they are. Each process updates and
    protects the part it holds, and speaks for that alone: an error in one process is none in the others.

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
        InvalidArgumentError: a hyperparameter out of range, or parameters without names, with a memory layout that
            cannot be updated in one pass, or that FSDP2 gathered for an evaluation and frees later.
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
        self._state_dtype = state_dtype
        # Where in the memory of this process's part of a parameter its protected weights lie.
        self._protected: dict[str, Tensor] = {}
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(named_groups(named_parameters), mask, defaults)
        if not any(param.requires_grad for _, name, param in self._named() if name in self._masked):
            raise MaskMismatchError(
                "the mask protects no weight that trains: all its parameters have requires_grad=False (their weights "
                "are safe from this optimizer without it)"
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters to train, which the mask does not cover.

        Args:
            param_group: ``{"params": [(name, parameter), ...], ...}`` with its own hyperparameters, if any.

        Raises:
            InvalidArgumentError: a hyperparameter out of range, a parameter without a name, or one given before.
            MaskMismatchError: a new parameter could be the one that the mask means.
        """
        group = self._checked_group(param_group)
        meant = {names.canonical(name) for name in self._masked}
        for name, param in group["params"]:
            if name not in self._masked and names.canonical(name) in meant:
                raise MaskMismatchError(f"parameter {name} may be one that the mask means, which is protected already")
            if param.requires_grad or name in self._masked:
                _check_usable(name, param)
        self._add(group)

    def _follow(self, name: str, param: Tensor, *, swapped: bool) -> None:
        if param.requires_grad or name in self._masked:
            _check_usable(name, param)
        if name not in self._masked:
            self._protected[name] = torch.empty(0, dtype=torch.int32, device=param.device)
            return
        indices, shape = self._mask.compact(self._masked[name]), self._mask.shapes[self._masked[name]]
        if param.shape != shape:
            raise MaskMismatchError(
                f"parameter {name} changed its shape from {tuple(shape)} to {tuple(param.shape)}: make a new mask and "
                "optimizer"
            )
        _, protected = held(param, indices)
        self._protected[name] = protected if local(param).is_contiguous() else protected.sort().values

    def _ensure_state(self, name: str, param: Tensor) -> None:
        """Makes or lays out anew what :meth:`step` needs of a parameter that trains.

        Not before the first step or the first look at the state: a model that is sharded after the optimizer was made
        need not have room for the moments of the whole.
        """
        if not param.requires_grad:
            return
        state = self._states.get(name)
        if state and state[_MOMENTS[0]].shape != param.shape:
            raise StepError(
                f"parameter {name} now has the shape {tuple(param.shape)}, and had {tuple(state[_MOMENTS[0]].shape)} "
                "when its moments were made: make a new optimizer"
            )
        # An empty one was cleared, which resets the parameter.
        if not state or not _lie_like(param, [state[moment] for moment in _MOMENTS]):
            _check_usable(name, param)
            with making_state():
                self._states[name] = self._state_of(param, state or {})

    def _state_of(self, param: Tensor, values: Mapping[str, Any]) -> dict[str, Tensor]:
        """State that lies in memory as the parameter does, with these values or zeros."""
        state: dict[str, Tensor] = loaded_others(values, _FIELDS, param)
        state["step"] = torch.as_tensor(values.get("step", 0.0), dtype=torch.float32, device="cpu").clone()
        for moment in _MOMENTS:
            state[moment] = torch.zeros_like(param, dtype=self._state_dtype or param.dtype, requires_grad=False)
            if moment in values:
                local(state[moment]).copy_(part(values[moment], param))
        return state

    def _targets(self, group: dict[str, Any]) -> Iterator[_Target]:
        for name, param in zip(group["param_names"], group["params"], strict=True):
            if param.grad is None or not param.requires_grad:
                continue
            piece, grad = local(param), settled_gradient(param)
            check_strided(name, grad)
            check_averaged(name, param)
            self._ensure_state(name, param)
            if grad.dtype not in (piece.dtype, torch.float32):
                grad = grad.to(piece.dtype)
            yield _Target(name, param, piece, grad, self._protected[name], self._states[name])

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

        Returns:
            What the closure returned, if there is one.

        Raises:
            StepError: no parameter received a gradient, or the memory of one was freed.
            InvalidArgumentError: a hyperparameter is out of range now.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._bind()
        for group in self.param_groups:
            check_in_step(group)
        work = [(group, targets) for group in self.param_groups if (targets := list(self._targets(group)))]
        if not work:
            raise StepError(
                "no parameter received a gradient: call backward() before step(), and check that the optimizer's "
                "parameters are part of the loss"
            )
        check_memory(target for _, targets in work for target in targets)
        for group, targets in work:
            for together in by_device([target.piece for target in targets]):
                _update(group, [targets[t] for t in together])
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The state, with the parameters' names and the mask's fingerprint: tensors and plain types only.

        The moments of a sharded parameter are sharded as it is, which ``torch.distributed.checkpoint`` saves, and loads
        into any other sharding.
        """
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what ``state_dict()`` returned for an optimizer with the same mask.

        Parameters are matched by name, whatever their order. The next step equals that of the uninterrupted run bit for
        bit: moments keep their dtype, where torch's own loading would cast them to the parameter's. Whole moments are
        cut down to the part of a sharded parameter that this process holds. A parameter without a saved state, as
        before its first gradient, has none afterwards.

        Args:
            state_dict: what ``state_dict()`` returned, also after a trip through ``torch.distributed.checkpoint``.

        Raises:
            MaskMismatchError: the state belongs to another mask or to other parameters. Nothing was changed.
            InvalidArgumentError: the state has fp32 moments, which this optimizer would round. Nothing was changed.
        """
        super().load_state_dict(state_dict)

    def _loaded_state(self, name: str, param: Tensor, saved: Mapping[str, Any]) -> dict[str, Tensor]:
        if not saved:
            # Saved before the parameter's first gradient: its next one starts anew, as with torch.optim.AdamW.
            return {}
        if not all(isinstance(saved.get(field), Tensor) for field in _FIELDS) or any(
            saved[moment].shape != param.shape for moment in _MOMENTS
        ):
            raise MaskMismatchError(f"the optimizer state of parameter {name} is incomplete or of another shape")
        dtype = self._state_dtype or param.dtype
        if any(torch.promote_types(saved[moment].dtype, dtype) != dtype for moment in _MOMENTS):
            raise InvalidArgumentError(
                f"the moments of parameter {name} were saved in {saved[_MOMENTS[0]].dtype}, and would be rounded to "
                f"{dtype}: make the optimizer with state_dtype=torch.float32"
            )
        return self._state_of(param, saved)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_state_dtype": self._state_dtype, "_protected": {}}


def _update(group: dict[str, Any], targets: list[_Target]) -> None:
    states = [target.state for target in targets]
    arguments = (
        [memory(target.piece) for target in targets],
        [memory_like(target.grad, target.piece) for target in targets],
        [target.protected for target in targets],
        *([memory(local(state[moment])) for state in states] for moment in _MOMENTS),
        *step_arguments(group, states),
    )
    with step_counted([target.param for target in targets], states):
        ops.spa_adamw_(*arguments)


def _lie_like(param: Tensor, moments: Sequence[Tensor]) -> bool:
    """Whether moments are sharded and lie in memory as their parameter does, in its dtype or fp32."""
    piece = local(param)
    shape, device, contiguous = piece.shape, piece.device, piece.is_contiguous()
    for moment in moments:
        mine = local(moment)
        # A model may be widened, or narrowed, after it was trained.
        if mine.dtype not in (piece.dtype, torch.float32):
            return False
        if (mine is moment) != (piece is param) or mine.shape != shape or mine.device != device:
            return False
        if not (contiguous and mine.is_contiguous()) and mine.stride() != piece.stride():
            return False
    return True


def _check_usable(name: str, param: Tensor) -> None:
    check_plain(name, param, sharded=True)
    piece = local(param).detach()
    if overlaps_itself(piece) or flat_view(piece).numel() != piece.numel():
        raise InvalidArgumentError(
            f"parameter {name} has overlapping elements or gaps in memory: make it contiguous first"
        )
