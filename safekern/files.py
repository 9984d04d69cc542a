"""The container of every file safekern writes: a plain safetensors file with a kind, a version and a checksum.

The safetensors layout is read and written here rather than through the safetensors package, because scores can be as
large as the model: tensors go to the file without being copied, come back into memory of their own instead of a map
of a file that may change, and the same content always gives the same bytes.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Never, TypeGuard

import torch
from torch import Tensor

from safekern.errors import FileAccessError, FileFormatError, InvalidArgumentError, SafekernError

# On Windows, temporary files that a killed process left have to be removed by hand.
if sys.platform != "win32":
    import fcntl

StrPath = str | os.PathLike[str]

CODES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.complex64: "C64",
}
DTYPES = {code: dtype for dtype, code in CODES.items()}
"""What a safetensors header calls each dtype, and the inverse."""

# The safetensors package refuses longer headers; the bound also keeps the memory for parsing JSON in check.
_MAX_HEADER = 100_000_000

_TEMPORARY = re.compile(r"\.safekern-[0-9a-f]{16}\.tmp")


class Entry(NamedTuple):
    """Where a tensor lies in a safetensors file."""

    code: str
    shape: tuple[int, ...]
    offset: int
    size: int


@contextlib.contextmanager
def reading(path: StrPath) -> Iterator[BufferedReader]:
    """Opens a file to be read.

    Args:
        path: A regular file.

    Yields:
        The file, open for reading bytes.

    Raises:
        FileAccessError: If the file is missing or cannot be read, also inside the block.
    """
    mode = _mode(path)
    if mode is None:
        raise FileAccessError(f"{os.fspath(path)}: no such file; check the path.")
    # Before it is opened: opening a pipe would wait for a writer that may never come.
    if not stat.S_ISREG(mode):
        raise FileAccessError(f"{os.fspath(path)}: not a regular file; give the path of a file.")
    try:
        with Path(path).open("rb") as file:
            yield file
    except SafekernError:
        raise
    except OSError as error:
        raise _access_error(path, "cannot be read", error) from error


def read_header(file: BinaryIO, path: StrPath) -> tuple[dict[str, Entry], dict[str, Any]]:
    """Reads the header of any safetensors file and checks it against the size of the file.

    Args:
        file: The file, at its beginning. Afterwards at the first byte of its data.
        path: Its path, for messages.

    Returns:
        The tensors by name, in the order of their data, and the metadata.

    Raises:
        FileFormatError: If it is damaged, truncated or not a safetensors file. Dtypes that torch lacks are accepted.
    """
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, _MAX_HEADER):
        _damaged(path, "it is truncated or not a safetensors file")
    header = _parse(path, file.read(length), "header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        _damaged(path, "its metadata cannot be understood")
    return _layout(path, header, 8 + length, size), metadata


@contextlib.contextmanager
def replacing(path: StrPath) -> Iterator[BinaryIO]:
    """Opens a temporary file that takes the place of ``path`` when the block ends without an exception.

    The bytes are on disk before the name changes, so that ``path`` holds the old content or all of the new, never a
    part. A symbolic link is followed, an existing file keeps its permissions, a new one gets those of the umask.
    Temporary files that killed processes left in the folder are removed.

    Args:
        path: Where the content goes. The folder has to exist.

    Yields:
        A binary file open for writing.

    Raises:
        FileAccessError: If the path cannot be written, or writing failed. Nothing is left behind.

    Example:
        >>> import pathlib, tempfile
        >>> from safekern.files import replacing
        >>> path = pathlib.Path(tempfile.mkdtemp(), "note.txt")
        >>> with replacing(path) as file:
        ...     _ = file.write(b"all or nothing")
        >>> path.read_bytes()
        b'all or nothing'
    """
    target = _target(path)
    _remove_leftovers(target.parent)
    temporary = _temporary(target)
    try:
        try:
            with contextlib.ExitStack() as renamed:
                with temporary.open("xb") as file:
                    _lock(file, renamed)
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
                if target.exists():
                    shutil.copymode(target, temporary)
                temporary.replace(target)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
    except SafekernError:
        raise
    except OSError as error:
        raise _access_error(path, "cannot be written", error) from error


def check_writable(path: StrPath, kind: str | None = None) -> None:
    """Raises what writing ``path`` would raise, to be called before long work starts. Leaves nothing behind.

    Args:
        path: The file that is going to be written.
        kind: What an existing file has to hold, unless it is empty, so as not to replace one of somebody else's; by
            default that does not matter.

    Raises:
        FileAccessError: If the folder is missing or not writable, the path is a directory or a read-only file, or the
            existing file is of another kind.

    Example:
        >>> import pathlib, tempfile
        >>> from safekern.files import check_writable
        >>> check_writable(pathlib.Path(tempfile.mkdtemp(), "mask.safetensors"))
    """
    target = _target(path)
    if kind is not None and target.exists() and target.stat().st_size and _kind(target) != kind:
        raise FileAccessError(
            f"{os.fspath(path)}: exists already and is no file of kind {kind!r} that safekern wrote, so it is not "
            "replaced; give another path, or move it away."
        )
    probe = _temporary(target)
    try:
        try:
            probe.touch(exist_ok=False)
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise _access_error(path, "cannot be written", error) from error


def write(path: StrPath, kind: str, version: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Writes tensors and their description, atomically.

    Args:
        path: The file to write or replace.
        kind: What the file holds, such as ``"mask"``; :func:`read` refuses another kind.
        version: Version of the layout of this kind, at least 1.
        tensors: Tensors of any shape, on any device, of an integer, boolean or floating point dtype.
        meta: Anything JSON can hold.

    Raises:
        FileAccessError: If the path cannot be written.
        InvalidArgumentError: If a dtype, a name or ``meta`` cannot be stored.

    Example:
        >>> import pathlib, tempfile, torch
        >>> from safekern import files
        >>> path = pathlib.Path(tempfile.mkdtemp(), "example.safetensors")
        >>> files.write(path, "example", 1, {"x": torch.arange(3)}, {"unit": "m"})
        >>> files.read(path, "example", 1)
        ({'x': tensor([0, 1, 2])}, {'unit': 'm'})
    """
    meta_text = dump_json(meta)
    for name, tensor in tensors.items():
        if tensor.dtype not in CODES:
            raise InvalidArgumentError(f"{name!r} has dtype {tensor.dtype}, which a safetensors file cannot hold.")
    if "__metadata__" in tensors:
        raise InvalidArgumentError("'__metadata__' is reserved in safetensors files; rename that tensor.")

    header: dict[str, Any] = {
        "__metadata__": {
            "safekern.kind": kind,
            "safekern.version": str(version),
            "safekern.meta": meta_text,
            "safekern.checksum": _checksum(kind, str(version), meta_text, tensors),
        }
    }
    # Wide dtypes first, so that every tensor starts at a multiple of its own item size.
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    offset = 0
    for name in order:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.itemsize
        header[name] = {
            "dtype": CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _MAX_HEADER:
        raise InvalidArgumentError(f"{path}: the names and meta take {len(text):,} bytes; {_MAX_HEADER:,} is the most.")

    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in order:
            file.write(_bytes(tensors[name]))


def read(path: StrPath, kind: str, max_version: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads what :func:`write` wrote and checks all of it.

    Args:
        path: The file.
        kind: The kind it has to be of.
        max_version: The newest version the caller understands.

    Returns:
        The tensors by name, on the CPU, and the description.

    Raises:
        FileAccessError: If the file is missing or cannot be read.
        FileFormatError: If it is damaged, truncated, of another kind, newer, or not a safekern file at all.

    Example:
        >>> import pathlib, tempfile, torch
        >>> from safekern import files
        >>> path = pathlib.Path(tempfile.mkdtemp(), "example.safetensors")
        >>> files.write(path, "example", 1, {"x": torch.zeros(2, 2)}, {})
        >>> files.read(path, "mask", 1)
        Traceback (most recent call last):
        safekern.errors.FileFormatError: ...example.safetensors: holds 'example', not 'mask'; give another file.
    """
    with reading(path) as file:
        return _read(file, path, kind, max_version)


def read_description(path: StrPath, kind: str, max_version: int) -> dict[str, Any]:
    """Reads the description in a file that :func:`write` wrote, without its tensors, and so without its checksum.

    Args:
        path: As for :func:`read`.
        kind: As for :func:`read`.
        max_version: As for :func:`read`.

    Raises:
        FileAccessError: As :func:`read`.
        FileFormatError: As :func:`read`, where the head of the file tells.

    Example:
        >>> import pathlib, tempfile, torch
        >>> from safekern import files
        >>> path = pathlib.Path(tempfile.mkdtemp(), "example.safetensors")
        >>> files.write(path, "example", 1, {"x": torch.zeros(2, 2)}, {"unit": "m"})
        >>> files.read_description(path, "example", 1)
        {'unit': 'm'}
    """
    with reading(path) as file:
        return _parse(path, _head(file, path, kind, max_version)[2], "description")


def dump_json(meta: Mapping[str, Any]) -> str:
    """Writes a description as strict JSON.

    Args:
        meta: A mapping of strings, numbers, booleans, None, lists and mappings of them.

    Raises:
        InvalidArgumentError: If it holds anything else, such as a tensor or a NaN.

    Example:
        >>> from safekern.files import dump_json
        >>> dump_json({"ratio": 0.01})
        '{"ratio": 0.01}'
    """
    try:
        return json.dumps(dict(meta), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidArgumentError(
            f"meta cannot be stored as JSON ({error}); use strings, finite numbers, booleans, lists and dicts."
        ) from error


def _read(file: BufferedReader, path: StrPath, kind: str, max_version: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    entries, version, meta_text, checksum = _head(file, path, kind, max_version)
    tensors = {name: _load(file, path, name, entry) for name, entry in entries.items()}
    if _checksum(kind, version, meta_text, tensors) != checksum:
        _damaged(path, "its checksum does not match its content")
    return tensors, _parse(path, meta_text, "description")


def _head(file: BufferedReader, path: StrPath, kind: str, max_version: int) -> tuple[dict[str, Entry], str, str, str]:
    """What stands before the tensors: where they lie, the version, the description and the checksum of all."""
    entries, stored = read_header(file, path)
    keys = [f"safekern.{key}" for key in ("kind", "version", "meta", "checksum")]
    if not all(isinstance(stored.get(key), str) for key in keys):
        raise FileFormatError(f"{os.fspath(path)}: a safetensors file, but not one that safekern wrote; give another.")
    found, version, meta_text, checksum = (stored[key] for key in keys)
    if found != kind:
        raise FileFormatError(f"{os.fspath(path)}: holds {found!r}, not {kind!r}; give another file.")
    if not (version.isascii() and version.isdecimal() and len(version) < 10 and int(version) > 0):
        _damaged(path, "its version is not a number")
    if int(version) > max_version:
        raise FileFormatError(
            f"{os.fspath(path)}: version {version} of {kind!r} is newer than this safekern understands "
            f"({max_version}); upgrade safekern to read it."
        )
    return entries, version, meta_text, checksum


def _kind(path: StrPath) -> object:
    """What a file holds, None where safekern did not write it."""
    try:
        with reading(path) as file:
            return read_header(file, path)[1].get("safekern.kind")
    except FileFormatError:
        return None


def _layout(path: StrPath, header: Mapping[str, Any], start: int, end: int) -> dict[str, Entry]:
    """Checks the entries of a header against each other and the data, which lies between two offsets of the file."""
    entries: dict[str, Entry] = {}
    for name, fields in header.items():
        if not isinstance(fields, dict):
            fields = {}
        code, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
        if not isinstance(code, str) or not _is_counts(shape) or not _is_counts(offsets) or len(offsets) != 2:
            _damaged(path, f"the entry of {name!r} cannot be understood")
        entries[name] = Entry(code, tuple(shape), start + offsets[0], offsets[1] - offsets[0])
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].offset, item[1].size)))
    position = start
    for name, entry in entries.items():
        dtype = DTYPES.get(entry.code)
        expected = math.prod(entry.shape) * dtype.itemsize if dtype else max(0, entry.size)
        if entry.offset != position or entry.size != expected:
            _damaged(path, f"the position of {name!r} does not fit its shape")
        position += entry.size
    if position != end:
        _damaged(path, f"it holds {end - start:,} bytes of data where its header says {position - start:,}")
    return entries


def _load(file: BufferedReader, path: StrPath, name: str, entry: Entry) -> Tensor:
    if entry.code not in DTYPES:
        _damaged(path, f"{name!r} has the unknown dtype {entry.code!r}")
    try:
        raw = torch.empty(entry.size, dtype=torch.uint8, device="cpu")
    except RuntimeError as error:
        raise FileAccessError(
            f"{os.fspath(path)}: no memory for a tensor of {entry.size:,} bytes; free some."
        ) from error
    if file.readinto(raw.numpy().data) != entry.size:
        _damaged(path, "it became shorter while it was read")
    try:
        return raw.view(DTYPES[entry.code]).reshape(entry.shape)
    except (RuntimeError, TypeError, OverflowError):
        _damaged(path, f"it describes a tensor of the impossible shape {entry.shape}")


def _parse(path: StrPath, text: str | bytes, what: str) -> dict[str, Any]:
    try:
        parsed = json.loads(text, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        _damaged(path, f"its {what} is not JSON")
    return parsed


def _finite(text: str) -> float:
    """Of a number in JSON, which has none that are not finite, though Python reads and writes them."""
    if not math.isfinite(value := float(text)):
        raise ValueError(text)
    return value


def _is_counts(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _checksum(kind: str, version: str, meta_text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps([kind, version, meta_text]).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, CODES[tensor.dtype], list(tensor.shape)]).encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    # One without elements may have a stride, if numpy made it, that no view as bytes accepts.
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def check_path(path: object) -> None:
    """Refuses what is neither a str nor a pathlib.Path.

    Raises:
        InvalidArgumentError: it is neither.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise InvalidArgumentError(f"A path is needed, got {type(path).__name__}; give a str or a pathlib.Path.")


def _mode(path: StrPath) -> int | None:
    """The type and permissions of what a path leads to, None where there is nothing."""
    check_path(path)
    try:
        return Path(path).stat().st_mode
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise _access_error(path, "cannot be used", error) from error


def _target(path: StrPath) -> Path:
    """The file that a write to ``path`` ends at, links followed."""
    mode = _mode(path)
    target = Path(os.path.realpath(path))
    if mode is None:
        if not target.parent.is_dir():
            raise FileAccessError(f"{os.fspath(path)}: the folder {target.parent} does not exist; create it first.")
    elif stat.S_ISDIR(mode):
        raise FileAccessError(f"{os.fspath(path)}: is a directory; add the name of a file.")
    elif not stat.S_ISREG(mode):
        raise FileAccessError(f"{os.fspath(path)}: not a regular file, so it is not replaced; give another path.")
    elif not os.access(target, os.W_OK):
        raise FileAccessError(f"{os.fspath(path)}: the file is read-only; make it writable or give another path.")
    return target


def _temporary(target: Path) -> Path:
    return target.with_name(f".safekern-{secrets.token_hex(8)}.tmp")


def _lock(file: BinaryIO, until: contextlib.ExitStack) -> None:
    """Locks a temporary file until then, or until the process ends: one without a lock was left by a killed process."""
    if sys.platform != "win32":
        handle = os.dup(file.fileno())
        until.callback(os.close, handle)
        # Where a file system knows no locks, nothing is taken for left over either.
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _remove_leftovers(folder: Path) -> None:
    if sys.platform == "win32":
        return
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if not (_TEMPORARY.fullmatch(entry.name) and entry.is_file(follow_symlinks=False)):
                continue
            # A new one may not be locked yet.
            if time.time() - entry.stat().st_mtime < 10:
                continue
            with contextlib.suppress(OSError), Path(entry.path).open("r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                Path(entry.path).unlink()


def _access_error(path: StrPath, what: str, error: Exception) -> FileAccessError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return FileAccessError(f"{os.fspath(path)}: {what}: {reason}.")


def _damaged(path: StrPath, what: str) -> Never:
    raise FileFormatError(f"{os.fspath(path)}: {what}; the file is damaged or foreign: copy or create it again.")
