"""What the CUDA kernels compute, with no GPU: their sources, compiled for the CPU, take the tests of the ops.

A small runtime (``tests/cuda_on_cpu``) runs the threads of a block as coroutines. Only launches and the class that
stands for a device are replaced in the sources.
"""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parent.parent
RUNTIME = ROOT / "tests" / "cuda_on_cpu"
LAUNCH = re.compile(r"(\w+)<<<(.+?), (\w+), 0, .*?stream\(\)>>>(\(.*?\));", re.DOTALL)

pytestmark = pytest.mark.full


def for_the_cpu(source: str) -> str:
    source = source.replace("STABLE_TORCH_LIBRARY_IMPL(safekern, CUDA", "STABLE_TORCH_LIBRARY_IMPL(safekern, CPU")
    source = re.sub(r"class Device \{.*?\n\};\n", '#include "device.h"\n', source, flags=re.DOTALL)
    # A copy for each thread would take long.
    source = re.sub(r"__grid_constant__ (Table<[^()]*?>) table", r"\1& table", source)
    # So that the tests' tensors, which are small for a GPU, are sampled too.
    source = re.sub(r"kSampleFrom = .*?;", "kSampleFrom = 1 << 17;", source)
    return LAUNCH.sub(r"on_cpu::launch(\2, \3, [&] { \1\4; });", source)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None or sys.platform != "linux":
        pytest.skip("a C++ compiler on Linux is needed")
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    (folder / "csrc" / "cuda").mkdir(parents=True)
    for header in (ROOT / "csrc").glob("*.h"):
        shutil.copy(header, folder / "csrc")
    objects = []
    for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu*")):
        target = folder / "csrc" / "cuda" / (path.name if path.suffix == ".cuh" else f"{path.stem}.cpp")
        text = for_the_cpu(path.read_text())
        assert "<<<" not in text
        target.write_text(text)
        if target.suffix == ".cpp":
            objects.append(target)
    flags = [
        "-O1",
        "-g0",
        "-w",
        "-fPIC",
        "-ffp-contract=off",
        "-std=c++20",
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
    ]
    includes = [f"-I{path}" for path in (RUNTIME, *include_paths())]

    def run(*command):
        ran = subprocess.run([compiler, *map(str, command)], capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        list(pool.map(lambda path: run(*flags, *includes, "-c", path, "-o", path.with_suffix(".o")), objects))
    built = folder / "cuda_on_cpu.so"
    torch_libraries = f"-L{Path(torch.__file__).parent / 'lib'}"
    run("-shared", *(path.with_suffix(".o") for path in objects), "-o", built, torch_libraries, "-ltorch_cpu")
    return built


# What only a look at the indices can tell, which a GPU does not take.
UNSEEN = "not outside and not ascend and not test_kernels_refuse_arguments"


@pytest.mark.parametrize("tests", ["tests/test_ops.py", "tests/cuda_on_cpu/cases.py"])
def test_the_kernels_pass(library, tests):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.cuda_on_cpu.plugin", tests, "-k", UNSEEN]
    environment = {**os.environ, "SAFEKERN_BACKEND": "torch", "SAFEKERN_CUDA_ON_CPU": str(library)}
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert ran.returncode == 0 and " passed" in ran.stdout, ran.stdout[-5000:] + ran.stderr[-2000:]
