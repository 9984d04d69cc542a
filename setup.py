"""Builds the compiled kernels; everything declarative is in pyproject.toml."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import setuptools
from setuptools import Extension, setup

# pyproject.toml says so too, but without build isolation nobody reads it there.
if int(setuptools.__version__.partition(".")[0]) < 77:
    sys.exit(
        f"safekern is built with setuptools 77 or newer, and here is {setuptools.__version__}: run "
        "`pip install 'setuptools>=77'`, then install safekern again."
    )
try:
    import torch
    from torch.utils import cpp_extension
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:
    sys.exit(
        "safekern compiles its kernels against the PyTorch you use: run `pip install torch` first, then "
        "install safekern with `pip install --no-build-isolation`."
    )

# The stable ABI of torch 2.11: one binary serves that version and every newer one.
TORCH_TARGET_VERSION = "0x020b000000000000"

# One binary for every Python, but for those without the GIL, which have no stable ABI before 3.15.
LIMITED = not sysconfig.get_config_var("Py_GIL_DISABLED")

digest = runpy.run_path("safekern/_sources.py")["digest"]

HEADERS = sorted(str(path) for path in Path("csrc").rglob("*.*h"))


class BuildKernels(BuildExtension):
    """Compiles the kernels, or says once that safekern will run on something slower instead."""

    def run(self) -> None:
        folders = [Path(self.build_lib, "safekern"), *([Path("safekern")] if self.inplace else [])]
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
        # A package takes all that is in its build folder, and kernels of an earlier build may be of other sources.
        built = {ext.name for ext in self.extensions}
        for name in {CPU_NAME, CUDA_NAME} - built:
            for folder in folders:
                for library in folder.glob(f"{name.rpartition('.')[2]}.*"):
                    library.unlink()
        for name in built if self.inplace else ():
            # Beside sources that will change, for the loader to notice.
            stem = name.rpartition(".")[2]
            Path("safekern", f"{stem}.sources").write_text(digest(Path("csrc"), stem.removeprefix("_C_")))

    def build_extension(self, ext: Extension) -> None:
        if ext.name != CUDA_NAME:
            super().build_extension(ext)
            return
        try:
            self.build_cuda(ext)
        except Exception as error:
            if "1" in (os.environ.get("SAFEKERN_REQUIRE_KERNELS"), os.environ.get("SAFEKERN_BUILD_CUDA")):
                raise
            self.warn(
                f"safekern's CUDA kernels were not compiled ({type(error).__name__}: {error}); on a GPU it will run on "
                "its Triton kernels (SAFEKERN_REQUIRE_KERNELS=1 makes this an error)."
            )
            self.extensions = [other for other in self.extensions if other is not ext]

    def build_cuda(self, ext: Extension) -> None:
        """Calls nvcc itself: torch's helper guesses the toolkit and takes no CUDA sources where torch has no CUDA."""
        home = cuda_home()
        if home is None:
            raise RuntimeError("there is no nvcc on PATH, and CUDA_HOME is not set")
        nvcc = str(home / "bin" / "nvcc")
        folder = Path(self.build_temp) / "cuda"
        folder.mkdir(parents=True, exist_ok=True)
        command = [
            nvcc,
            "-c",
            *cuda_flags(nvcc),
            *dialect(nvcc),
            *(f"-I{path}" for path in cpp_extension.include_paths()),
        ]

        def compile_one(source: str) -> str:
            # Always: what is there may have been compiled for other GPUs, or with another toolkit.
            target = str(folder / f"{Path(source).stem}.o")
            call([*command, source, "-o", target])
            return target

        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            objects = list(pool.map(compile_one, ext.depends))
        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        libraries = Path(torch.__file__).parent / "lib"
        link = [nvcc, "-shared", "-cudart", "static", *objects, "-o", str(library), f"-L{libraries}", "-ltorch_cpu"]
        if (libraries / "libtorch_cuda.so").exists():
            # What the kernels need from it is a weak symbol, for which a linker may not record the library.
            link += ["-Xlinker", "--no-as-needed", "-ltorch_cuda"]
        call(link)


def call(command: list[str]) -> str:
    """Runs a compiler and returns what it said, which is also shown."""
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{ran.stdout}{ran.stderr}")
    sys.stderr.write(ran.stderr)
    return ran.stdout + ran.stderr


def flags() -> list[str]:
    if sys.platform == "win32":
        return ["/O2", "/fp:precise"]
    # A fused multiply-add rounds differently from the reference. Errno keeps sqrt from being vectorised, and traps,
    # which nobody takes, keep GCC from computing both sides of a choice; neither changes a value.
    return ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-Wall"]


def cuda_flags(nvcc: str) -> list[str]:
    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        os.environ["TORCH_CUDA_ARCH_LIST"] = cuda_archs(call([nvcc, "--list-gpu-arch"]).split())
    # The same rounding as on the CPU: nothing fused, nothing approximated, denormals kept.
    exact = ["-fmad=false", "-ftz=false", "-prec-div=true", "-prec-sqrt=true"]
    host = "-Xcompiler=-fPIC,-fvisibility=hidden,-ffp-contract=off"
    macro = f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"
    return ["-O3", *exact, host, macro, *cpp_extension._get_cuda_arch_flags()]


def dialect(nvcc: str) -> list[str]:
    """C++17 where the host compiler's own is older, as up to GCC 10; newer releases of torch want a newer one."""
    asked = [nvcc, "-x", "cu", "-E", "-Xcompiler", "-dM", os.devnull]
    said = subprocess.run(asked, capture_output=True, text=True).stdout
    found = re.search(r"^#define __cplusplus (\d+)", said, re.MULTILINE)
    return ["-std=c++17"] if found and int(found[1]) < 201703 else []


def cuda_archs(known: list[str]) -> str:
    """Not those of this machine's GPUs alone, as torch has it: it may have none, or the package may go elsewhere.

    Args:
        known: What nvcc compiles for, such as ``compute_75``.
    """
    try:
        here = {torch.cuda.get_device_capability(device) for device in range(torch.cuda.device_count())}
    except RuntimeError:  # a GPU that another process has for itself
        here = set()
    # Newer ones translate the PTX; the kernels' parameters take more room than those before sm_70 have.
    older = [(major, minor) for major, minor in sorted(here) if (7, 0) <= (major, minor) < (8, 0)]
    named = [f"{major}.{minor}" for major, minor in older if f"compute_{major}{minor}" in known]
    return ";".join([*named, "8.0", "9.0+PTX"])


def cuda_home() -> Path | None:
    """The CUDA toolkit: CUDA_HOME, or the one that the nvcc on PATH, perhaps a script, says it belongs to."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return Path(home)
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    said = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    folder = re.search(r"^#\$ _HERE_=(.+)$", said, re.MULTILINE)
    return Path(folder[1] if folder else Path(nvcc).parent).parent


def builds_cuda() -> bool:
    """Never asks for a GPU: a machine that builds may have none. SAFEKERN_BUILD_CUDA=1 needs no CUDA in torch."""
    if (wanted := os.environ.get("SAFEKERN_BUILD_CUDA")) in ("0", "1"):
        return wanted == "1"
    return torch.version.cuda is not None and cuda_home() is not None


CPU_NAME, CUDA_NAME = "safekern._C_cpu", "safekern._C_cuda"

extensions = [
    CppExtension(
        CPU_NAME,
        sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp")),
        depends=HEADERS,
        py_limited_api=LIMITED,
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)],
        extra_compile_args={"cxx": flags()},
    )
]
if builds_cuda():
    # As dependencies, since torch refuses CUDA sources where it has no CUDA; BuildKernels compiles them.
    kernels = sorted(str(path) for path in Path("csrc/cuda").glob("*.cu"))
    extensions.append(Extension(CUDA_NAME, [], depends=kernels, py_limited_api=LIMITED))

setup(
    ext_modules=extensions,
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if LIMITED else {},
)
