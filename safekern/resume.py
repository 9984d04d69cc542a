"""Interrupted training: files from which a run goes on as if nothing had happened, bit for bit if deterministic."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from safekern import files
from safekern.errors import FileFormatError, InvalidArgumentError
from safekern.files import StrPath
from safekern.layout import flat_view, memory_indices

_KIND, _VERSION = "training", 1
_WEIGHT, _STATE = "weight:", "state:"


class Weights:
    """Those weights of a model that matter to a run, to be read, put aside and written back.

    Args:
        params: by name the parameter, and the row-major indices that matter in it, None for all.
    """

    def __init__(self, params: Mapping[str, tuple[Tensor, Tensor | None]]) -> None:
        self._params = dict(params)

    def others(self, model: torch.nn.Module) -> list[Tensor]:
        """The parameters of the model in which none of them lies."""
        return [param for name, param in model.named_parameters() if name not in self._params]

    def read(self) -> dict[str, Tensor]:
        """A copy of them, 1-D for each parameter, on its device."""
        return {
            name: flat_view(param.detach()).clone()
            if indices is None
            else flat_view(param.detach()).index_select(0, memory_indices(param, indices))
            for name, (param, indices) in self._params.items()
        }

    def changed(self, since: Mapping[str, Tensor]) -> list[str]:
        """The parameters of which a bit is another than when `read` returned ``since``."""
        return [
            name
            for name, value in self.read().items()
            if not torch.equal(value.view(torch.uint8), since[name].view(torch.uint8))
        ]

    def write(self, values: Mapping[str, Tensor]) -> None:
        """Puts back what `read` returned.

        Raises:
            FileFormatError: these are values of other weights. Nothing was changed.
        """
        fits = values.keys() == self._params.keys() and all(
            (values[name].dtype, values[name].numel())
            == (param.dtype, param.numel() if indices is None else indices.numel())
            for name, (param, indices) in self._params.items()
        )
        if not fits:
            raise FileFormatError("the saved weights are not those of this run: start it again without --resume")
        with torch.no_grad():
            for name, (param, indices) in self._params.items():
                flat, saved = flat_view(param), values[name].to(param.device)
                if indices is None:
                    flat.copy_(saved)
                else:
                    flat.index_copy_(0, memory_indices(param, indices).long(), saved)


class Run(NamedTuple):
    """What a run is continued from.

    Attributes:
        weights: for `Weights.write`.
        optimizer: for `restore`.
        losses: of the iterations so far.
    """

    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    losses: list[float]

    def restore(self, optimizer: Optimizer) -> None:
        """Gives an optimizer over the same weights the state that the saved one had.

        Raises:
            FileFormatError: it is not the state of such an optimizer.
        """
        try:
            optimizer.load_state_dict(self.optimizer)
        # An optimizer trusts what it is given: a wrong type shows wherever it is first used.
        except Exception as error:
            raise FileFormatError(
                f"the saved state is not that of this run's optimizer ({error}): start it again without --resume"
            ) from error


def save(
    path: StrPath, weights: Mapping[str, Tensor], optimizer: Optimizer, losses: list[float], settings: Mapping[str, Any]
) -> None:
    """Writes a run to a safetensors file with a checksum, atomically: the last one stays until this one is complete.

    Args:
        path: the file to write or replace.
        weights: what `Weights.read` returned.
        optimizer: one whose state holds tensors only.
        losses: of the iterations so far.
        settings: what has to be the same when the run goes on, as JSON can hold it.

    Raises:
        FileAccessError: the path cannot be written.
    """
    state = optimizer.state_dict()
    tensors = {_WEIGHT + name: tensor for name, tensor in weights.items()}
    for key, fields in state["state"].items():
        tensors |= {f"{_STATE}{key}:{field}": tensor for field, tensor in fields.items()}
    files.write(
        path, _KIND, _VERSION, tensors, {"groups": state["param_groups"], "losses": losses, "settings": dict(settings)}
    )


def check(path: StrPath, settings: Mapping[str, Any]) -> int:
    """Refuses a run with other settings before anything large is read, and returns how many iterations it has taken.

    Args:
        path: what `save` wrote.
        settings: those that are known so far.

    Raises:
        FileAccessError: the file is missing or cannot be read.
        FileFormatError: it is of another kind or newer, or damaged where the head of the file tells.
        InvalidArgumentError: it belongs to a run with other settings; names them.
    """
    before, losses, _ = _described(path, files.read_description(path, _KIND, _VERSION))
    _refuse_other(path, before, settings, settings)
    return len(losses)


def load(path: StrPath, settings: Mapping[str, Any]) -> Run:
    """Reads what `save` wrote.

    Raises:
        FileAccessError: the file is missing or cannot be read.
        FileFormatError: it is damaged, of another kind or newer.
        InvalidArgumentError: it belongs to a run with other settings; names them.
    """
    tensors, meta = files.read(path, _KIND, _VERSION)
    before, losses, groups = _described(path, meta)
    state: dict[int, dict[str, Tensor]] = {}
    with _valid(path):
        for name, tensor in tensors.items():
            if name.startswith(_STATE):
                key, field = name.removeprefix(_STATE).split(":")
                state.setdefault(int(key), {})[field] = tensor
    _refuse_other(path, before, settings, {**before, **settings})
    weights = {name.removeprefix(_WEIGHT): value for name, value in tensors.items() if name.startswith(_WEIGHT)}
    return Run(weights, {"state": state, "param_groups": groups}, losses)


def _described(path: StrPath, meta: Mapping[str, Any]) -> tuple[dict[str, Any], list[float], list[dict[str, Any]]]:
    """The settings, losses and parameter groups in a file's description."""
    with _valid(path):
        groups = [{**group, "betas": tuple(group["betas"])} for group in meta["groups"]]
        return dict(meta["settings"]), [float(loss) for loss in meta["losses"]], groups


@contextmanager
def _valid(path: StrPath) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        raise FileFormatError(f"{path}: not a valid training run ({error}); start it again without --resume") from error


def _refuse_other(path: StrPath, before: Mapping[str, Any], now: Mapping[str, Any], keys: Iterable[str]) -> None:
    other = [key for key in keys if before.get(key) != now.get(key)]
    if other:
        changes = ", ".join(f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in other)
        raise InvalidArgumentError(
            f"{path}: belongs to a run with other settings: {changes}. Use the same, or start anew"
        )
