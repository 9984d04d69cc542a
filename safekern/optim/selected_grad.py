"""Gradients that keep only the selected entries, so that backward can free the dense ones as it goes."""

import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.utils.hooks import RemovableHandle

from safekern.errors import InvalidArgumentError, StepError
from safekern.layout import gather_selected
from safekern.sharding import local

aten = torch.ops.aten

# Each maps zeros to zeros, so that it means the same on the selected entries as on a gradient that is zero elsewhere.
_IN_PLACE = (
    aten.clamp_.default,
    aten.div_.Scalar,
    aten.div_.Tensor,
    aten.mul_.Scalar,
    aten.mul_.Tensor,
    aten.zero_.default,
)
# The same on lists of gradients, as torch calls them for DTensors.
_FOREACH = (
    aten._amp_foreach_non_finite_check_and_unscale_.default,
    aten._foreach_clamp_max_.Scalar,
    aten._foreach_clamp_min_.Scalar,
    aten._foreach_div_.Scalar,
    aten._foreach_mul_.Scalar,
    aten._foreach_mul_.Tensor,
    aten._foreach_norm.Scalar,
    aten._foreach_zero_.default,
)
# What depends on the values. Scaling does not: the mean of scaled gradients is the scaled mean.
_READING = (
    aten._amp_foreach_non_finite_check_and_unscale_.default,
    aten._foreach_clamp_max_.Scalar,
    aten._foreach_clamp_min_.Scalar,
    aten._foreach_norm.Scalar,
    aten.clamp_.default,
    aten.linalg_vector_norm.default,
)
_NORMS = (aten._foreach_norm.Scalar, aten.linalg_vector_norm.default)


class SelectedGrad(Tensor):
    """The gradient of a masked parameter, of which only the selected entries are kept, in fp32.

    It stands in ``param.grad`` with the parameter's shape and device and the gradient's dtype, and takes 4 bytes per
    selected weight. Backward adds to it; ``zero_grad``, ``torch.nn.utils.clip_grad_norm_`` and ``clip_grad_value_``,
    ``torch.amp.GradScaler``, in-place multiplication by a number and ``Module.to`` act on it as on a gradient that is
    zero elsewhere.
    Any other operation raises :class:`~safekern.InvalidArgumentError`. The gradient of a sharded parameter is a DTensor
    whose local tensor is one of these.

    Attributes:
        selected: fp32 [k], the gradient at the selected weights, in the order of the mask. With several processes that
            each hold the whole model, it is that of this process's batches until clipping, a scaler or ``step()``
            averages it over all.
        positions: int32 or int64 [k], where these lie in the parameter's memory.
    """

    selected: Tensor
    positions: Tensor
    _before_reading: weakref.WeakMethod[Callable[[], None]] | None

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls,
        like: Tensor,
        positions: Tensor,
        selected: Tensor,
        before_reading: weakref.WeakMethod[Callable[[], None]] | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Stands for a gradient with the shape, strides, device and, unless another is given, dtype of ``like``.

        ``before_reading`` is called before anything that depends on the values.
        """
        grad = torch.Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=dtype or like.dtype, device=positions.device
        )
        grad.positions, grad.selected, grad._before_reading = positions, selected, before_reading
        return grad

    @classmethod
    def empty(cls, param: Tensor, dtype: torch.dtype) -> Self:
        """Of a parameter's gradient of that dtype of which nothing is kept."""
        positions = torch.empty(0, dtype=torch.int32, device=param.device)
        return cls(param, positions, positions.float(), dtype=dtype)

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        return (
            f"SelectedGrad({self.selected.numel()} of {self.numel()} entries, shape={tuple(self.shape)}, "
            f"dtype={self.dtype}, selected={self.selected})"
        )

    # How Module.to gives a gradient its place on another device: the values have to go with it.
    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, moved: Tensor) -> None:
        assert isinstance(moved, SelectedGrad)
        Tensor.data.__set__(self, moved)  # type: ignore[attr-defined]
        self.positions, self.selected = moved.positions, moved.selected

    # On the whole gradient, which is not there, torch's own would end the process.
    def share_memory_(self) -> Self:
        self.selected.share_memory_()
        return self

    def __reduce_ex__(self, protocol: object) -> Any:
        raise _unsupported("copying or pickling")

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self, *others = args
        if func in _READING:
            for grad in self if func in _FOREACH else [self]:
                before_reading = grad._before_reading and grad._before_reading() if isinstance(grad, cls) else None
                if before_reading is not None:
                    before_reading()
        if func in _FOREACH:
            return func([_operand(grad, func) if isinstance(grad, cls) else grad for grad in self], *others, **kwargs)
        if not isinstance(self, cls):
            raise _unsupported(func)
        if func is aten.detach.default:
            return cls(self, self.positions, self.selected, self._before_reading)
        if func is aten._to_copy.default:
            # A module that is moved or converted takes its gradients along. The values stay in fp32.
            device = kwargs.get("device") or self.device
            selected = self.selected.to(device, copy=True)
            return cls(
                self, self.positions.to(device), selected, self._before_reading, dtype=kwargs.get("dtype") or self.dtype
            )
        if func is aten.linalg_vector_norm.default and not any(others[1:]):
            return func(_operand(self, func), *others, **kwargs)
        if func is aten.add_.Tensor and isinstance(others[0], Tensor) and others[0].shape == self.shape:
            self.selected.add_(self._selected_of(others[0]), **kwargs)
            return self
        if func in _IN_PLACE and not any(isinstance(other, Tensor) and other.dim() for other in others):
            func(self.selected, *others, **kwargs)
            return self
        raise _unsupported(func)

    def _selected_of(self, grad: Tensor) -> Tensor:
        if not isinstance(grad, SelectedGrad):
            # Where nothing is, nothing need be looked up, which a sparse gradient does not allow.
            return gather_selected(grad, self, self.positions) if self.positions.numel() else self.selected
        if not _same(grad.positions, self.positions):
            raise _unsupported("adding a gradient selected by another mask")
        return grad.selected


def _operand(grad: SelectedGrad, func: Any) -> Tensor:
    """The values; for a norm a zero in place of none, of which torch has no largest."""
    return grad.selected.new_zeros(1) if func in _NORMS and not grad.selected.numel() else grad.selected


def _unsupported(operation: object) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"{operation} does not work on a SelectedGrad: with in_backward=True, SETAdamW keeps only the selected entries "
        "of a gradient, and none outside its mask. Use the `selected` values instead, or make the optimizer without "
        "in_backward; if another optimizer wants this gradient, give this one other parameters. For "
        "DistributedDataParallel, call safekern.integrations.leave_to_set(model, mask) right before wrapping the "
        "model, after torch.compile and the like"
    )


def _same(positions: Tensor, others: Tensor | None) -> bool:
    """Whether positions are equal; None are none. Those of one optimizer are one tensor, until the parameter moves."""
    if others is None:
        return not positions.numel()
    return positions is others or (positions.device == others.device and torch.equal(positions, others))


def is_selected(name: str, grad: Tensor, positions: Tensor | None) -> bool:
    """Whether a gradient was reduced to the selected entries.

    Args:
        name: of its parameter.
        grad: dense, or reduced by this optimizer or another one; it may be sharded.
        positions: of the parameter's selected weights; None if none is.

    Raises:
        StepError: it was reduced to the entries that another optimizer selects, which are of no use here.
    """
    piece = local(grad)
    if not isinstance(piece, SelectedGrad):
        return False
    if not _same(piece.positions, positions):
        raise StepError(
            f"the gradient of parameter {name} was already reduced to the entries that another optimizer selects: "
            "give a parameter to one optimizer with in_backward=True, and no other. An earlier one counts as long as "
            "something refers to it, such as its Trainer or an old cell of a notebook: delete that"
        )
    return True


class GradientHooks:
    """Calls ``collect(name, param)`` on its owner, inside backward, when a parameter's gradient is ready.

    The hooks keep nothing alive: when the owner goes, they go, and with them the gradients it collected.
    """

    def __init__(self, collect: Callable[[str, Tensor], None]) -> None:
        self._collect = weakref.WeakMethod(collect)
        self._placed: dict[str, tuple[weakref.ref[Tensor], RemovableHandle]] = {}
        weakref.finalize(collect.__self__, self._remove).atexit = False  # type: ignore[attr-defined]
        # The latest backward pass (their numbers ascend), and its thread.
        self._latest = (-1, 0)

    def place(self, name: str, param: Tensor) -> None:
        """Hooks a parameter, unless it is already; a parameter that had the name before is released."""
        before, handle = self._placed.get(name, (None, None))
        if before is not None and handle is not None:
            if before() is param:
                return
            _release(before, handle)
        # What was made under inference_mode and is frozen can never have a gradient.
        if not param.is_floating_point() or (param.is_inference() and not param.requires_grad):
            return
        # torch hooks only what requires grad, but a frozen parameter may be trained later.
        frozen = not param.requires_grad
        if frozen:
            param.requires_grad_(True)
        hook = functools.partial(self._call, name)
        handle = param.register_post_accumulate_grad_hook(hook)
        if frozen:
            param.requires_grad_(False)
        self._placed[name] = weakref.ref(param), handle

    def others(self, param: Tensor) -> list[tuple[Any, str]]:
        """Who else waits for a parameter's gradient with hooks of this kind, and the name it has there."""
        found = []
        for hook in (param._post_accumulate_grad_hooks or {}).values():
            hooks = getattr(getattr(hook, "func", None), "__self__", None)
            collect = hooks._collect() if isinstance(hooks, GradientHooks) and hooks is not self else None
            if collect is not None:
                found.append((collect.__self__, hook.args[0]))  # type: ignore[attr-defined]
        return found

    @_disable_dynamo
    def _call(self, name: str, param: Tensor) -> None:
        collect = self._collect()
        if collect is not None:
            self._check_alone(name)
            collect(name, param)

    def _check_alone(self, name: str) -> None:
        """Refuses backward passes that interleave in two threads.

        Torch adds to a gradient under a lock and runs hooks after it: one thread would take a gradient while the other
        adds to it. Passes inside each other, as of reentrant checkpointing, are of one thread.
        """
        now = (torch._C._current_graph_task_id(), threading.get_ident())
        if now[0] < self._latest[0] and now[1] != self._latest[1]:
            raise StepError(
                f"two threads ran backward at once, and with in_backward=True the gradient of {name} and of others may "
                "be lost: call zero_grad() and run one backward pass at a time"
            )
        self._latest = max(self._latest, now)

    def _remove(self) -> None:
        for before, handle in self._placed.values():
            _release(before, handle)
        self._placed.clear()


def _release(ref: weakref.ref[Tensor], handle: RemovableHandle) -> None:
    handle.remove()
    param = ref()
    if param is not None and param.grad is not None and isinstance(local(param.grad), SelectedGrad):
        param.grad = None
