"""The CUDA kernels as far as a machine without a GPU can check them: compiled, linked, and loaded beside any torch."""

import importlib.util
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
# The kernels that stream whole tensors, and whether they write them too.
STREAMING = {"accumulate": True, "spa_adamw": True, "moments": False, "filter": False}


@dataclass
class Built:
    library: Path
    ptx: dict[str, str]
    report: str


def load_setup(monkeypatch):
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.chdir(ROOT)
    spec = importlib.util.spec_from_file_location("safekern_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("capabilities", "archs"),
    [
        ([], "8.0;9.0+PTX"),
        ([(9, 0), (12, 0)], "8.0;9.0+PTX"),
        ([(8, 6), (7, 5), (7, 5)], "7.5;8.0;9.0+PTX"),
        # Which the toolkit has given up, and which has no room for the kernels' parameters.
        ([(8, 6), (7, 0), (6, 1)], "8.0;9.0+PTX"),
    ],
)
def test_older_gpus_of_the_machine_are_compiled_for(monkeypatch, capabilities, archs):
    setup = load_setup(monkeypatch)
    monkeypatch.setattr("torch.cuda.device_count", lambda: len(capabilities))
    monkeypatch.setattr("torch.cuda.get_device_capability", capabilities.__getitem__)
    assert setup.cuda_archs(["compute_61", "compute_75", "compute_80", "compute_90"]) == archs


def test_a_gpu_that_cannot_be_asked_stops_no_build(monkeypatch):
    def busy(device):
        raise RuntimeError("CUDA-capable device(s) is/are busy or unavailable")

    setup = load_setup(monkeypatch)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_capability", busy)
    assert setup.cuda_archs(["compute_75"]) == "8.0;9.0+PTX"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    # Not even nvcc is asked for more.
    flags = setup.cuda_flags("nowhere/nvcc")
    assert [flag for flag in flags if "arch" in flag] == ["-gencode=arch=compute_90,code=sm_90"]


@pytest.mark.parametrize(("default", "flags"), [("201402L", ["-std=c++17"]), ("201703L", []), ("202002L", [])])
def test_an_older_compiler_is_told_the_dialect(tmp_path, monkeypatch, default, flags):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho '#define OTHER (__cplusplus >= 201103L)\n#define __cplusplus {default}'\n")
    nvcc.chmod(0o755)
    assert load_setup(monkeypatch).dialect(str(nvcc)) == flags


def test_cuda_can_be_left_out(monkeypatch):
    setup = load_setup(monkeypatch)
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setenv("CUDA_HOME", "/somewhere")
    monkeypatch.delenv("SAFEKERN_BUILD_CUDA", raising=False)
    assert setup.builds_cuda()
    monkeypatch.setenv("SAFEKERN_BUILD_CUDA", "0")
    assert not setup.builds_cuda()


@pytest.mark.parametrize("free_threaded", [0, 1])
def test_pythons_without_a_stable_abi(monkeypatch, free_threaded):
    monkeypatch.setattr("sysconfig.get_config_var", lambda name: free_threaded if name == "Py_GIL_DISABLED" else None)
    setup = load_setup(monkeypatch)
    assert [extension.py_limited_api for extension in setup.extensions[:1]] == [not free_threaded]


@pytest.fixture(scope="module", params=["9.0", pytest.param("8.0", marks=pytest.mark.full)])
def built(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("SAFEKERN_BUILD_CUDA", "1")
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", request.param)
        monkeypatch.setenv("NVCC_APPEND_FLAGS", f"-Xptxas=-v --keep --keep-dir={folder}")
        setup = load_setup(monkeypatch)
        if setup.cuda_home() is None:
            pytest.skip("nvcc is not installed")
        said = []
        call = setup.call
        monkeypatch.setattr(setup, "call", lambda command: said.append(call(command)))
        (extension,) = [extension for extension in setup.extensions if extension.name == setup.CUDA_NAME]
        command = setup.BuildKernels(setuptools.Distribution({"name": "safekern", "ext_modules": [extension]}))
        command.build_temp, command.build_lib = str(folder / "temp"), str(folder / "lib")
        command.ensure_finalized()
        command.build_extension(extension)
    (library,) = (folder / "lib").rglob("_C_cuda*.so")
    return Built(library, {path.stem: path.read_text() for path in folder.glob("*.ptx")}, "".join(said))


def test_no_kernel_spills_registers(built):
    kernels = re.findall(r"Compiling entry function '(\w+)'", built.report)
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", built.report)
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", built.report)]
    assert len(kernels) == len(spills) == len(registers) > 60
    assert {number for spill in spills for number in spill} == {"0"}
    # 80 leave a multiprocessor three blocks of 256 threads, which have enough bytes in flight to hide the memory.
    assert max(registers) <= 80


def test_the_compiler_has_nothing_to_say(built):
    assert "warning" not in built.report


def test_streaming_kernels_access_16_bytes(built):
    entries = {}
    for text in built.ptx.values():
        for name, body in re.findall(r"\.entry (\w+)\(.*?\)\n(.*?)\n}", text, re.DOTALL):
            entries[name] = body
    for kernel, writes in STREAMING.items():
        bodies = [body for name, body in entries.items() if f"{len(kernel)}{kernel}" in name]
        assert bodies, kernel
        for body in bodies:
            assert re.search(r"ld\.global(\.cs)?\.v4\.[bufs]32", body), kernel
            assert not writes or re.search(r"st\.global(\.cs)?\.v4\.[bufs]32", body), kernel


def test_nothing_is_fused_approximated_or_flushed(built):
    assert len(built.ptx) == len(SOURCES)
    for name, text in built.ptx.items():
        assert not re.search(r"\b(fma|mad)\.(rn\.)?(ftz\.)?f(32|64)|\.approx|\.ftz|div\.full", text), name


USE = """
import sys, torch
import safekern
from safekern import ops
from safekern.ops import registry

torch.ops.load_library(sys.argv[1])
assert not torch.cuda.is_initialized()
x, index, flag, k = torch.ones(4), torch.tensor([1]), torch.zeros(1, dtype=torch.bool), torch.ones(1)
calls = {
    "accumulate_": ([x], [x], flag, True),
    "count_changed": ([x], [index], [k]),
    "gather_": ([k], [x], [index], flag),
    "perturb_": ([x], [index], [1.0], [7], 3),
    "restore_": ([x], [index], [k]),
    "select": ([x], k, 1, True),
    "set_adamw_": ([x], [k], [index], [k], [k], [k], [1.0], [1.0], 0.9, 0.99, 1e-8, 1.0),
    "sigma": ([x],),
    "spa_adamw_": ([x], [x], [index], [x], [x], [1.0], [1.0], 0.9, 0.99, 1e-8, 1.0),
}
assert set(calls) == set(registry.OPS), set(calls) ^ set(registry.OPS)
cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
for name, arguments in calls.items():
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"safekern::{name}", "CUDA"), name
    op = getattr(ops, name)
    # With tensors that are not on a GPU, a kernel gets as far as looking for their device: past the unpacking of its
    # arguments, which the stable ABI does by its C++ signature alone, and past its checks.
    try:
        op.redispatch(cuda, *arguments)
    except RuntimeError as error:
        assert "must be on one device" in str(error), (name, str(error))
    else:
        raise AssertionError(name)
try:
    ops.gather_.redispatch(cuda, [k], [x], [index.float()], flag)
except RuntimeError as error:
    assert "indices must be int32 or int64, got Float" in str(error), error
"""


def test_the_library_loads_beside_any_torch_and_serves_every_op(built):
    ran = subprocess.run([sys.executable, "-c", USE, built.library], capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr


def test_a_toolkit_is_found_behind_a_script(tmp_path, monkeypatch):
    setup = load_setup(monkeypatch)
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    toolkit = tmp_path / "cuda"
    (toolkit / "bin").mkdir(parents=True)
    nvcc, wrapper = toolkit / "bin" / "nvcc", tmp_path / "path" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho '#$ _HERE_={nvcc.parent}' >&2\n")
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {nvcc} "$@"\n')
    nvcc.chmod(0o755)
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", str(wrapper.parent), prepend=":")
    assert setup.cuda_home() == toolkit
    monkeypatch.setenv("PATH", str(tmp_path))
    assert setup.cuda_home() is None
    monkeypatch.setenv("CUDA_HOME", "/elsewhere")
    assert setup.cuda_home() == Path("/elsewhere")


@pytest.mark.parametrize("strict", ["0", "1"])
def test_a_failed_cuda_build_leaves_the_other_kernels(tmp_path, monkeypatch, strict):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("SAFEKERN_REQUIRE_KERNELS", strict)
    monkeypatch.setenv("SAFEKERN_BUILD_CUDA", "1")
    setup = load_setup(monkeypatch)
    monkeypatch.setenv("SAFEKERN_BUILD_CUDA", "0")
    command = setup.BuildKernels(setuptools.Distribution({"name": "safekern", "ext_modules": setup.extensions}))
    command.build_temp, command.build_lib = str(tmp_path / "temp"), str(tmp_path / "lib")
    command.ensure_finalized()
    said = []
    monkeypatch.setattr(command, "warn", said.append)
    (extension,) = [extension for extension in command.extensions if extension.name == setup.CUDA_NAME]
    if strict == "1":
        with pytest.raises(OSError):
            command.build_extension(extension)
        return
    command.build_extension(extension)
    assert [extension.name for extension in command.extensions] == ["safekern._C_cpu"]
    assert len(said) == 1 and "Triton" in said[0]


@pytest.mark.parametrize("inplace", [False, True])
def test_kernels_of_an_earlier_build_are_not_left_where_one_failed(tmp_path, monkeypatch, inplace):
    # Which makes a failure an error.
    monkeypatch.delenv("SAFEKERN_REQUIRE_KERNELS", raising=False)
    setup = load_setup(monkeypatch)
    command = setup.BuildKernels(setuptools.Distribution({"name": "safekern", "ext_modules": setup.extensions[:1]}))
    command.build_temp, command.build_lib, command.inplace = str(tmp_path / "temp"), str(tmp_path / "lib"), inplace
    command.ensure_finalized()
    said = []
    monkeypatch.setattr(command, "warn", said.append)
    monkeypatch.setattr(command, "build_extension", lambda extension: setup.call(["false"]))
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path / "lib" / "safekern", tmp_path / "safekern"):
        folder.mkdir(parents=True)
        for file in ("_C_cpu.abi3.so", "_C_cuda.abi3.so", "other.py"):
            (folder / file).touch()
    command.run()
    assert len(said) == 1 and "plain PyTorch reference" in said[0]
    assert [path.name for path in (tmp_path / "lib" / "safekern").iterdir()] == ["other.py"]
    assert len(list((tmp_path / "safekern").iterdir())) == (1 if inplace else 3)


def test_an_old_setuptools_is_explained(monkeypatch):
    monkeypatch.setattr(setuptools, "__version__", "65.5.0")
    with pytest.raises(SystemExit, match="setuptools 77 or newer, and here is 65"):
        load_setup(monkeypatch)
