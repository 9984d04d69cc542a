"""Where ops are defined and their compiled kernels are loaded.

An op is one module of this package: its schema, its plain-torch reference (the default kernel on every device, and the
oracle of the tests) and its fake. Compiled libraries register faster kernels for the same op with torch's dispatcher,
so callers never choose: they call ``torch.ops.safekern.<op>``.
"""

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from safekern.errors import BackendError

_LIBRARY = torch.library.Library("safekern", "DEF")


def define(schema: str, *, reference: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Defines ``safekern::<schema>`` with its reference and fake kernels; returns the op."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"safekern::{name}", fake, lib=_LIBRARY)
    return getattr(getattr(torch.ops.safekern, name), "default")  # noqa: B009 - mypy cannot see ops' overloads


def load_kernels() -> str:
    """Loads the compiled CPU kernels and returns the name of the backend in use: ``"cpu"`` or ``"torch"``.

    ``SAFEKERN_BACKEND=cpu`` insists on the kernels and ``SAFEKERN_BACKEND=torch`` leaves them out. Without it, missing
    kernels are a warning, given once.

    Raises:
        BackendError: the backend asked for is unknown, missing, or failed to load.
    """
    wanted = os.environ.get("SAFEKERN_BACKEND", "")
    if wanted not in ("", "cpu", "torch"):
        raise BackendError(f"SAFEKERN_BACKEND={wanted!r} is not available: use 'cpu', 'torch', or leave it unset")
    if wanted == "torch":
        return "torch"
    folder = Path(__file__).parent.parent
    failure = "this installation has no compiled kernels"
    for path in sorted(folder.glob("_C_cpu*.so")) + sorted(folder.glob("_C_cpu*.pyd")):
        try:
            torch.ops.load_library(str(path))
            return "cpu"
        except OSError as error:
            failure = f"{path.name} failed to load: {error}"
    if wanted == "cpu":
        raise BackendError(f"SAFEKERN_BACKEND=cpu, but {failure}")
    warnings.warn(
        f"safekern runs on its plain PyTorch reference, which is slower: {failure}. Install a C++ compiler and "
        "reinstall safekern with `pip install --no-build-isolation`, or set SAFEKERN_BACKEND=torch if this is wanted.",
        stacklevel=2,
    )
    return "torch"
