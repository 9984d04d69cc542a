"""What the masked optimizers share: parameters and state by name, and the selected weights of a parameter in memory."""

import copy
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, Self

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from safekern import names
from safekern.arguments import is_scalar
from safekern.eligibility import check_initialized
from safekern.errors import InvalidArgumentError, MaskMismatchError, StepError
from safekern.layout import mark_written, memory_indices, sharing
from safekern.mask import Mask, check_mask
from safekern.sharding import Shard, is_sharded, local

# Made once: a plain number would be made a tensor anew for every parameter.
_ONE = torch.ones((), dtype=torch.float32, device="cpu")

_NO_STATE = "this is no optimizer state: pass what the optimizer's state_dict() returned"

Places = slice | Tensor
Named = tuple[dict[str, Any], str, Tensor]
NamedParameters = Iterable[tuple[str, Tensor]] | Iterable[Mapping[str, Any]]


def named_groups(named_parameters: NamedParameters) -> list[dict[str, Any]]:
    """Parameter groups in the form torch keeps names in: ``{"params": [(name, param), ...], ...}``.

    Raises:
        InvalidArgumentError: no parameters, parameters without names, or a name or a parameter given twice.
    """
    if not isinstance(named_parameters, Iterable):
        raise InvalidArgumentError(
            f"named parameters are needed, got {type(named_parameters).__name__}: pass model.named_parameters()"
        )
    entries = list(named_parameters)
    if not entries:
        raise InvalidArgumentError(
            "no named parameters were given: pass model.named_parameters(), which can be gone through only once"
        )
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
            check_initialized(name, param)
            names.add(name)
            given[param] = name
        group["params"] = [tuple(entry) for entry in group["params"]]
    return groups


@contextmanager
def making_state() -> Iterator[None]:
    """Lets a block make tensors that steps can write to, also where the caller is in ``torch.inference_mode``."""
    # Leaving inference mode turns gradients on.
    with torch.inference_mode(False), torch.no_grad():
        yield


class MaskedOptimizer(Optimizer):
    """An optimizer that matches its parameters with a mask by name, and keeps its state by name too.

    Tools that shard, wrap or move a model put other tensors into ``param_groups``, without a word to the optimizer. So
    each use starts with :meth:`_bind`, which looks for changes, and in between nothing holds on to a parameter but the
    groups: whoever shards a model wants the memory of the whole one back.

    Args:
        groups: of :func:`named_groups`.
        mask: which weights of the parameters are meant.
        defaults: hyperparameters.
    """

    def __init__(self, groups: list[dict[str, Any]], mask: Mask, defaults: dict[str, Any]) -> None:
        check_mask(mask)
        named = {name: param for group in groups for name, param in group["params"]}
        self._mask = mask
        # The name in the mask of each masked parameter.
        self._masked = {given: masked for masked, given in mask.resolve(named).items()}
        self._states: dict[str, dict[str, Tensor]] = {}
        # The id, form and address that each parameter had. No weak reference, of which torch.utils.swap_tensors allows
        # none: if a new parameter has the id of a freed one, what depends on its memory shows in its form.
        self._seen: dict[str, tuple[int, tuple[Any, ...], int]] = {}
        super().__init__(groups, {**defaults, "mask_fingerprint": mask.fingerprint})

    @property  # type: ignore[override]
    def state(self) -> dict[Tensor, dict[str, Tensor]]:
        """The state of every parameter that has one; it is made when it is first asked for, and anew once taken out."""
        self._bind()
        for _, name, param in self._named():
            self._ensure_state(name, param)
        return _State(self, {param: self._states[name] for _, name, param in self._named() if name in self._states})

    @state.setter
    def state(self, state: Mapping[Tensor, dict[str, Tensor]]) -> None:
        self._states = {name: state[param] for _, name, param in self._named() if state.get(param)}
        # So that the next use makes what is missing.
        self._seen = {name: seen for name, seen in self._seen.items() if name in self._states}

    def _add(self, param_group: dict[str, Any]) -> None:
        """Adds a group that was checked, or leaves the others as they were."""
        super().add_param_group(param_group)
        try:
            self._bind()
        except BaseException:
            self.param_groups.pop()
            raise

    def _checked_group(self, param_group: dict[str, Any]) -> dict[str, Any]:
        """A group to be added, in the form torch keeps names in; an error if it repeats what is given already."""
        given = [
            {"params": list(zip(group["param_names"], group["params"], strict=True))} for group in self.param_groups
        ]
        *_, group = named_groups([*given, param_group])
        check_hyperparameters({**self.defaults, **group})
        # Without names of its own torch would refuse an empty group beside named ones.
        # A group of another masked optimizer may bring the fingerprint of another mask.
        return {"param_names": [], **group, "mask_fingerprint": self.defaults["mask_fingerprint"]}

    def _named(self) -> Iterator[Named]:
        """The group, name and tensor of every parameter."""
        # Wrappers that take over the class, as Lightning's, forward what they have not.
        for group in getattr(self, "param_groups", ()):
            check_names(group)
            for name, param in zip(group["param_names"], group["params"], strict=True):
                yield group, name, param

    def _bind(self) -> list[Named]:
        """Follows parameters that are new, were swapped for others of the same name, moved, or laid out anew.

        Returns:
            What :meth:`_named` yields.
        """
        named = list(self._named())
        self._bind_those((name, param) for _, name, param in named)
        return named

    def _bind_those(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """:meth:`_bind` for some parameters."""
        found = []
        for name, param in named:
            before, now = self._seen.get(name), _look_of(param)
            if before != now:
                found.append((name, param, before, now))
        if not found:
            return
        self._check_apart()
        with making_state():
            for name, param, before, now in found:
                swapped = before is not None and before[0] != now[0]
                if before is None or before[:2] != now[:2]:
                    self._follow(name, param, swapped=swapped)
                self._seen[name] = now

    def _check_apart(self) -> None:
        """Refuses masked parameters in whose memory another one lies, through which they would be updated too."""
        for one, other in sharing((name, param) for _, name, param in self._named()):
            if one in self._masked or other in self._masked:
                raise InvalidArgumentError(
                    f"parameters {one} and {other} share memory, so that an update of one changes what the mask says "
                    "of the other: tie them as one parameter (a.weight = b.weight, without .data), or give one a copy"
                )

    def _follow(self, name: str, param: Tensor, *, swapped: bool) -> None:
        """Works out what depends on the memory of a parameter; an error leaves everything as it was."""
        raise NotImplementedError

    def _ensure_state(self, name: str, param: Tensor) -> None:
        """Makes the state of a parameter that should have one, unless :meth:`_follow` does."""

    def _saved_state(self, name: str, param: Tensor) -> dict[str, Tensor]:
        """The state of a parameter as ``state_dict()`` gives it."""
        return self._states[name]

    def _loaded_state(self, name: str, param: Tensor, saved: Mapping[str, Any]) -> dict[str, Tensor]:
        """A copy of a saved state in the form this optimizer keeps it, empty for none; an error if it does not fit."""
        raise NotImplementedError

    @_disable_dynamo
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients of all parameters given to the optimizer.

        Args:
            set_to_none: free them, instead of filling them with zeros.
        """
        self._bind()
        super().zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        self._bind()
        groups: list[dict[str, Any]] = []
        state: dict[int, dict[str, Tensor]] = {}
        key = 0
        for group in self.param_groups:
            saved = {field: value for field, value in group.items() if field != "params"}
            groups.append({**saved, "params": list(range(key, key + len(group["params"])))})
            for name, param in zip(group["param_names"], group["params"], strict=True):
                if name in self._states:
                    state[key] = self._saved_state(name, param)
                key += 1
        state_dict: dict[str, Any] = {"state": state, "param_groups": groups}
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            state_dict = post_hook(self, state_dict) or state_dict
        return state_dict

    @making_state()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not isinstance(state_dict, Mapping):
            raise InvalidArgumentError(_NO_STATE)
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        if not ({"state", "param_groups"} <= state_dict.keys() and isinstance(state_dict["state"], Mapping)):
            raise InvalidArgumentError(_NO_STATE)
        self._bind()
        groups: list[dict[str, Any]] = []
        states: dict[str, dict[str, Tensor]] = {}
        for group, (saved, keys) in zip(self.param_groups, self._match(state_dict["param_groups"]), strict=True):
            saved = copy.deepcopy({field: value for field, value in saved.items() if field != "params"})
            groups.append({**saved, "params": group["params"], "param_names": group["param_names"]})
            check_in_step(groups[-1])
            for name, param, key in zip(group["param_names"], group["params"], keys, strict=True):
                values = state_dict["state"].get(key)
                if values is None and not param.requires_grad:
                    # torch.distributed.checkpoint leaves out what does not train.
                    states.update({name: self._states[name]} if name in self._states else {})
                elif values is not None or name in self._states:
                    loaded = self._loaded_state(name, param, values or {})
                    states.update({name: loaded} if loaded else {})
        self.param_groups, self._states = groups, states
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _match(self, saved_groups: list[dict[str, Any]]) -> list[tuple[dict[str, Any], list[Any]]]:
        """For each group the saved one with the same parameters, and the keys of their state in this one's order."""
        keys_by_name = []
        for saved in saved_groups:
            if "mask_fingerprint" not in saved:
                raise MaskMismatchError(
                    "this optimizer state was saved by an optimizer without a mask, whose state is laid out in another "
                    "way: start this one anew"
                )
            if saved["mask_fingerprint"] != self.defaults["mask_fingerprint"]:
                raise MaskMismatchError("this optimizer state was saved with another mask: load the mask it belongs to")
            keys = saved["params"]
            # torch.distributed.checkpoint puts names in place of numbers, in an order of its own.
            given = keys if all(isinstance(key, str) for key in keys) else saved.get("param_names", [])
            keys_by_name.append(dict(zip(given, keys, strict=False)))
        found = names.resolve([name for _, name, _ in self._named()], [name for keys in keys_by_name for name in keys])
        matches = []
        for group in self.param_groups:
            wanted = [found.get(name) for name in group["param_names"]]
            for saved, keys in zip(saved_groups, keys_by_name, strict=True):
                if keys.keys() == set(wanted):
                    matches.append((saved, [keys[name] for name in wanted]))
                    break
        if len(matches) != len(self.param_groups) or len(matches) != len(saved_groups):
            raise MaskMismatchError(
                "this optimizer state was saved for other parameters, or for the same ones in other groups: give the "
                "optimizer the parameters and groups that it was saved with"
            )
        return matches

    def __getstate__(self) -> dict[str, Any]:
        state = dict(super().__getstate__())
        del state["state"]
        own = ("_mask", "_masked", "_states")
        return {**state, **{field: self.__dict__[field] for field in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # A copy has parameters of its own, to which it binds anew.
        self.__dict__.setdefault("_seen", {})


class _State(dict[Tensor, dict[str, Tensor]]):
    """The state by parameter. As with torch's optimizers, clearing it or taking entries out resets the optimizer."""

    def __init__(self, optimizer: MaskedOptimizer, states: dict[Tensor, dict[str, Tensor]]) -> None:
        super().__init__(states)
        self._optimizer = optimizer

    def __setitem__(self, param: Tensor, state: dict[str, Tensor]) -> None:
        super().__setitem__(param, state)
        self._optimizer.state = self

    def __delitem__(self, param: Tensor) -> None:
        super().__delitem__(param)
        self._optimizer.state = self

    def pop(self, *arguments: Any) -> Any:
        popped = super().pop(*arguments)
        self._optimizer.state = self
        return popped

    # By way of the above.
    popitem, update = MutableMapping.popitem, MutableMapping.update

    def setdefault(self, param: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
        if param not in self:
            self[param] = state
        return self[param]

    def __ior__(self, states: Any) -> Self:  # type: ignore[override, misc]
        self.update(states)
        return self

    def __missing__(self, param: Tensor) -> dict[str, Tensor]:
        return {}

    def clear(self) -> None:
        super().clear()
        self._optimizer.state = self

    def __reduce__(self) -> Any:
        # Copies belong to no optimizer.
        return dict, (dict(self),)


def check_names(group: Mapping[str, Any]) -> None:
    """Refuses a group that names some of its parameters only."""
    if len(group["param_names"]) != len(group["params"]):
        raise InvalidArgumentError(
            f"a group has {len(group['params'])} parameters and {len(group['param_names'])} names: what takes "
            "parameters out of group['params'] must take their names out of group['param_names'], too"
        )


def others_of(state: Mapping[str, Any], own: Sequence[str]) -> dict[str, Any]:
    """What wrappers such as Lookahead keep in the state of a parameter beside the optimizer's own."""
    return {field: value for field, value in state.items() if field not in own}


def loaded_others(saved: Mapping[str, Any], own: Sequence[str], param: Tensor) -> dict[str, Any]:
    """A copy of the same in a saved state, on the parameter's device, as torch's optimizers load it."""
    return {
        field: value.to(param.device, copy=True) if type(value) is Tensor else copy.deepcopy(value)
        for field, value in others_of(saved, own).items()
    }


def _look_of(param: Tensor) -> tuple[int, tuple[Any, ...], int]:
    """A parameter's id, its form, for which positions in its memory hold, and its address."""
    piece = local(param)
    whole = None if piece is param else param.shape
    form = type(param), whole, piece.shape, piece.stride(), piece.dtype, piece.device
    # Wrappers of other tensors and sparse ones have none. This is quicker than to ask what it is.
    try:
        address = piece.data_ptr()
    except (RuntimeError, NotImplementedError):
        address = 0
    return id(param), form, address


def settled_gradient(param: Tensor) -> Tensor:
    """This process's part of a gradient that the parameter has, with elements where the parameter has them."""
    grad = param.grad
    if type(grad) is Tensor:
        return grad
    assert grad is not None
    if is_sharded(grad) and is_sharded(param) and grad.placements != param.placements:
        # Tensor parallelism leaves partial sums for parameters that every process holds whole.
        param.grad = grad = grad.redistribute(param.device_mesh, param.placements)
    return local(grad)


def held(param: Tensor, indices: Tensor) -> tuple[Places, Tensor]:
    """Those of some elements of a parameter that this process holds.

    Args:
        param: plain or sharded.
        indices: ascending row-major positions in the whole parameter.

    Returns:
        Their places in ``indices``, and where they lie in the memory of this process's part, in the same order.
    """
    shard = Shard.of(param)
    places = shard.inside(indices)
    return places, memory_indices(local(param), shard.to_local(indices[places]))


def at(values: Tensor, places: Places) -> Tensor:
    """The values at some places."""
    return values[places.to(values.device) if isinstance(places, Tensor) else places]


def cut(values: Tensor, before: Places, after: Places, count: int) -> Tensor | None:
    """Of values for the places ``before``, those for the places ``after``; None if they are not among them.

    ``count`` is how many places there are over all processes.
    """
    if isinstance(before, Tensor):
        return values if isinstance(after, Tensor) and torch.equal(before, after) else None
    if not isinstance(after, Tensor) and before == after:
        return values
    return at(values, after).clone() if before == slice(0, count) else None


def step_arguments(
    group: Mapping[str, Any], states: Sequence[Mapping[str, Tensor]]
) -> tuple[list[float], list[float], float, float, float, float]:
    """What the ops take of the hyperparameters of a group for the next step of parameters with these states.

    Returns:
        Per parameter the step size and the root of the second moment's bias correction; both betas, eps and the decay.
    """
    lr, (beta1, beta2) = float(group["lr"]), map(float, group["betas"])
    steps = [int(state["step"].item()) + 1 for state in states]
    # Almost always they are all at the same one.
    sizes = {step: lr / (1 - beta1**step) for step in set(steps)}
    roots = {step: math.sqrt(1 - beta2**step) for step in sizes}
    return (
        [sizes[step] for step in steps],
        [roots[step] for step in steps],
        beta1,
        beta2,
        float(group["eps"]),
        1 - lr * float(group["weight_decay"]),
    )


@contextmanager
def step_counted(params: Sequence[Tensor], states: Sequence[Mapping[str, Tensor]]) -> Iterator[None]:
    """Counts the step in which a block calls the ops that update these parameters.

    Before it, since Ctrl-C strikes where the time goes, which is in those ops and in waiting for the device: the states
    that it leaves say what was done. Any other exception in the block has to mean that nothing was, and is not counted.
    """
    steps = [state["step"] for state in states]
    torch._foreach_add_(steps, _ONE, alpha=1.0)
    updated = True
    try:
        yield
    except Exception:
        updated = False
        torch._foreach_add_(steps, _ONE, alpha=-1.0)
        raise
    finally:
        if updated:
            mark_written(params)


def check_hyperparameters(group: Mapping[str, Any], *, least: float = 0.0) -> None:
    """Refuses hyperparameters of AdamW that are no numbers or out of range, and those of other optimizers."""
    for name in ("maximize", "amsgrad"):
        if group.get(name):
            raise InvalidArgumentError(f"{name} is not supported: leave it out")
    for name in ("lr", "eps", "weight_decay"):
        value = group.get(name)
        # Read once, since a tensor may be on a device.
        if not (is_scalar(value) and least <= float(value) < math.inf):
            hint = " (YAML reads 1e-2 as text, and 1.0e-2 as a number)" if isinstance(value, str) else ""
            raise InvalidArgumentError(f"{name} must be a finite number of at least 0, got {value!r}{hint}")
    betas = group.get("betas")
    if not (
        isinstance(betas, Sequence) and len(betas) == 2 and all(is_scalar(beta) and 0 <= beta < 1 for beta in betas)
    ):
        raise InvalidArgumentError(f"betas must be two numbers in [0, 1), got {betas!r}")


def check_in_step(group: Mapping[str, Any]) -> None:
    """:func:`check_hyperparameters` of what schedulers, and whoever else writes into groups, made of them."""
    # Schedulers may round to just below 0.
    check_hyperparameters(group, least=-sys.float_info.max)


class NamedPiece(Protocol):
    """The part of a named parameter that this process holds."""

    name: str
    piece: Tensor


def check_memory(targets: Iterable[NamedPiece]) -> None:
    """Refuses a step that would write to where a parameter was."""
    # A part without elements has no memory either.
    freed = [target.name for target in targets if not target.piece.data_ptr() and target.piece.numel()]
    if freed:
        raise StepError(
            f"the memory of {names.listed(freed)} was freed, with the parameters still in this optimizer; no weight "
            "was changed. Make the optimizer of the parameters that the model has now"
        )


def check_strided(name: str, grad: Tensor) -> None:
    """Refuses the gradients that ``sparse=True`` gives."""
    if grad.layout != torch.strided:
        raise StepError(f"parameter {name} has a sparse gradient: build its module with sparse=False")
