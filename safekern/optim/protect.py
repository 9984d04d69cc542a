"""protect: keep the weights of a mask bit-identical around any torch optimizer."""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter, methodcaller
from types import FrameType, TracebackType
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from safekern import ops
from safekern.eligibility import check_plain
from safekern.errors import InvalidArgumentError, MaskMismatchError, ProtectionError
from safekern.faults import put_back
from safekern.layout import by_device, mark_written, memory, overlaps_itself, read_selected, write_selected
from safekern.mask import Mask, check_mask
from safekern.names import listed
from safekern.optim.masked import NamedParameters, Places, check_names, cut, held, named_groups
from safekern.optim.replicas import LEFT_TO_SET, check_averaged
from safekern.sharding import local

# How many protected weights of a parameter are compared before a step where torch's version counter says that it was
# not touched since the last one: the counter does not see edits through .data or numpy. Comparing all of them would
# take as long again as restoring them, so of an edit to a few weights of a large parameter it may see none.
_COMPARED = 64

# For map(), which asks hundreds of tensors in a fraction of a loop's time.
_version, _dtype, _shape = attrgetter("_version"), attrgetter("dtype"), attrgetter("shape")
_extent, _pointer, _stride = attrgetter("shape", "device"), methodcaller("data_ptr"), methodcaller("stride")

# Torch runs an optimizer's hooks from this function.
_STEP_CODE = Optimizer.profile_hook_step(lambda: None).__code__


def protect(optimizer: Optimizer, mask: Mask, named_parameters: NamedParameters) -> "Protection":
    """Keeps the weights of a mask bit-identical while an optimizer trains all others.

    Safety Preserving Adaptation (arXiv 2604.08297) around any ``torch.optim.Optimizer``: the protected values are saved
    once and written back after every ``step()``, through the optimizer's step hooks. Inside a step (in a closure)
    protected weights may move. Of two optimizers (Muon for matrices, AdamW for the rest), each takes a handle, with the
    same mask; of one inside another (SAM), that whose ``step()`` is called.

    Before a step, protected weights are compared with the saved ones, also those that this optimizer does not hold, so
    that weights loaded meanwhile are not overwritten: the step raises ``ProtectionError``. All are compared in
    parameters that torch saw written to, and at least 64 in every other; so only an edit through ``.data`` or numpy,
    and of a few weights among more, can be overwritten.

    Of sharded parameters (FSDP2, tensor parallelism) each process protects, compares and restores the part it holds,
    and speaks for that alone: an error in one process is none in the others. With accelerate, protect after
    ``prepare()``.

    The protection lasts until :meth:`Protection.remove`, also when the handle is dropped. It is not part of the
    optimizer's ``state_dict()``, and copies of the optimizer (``deepcopy``, ``pickle``) are without it, as torch copies
    no hooks.

    Schedule-free optimizers, which swap other weights into the model in ``train()`` and ``eval()``, keep copies in
    their state; the protected weights are written into these too, from the start, so that both modes show them.

    Args:
        optimizer: any ``torch.optim.Optimizer``, also inside an ``AcceleratedOptimizer``; its groups need no names.
        mask: which weights to protect.
        named_parameters: ``model.named_parameters()``, all that the mask names among them.

    Returns:
        The handle, which is also a context manager: on leaving it verifies, unless by an exception, and ends the
        protection.

    Raises:
        MaskMismatchError: the mask does not fit the parameters, or the optimizer holds none of those it names.
        InvalidArgumentError: a masked parameter is on the meta device, quantised, overlaps itself in memory, or is one
            that FSDP2 gathered for an evaluation and frees later; or a protected weight is -0.0, NaN or infinite, which
            a schedule-free optimizer's swap would change.

    Example:
        >>> opt = torch.optim.AdamW(model.parameters(), lr=1e-5)                              # doctest: +SKIP
        >>> with safekern.protect(opt, mask, model.named_parameters()) as handle:             # doctest: +SKIP
        ...     for batch in batches:
        ...         model(**batch).loss.backward()
        ...         opt.step()
        ...         opt.zero_grad()
    """
    return Protection(optimizer, mask, named_parameters)


@dataclass(slots=True)
class _Saved:
    """The protected weights of one parameter."""

    name: str
    masked_name: str
    param: Tensor
    # Where the optimizer holds the parameter, if it does: group, position, and the name it has there.
    place: tuple[int, int, str | None] | None
    # Of the mask's weights, those that this process holds, and where in its memory.
    places: Places | None
    indices: Tensor
    values: Tensor

    @property
    def piece(self) -> Tensor:
        """The part of the parameter that this process holds."""
        return local(self.param)

    def spots(self, turn: int) -> tuple[Tensor, Tensor]:
        """The few weights that are compared where nothing points to an edit: where they are, and their values."""
        count = self.indices.numel()
        start = min(turn * _COMPARED % max(1, count), max(0, count - _COMPARED))
        return self.indices[start : start + _COMPARED], self.values[start : start + _COMPARED]


class _Batch:
    """Parameters on one device, in lists that serve many steps.

    When a step begins, nothing of this is in the processor's caches, so that it takes as long as the Python objects it
    touches. No view of a parameter is kept: it would keep the old memory alive after ``model.cpu()``.
    """

    def __init__(self, batch: list[_Saved]) -> None:
        self._saved = batch
        self._params = [saved.param for saved in batch]
        self._are_memories = all(memory(saved.piece) is saved.param for saved in batch)
        self._indices, self._values = [saved.indices for saved in batch], [saved.values for saved in batch]
        spots = [saved.spots(0) for saved in batch]
        self._spots, self._spot_values = [indices for indices, _ in spots], [values for _, values in spots]
        # The version of each parameter that last held all the values.
        self._versions: list[int | None] = [None] * len(batch)
        self._held = [t for t, saved in enumerate(batch) if saved.place]

    def changed(self, turn: int, *, everything: bool) -> Iterator[tuple[_Saved, int]]:
        """The parameters that do not hold the values, and how many weights were found to differ."""
        # One parameter a step looks at its next few weights, so that over many steps all are compared.
        t = turn % len(self._saved)
        self._spots[t], self._spot_values[t] = self._saved[t].spots(turn // len(self._saved))
        versions = list(map(_version, self._params))
        indices, values = (self._indices, self._values) if everything else (self._spots, self._spot_values)
        touched: list[int] = []
        if versions != self._versions:
            touched = [t for t, version in enumerate(versions) if version != self._versions[t]]
            indices, values = indices.copy(), values.copy()
            for t in touched:
                indices[t], values[t] = self._indices[t], self._values[t]
        counts = ops.count_changed(self._memories(), indices, values).tolist()
        for t in touched:
            if not counts[t]:
                self._versions[t] = versions[t]
        return ((saved, count) for saved, count in zip(self._saved, counts, strict=True) if count)

    def restore(self, *, everything: bool) -> None:
        """Writes the values back, those of parameters that the optimizer does not hold if it is to be everything."""
        params, memories, indices, values = self._params, self._memories(), self._indices, self._values
        restored: Sequence[int] = range(len(params))
        if not everything and len(self._held) < len(params):
            restored = self._held
            memories, indices, values = ([all_of[t] for t in restored] for all_of in (memories, indices, values))
        ops.restore_(memories, indices, values)
        # What torch did not see a step write to holds what it held, and graphs that saved it stay valid.
        mark_written([params[t] for t in restored if everything or params[t]._version != self._versions[t]])
        for t in restored:
            self._versions[t] = params[t]._version

    def _memories(self) -> list[Tensor]:
        return self._params if self._are_memories else [memory(saved.piece) for saved in self._saved]


class Protection:
    """The handle that :func:`protect` returns.

    Example:
        >>> handle = safekern.protect(opt, mask, model.named_parameters())                    # doctest: +SKIP
        >>> model.load_state_dict(other)                                                      # doctest: +SKIP
        >>> handle.refresh()                                                                  # doctest: +SKIP
        >>> train(model, opt)                                                                 # doctest: +SKIP
        >>> handle.verify()                                                                   # doctest: +SKIP
        >>> handle.remove()                                                                   # doctest: +SKIP
    """

    def __init__(self, optimizer: Optimizer, mask: Mask, named_parameters: NamedParameters) -> None:
        check_mask(mask)
        self._optimizer = _with_hooks(optimizer)
        named = dict(pair for group in named_groups(named_parameters) for pair in group["params"])
        self._mask = mask
        nothing = torch.empty(0, device="cpu")
        self._saved = [
            _Saved(name, masked_name, named[name], None, None, nothing, nothing)
            for masked_name, name in mask.resolve(named).items()
        ]
        # The parameters of these, and of each the memory and layout that its indices are for.
        self._params = [saved.param for saved in self._saved]
        self._layouts: list[tuple[Any, ...]] = [()] * len(self._saved)
        # Those of which the values can be compared and written, and the others.
        self._batches: list[_Batch] = []
        self._mistyped: list[_Saved] = []
        # Those that nobody averages over processes, unless SETAdamW does.
        self._left: list[_Saved] = []
        self._stepping = False
        self._turn = 0
        # What the optimizer held when the parameters were last looked for: addresses and names, per group.
        self._held: list[tuple[list[int], list[str] | None]] = []
        self._locate()
        if not any(saved.place for saved in self._saved):
            wanted = listed([saved.name for saved in self._saved])
            raise MaskMismatchError(
                f"the optimizer holds none of the parameters that the mask names ({wanted}): pass the "
                "optimizer that trains them, and the parameters of the model that it was made for"
            )
        self.refresh()
        try:
            self._arm()
        except BaseException:
            self.remove()
            raise

    @torch.no_grad()
    def verify(self) -> None:
        """Compares all protected weights with their saved values, bit for bit.

        Raises:
            ProtectionError: at least one bit moved. The message names the parameters and says how many weights.
        """
        self._locate()
        self._check(everything=True)

    @torch.no_grad()
    def refresh(self) -> None:
        """Protects the values that the model has now, after other weights were loaded on purpose.

        Raises:
            InvalidArgumentError: a value that the swaps of a schedule-free optimizer would change, see :func:`protect`.
            ProtectionError: the optimizer no longer holds a parameter, or one was sharded anew.
        """
        self._locate()
        fresh = read_selected([saved.piece for saved in self._saved], [saved.indices for saved in self._saved])
        if self._swaps_weights():
            for saved, values in zip(self._saved, fresh, strict=True):
                if not bool((values.isfinite() & ~((values == 0) & values.signbit())).all()):
                    raise InvalidArgumentError(
                        f"a protected weight of {saved.name} is -0.0, NaN or infinite, which train() or eval() of "
                        f"{type(self._optimizer).__name__} would change: leave it out of the mask"
                    )
        for saved, values in zip(self._saved, fresh, strict=True):
            saved.values = values
        self._form_batches()
        self._stepping = False
        self._write(everything=True)

    @torch.no_grad()
    def restore(self) -> None:
        """Writes the saved values back: after an exception inside a step, which kept the step from doing so.

        Raises:
            ProtectionError: a parameter is in another dtype than its saved values, or was sharded anew.
        """
        self._locate()
        self._write(everything=True)
        self._stepping = False

    def remove(self) -> None:
        """Ends the protection. The weights stay as they are."""
        # By what they are and not by their handles, of which an interrupt may have lost one.
        for registered, _, hook in self._hooks():
            for key in [key for key, other in registered.items() if other == hook]:
                registered.pop(key, None)

    def __enter__(self) -> "Protection":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.verify()
            elif self._stepping:
                put_back(self.restore)
        finally:
            put_back(self.remove)

    def _arm(self, *_: Any) -> None:
        """Registers the hooks that are not: loading a state may have replaced the optimizer's hooks."""
        for registered, register, hook in self._hooks():
            if hook not in registered.values():
                register(hook)

    def _hooks(self) -> tuple[tuple[dict[int, Any], Callable[[Any], Any], Callable[..., Any]], ...]:
        """Where the optimizer keeps its hooks of each kind, how one is registered, and ours."""
        optimizer = self._optimizer
        return (
            (optimizer._optimizer_step_pre_hooks, optimizer.register_step_pre_hook, self._before_step),
            (optimizer._optimizer_step_post_hooks, optimizer.register_step_post_hook, self._after_step),
            (optimizer._optimizer_load_state_dict_post_hooks, optimizer.register_load_state_dict_post_hook, self._arm),
        )

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        if _is_nested(optimizer):
            return
        self._locate()
        for saved in self._left:
            if type(saved.param.grad) is Tensor:
                check_averaged(saved.name, saved.param)
        self._check(everything=False)
        self._stepping = True

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        if _is_nested(optimizer):
            return
        self._locate()
        self._write(everything=False)
        # Only now, so that leaving by an interrupt in here restores.
        self._stepping = False

    def _locate(self) -> None:
        """Finds the parameters in the optimizer, and their protected weights in memory, where either changed."""
        groups = self._optimizer.param_groups
        for group in groups:
            if "param_names" in group:
                check_names(group)
        held = [(list(map(id, group["params"])), group.get("param_names")) for group in groups]
        # Parameters of the mask are kept alive here, so that none of their addresses can have become another's.
        moved = held != self._held
        if moved:
            self._find(groups)
            self._held = [(ids, None if names is None else list(names)) for ids, names in held]
        layouts = _layouts(self._params)
        if moved or layouts != self._layouts:
            for saved, before, now in zip(self._saved, self._layouts, layouts, strict=True):
                if before != now:
                    self._follow(saved, before, now)
            self._layouts = layouts
            self._form_batches()

    def _find(self, groups: Sequence[dict[str, Any]]) -> None:
        held = {id(param): (g, i) for g, group in enumerate(groups) for i, param in enumerate(group["params"])}
        for t, saved in enumerate(self._saved):
            if saved.place and id(saved.param) not in held:
                saved.param, self._layouts[t] = self._successor(saved), ()
                self._params[t] = saved.param
            if id(saved.param) in held:
                g, i = held[id(saved.param)]
                saved.place = (g, i, groups[g]["param_names"][i] if "param_names" in groups[g] else None)
        self._left = [saved for saved in self._saved if saved.place and hasattr(saved.param, LEFT_TO_SET)]

    def _follow(self, saved: _Saved, before: tuple[Any, ...], now: tuple[Any, ...]) -> None:
        param, piece = saved.param, saved.piece
        check_plain(saved.name, param, sharded=True)
        if param.shape != self._mask.shapes[saved.masked_name]:
            raise MaskMismatchError(f"parameter {saved.name} now has the shape {tuple(param.shape)}: make a new mask")
        if overlaps_itself(piece):
            raise InvalidArgumentError(f"parameter {saved.name} has overlapping memory: make it contiguous first")
        # All but its address and dtype, which are the first two.
        if before[2:] != now[2:]:
            compact = self._mask.compact(saved.masked_name)
            places, indices = held(param, compact)
            values: Tensor | None = saved.values
            if saved.places is not None:
                values = cut(saved.values, saved.places, places, compact.numel())
            if values is None:
                raise ProtectionError(
                    f"parameter {saved.name} was sharded anew: remove() this handle and protect() it anew"
                )
            saved.places, saved.indices, saved.values = places, indices, values.to(piece.device)

    def _form_batches(self) -> None:
        self._mistyped = [saved for saved in self._saved if saved.param.dtype != saved.values.dtype]
        typed = [saved for saved in self._saved if saved.param.dtype == saved.values.dtype]
        self._batches = [_Batch([typed[t] for t in here]) for here in by_device([saved.values for saved in typed])]

    def _successor(self, saved: _Saved) -> Tensor:
        """The parameter now in the place of one that the optimizer held.

        accelerate swaps the entries of ``param_groups`` for others; the names beside them stay.
        """
        g, i, name = saved.place or (0, 0, None)
        groups = self._optimizer.param_groups
        if name is not None:
            found = [
                param
                for group in groups
                for other, param in zip(group["param_names"], group["params"], strict=True)
                if other == name
            ]
        else:
            # Not where something was taken out, and another one moved up.
            swapped = g < len(groups) and len(groups[g]["params"]) == len(self._held[g][0])
            found = groups[g]["params"][i : i + 1] if swapped else []
        if len(found) != 1 or any(found[0] is other.param for other in self._saved):
            raise ProtectionError(
                f"the optimizer no longer holds parameter {saved.name}: remove() this handle and protect() it anew"
            )
        successor: Tensor = found[0]
        return successor

    def _check(self, *, everything: bool) -> None:
        self._turn += 1
        moved = [(saved, saved.indices.numel()) for saved in self._mistyped]
        for batch in self._batches:
            moved += batch.changed(self._turn, everything=everything)
        if moved:
            raise ProtectionError(
                f"{sum(count for _, count in moved):,} protected weights are not what they were, in "
                f"{listed([f'{saved.name} ({count:,})' for saved, count in moved])}. "
                + ("The last step ended in an exception: handle.restore() puts them back. " if self._stepping else "")
                + "If they were changed on purpose, outside a step, call handle.refresh(); handle.restore() undoes it"
                + ("" if not self._mistyped else f", once they are in {self._mistyped[0].values.dtype} again")
            )

    def _write(self, *, everything: bool) -> None:
        for saved in self._mistyped:
            if everything or saved.place:
                raise _cannot_hold(saved.param, saved)
        for batch in self._batches:
            batch.restore(everything=everything)
        if self._swaps_weights():
            self._write_copies()

    def _write_copies(self) -> None:
        copies = [(copy, saved) for saved in self._saved if saved.place for copy in self._copies(saved)]
        for copy, saved in copies:
            if copy.dtype != saved.values.dtype or copy.shape != saved.param.shape:
                raise _cannot_hold(copy, saved)
        write_selected(
            [copy for copy, _ in copies],
            [self._indices_in(copy, saved) for copy, saved in copies],
            [saved.values for _, saved in copies],
        )

    def _indices_in(self, tensor: Tensor, saved: _Saved) -> Tensor:
        """Where the protected weights of a parameter lie in the memory of a tensor like it."""
        if local(tensor).stride() == saved.piece.stride():
            return saved.indices
        return held(tensor, self._mask.compact(saved.masked_name))[1]

    def _swaps_weights(self) -> bool:
        return all(callable(getattr(self._optimizer, mode, None)) for mode in ("train", "eval"))

    def _copies(self, saved: _Saved) -> list[Tensor]:
        """The weights that a schedule-free optimizer (arXiv 2405.15682) keeps beside those in the model."""
        state = self._optimizer.state.get(saved.param, {})
        return [state[key] for key in ("x", "y", "z") if key in state]


def _with_hooks(optimizer: Any) -> Optimizer:
    # accelerate's wrapper is an Optimizer whose __init__ never ran, and has the real one inside.
    while not _runs_hooks(optimizer) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    if not _runs_hooks(optimizer):
        inside = ", which it does not run: pass the optimizer inside of it" if isinstance(optimizer, Optimizer) else ""
        raise InvalidArgumentError(
            f"protect() uses the step hooks of a torch.optim.Optimizer, got {type(optimizer).__name__}{inside}"
        )
    return cast(Optimizer, optimizer)


def _runs_hooks(optimizer: Any) -> bool:
    # What Optimizer.__init__ makes, which some wrappers do not call.
    return (
        isinstance(optimizer, Optimizer)
        and hasattr(optimizer, "_optimizer_load_state_dict_post_hooks")
        and hasattr(type(optimizer).step, "hooked")
    )


def _layouts(params: Sequence[Tensor]) -> list[tuple[Any, ...]]:
    """Where the part of each parameter that this process holds lies in memory, and in what form."""
    pieces = list(map(local, params))
    return list(
        zip(
            map(_pointer, pieces),
            map(_dtype, pieces),
            map(_shape, params),
            map(_extent, pieces),
            map(_stride, pieces),
            strict=True,
        )
    )


def _cannot_hold(tensor: Tensor, saved: _Saved) -> ProtectionError:
    return ProtectionError(
        f"the protected values of {saved.name} are in {saved.values.dtype} and cannot be written back in "
        f"{tensor.dtype}: call handle.refresh() after changing the model's dtype; an optimizer that keeps weights of "
        "its own in another one cannot be protected"
    )


def _is_nested(optimizer: Optimizer) -> bool:
    """Whether a hook runs inside a step inside a step: torch runs them again where a subclass calls super().step().

    Only the call stack tells such a step from one after a step that an exception ended.
    """
    running = 0
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and running < 2:
        running += frame.f_code is _STEP_CODE and frame.f_locals["self"] is optimizer
        frame = frame.f_back
    return running > 1
