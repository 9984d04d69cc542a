"""Every Triton kernel, compiled ahead of time for GPUs that are not here: no spills, and 16-byte accesses."""

import importlib
import pkgutil
import re

import pytest

from safekern import ops

pytest.importorskip("triton", reason="Triton is not installed")

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from triton.runtime.jit import JITFunction

import safekern.ops.triton as kernels

MODULES = [importlib.import_module(f"safekern.ops.triton.{module.name}") for module in pkgutil.iter_modules(kernels.__path__)]
SPECS = [spec for module in MODULES for spec in module.SPECS]
TARGETS = [GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)]
