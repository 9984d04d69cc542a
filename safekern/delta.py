"""Deltas: the masked weights' values alone, to turn a base model into a tuned one, bit for bit."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from safekern import checkpoint, files, names
from safekern.checkpoint import OnDisk, Source, Weights
from safekern.eligibility import check_plain
from safekern.errors import (
    DeltaAppliedError,
    DeltaDtypeError,
    DeltaMismatchError,
    DeltaNamesError,
    FileFormatError,
    InvalidArgumentError,
    MaskMismatchError,
)
from safekern.files import StrPath
from safekern.layout import memory_indices, overlaps_itself, write_selected
from safekern.mask import Mask, check_mask

_KIND, _VERSION = "delta", 1
_INDICES, _VALUES = "indices:", "values:"
_WORDS: dict[int, type[np.unsignedinteger[Any]]] = {2: np.uint16, 4: np.uint32, 8: np.uint64}


def save_delta(model: nn.Module, mask: Mask, path: StrPath, base: Source | None = None) -> None:
    """Writes what :func:`apply_delta` needs to turn the base model into this one: the masked weights' values.

    With bf16 weights and a mask of 1%, a file takes 3.1 bytes per masked weight. It also holds, for every parameter, a
    SHA-256 of its weights outside the mask, by which ``apply_delta`` recognises the base model; and with ``base`` one
    of the values that are to be replaced, so that it recognises a base in which these differ.

    Costs one pass over the model's weights, and one over those of ``base``, at the speed of SHA-256 (about 1 GB/s for
    each of torch's threads), and memory for the masked weights and 32 MB for each thread. A parameter that is not
    contiguous is copied meanwhile.

    Args:
        model: the tuned model, with parameters on any device. Nothing outside the mask may have changed since the base.
        mask: the weights that changed.
        path: the file to write or replace, by habit ``*.safetensors``.
        base: the model before tuning, its state dict, or its checkpoint on disk. With it, a weight that changed outside
            the mask is found here, and not where the delta is applied.

    Raises:
        DeltaMismatchError: the model differs from ``base`` outside the mask, or in names, shapes or dtypes.
        MaskMismatchError: the mask does not fit the model.
        InvalidArgumentError: no masked weight differs from ``base``; or a parameter is not a plain tensor on a real
            device.
        FileAccessError: the path cannot be written, or the checkpoint not be read.
        FileFormatError: the checkpoint is damaged or not in safetensors files.

    Example:
        >>> safekern.save_delta(model, mask, "delta.safetensors", base="base_model")      # doctest: +SKIP
    """
    check_mask(mask)
    files.check_writable(path)
    selected = mask.parameters(model)
    for name, (param, _) in selected.items():
        check_plain(name, param)
    indices = {name: positions for name, (_, positions) in selected.items()}
    aliases = _aliases(model)
    weights = {name: checkpoint.InMemory(name, model.get_parameter(name)) for name in aliases}
    scans = _scan_all(weights, indices)
    parameters = {
        name: _Parameter(tuple(aliases[name]), weights[name].code, weights[name].shape, scan.rest, None)
        for name, scan in scans.items()
    }
    values = {name: scans[name].values for name in indices}
    if base is not None:
        parameters = _with_base(parameters, values, indices, base)

    shapes = {name: param.shape for name, (param, _) in selected.items()}
    codes, description = Mask(indices, shapes, mask.model_numel, mask.meta).pack()
    tensors = {_INDICES + name: code for name, code in codes.items()}
    tensors |= {_VALUES + name: _as_tensor(value, selected[name][0].dtype) for name, value in values.items()}
    described = {name: parameter._asdict() for name, parameter in parameters.items()}
    files.write(path, _KIND, _VERSION, tensors, {"mask": description, "parameters": described})


def apply_delta(model: nn.Module | StrPath, path: StrPath) -> None:
    """Writes the values of a delta into the base model, in memory or on disk: afterwards it is the tuned one, exactly.

    First every parameter that the delta knows is compared with the fingerprints in the file, so that a wrong base, or
    one that was changed, is an error before anything is written. What else the model holds (buffers, adapters) is not
    looked at. In a checkpoint, names may lack a prefix such as ``model.`` or have one more, and a tied weight may be
    stored under any of its names. Where names on disk differ otherwise (some mixtures of experts store each expert by
    itself), load the model, apply the delta to it and save it.

    Costs one pass over the weights at the speed of SHA-256 (about 1 GB/s for each of torch's threads), and memory for
    the masked weights and 32 MB for each thread. On disk, each file with masked weights is written anew, for which
    there must be room; once all are complete they take the places of the old ones. If the process is killed between two
    of these renames, some files are new and some old: apply the delta again, which finishes the job.

    Args:
        model: the base model, with parameters on any device; or a folder with ``model.safetensors``, or with
            ``model.safetensors.index.json`` and what it lists; or a single safetensors file.
        path: a file that :func:`save_delta` wrote.

    Raises:
        DeltaMismatchError: the weights are not those of the base model, or its names, shapes or dtypes differ. Nothing
            was changed.
        DeltaNamesError: a parameter is not there under a name like its own. It is a DeltaMismatchError.
        DeltaDtypeError: a parameter is there in another dtype. It is a DeltaMismatchError.
        DeltaAppliedError: the weights are those that the delta makes. Nothing was changed. It is a DeltaMismatchError.
        InvalidArgumentError: a parameter is not a plain tensor on a real device, or overlaps itself in memory. Nothing
            was changed.
        FileAccessError: a file is missing, or cannot be read or written.
        FileFormatError: the delta or the checkpoint is damaged, of another kind, or newer than this safekern.

    Example:
        >>> model = AutoModelForCausalLM.from_pretrained("base_model")                    # doctest: +SKIP
        >>> safekern.apply_delta(model, "delta.safetensors")                              # doctest: +SKIP
    """
    delta = _load(path)
    if not isinstance(model, nn.Module | str | os.PathLike):
        raise InvalidArgumentError(f"a model or the path of a checkpoint is needed, got {type(model).__name__}")
    weights = checkpoint.open_weights(model)
    located = _locate(delta.parameters, weights)
    masked = [(name, found) for name in delta.mask for found in located[name]]
    if isinstance(model, nn.Module):
        params = {found: model.get_parameter(found) for _, found in masked}
        for found, param in params.items():
            _check_writable(found, param)
        pending = _pending(delta, weights, located)
        _write(delta, [(name, params[found]) for name, found in pending])
    else:
        stored = {found: weights[found] for _, found in masked}
        on_disk = {found: weight for found, weight in stored.items() if isinstance(weight, OnDisk)}
        checkpoint.check_rewritable(list(on_disk.values()))
        pending = _pending(delta, weights, located)
        checkpoint.rewrite(
            [(on_disk[found], delta.mask.compact(name).numpy(), delta.values[name]) for name, found in pending]
        )


def check_delta(source: Source, path: StrPath) -> None:
    """Raises what :func:`apply_delta` would raise for weights that do not fit, and changes nothing.

    Args:
        source: the base model, in memory or on disk; here its files may be links or read-only.
        path: a file that :func:`save_delta` wrote.

    Raises:
        SafekernError: as :func:`apply_delta`, but for what stands in the way of writing.

    Example:
        >>> from safekern.delta import check_delta
        >>> check_delta("base_model", "delta.safetensors")                                # doctest: +SKIP
    """
    delta = _load(path)
    weights = checkpoint.open_weights(source)
    _pending(delta, weights, _locate(delta.parameters, weights))


class _Parameter(NamedTuple):
    """One parameter of the tuned model: its other names, if it is tied, and what its base is recognised by."""

    aliases: tuple[str, ...]
    code: str
    shape: tuple[int, ...]
    # Of the weights outside the mask, and of the base's values inside it.
    rest: str
    replaced: str | None


@dataclass(frozen=True)
class _Delta:
    mask: Mask
    values: dict[str, NDArray[Any]]
    parameters: dict[str, _Parameter]


class _Scan(NamedTuple):
    rest: str
    values: NDArray[Any]


def _aliases(model: nn.Module) -> dict[str, list[str]]:
    """For the first name of every parameter, its others."""
    first: dict[Tensor, str] = {}
    aliases: dict[str, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        if param in first:
            aliases[first[param]].append(name)
        else:
            first[param], aliases[name] = name, []
    return aliases


def _scan_all(weights: Mapping[str, Weights], indices: Mapping[str, Tensor]) -> dict[str, _Scan]:
    nothing = torch.empty(0, dtype=torch.int32, device="cpu")

    def scan(name: str) -> _Scan:
        return _scan(weights[name], indices.get(name, nothing).numpy())

    # Hashing and reading files run outside of Python's lock.
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return dict(zip(weights, pool.map(scan, weights), strict=True))


def _scan(weights: Weights, indices: NDArray[Any]) -> _Scan:
    """The fingerprint of the weights outside the mask, for which those inside count as zeros, and those inside."""
    digest = hashlib.sha256(json.dumps([weights.code, list(weights.shape)]).encode())
    word = _WORDS[files.DTYPES[weights.code].itemsize] if indices.size else np.uint8
    values = np.empty(indices.size, dtype=word)
    start = done = 0
    for chunk in weights.chunks():
        words = chunk.view(word)
        stop = start + words.size
        upto = int(np.searchsorted(indices, stop)) if done < indices.size else done
        if upto > done:
            inside = indices[done:upto] - start
            values[done:upto] = words[inside]
            words = words.copy()
            words[inside] = 0
        digest.update(words.data)
        start, done = stop, upto
    return _Scan(digest.hexdigest(), values)


def _fingerprint(values: NDArray[Any]) -> str:
    return hashlib.sha256(values.data).hexdigest()


def _with_base(
    parameters: dict[str, _Parameter],
    values: Mapping[str, NDArray[Any]],
    indices: Mapping[str, Tensor],
    base: Source,
) -> dict[str, _Parameter]:
    """The parameters with the fingerprints of what the delta replaces, after making sure that it would fit the base."""
    weights = checkpoint.open_weights(base)
    located = _locate(parameters, weights)
    scans = _compare(parameters, weights, located, indices)
    changed, several = False, []
    for name in indices:
        before, *others = (scans[found].values for found in located[name])
        changed = changed or not np.array_equal(before, values[name])
        parameters[name] = parameters[name]._replace(replaced=_fingerprint(before))
        if not all(np.array_equal(before, other) for other in others):
            several.append(name)
    if several:
        raise DeltaMismatchError(f"base holds different values under the tied names of {names.listed(several)}")
    if not changed:
        raise InvalidArgumentError(
            "every masked weight is what it is in base, so there is nothing to save: give the model as it was before "
            "tuning (a copy of it; tuning works in place)"
        )
    return parameters


def _locate(parameters: Mapping[str, _Parameter], weights: Collection[str]) -> dict[str, list[str]]:
    """Where each parameter lies among the given weights: under one of its names at least.

    Names that are found nowhere may all lack one prefix, or all have one too many.
    """
    own_names = Counter(map(names.canonical, weights))
    given = {names.canonical(name): name for name in weights if own_names[names.canonical(name)] == 1}
    every = [alias for name, parameter in parameters.items() for alias in (name, *parameter.aliases)]
    found = _resolve(every, weights)
    located = {
        name: [found[alias] for alias in (name, *parameter.aliases) if alias in found]
        for name, parameter in parameters.items()
    }
    missing = {name: names.canonical(name) for name, matches in located.items() if not matches}
    if not missing:
        return located

    first = next(iter(missing.values()))
    more = {name.removesuffix(first) for name in given if name.endswith(f".{first}")}
    fewer = {first.removesuffix(name) for name in given if first.endswith(f".{name}")}
    renamed = [{name: prefix + own for name, own in missing.items()} for prefix in more]
    renamed += [{name: own.removeprefix(prefix) for name, own in missing.items()} for prefix in fewer]
    taken = {match for matches in located.values() for match in matches}
    fitting = [
        trial
        for trial in renamed
        if all(own in given and given[own] not in taken for own in trial.values())
        and len(set(trial.values())) == len(trial)
    ]
    if len(fitting) != 1:
        raise DeltaNamesError(
            f"{len(missing):,} of {len(parameters):,} parameters are missing ({names.listed(list(missing))}), "
            + ("or could be several: " if fitting else "also under any one other prefix: ")
            + "use the model that the delta was made for. If it is a checkpoint whose experts are stored one by one, "
            "load it with from_pretrained and apply the delta in memory, which safekern apply does with --out"
        )
    found = _resolve(fitting[0].values(), weights)
    return located | {name: [found[own]] for name, own in fitting[0].items()}


def _resolve(wanted: Iterable[str], available: Iterable[str]) -> dict[str, str]:
    try:
        return names.resolve(wanted, available)
    except MaskMismatchError as error:
        raise DeltaMismatchError(str(error)) from error


def _compare(
    parameters: Mapping[str, _Parameter],
    weights: Mapping[str, Weights],
    located: Mapping[str, Sequence[str]],
    indices: Mapping[str, Tensor],
) -> dict[str, _Scan]:
    """Reads the located weights and makes sure that outside the mask they are what the parameters say."""
    pairs = [(name, found) for name, matches in located.items() for found in matches]
    other = [
        f"{found} ({weights[found].code} {weights[found].shape} instead of {parameters[name].code} "
        f"{parameters[name].shape})"
        for name, found in pairs
        if (weights[found].code, weights[found].shape) != (parameters[name].code, parameters[name].shape)
    ]
    if other:
        shapes_fit = all(weights[found].shape == parameters[name].shape for name, found in pairs)
        raise (DeltaDtypeError if shapes_fit else DeltaMismatchError)(
            f"{len(other):,} of {len(pairs):,} parameters have another dtype or shape: {names.listed(other)}. A delta "
            "is exact, so model and base have to be in the dtypes that it was made in: load them with dtype= (--dtype "
            "of the command, with --out) where a checkpoint's files are in others"
        )
    scans = _scan_all(
        {found: weights[found] for _, found in pairs},
        {found: indices[name] for name, found in pairs if name in indices},
    )
    changed = [found for name, found in pairs if scans[found].rest != parameters[name].rest]
    if changed:
        raise DeltaMismatchError(
            f"weights outside the mask differ in {len(changed):,} of {len(pairs):,} parameters: "
            f"{names.listed(changed)}. Model and base must be the same there: use the right base, and tune nothing but "
            "masked weights"
        )
    return scans


def _pending(
    delta: _Delta, weights: Mapping[str, Weights], located: Mapping[str, Sequence[str]]
) -> list[tuple[str, str]]:
    """The masked parameters that do not have the delta's values yet, as named in the delta and where they lie."""
    indices = {name: delta.mask.compact(name) for name in delta.mask}
    scans = _compare(delta.parameters, weights, located, indices)
    pending, unknown = [], []
    for name in delta.mask:
        for found in located[name]:
            values, replaced = scans[found].values, delta.parameters[name].replaced
            if np.array_equal(values, delta.values[name]):
                continue
            pending.append((name, found))
            if replaced is not None and _fingerprint(values) != replaced:
                unknown.append(found)
    if unknown:
        raise DeltaMismatchError(
            f"the masked weights are neither those of the base nor those of the delta in {len(unknown):,} parameters: "
            f"{names.listed(unknown)}. Use the base that the delta was made with; another delta or tuning may have "
            "been here"
        )
    if not pending:
        raise DeltaAppliedError("the delta is applied already: every masked weight has the value that it would get")
    return pending


def _check_writable(name: str, param: Tensor) -> None:
    check_plain(name, param)
    if overlaps_itself(param):
        raise InvalidArgumentError(f"parameter {name} has overlapping memory: make it contiguous first")


def _write(delta: _Delta, pending: Sequence[tuple[str, Tensor]]) -> None:
    write_selected(
        [param for _, param in pending],
        [memory_indices(param, delta.mask.compact(name)) for name, param in pending],
        [_as_tensor(delta.values[name], param.dtype).to(param.device) for name, param in pending],
    )


def _as_tensor(values: NDArray[Any], dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(values.view(np.uint8)).view(dtype)


def _load(path: StrPath) -> _Delta:
    tensors, meta = files.read(path, _KIND, _VERSION)
    try:
        codes = {name.removeprefix(_INDICES): code for name, code in tensors.items() if name.startswith(_INDICES)}
        mask = Mask.unpack(codes, meta["mask"])
        values = {name: tensors[_VALUES + name] for name in mask}
        parameters = {name: _parameter(**fields) for name, fields in meta["parameters"].items()}
        if len(tensors) != 2 * len(values) or not values:
            raise InvalidArgumentError("its indices and values do not belong together")
        for name, value in values.items():
            fits = value.shape == mask.compact(name).shape and parameters[name].code == files.CODES[value.dtype]
            if not (fits and parameters[name].shape == mask.shapes[name] and value.itemsize in _WORDS):
                raise InvalidArgumentError(f"the values of {name!r} do not fit its indices")
    except (InvalidArgumentError, KeyError, TypeError, AttributeError) as error:
        raise FileFormatError(f"{os.fspath(path)}: not a valid delta ({error}). Copy or create it again.") from error
    words = {name: value.view(torch.uint8).numpy().view(_WORDS[value.itemsize]) for name, value in values.items()}
    return _Delta(mask, words, parameters)


def _parameter(aliases: Any, code: Any, shape: Any, rest: Any, replaced: Any) -> _Parameter:
    if not all(isinstance(text, str) for text in (*aliases, code, rest, "" if replaced is None else replaced)):
        raise InvalidArgumentError("a parameter's description cannot be understood")
    return _Parameter(tuple(aliases), code, tuple(shape), rest, replaced)
