"""What is installed: what importing costs, and what happens without the compiled kernels."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from safekern._sources import digest
from safekern.errors import BackendError
from safekern.ops.registry import OPS

ROOT = Path(__file__).parent.parent


def python(code, **environment):
    # Whatever backend this suite runs on, these tests choose their own.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("SAFEKERN_")}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**inherited, **environment}, cwd=ROOT
    )


def test_import_is_light():
    code = (
        "import sys, torch, safekern\n"
        "heavy = {'transformers', 'matplotlib', 'gguf', 'triton', 'accelerate', 'peft'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    ran = python(code)
    assert ran.returncode == 0, ran.stderr


def test_reference_backend_can_be_forced():
    ran = python(
        "import safekern.ops; print(safekern.ops.BACKENDS['cpu'].backend)",
        SAFEKERN_BACKEND="torch",
        PYTHONWARNINGS="error",
    )
    assert (ran.stdout, ran.returncode) == ("torch\n", 0), ran.stderr


def test_unknown_backend_is_refused():
    ran = python("import safekern", SAFEKERN_BACKEND="abacus")
    assert ran.returncode and "SAFEKERN_BACKEND='abacus' is not available" in ran.stderr


HIDE_KERNELS = (
    "import pathlib\n"
    "glob = pathlib.Path.glob\n"
    "pathlib.Path.glob = lambda self, pattern: iter(()) if '_C_' in pattern else glob(self, pattern)\n"
)


def test_missing_kernels_are_a_warning_given_once():
    ran = python(
        HIDE_KERNELS + "import safekern, safekern.ops, safekern.scores\nprint(safekern.ops.BACKENDS['cpu'].backend)"
    )
    assert ran.stdout == "torch\n"
    assert ran.stderr.count("safekern runs on its plain PyTorch reference") == 1
    assert "reinstall" in ran.stderr


def test_missing_kernels_that_were_asked_for_are_an_error():
    ran = python(HIDE_KERNELS + "import safekern", SAFEKERN_BACKEND="cpu")
    assert ran.returncode and "BackendError: SAFEKERN_BACKEND=cpu, but" in ran.stderr


def test_the_backend_of_each_device_is_known_and_why_not_another():
    ran = python("import safekern.ops; print(safekern.ops.BACKENDS['cuda'])", TRITON_INTERPRET="0")
    if torch.version.cuda is None:
        assert "backend='torch'" in ran.stdout and ran.stdout.count("this PyTorch is built without CUDA") == 2


def test_a_forced_gpu_backend_without_a_gpu_build_is_an_error():
    if torch.version.cuda is None:
        for backend in ("cuda", "triton"):
            ran = python("import safekern", SAFEKERN_BACKEND=backend)
            assert ran.returncode and f"BackendError: SAFEKERN_BACKEND={backend}, but this PyTorch" in ran.stderr


def test_broken_kernels_are_named(tmp_path):
    broken = tmp_path / "_C_cpu.abi3.so"
    broken.write_bytes(b"not a library")
    code = HIDE_KERNELS.replace("iter(())", f"iter([pathlib.Path({str(broken)!r})] * ('so' in pattern))")
    ran = python(code + "import safekern\nprint(safekern.ops.BACKENDS['cpu'].backend)")
    assert ran.stdout == "torch\n"
    assert "_C_cpu.abi3.so failed to load" in ran.stderr


def test_kernels_of_other_sources_are_named(tmp_path):
    if not list((ROOT / "safekern").glob("_C_cpu*.so")):
        pytest.skip("this checkout has no compiled kernels")
    # As a `git pull` leaves it.
    shutil.copytree(ROOT / "safekern", tmp_path / "safekern")
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    backend = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nimport safekern, safekern.ops as ops\n"
    backend += "assert safekern.__file__.startswith(sys.path[0]); print(ops.BACKENDS['cpu'].backend)"
    (tmp_path / "safekern" / "_C_cpu.sources").write_text(digest(tmp_path / "csrc", "cpu"))
    ran = python(backend)
    assert (ran.stdout, ran.stderr) == ("cpu\n", "")
    with (tmp_path / "csrc" / "cpu" / "select.cpp").open("a") as source:
        source.write("\n")
    ran = python(backend)
    assert ran.stdout == "torch\n"
    assert "was compiled from other sources than csrc holds now" in ran.stderr and "reinstall" in ran.stderr


def test_devices_without_fp64_are_refused():
    for op in OPS.values():
        with pytest.raises(BackendError, match=r"Apple's GPUs .* model\.to\('cpu'\)"):
            op.call._op_dk(torch._C.DispatchKey.MPS, *next(iter(op.cases(False))).arguments)


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in for a compiler is a POSIX program")
def test_building_without_a_compiler_leaves_the_reference(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", tmp_path / "lib", "--build-temp", tmp_path]
    environment = {**os.environ, "CC": "false", "CXX": "false", "MAX_JOBS": "1", "SAFEKERN_REQUIRE_KERNELS": "0"}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    output = ran.stdout + ran.stderr
    assert ran.returncode == 0, output
    assert output.count("the safekern kernels were not compiled") == 1
    assert not list(tmp_path.rglob("*.so"))
    strict = subprocess.run(
        command, capture_output=True, text=True, env={**environment, "SAFEKERN_REQUIRE_KERNELS": "1"}, cwd=ROOT
    )
    assert strict.returncode != 0


def test_setup_without_torch_says_what_to_install(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('no torch')\n")
    ran = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert ran.returncode
    assert "`pip install torch` first" in ran.stderr.splitlines()[-1]
