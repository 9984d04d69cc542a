"""Weights as bytes, one chunk at a time, wherever they lie: in a model, a state dict or a checkpoint's files."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from safekern import files, names
from safekern.eligibility import check_kept
from safekern.errors import FileAccessError, FileFormatError, InvalidArgumentError
from safekern.files import Entry, StrPath

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
# Bytes, a multiple of every item size.
_CHUNK = 1 << 24


class Weights(Protocol):
    """One tensor's content in row-major order, and its dtype by its safetensors name."""

    @property
    def code(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    def chunks(self) -> Iterator[NDArray[np.uint8]]:
        """The bytes, in pieces that hold whole elements. Not to be written to."""


class InMemory:
    """A tensor on any device. One that is not contiguous is copied while its chunks are read."""

    def __init__(self, name: str, tensor: Tensor) -> None:
        check_kept(name, tensor)
        if tensor.is_meta:
            raise InvalidArgumentError(
                f"parameter {name} is on the meta device (offloaded or not loaded yet): load the model's weights first"
            )
        is_wrapper: bool = is_traceable_wrapper_subclass(tensor)
        if is_wrapper:
            raise InvalidArgumentError(
                f"parameter {name} is a {type(tensor).__name__}, not a plain tensor: sharded and quantised parameters "
                "are not supported yet"
            )
        self._tensor = tensor.detach()
        if tensor.is_cuda:
            # It is read in threads, which have a stream of their own.
            torch.cuda.current_stream(tensor.device).synchronize()
        self.code = files.CODES.get(tensor.dtype, str(tensor.dtype))
        self.shape = tuple(tensor.shape)

    def chunks(self) -> Iterator[NDArray[np.uint8]]:
        flat = self._tensor.contiguous().view(-1)
        for part in flat.split(_CHUNK // flat.itemsize):
            yield part.cpu().view(torch.uint8).numpy()


class Patched:
    """A tensor as it was when some of its elements had other values, without a copy of it.

    Args:
        name: what the tensor is called in messages.
        tensor: on any device.
        indices: ascending positions in row-major order, on the CPU.
        values: what stood there, of the tensor's dtype.
    """

    def __init__(self, name: str, tensor: Tensor, indices: Tensor, values: Tensor) -> None:
        self._now = InMemory(name, tensor)
        self._itemsize = tensor.itemsize
        self._indices = indices.numpy()
        self._values = values.detach().cpu().view(torch.uint8).view(-1, tensor.itemsize).numpy()
        self.code, self.shape = self._now.code, self._now.shape

    def chunks(self) -> Iterator[NDArray[np.uint8]]:
        start = 0
        for chunk in self._now.chunks():
            elements = chunk.reshape(-1, self._itemsize).copy()
            first, last = np.searchsorted(self._indices, (start, start + len(elements)))
            elements[self._indices[first:last] - start] = self._values[first:last]
            start += len(elements)
            yield elements.reshape(-1)


class OnDisk(NamedTuple):
    """A tensor in a safetensors file."""

    path: Path
    entry: Entry

    @property
    def code(self) -> str:
        return self.entry.code

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.shape

    def chunks(self) -> Iterator[NDArray[np.uint8]]:
        with files.reading(self.path) as file:
            file.seek(self.entry.offset)
            for start in range(0, self.entry.size, _CHUNK):
                chunk = np.empty(min(_CHUNK, self.entry.size - start), dtype=np.uint8)
                if file.readinto(chunk.data) != chunk.size:
                    raise FileFormatError(f"{self.path}: became shorter while it was read; copy it again.")
                yield chunk


Source = nn.Module | Mapping[str, Tensor | Patched] | StrPath


def open_weights(source: Source) -> Mapping[str, Weights]:
    """The weights of a model (a tied parameter once), a state dict, or a checkpoint on disk.

    Raises:
        InvalidArgumentError: not one of these, or a parameter without plain memory.
        FileAccessError: a file is missing or cannot be read.
        FileFormatError: the files are damaged, contradict each other, or are not safetensors files.
    """
    if isinstance(source, nn.Module):
        return {name: InMemory(name, param) for name, param in source.named_parameters()}
    if isinstance(source, Mapping):
        return {
            name: value if isinstance(value, Patched) else InMemory(name, value)
            for name, value in source.items()
            if isinstance(value, Tensor | Patched)
        }
    if isinstance(source, str | os.PathLike):
        return _open_checkpoint(Path(source))
    raise InvalidArgumentError(f"a model, a state dict or the path of a checkpoint is needed, got {type(source)}")


def fingerprint(source: Source) -> str:
    """SHA-256 (hex) of all weights with their names, dtypes and shapes, whatever device or wrapper they are in.

    Takes one pass at the speed of SHA-256, about 1 GB/s for each of torch's threads.

    Raises:
        SafekernError: as `open_weights`.
    """
    weights = open_weights(source)

    def digest(name: str) -> str:
        weight = weights[name]
        hashed = hashlib.sha256(json.dumps([names.canonical(name), weight.code, list(weight.shape)]).encode())
        for chunk in weight.chunks():
            hashed.update(chunk.data)
        return hashed.hexdigest()

    # Hashing runs outside of Python's lock.
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        digests = sorted(pool.map(digest, weights))
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _open_checkpoint(path: Path) -> dict[str, OnDisk]:
    """Every tensor of a checkpoint: a folder as ``save_pretrained`` writes it, or one safetensors file."""
    weights: dict[str, OnDisk] = {}
    for shard in _shards(path) if path.is_dir() else [path]:
        with files.reading(shard) as file:
            entries, _ = files.read_header(file, shard)
        for name, entry in entries.items():
            if name in weights:
                raise FileFormatError(
                    f"{path}: {name!r} is in both {weights[name].path.name} and {shard.name}; keep one checkpoint."
                )
            weights[name] = OnDisk(shard, entry)
    return weights


def _shards(folder: Path) -> list[Path]:
    single, index = folder / _SINGLE, folder / _INDEX
    if single.exists() and index.exists():
        raise FileFormatError(f"{folder}: holds both {_SINGLE} and {_INDEX}; remove the one that is not meant.")
    if single.exists():
        return [single]
    if not index.exists():
        raise FileAccessError(
            f"{folder}: holds neither {_SINGLE} nor {_INDEX}; save the model with save_pretrained, which writes them."
        )
    with files.reading(index) as file:
        text = file.read()
    try:
        shards = dict.fromkeys(json.loads(text)["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        shards = {None: None}
    if not all(isinstance(name, str) and name == Path(name).name for name in shards):
        raise FileFormatError(f"{index}: does not say which file holds which tensor; copy or create it again.")
    return [folder / name for name in shards]


def check_rewritable(weights: Sequence[OnDisk]) -> None:
    """Raises what :func:`rewrite` would raise before it starts.

    Raises:
        FileAccessError: a file cannot be written, or is a link into a store whose files must not change.
    """
    for path in dict.fromkeys(stored.path for stored in weights):
        if path.is_symlink():
            raise FileAccessError(
                f"{path}: is a symbolic link, as in the cache of the Hugging Face hub, whose files must not change; "
                "copy the folder with its files (cp -rL) and give the copy."
            )
        files.check_writable(path)


def rewrite(edits: Sequence[tuple[OnDisk, NDArray[Any], NDArray[Any]]]) -> None:
    """Replaces single elements of tensors on disk, and keeps every other byte of their files.

    Every file is first written anew beside the old one. Only when all are complete and on disk do they take the old
    ones' places, one after the other. So an exception before that changes nothing; a process that is killed leaves
    ``.safekern-*.tmp`` files behind, which the next write into the folder removes, and, if it was renaming, some files
    new and some old.

    Args:
        edits: per tensor the flat indices, and the values as unsigned integers of its item size.

    Raises:
        FileAccessError: a file cannot be written.
    """
    paths = dict.fromkeys(stored.path for stored, _, _ in edits)
    with contextlib.ExitStack() as stack:
        written = {path: stack.enter_context(files.replacing(path)) for path in paths}
        for path, file in written.items():
            for chunk in _content(path):
                file.write(chunk)
            file.flush()
            for stored, indices, values in edits:
                if stored.path == path:
                    count = stored.entry.size // values.itemsize
                    content = np.memmap(file.name, values.dtype, "r+", stored.entry.offset, (count,))
                    content[indices] = values
                    content.flush()
                    # Windows renames no file that is mapped.
                    del content
            os.fsync(file.fileno())


def _content(path: Path) -> Iterator[bytes]:
    # A generator, so that a full disk where the chunks go is not taken for a file that cannot be read.
    with files.reading(path) as file:
        while chunk := file.read(_CHUNK):
            yield chunk
