"""The mask: which weights of a model are selected, as sorted indices per parameter."""

import builtins
import copy
import difflib
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from typing import Any, Literal, TypeVar, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from safekern import files, names
from safekern.arguments import is_whole_number
from safekern.errors import FileFormatError, InvalidArgumentError, MaskMismatchError, UnknownNameError
from safekern.files import StrPath
from safekern.indices import checked, contains, decode, encode, union
from safekern.tables import Column, Table, counted, printable

Shape = Sequence[int]
_Default = TypeVar("_Default")

# Version 1 had 16-bit codes alone.
_KIND, _VERSION = "mask", 2
_SHOWN = 10
_MOST_EXPERTS = 1 << 16
# Of a mask made of masks, how many operations deep its meta says what they were made of.
_MOST_OPERATIONS = 8


class Mask(Mapping[str, Tensor]):
    """A selection of single weights across the parameters of a model.

    Reads like a mapping from parameter names to sorted int64 indices into the flattened (row-major) parameter, over
    the parameters with at least one selected weight. A mask never changes: what it hands out are copies.

    Made by :meth:`from_indices`, :meth:`from_bool`, :meth:`load`, the ranking methods of the scores, and ``&``, ``|``
    and ``-`` between masks of one model, which see through wrapped names; the result has those of the mask on the left.
    ``==`` compares names, indices and shapes, not :attr:`meta`.

    Example:
        >>> from safekern.mask import Mask
        >>> mask = Mask.from_indices({"w": [5, 0]}, {"w": (2, 3), "bias": (2,)})
        >>> mask["w"], mask.numel, mask.density
        (tensor([0, 5]), 2, 0.25)
    """

    def __init__(
        self, indices: Mapping[str, Tensor], shapes: dict[str, torch.Size], model_numel: int, meta: dict[str, Any]
    ) -> None:
        """Takes over data that was checked before; use :meth:`from_indices` for anything else."""
        self._indices = indices
        self._shapes = shapes
        self._model_numel = model_numel
        self._meta = meta

    @classmethod
    def from_indices(
        cls,
        indices: Mapping[str, Tensor | Sequence[int] | NDArray[Any]],
        shapes: Mapping[str, Shape],
        *,
        model_numel: int | None = None,
        meta: Mapping[str, Any] | None = None,
    ) -> "Mask":
        """Makes a mask from flat indices.

        Args:
            indices: For each parameter, 1-D integers into its flattened (row-major) values, in any order, on any
                device. Parameters without any are left out of the mask.
            shapes: The shape of at least every parameter in ``indices``.
            model_numel: How many weights the whole model has; by default those of all ``shapes`` together.
            meta: Where the mask comes from, as JSON can hold it.

        Returns:
            A mask that shares no memory with what was given.

        Raises:
            InvalidArgumentError: If indices are not integers, repeat or lie outside the shape, if a shape is missing,
                a name is not a string or ``model_numel`` is too small.

        Example:
            >>> from safekern.mask import Mask
            >>> Mask.from_indices({"w": [3, 1]}, {"w": (2, 2)})
            Mask(2 of 4 weights, 50%, in 1 parameter)
        """
        for given in (indices, shapes):
            _check_names(given)
        sizes = {name: _size(name, shape) for name, shape in shapes.items()}
        missing = [name for name in indices if name not in sizes]
        if missing:
            listed = names.listed([*map(repr, missing)], _SHOWN)
            raise InvalidArgumentError(f"No shape is given for {listed}; add it to shapes.")
        stored = {name: checked(name, values, sizes[name]) for name, values in indices.items()}
        stored = {name: values for name, values in stored.items() if values.numel()}
        masked = {name: sizes[name] for name in stored}
        known = sum(map(_numel, sizes.values()))
        least = sum(map(_numel, masked.values()))
        if model_numel is not None and not (is_whole_number(model_numel) and least <= model_numel < 2**63):
            raise InvalidArgumentError(
                f"model_numel is {model_numel!r:.50}, but must be a whole number of at least {least:,}, the weights of "
                "the masked parameters alone."
            )
        return cls(
            stored, masked, known if model_numel is None else int(model_numel), json.loads(files.dump_json(meta or {}))
        )

    @classmethod
    def from_bool(cls, masks: Mapping[str, Tensor], *, meta: Mapping[str, Any] | None = None) -> "Mask":
        """Makes a mask from boolean tensors.

        Args:
            masks: For each parameter a bool tensor of its shape, on any device, True where selected. Together they
                count as the whole model for :attr:`density`.
            meta: Where the mask comes from, as JSON can hold it.

        Returns:
            A mask that shares no memory with what was given.

        Raises:
            InvalidArgumentError: If one is not a dense bool tensor with values, or a name is not a string.

        Example:
            >>> import torch
            >>> from safekern.mask import Mask
            >>> Mask.from_bool({"w": torch.tensor([[True, False], [False, True]])})["w"]
            tensor([0, 3])
        """
        _check_names(masks)
        for name, tensor in masks.items():
            if not isinstance(tensor, Tensor) or tensor.dtype != torch.bool:
                got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise InvalidArgumentError(
                    f"{name!r}: a bool tensor is needed, got {got}; for indices there is Mask.from_indices."
                )
            if tensor.is_meta or tensor.layout != torch.strided:
                raise InvalidArgumentError(
                    f"{name!r}: a bool tensor with a value for every weight is needed, got one "
                    + ("on the meta device." if tensor.is_meta else "that is sparse; use its to_dense().")
                )
        # On the CPU, because CUDA's nonzero stops at 2^31 elements.
        indices = {name: tensor.detach().cpu().reshape(-1).nonzero().view(-1) for name, tensor in masks.items()}
        return cls.from_indices(indices, {name: tensor.shape for name, tensor in masks.items()}, meta=meta)

    def __getitem__(self, name: str) -> Tensor:
        return self.compact(name).to(torch.int64, copy=True)

    def __iter__(self) -> Iterator[str]:
        return iter(self._indices)

    def __len__(self) -> int:
        return len(self._indices)

    def __contains__(self, name: object) -> builtins.bool:
        return name in self._shapes

    @overload
    def get(self, name: str, /) -> Tensor | None: ...
    @overload
    def get(self, name: str, /, default: Tensor | _Default) -> Tensor | _Default: ...
    def get(self, name: str, /, default: Any = None) -> Any:
        """The indices of one parameter, or ``default`` where none is selected.

        Args:
            name: A parameter's name.
            default: What to return instead.

        Returns:
            As ``mask[name]``: sorted int64 of shape [selected], on the CPU.

        Example:
            >>> from safekern.mask import Mask
            >>> mask = Mask.from_indices({"w": [1]}, {"w": (1, 2)})
            >>> mask.get("w"), mask.get("bias")
            (tensor([1]), None)
        """
        return self[name] if name in self._shapes else default

    def compact(self, name: str) -> Tensor:
        """The sorted indices without a copy where they are stored as such: not to be written to.

        Args:
            name: A parameter's name.

        Returns:
            1-D, on the CPU; int32, or int64 where the parameter has 2^31 elements or more.

        Raises:
            UnknownNameError: If nothing of that parameter is selected.

        Example:
            >>> from safekern.mask import Mask
            >>> Mask.from_indices({"w": [1, 2]}, {"w": (4,)}).compact("w")
            tensor([1, 2], dtype=torch.int32)
        """
        try:
            return self._indices[name]
        except KeyError:
            raise UnknownNameError(
                f"{name!r} is not in this mask, which selects weights in {counted(len(self), 'parameter')}."
                f"{_suggestion(name, self._indices)} list(mask) gives the names."
            ) from None

    def bool(self, name: str) -> Tensor:
        """One parameter's selection as a dense tensor.

        Args:
            name: A parameter's name.

        Returns:
            A bool tensor of the parameter's shape on the CPU, True where selected.

        Raises:
            UnknownNameError: If nothing of that parameter is selected.

        Example:
            >>> from safekern.mask import Mask
            >>> Mask.from_indices({"w": [1]}, {"w": (1, 2)}).bool("w")
            tensor([[False,  True]])
        """
        indices = self.compact(name)
        dense = torch.zeros(_numel(self._shapes[name]), dtype=torch.bool, device="cpu")
        dense.numpy()[indices.numpy()] = True
        return dense.view(self._shapes[name])

    @cached_property
    def numel(self) -> int:
        """How many weights are selected."""
        if isinstance(self._indices, _Packed):
            return self._indices.numel
        return sum(indices.numel() for indices in self._indices.values())

    @property
    def model_numel(self) -> int:
        """How many weights the whole model has."""
        return self._model_numel

    @property
    def density(self) -> float:
        """The share of the whole model's weights that is selected."""
        return self.numel / self._model_numel if self._model_numel else 0.0

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """The shapes of the masked parameters."""
        return dict(self._shapes)

    @property
    def meta(self) -> dict[str, Any]:
        """Where the mask comes from, such as ratio, reduction, objective, batches and versions.

        Of a mask made by ``&``, ``|`` or ``-``, the operation and the meta of both masks (``"left"``, ``"right"``), up
        to 8 operations in one another.
        """
        return copy.deepcopy(self._meta)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of names, shapes and indices: equal where masks are, up to what wrappers add to names.

        So a checkpoint made with the mask of a compiled model belongs to the mask of the plain one too.
        """
        digest = hashlib.sha256()
        for plain, name in sorted((names.canonical(name), name) for name in self._indices):
            indices = self._indices[name]
            digest.update(json.dumps([plain, list(self._shapes[name]), indices.numel()]).encode())
            digest.update(indices.numpy().data)
        return digest.hexdigest()

    def resolve(self, named: Mapping[str, torch.Size | Tensor]) -> dict[str, str]:
        """Finds every masked parameter among the given ones.

        Args:
            named: Parameters, or their shapes, by name. Names may be wrapped by DDP, ``torch.compile`` or PEFT.

        Returns:
            For each name in the mask, the given name it stands for.

        Raises:
            MaskMismatchError: If the mask selects nothing, or a parameter is missing, ambiguous or of another shape.

        Example:
            >>> import torch
            >>> from safekern.mask import Mask
            >>> Mask.from_indices({"w": [1]}, {"w": (4,)}).resolve({"module.w": torch.zeros(4)})
            {'w': 'module.w'}
        """
        if not self._indices:
            raise MaskMismatchError("The mask selects nothing, so using it would have no effect; make another.")
        found = names.resolve(self._indices, named)
        given = {name: _shape_of(named[match]) for name, match in found.items()}
        wrong = [name for name, shape in self._shapes.items() if given.get(name) != shape]
        if not wrong:
            return found

        lines = [f"The mask does not fit: {len(wrong):,} of its {counted(len(self), 'parameter')}."]
        for name in wrong[:_SHOWN]:
            if name in found:
                alias = "" if found[name] == name else f" (here {found[name]})"
                lines.append(f"  {name}{alias}: shape {_text(given[name])}, in the mask {_text(self._shapes[name])}")
                dtype = getattr(named[found[name]], "dtype", torch.float32)
                if not dtype.is_floating_point:
                    lines[-1] += f" ({dtype}: quantised)"
            else:
                lines.append(f"  {name}: missing.{_suggestion(name, named)}")
        if len(wrong) > _SHOWN:
            lines.append(f"  and {len(wrong) - _SHOWN:,} more: {', '.join(wrong[_SHOWN:])}")
        tied = "" if found.keys() >= set(wrong) else " Of a tied weight's names, named_parameters() lists the first."
        lines.append(f"Use a mask made for this model, or load the model the mask was made for.{tied}")
        raise MaskMismatchError("\n".join(lines))

    def check(self, model: nn.Module) -> None:
        """Makes sure that the mask fits a model.

        Args:
            model: The model; it may be wrapped by DDP, ``torch.compile`` or PEFT, and tied weights count under each
                of their names.

        Raises:
            MaskMismatchError: If the mask selects nothing, or a parameter is missing, ambiguous or of another shape;
                the message names all of them.
            InvalidArgumentError: If ``model`` is none.

        Example:
            >>> import torch
            >>> from safekern.mask import Mask
            >>> Mask.from_indices({"weight": [0, 7]}, {"weight": (2, 4)}).check(torch.nn.Linear(4, 2))
        """
        self.resolve(_named(model))

    def parameters(self, model: nn.Module) -> dict[str, tuple[nn.Parameter, Tensor]]:
        """The masked parameters of a model with their indices, a tied parameter once.

        Args:
            model: The model, as for :meth:`check`.

        Returns:
            For the first of the names that the model has for each masked parameter, the parameter and its sorted
            indices, on the CPU and not to be written to: those under all its names.

        Raises:
            MaskMismatchError: As :meth:`check`.
            InvalidArgumentError: As :meth:`check`.

        Example:
            >>> import torch
            >>> from safekern.mask import Mask
            >>> Mask.from_indices({"weight": [0]}, {"weight": (1, 1)}).parameters(torch.nn.Linear(1, 1))["weight"][1]
            tensor([0], dtype=torch.int32)
        """
        named = _named(model)
        first = {param: name for name, param in reversed(named.items())}
        found: dict[str, tuple[nn.Parameter, Tensor]] = {}
        for masked, given in self.resolve(named).items():
            param, indices = named[given], self._indices[masked]
            name = first[param]
            found[name] = (param, union(found[name][1], indices) if name in found else indices)
        return found

    def named_like(self, other: "Mask") -> "Mask":
        """This mask under the names that another one has for the same parameters, so that the two can be combined.

        The operators and :meth:`jaccard` do this with the mask on the right.

        Args:
            other: A mask over the same model, whose names may be wrapped otherwise by DDP, ``torch.compile`` or PEFT.

        Returns:
            A mask in which parameters that only this one has keep their names.

        Raises:
            MaskMismatchError: If a parameter has another shape in the other mask, or a name is ambiguous.

        Example:
            >>> from safekern.mask import Mask
            >>> wrapped, plain = (Mask.from_indices({name: [1]}, {name: (4,)}) for name in ("_orig_mod.w", "w"))
            >>> list(wrapped.named_like(plain)), (plain - wrapped).numel
            (['w'], 0)
        """
        check_mask(other)
        # A name that both have is the same parameter, whatever else it may resemble.
        new = names.resolve([name for name in self if name not in other], [name for name in other if name not in self])
        shapes = {new.get(name, name): shape for name, shape in self._shapes.items()}
        for name, shape in shapes.items():
            if other._shapes.get(name, shape) != shape:
                raise MaskMismatchError(
                    f"{name!r} has shape {_text(other._shapes[name])} in one mask and {_text(shape)} in the other; "
                    f"combine masks of the same model."
                )
        if not new:
            return self
        indices = {new.get(name, name): values for name, values in self._indices.items()}
        return Mask(indices, shapes, self._model_numel, self._meta)

    def __and__(self, other: "Mask") -> "Mask":
        if not isinstance(other, Mask):
            return NotImplemented
        other = other.named_like(self)
        common = {
            name: indices[contains(other._indices[name], indices)]
            for name, indices in self._indices.items()
            if name in other
        }
        return self._combined(other, "&", common)

    def __or__(self, other: "Mask") -> "Mask":
        if not isinstance(other, Mask):
            return NotImplemented
        other = other.named_like(self)
        both = dict(self._indices)
        for name, indices in other._indices.items():
            mine = self._indices.get(name)
            both[name] = indices if mine is None else union(mine, indices)
        return self._combined(other, "|", both)

    def __sub__(self, other: "Mask") -> "Mask":
        if not isinstance(other, Mask):
            return NotImplemented
        other = other.named_like(self)
        rest = {
            name: indices[~contains(other._indices[name], indices)] if name in other else indices
            for name, indices in self._indices.items()
        }
        return self._combined(other, "-", rest)

    def __eq__(self, other: object) -> builtins.bool:
        if not isinstance(other, Mask):
            return NotImplemented
        return self._shapes == other._shapes and all(
            torch.equal(indices, other._indices[name]) for name, indices in self._indices.items()
        )

    # Comparing is by content, which is too much to hash for a dictionary key; `fingerprint` serves as one.
    __hash__ = None  # type: ignore[assignment]

    def jaccard(self, other: "Mask") -> float:
        """The share of the weights selected by either mask that both select.

        Args:
            other: A mask over the same model; its names may be wrapped otherwise, as for :meth:`named_like`.

        Returns:
            Between 0 and 1; 1 for two empty masks.

        Raises:
            MaskMismatchError: If a parameter has another shape in the other mask, or a name is ambiguous.

        Example:
            >>> from safekern.mask import Mask
            >>> shapes = {"w": (4,)}
            >>> Mask.from_indices({"w": [0, 1]}, shapes).jaccard(Mask.from_indices({"w": [1]}, shapes))
            0.5
        """
        check_mask(other)
        other = other.named_like(self)
        common = sum(
            int(contains(other._indices[name], indices).sum())
            for name, indices in self._indices.items()
            if name in other
        )
        either = self.numel + other.numel - common
        return common / either if either else 1.0

    def summary(self) -> "Summary":
        """Counts the selected weights per layer and component.

        A component is a parameter as the model has it. Projections that are fused into one (Phi3's ``qkv_proj``, the
        ``gate_up_proj`` of experts) are one component, since a mask knows no head counts to take them apart with.

        A mask only knows the shapes of parameters with at least one selected weight. So a cell's ``numel`` leaves out
        parameters that nothing was selected in, and a cell in which nothing was selected has no row.

        Returns:
            One row per layer and component; printing it gives a table.

        Example:
            >>> from safekern.mask import Mask
            >>> mask = Mask.from_indices({"layers.0.q_proj.weight": [0, 3]}, {"layers.0.q_proj.weight": (2, 4)})
            >>> mask.summary()[0].component, mask.summary()[0].density
            ('q_proj', 0.25)
        """
        cells: dict[tuple[int | None, str], list[int]] = {}
        for name, indices in self._indices.items():
            cell = cells.setdefault((names.layer(name), names.component(name)), [0, 0])
            cell[0] += indices.numel()
            cell[1] += _numel(self._shapes[name])
        rows = [self._row(layer, component, cell) for (layer, component), cell in cells.items()]
        rows.sort(key=lambda row: (*names.layer_order(row.layer), names.component_order(row.component)))
        return Summary(rows, self.density)

    def expert_summary(self) -> "Summary":
        """Counts the selected weights per layer and expert of a mixture of experts.

        Experts are the slices of a fused 3-D tensor along its first dimension, or modules with a number. Shared experts
        and routers are left out. An expert with modules of its own in which nothing was selected has no row.

        Returns:
            One row per layer and expert, over all of the expert's tensors; empty where the mask holds no experts.

        Raises:
            InvalidArgumentError: If a tensor claims to fuse more experts than any model has.

        Example:
            >>> from safekern.mask import Mask
            >>> name = "layers.0.mlp.experts.down_proj"
            >>> rows = Mask.from_indices({name: [0, 1, 7]}, {name: (2, 2, 2)}).expert_summary()
            >>> [(row.expert, row.selected) for row in rows]
            [(0, 2), (1, 1)]
        """
        cells: dict[tuple[int | None, int], list[int]] = {}
        for name, indices in self._indices.items():
            for expert, selected, numel in _per_expert(name, indices, self._shapes[name]):
                cell = cells.setdefault((names.layer(name), expert), [0, 0])
                cell[0] += selected
                cell[1] += numel
        rows = [self._row(layer, "experts", cell, expert) for (layer, expert), cell in cells.items()]
        rows.sort(key=lambda row: (*names.layer_order(row.layer), row.expert or 0))
        return Summary(rows, self.density)

    def plot(self, path: StrPath) -> None:
        """Draws the density of each component in each layer as a heat map, and below it that of each expert.

        Args:
            path: The image to write; its suffix chooses the format (``.png``, ``.svg``, ``.pdf``; without one, PNG).

        Raises:
            InvalidArgumentError: If the mask selects nothing, or the suffix is not an image format.
            FileAccessError: If the path cannot be written.
            MissingDependencyError: If matplotlib is not installed.

        Example:
            >>> import pathlib, tempfile
            >>> from safekern.mask import Mask
            >>> mask = Mask.from_indices({"layers.0.q_proj.weight": [0, 3]}, {"layers.0.q_proj.weight": (2, 4)})
            >>> mask.plot(pathlib.Path(tempfile.mkdtemp(), "mask.png"))
        """
        # Where matplotlib is missing, that is said only when something is drawn.
        from safekern import plots

        plots.write(plots.mask_figure(self), path)

    def save(self, path: StrPath) -> None:
        """Writes the mask to a file: at a density of 1%, 1.1 bytes per selected weight.

        The file is a safetensors file with a format version and a checksum. It takes its place only once complete.

        Args:
            path: The file to write or replace, by habit ``*.safetensors``.

        Raises:
            FileAccessError: If the path cannot be written.

        Example:
            >>> import pathlib, tempfile
            >>> from safekern.mask import Mask
            >>> path = pathlib.Path(tempfile.mkdtemp(), "mask.safetensors")
            >>> mask = Mask.from_indices({"w": [5]}, {"w": (2, 3)})
            >>> mask.save(path)
            >>> Mask.load(path) == mask
            True
        """
        codes, description = self.pack()
        files.write(path, _KIND, _VERSION, codes, description)

    @classmethod
    def load(cls, path: StrPath) -> "Mask":
        """Reads a mask that :meth:`save` wrote, and checks all of it.

        Args:
            path: The file.

        Returns:
            The mask that was saved, its :attr:`meta` too.

        Raises:
            FileAccessError: If the file is missing or cannot be read.
            FileFormatError: If it is damaged, newer than this version of safekern, or not a mask.

        Example:
            >>> import pathlib, tempfile
            >>> from safekern.mask import Mask
            >>> path = pathlib.Path(tempfile.mkdtemp(), "mask.safetensors")
            >>> Mask.from_indices({"w": [5]}, {"w": (2, 3)}).save(path)
            >>> Mask.load(path)["w"]
            tensor([5])
        """
        codes, description = files.read(path, _KIND, _VERSION)
        try:
            return cls.unpack(codes, description)
        except InvalidArgumentError as error:
            raise FileFormatError(f"{path}: not a valid mask: {error} Copy or create it again.") from error

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a file holds of the mask, for formats of one's own; :meth:`save` writes a file.

        Returns:
            For each parameter 1-D codes, uint8 or uint16; and a description as JSON can hold it.

        Example:
            >>> from safekern.mask import Mask
            >>> mask = Mask.from_indices({"w": [1, 3]}, {"w": (2, 2)})
            >>> codes, description = mask.pack()
            >>> codes["w"], Mask.unpack(codes, description) == mask
            (tensor([2, 2], dtype=torch.uint8), True)
        """
        if isinstance(self._indices, _Packed):
            codes = self._indices.codes
        else:
            codes = {name: encode(indices) for name, indices in self._indices.items()}
        shapes = {name: list(shape) for name, shape in self._shapes.items()}
        return codes, {"model_numel": self._model_numel, "shapes": shapes, "meta": self._meta}

    @classmethod
    def unpack(cls, codes: Mapping[str, Tensor], description: Mapping[str, Any]) -> "Mask":
        """The inverse of :meth:`pack`, for content of any origin.

        The mask keeps the codes, about 1.1 bytes per selected weight at 1%, and unpacks a parameter's when asked for
        them: each of many processes can hold it, and unpack what it has to do with.

        Args:
            codes: For each parameter what :meth:`pack` gave.
            description: What it gave beside them.

        Returns:
            A mask that is equal to the one that was packed.

        Raises:
            InvalidArgumentError: If it does not describe a mask.
        """
        shapes, model_numel, meta = (description.get(key) for key in ("shapes", "model_numel", "meta"))
        if not isinstance(shapes, dict) or type(model_numel) is not int or not isinstance(meta, dict):
            raise InvalidArgumentError("The shapes, the model's size or the meta are missing.")
        if shapes.keys() != codes.keys():
            raise InvalidArgumentError("The names of its shapes and of its indices differ.")
        sizes = {name: _size(name, shape) for name, shape in shapes.items()}
        if not sum(map(_numel, sizes.values())) <= model_numel < 2**63:
            raise InvalidArgumentError("The model's size is not one that holds the masked parameters.")
        try:
            # As `meta` does, which should not be where it fails.
            copy.deepcopy(meta)
        except RecursionError as error:
            raise InvalidArgumentError("Its meta is nested too deeply.") from error
        return cls(_Packed({name: codes[name] for name in sizes}, sizes), sizes, model_numel, meta)

    def __repr__(self) -> str:
        return (
            f"Mask({self.numel:,} of {self.model_numel:,} weights, {_percent(self.density)}, "
            f"in {counted(len(self), 'parameter')})"
        )

    def _row(self, layer: int | None, component: str, counts: list[int], expert: int | None = None) -> "SummaryRow":
        selected, numel = counts
        density = selected / numel
        return SummaryRow(
            layer, component, selected, numel, selected / self.numel, density, density / self.density, expert
        )

    def _combined(self, other: "Mask", operation: str, indices: dict[str, Tensor]) -> "Mask":
        indices = {name: values for name, values in indices.items() if values.numel()}
        shapes = self._shapes | other._shapes
        shapes = {name: shapes[name] for name in indices}
        # Masks over disjoint parts of a model may each know only their own part.
        model_numel = max(self._model_numel, other._model_numel, sum(map(_numel, shapes.values())))
        meta = _pruned({"operation": operation, "left": self._meta, "right": other._meta}, _MOST_OPERATIONS)
        return Mask(indices, shapes, model_numel, meta)


@dataclass(frozen=True)
class SummaryRow:
    """What a mask selects of one component or one expert of one layer.

    Attributes:
        layer: The number of the layer; None outside the layers.
        component: What the parameters are, such as ``"q_proj"``.
        selected: How many weights are selected.
        numel: How many weights the masked parameters of this cell have.
        share: ``selected`` as a share of all selected weights.
        density: ``selected`` as a share of ``numel``.
        enrichment: ``density`` relative to the density over the whole model; above 1 where the mask concentrates.
        expert: The number of the expert, in the rows of :meth:`Mask.expert_summary`.
    """

    layer: int | None
    component: str
    selected: int
    numel: int
    share: float
    density: float
    enrichment: float
    expert: int | None = None


class Summary(tuple[SummaryRow, ...]):
    """The rows of :meth:`Mask.summary` or :meth:`Mask.expert_summary`; printed as a table.

    Attributes:
        density: The share of the whole model's weights that the mask selects.
    """

    density: float

    def __new__(cls, rows: Iterable[SummaryRow], density: float) -> "Summary":
        """Keeps the rows in their order."""
        summary = super().__new__(cls, rows)
        summary.density = density
        return summary

    def table(self, by: Literal["cell", "component", "layer"] = "cell") -> Table:
        """The rows as a table, as they are or added up.

        Args:
            by: ``"cell"`` keeps every row; ``"component"`` adds up the layers, ``"layer"`` the components.

        Returns:
            A table to print; its ``records()`` are for JSON.

        Raises:
            InvalidArgumentError: If ``by`` is something else.

        Example:
            >>> from safekern.mask import Mask
            >>> shapes = {f"layers.{i}.q_proj.weight": (2, 2) for i in range(2)}
            >>> print(Mask.from_indices(dict.fromkeys(shapes, [0]), shapes).summary().table("component"))
            component  selected  of  density    share  enrichment
            q_proj            2   8   25.00%  100.00%       1.00x
        """
        numbers = (
            Column("selected", "{:,}"),
            Column("numel", "{:,}", "of"),
            Column("density", "{:.2%}"),
            Column("share", "{:.2%}"),
            Column("enrichment", "{:.2f}x"),
        )
        if by == "cell":
            keys = ("layer", "expert") if any(row.expert is not None for row in self) else ("layer", "component")
            fields = (*keys, *(column.key for column in numbers))
            columns = [*map(Column, keys), *numbers]
            return Table(columns, [tuple(getattr(row, field) for field in fields) for row in self])
        if by not in names.ORDERS:
            raise InvalidArgumentError(f"by must be 'cell', 'component' or 'layer', got {by!r}.")
        merged: dict[Any, list[float]] = {}
        for row in self:
            total = merged.setdefault(getattr(row, by), [0, 0, 0.0])
            for position, value in enumerate((row.selected, row.numel, row.share)):
                total[position] += value
        rows = []
        for key in sorted(merged, key=names.ORDERS[by]):
            selected, numel, share = merged[key]
            density = selected / numel
            rows.append((key, selected, numel, density, share, density / self.density))
        return Table([Column(by), *numbers], rows)

    def heat_map(self) -> str:
        """The rows as text: a line per component, a character per layer, darker where more of the cell is selected.

        Example:
            >>> from safekern.mask import Mask
            >>> name = "layers.0.q_proj.weight"
            >>> print(Mask.from_indices({name: [0]}, {name: (2, 4)}).summary().heat_map())
                    layer 0
            q_proj  █        100.0% of the mask, 12.50% of its weights
        """
        # Experts of a layer are one cell.
        cells: dict[tuple[str, int | None], list[int]] = {}
        for row in self:
            cell = cells.setdefault((row.component, row.layer), [0, 0])
            cell[0] += row.selected
            cell[1] += row.numel
        densities = {key: selected / numel for key, (selected, numel) in cells.items()}
        layers = sorted({row.layer for row in self if row.layer is not None})
        densest = max(densities.values(), default=0.0)
        width = max((len(printable(row.component)) for row in self), default=0)
        scale = f"layer {layers[0]}" + (f" to {layers[-1]}" if len(layers) > 1 else "") if layers else ""
        span = max(len(layers), len(scale))
        lines = [f"{'':{width}}  {scale}".rstrip()]
        for component, _, _, density, share, _ in self.table("component").rows:
            shades = "".join(_shade(densities.get((component, layer), 0.0) / densest) for layer in layers)
            label = printable(component)
            lines.append(f"{label:{width}}  {shades:{span}}  {share:.1%} of the mask, {density:.2%} of its weights")
        return "\n".join(lines)

    def __str__(self) -> str:
        return str(self.table())


def _shade(level: float) -> str:
    return " ░▒▓█"[min(4, int(level * 4 + 0.999))]


def check_mask(mask: object) -> None:
    """Refuses what is no mask.

    Raises:
        InvalidArgumentError: as above; the message says how to make one of it.

    Example:
        >>> from safekern.mask import check_mask
        >>> check_mask("mask.safetensors")
        Traceback (most recent call last):
        safekern.errors.InvalidArgumentError: a mask is needed, got str: pass Mask.load(path) for a file
    """
    if not isinstance(mask, Mask):
        is_path = isinstance(mask, (str, bytes, PathLike))
        hint = "Mask.load(path) for a file" if is_path else "what scores.top(ratio) or Mask.from_bool(...) returns"
        raise InvalidArgumentError(f"a mask is needed, got {type(mask).__name__}: pass {hint}")


def _check_names(given: object) -> None:
    if not isinstance(given, Mapping):
        raise InvalidArgumentError(f"A mapping by parameter name is needed, got {type(given).__name__}.")
    for name in given:
        if not isinstance(name, str):
            raise InvalidArgumentError(
                f"{name!r} is not the name of a parameter, which is a string; use those of model.named_parameters()."
            )


def _size(name: str, shape: Any) -> torch.Size:
    if not isinstance(shape, Sequence) or not all(is_whole_number(dim) and dim >= 0 for dim in shape):
        raise InvalidArgumentError(f"{name!r}: {shape!r} is not a shape; use a sequence of sizes.")
    sizes = [int(dim) for dim in shape]
    if math.prod(sizes) >= 2**63 or any(size >= 2**63 for size in sizes):
        raise InvalidArgumentError(f"{name!r}: the shape {_text(sizes)} is larger than a tensor can be.")
    return torch.Size(sizes)


def _pruned(meta: Mapping[str, Any], depth: int) -> dict[str, Any]:
    """A copy of meta in which no more than so many operations lie in one another, as a long chain would have them."""
    operands = [key for key in ("left", "right") if "operation" in meta and isinstance(meta.get(key), dict)]
    pruned = copy.deepcopy({key: value for key, value in meta.items() if key not in operands})
    if depth:
        pruned |= {key: _pruned(meta[key], depth - 1) for key in operands}
    return pruned


def _numel(shape: Iterable[int]) -> int:
    return math.prod(shape)


def _shape_of(value: torch.Size | Tensor) -> torch.Size:
    return value.shape if isinstance(value, Tensor) else torch.Size(value)


class _Packed(Mapping[str, Tensor]):
    """Sorted indices by parameter, kept as the codes of a file and decoded when asked for.

    Raises:
        InvalidArgumentError: If codes of any origin are not those of a mask.
    """

    def __init__(self, codes: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> None:
        self.codes = dict(codes)
        self._shapes = shapes
        self.numel = sum(self[name].numel() for name in codes)

    def __getitem__(self, name: str) -> Tensor:
        return decode(name, self.codes[name], self._shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.codes)

    def __len__(self) -> int:
        return len(self.codes)

    # By numpy, since torch pickles codes of uint16 but does not unpickle them (2.13).
    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "codes": {name: codes.numpy() for name, codes in self.codes.items()}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, codes={name: torch.from_numpy(codes) for name, codes in state["codes"].items()})


def _per_expert(name: str, indices: Tensor, shape: torch.Size) -> list[tuple[int, int, int]]:
    """Expert, selected weights and all weights, for each expert that a parameter holds."""
    number = names.expert(name)
    if number is not None:
        return [(number, indices.numel(), _numel(shape))]
    experts = names.fused_experts(name, shape)
    if experts is None:
        return []
    # A file of a few bytes can name any number, and a row for each would take all memory.
    if experts > _MOST_EXPERTS:
        raise InvalidArgumentError(
            f"{name!r} has {experts:,} experts, where no model has more than {_MOST_EXPERTS:,}: the mask is damaged or "
            "made up, so make it again."
        )
    numel = _numel(shape) // experts
    selected = np.bincount(indices.numpy() // numel, minlength=experts)
    return [(expert, int(count), numel) for expert, count in enumerate(selected)]


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def _text(shape: Iterable[int]) -> str:
    return str(tuple(shape))


def _named(model: object) -> dict[str, nn.Parameter]:
    if not isinstance(model, nn.Module):
        raise InvalidArgumentError(f"A model is a torch.nn.Module, got {type(model).__name__}.")
    return dict(model.named_parameters(remove_duplicate=False))


def _suggestion(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(name), known, n=3)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
