"""Where ops are defined and their backends are chosen.

An op is one module of this package: its schema, its plain-torch reference (the default kernel on every device, and the
oracle of the tests), its fake, and the cases on which its kernels are compared with the reference. A backend brings
faster kernels for all ops on one kind of device, and registers them with torch's dispatcher, so callers never choose:
they call ``torch.ops.safekern.<op>``.

To add an op, write its module here, ``csrc/cpu/<op>.cpp``, ``csrc/cuda/<op>.cu`` and ``safekern/ops/triton/<op>.py``;
nothing lists them. (The compiled `restore_` and `count_changed`, which take the same arguments, share a file.) To add a
backend, add a line to `_BACKENDS` with a function that registers its kernels.
"""

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from safekern._sources import digest
from safekern.errors import BackendError
from safekern.ops.cases import Case

_LIBRARY = torch.library.Library("safekern", "DEF")


@dataclass(frozen=True)
class Op:
    """An op as it was defined.

    Attributes:
        call: the op itself, which the dispatcher sends to the backend of the arguments' device.
        reference: its plain-torch implementation.
        cases: ``cases(large)`` gives the inputs on which every kernel has to agree with the reference; with ``large``
            also some that pass the sizes at which kernels change their ways.
    """

    call: Callable[..., Any]
    reference: Callable[..., Any]
    cases: Callable[[bool], Iterable[Case]]


OPS: dict[str, Op] = {}


def define(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    cases: Callable[[bool], Iterable[Case]],
) -> Any:
    """Defines ``safekern::<schema>`` with its reference and fake kernels; returns the op."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    _LIBRARY.impl(name, _without_fp64, "MPS")
    torch.library.register_fake(f"safekern::{name}", fake, lib=_LIBRARY)
    op = getattr(getattr(torch.ops.safekern, name), "default")  # noqa: B009 - mypy cannot see ops' overloads
    OPS[name] = Op(op, reference, cases)
    return op


def _without_fp64(*args: Any, **kwargs: Any) -> Any:
    # Before anything is written: the references would fail in the middle of a step.
    raise BackendError(
        "safekern takes roots and deviations in fp64, which Apple's GPUs (mps) do not have: move the model to the CPU, "
        "model.to('cpu')"
    )


class _UnavailableError(Exception):
    """Why a backend cannot serve in this process."""


class _BrokenError(_UnavailableError):
    """The same, of a backend that is installed and should have worked."""


@dataclass(frozen=True)
class Served:
    """Which backend serves the ops on one kind of device, and why others do not.

    Attributes:
        backend: ``"cpu"``, ``"cuda"``, ``"triton"``, or ``"torch"`` for the plain-torch reference.
        passed_over: for each backend that would have come first, the reason why it does not serve.
    """

    backend: str
    passed_over: dict[str, str]


def load_kernels() -> dict[str, Served]:
    """Loads the backends of this process and returns which one serves each kind of device.

    ``SAFEKERN_BACKEND`` insists on one of them, and ``SAFEKERN_BACKEND=torch`` leaves all of them out. Without it, ops
    that fall to the slower reference, and backends that are installed but broken, are a warning, given once.

    Raises:
        BackendError: the backend asked for is unknown, missing, or failed to load; or SAFEKERN_CPU_CAPABILITY is
            unknown or not supported by this processor.
    """
    wanted = os.environ.get("SAFEKERN_BACKEND", "")
    known = [name for backends in _BACKENDS.values() for name in backends]
    if wanted not in ("", "torch", *known):
        raise BackendError(
            f"SAFEKERN_BACKEND={wanted!r} is not available: use one of {', '.join(sorted({*known, 'torch'}))}, "
            "or leave it unset"
        )
    return {device: _choose(device, wanted) for device in _BACKENDS}


def backends(device: str) -> list[str]:
    """The names of all backends for a kind of device, best first, whether they are available or not."""
    return list(_BACKENDS[device])


def has_kernel(op: str, device: str) -> bool:
    """Whether the backend that serves a kind of device has a kernel of its own for an op; else the reference runs."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"safekern::{op}", device.upper()))


def _choose(device: str, wanted: str) -> Served:
    served, passed_over, broken = "torch", {}, False
    for name, load in _BACKENDS[device].items():
        if wanted == "torch" or (wanted in _BACKENDS[device] and wanted != name):
            passed_over[name] = f"SAFEKERN_BACKEND={wanted}"
            continue
        try:
            load()
            served = name
            break
        except _UnavailableError as reason:
            if wanted == name:
                raise BackendError(f"SAFEKERN_BACKEND={name}, but {reason}") from reason
            passed_over[name] = str(reason)
            broken |= isinstance(reason, _BrokenError)
    # Every PyTorch has CPU tensors; that one is built without CUDA is no loss to report.
    if broken or (served == "torch" and device == "cpu" and wanted != "torch"):
        instead = "plain PyTorch reference, which is slower" if served == "torch" else f"{served} kernels"
        reasons = "; ".join(f"{name}: {reason}" for name, reason in passed_over.items())
        warnings.warn(
            f"safekern runs on its {instead}: {reasons}. Install a compiler and reinstall safekern with `pip install "
            "--no-build-isolation`, or set SAFEKERN_BACKEND=torch if this is wanted.",
            stacklevel=3,
        )
    return Served(served, passed_over)


def _load_library(stem: str) -> None:
    folder = Path(__file__).parent.parent
    paths = sorted(folder.glob(f"{stem}*.so")) + sorted(folder.glob(f"{stem}*.pyd"))
    if not paths:
        raise _UnavailableError(f"this installation has no compiled kernels ({stem})")
    # Only a checkout has sources, which a `git pull` changes and the library not.
    stamp, csrc = folder / f"{stem}.sources", folder.parent / "csrc"
    if stamp.exists() and csrc.is_dir() and stamp.read_text() != digest(csrc, stem.removeprefix("_C_")):
        raise _BrokenError(f"{paths[0].name} was compiled from other sources than {csrc.name} holds now")
    try:
        torch.ops.load_library(str(paths[0]))
    except OSError as error:
        raise _BrokenError(f"{paths[0].name} failed to load: {error}") from error


def _load_cpu() -> None:
    _load_library("_C_cpu")
    try:
        cpu_capability()
    except RuntimeError as error:
        raise BackendError(f"{error}. Choose one of those, or leave the variable unset") from error


def cpu_capability() -> str | None:
    """The instruction set of the compiled CPU kernels in this process; None without these kernels.

    ``"avx512"``, ``"avx2"``, ``"sse2"``, or ``"portable"`` on other processors than x86-64: the widest that the
    processor has, unless the environment variable ``SAFEKERN_CPU_CAPABILITY`` named another when safekern was imported.
    Results do not depend on it.
    """
    if not hasattr(torch.ops.safekern, "cpu_capability"):
        return None
    name: str = torch.ops.safekern.cpu_capability()
    return name


def _load_cuda() -> None:
    if torch.version.cuda is None:
        raise _UnavailableError("this PyTorch is built without CUDA")
    _load_library("_C_cuda")


def _load_triton() -> None:
    if importlib.util.find_spec("triton") is None:
        raise _UnavailableError("the package triton is not installed")
    if not INTERPRETED and torch.version.cuda is None:
        # They compile for AMD's GPUs, and nobody has run them there yet.
        built = "for ROCm, on which safekern's kernels are untested" if torch.version.hip else "without CUDA"
        raise _UnavailableError(f"this PyTorch is built {built}")
    for name in OPS:
        _LIBRARY.impl(name, _from_triton(name), "CPU" if INTERPRETED else "CUDA")


def _from_triton(name: str) -> Callable[..., Any]:
    # Triton is imported by the first call: importing safekern stays light.
    def kernel(*args: Any, **kwargs: Any) -> Any:
        module = importlib.import_module(f"safekern.ops.triton.{name.rstrip('_')}")
        return getattr(module, name)(*args, **kwargs)

    return kernel


# Triton reads this at its own import: in such a process its kernels run on the CPU, in its interpreter.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Per kind of device, best first.
_BACKENDS: dict[str, dict[str, Callable[[], None]]] = {
    "cpu": {"cpu": _load_cpu},
    "cuda": {"cuda": _load_cuda},
}
_BACKENDS["cpu" if INTERPRETED else "cuda"]["triton"] = _load_triton
