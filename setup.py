"""Builds the compiled kernels; everything declarative is in pyproject.toml."""

import os
import sys
from pathlib import Path

from setuptools import setup

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:
    sys.exit(
        "safekern compiles its kernels against the PyTorch you use: run `pip install torch setuptools` first, "
        "then install safekern with `pip install --no-build-isolation`."
    )

# The stable ABI of torch 2.11: one binary serves that version and every newer one.
TORCH_TARGET_VERSION = "0x020b000000000000"


class BuildKernels(BuildExtension):
    """Compiles the kernels, or says once that safekern will run on its plain PyTorch reference instead."""

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:
            # An explicit request for kernels must not end in a package without them.
            if os.environ.get("SAFEKERN_REQUIRE_KERNELS") == "1":
                raise
            self.warn(
                f"the safekern kernels were not compiled ({type(error).__name__}: {error}); "
                "safekern will run on its slower plain PyTorch reference. Install a C++17 compiler and reinstall to "
                "get the kernels (SAFEKERN_REQUIRE_KERNELS=1 makes this an error)."
            )
            self.extensions = []


def flags() -> list[str]:
    if sys.platform == "win32":
        return ["/O2", "/fp:precise"]
    # A fused multiply-add rounds differently from the reference. Errno keeps sqrt from being vectorised, and traps,
    # which nobody takes, keep GCC from computing both sides of a choice; neither changes a value.
    return ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-Wall"]


setup(
    ext_modules=[
        CppExtension(
            "safekern._C_cpu",
            sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp")),
            depends=sorted(str(path) for path in Path("csrc").rglob("*.h")),
            py_limited_api=True,
            define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)],
            extra_compile_args={"cxx": flags()},
        )
    ],
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
