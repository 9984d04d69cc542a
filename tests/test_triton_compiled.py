"""Every Triton kernel compiled ahead of time, for GPUs that are not here: no spills, 16-byte accesses, no fusion."""

import importlib
import pkgutil
import re
import subprocess

import pytest

triton = pytest.importorskip("triton", reason="the package triton is not installed")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

import safekern.ops.triton as kernels  # noqa: E402
from safekern.ops import registry  # noqa: E402
from safekern.ops.triton import select  # noqa: E402
from safekern.ops.triton.common import launch_options  # noqa: E402

if registry.INTERPRETED:
    pytest.skip("this process interprets Triton kernels", allow_module_level=True)

MODULES = [
    importlib.import_module(f"{kernels.__name__}.{module.name}") for module in pkgutil.iter_modules(kernels.__path__)
]
TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}


def cases():
    """Every spec; the first and the last of each kernel without ``--full``."""
    for module in MODULES:
        for kernel in {spec.kernel: None for spec in module.SPECS}:
            specs = [spec for spec in module.SPECS if spec.kernel is kernel]
            for number, spec in enumerate(specs):
                marks = () if number in (0, len(specs) - 1) else pytest.mark.full
                yield pytest.param(spec, marks=marks, id=f"{kernel.__name__}-{number}")


@pytest.fixture(scope="module", autouse=True)
def empty_cache(tmp_path_factory):
    """What an earlier run compiled proves nothing about this one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def compiled(spec, target):
    names = spec.kernel.arg_names
    assert {*spec.signature, *spec.constants} == {*names}
    signature = {name: spec.signature.get(name, "constexpr") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    source = ASTSource(spec.kernel, signature, spec.constants, aligned)
    return triton.compile(source, target=GPUTarget(*target), options=launch_options(target[-1], spec.threads))


@pytest.mark.parametrize("spec", list(cases()))
@pytest.mark.parametrize("target", TARGETS)
def test_kernel_compiles_well(target, spec, tmp_path):
    binary = compiled(spec, TARGETS[target])
    if target == "gfx942":
        assembly = binary.asm["amdgcn"]
        assert re.findall(r"\.[sv]gpr_spill_count: *(\d+)", assembly) == ["0", "0"]
        assert re.findall(r"\.private_segment_fixed_size: *(\d+)", assembly) == ["0"]
        loads, stores = r"(?:global|flat|buffer)_load_dwordx4", r"(?:global|flat|buffer)_store_dwordx4"
    else:
        assembly = binary.asm["ptx"]
        path = tmp_path / "kernel.cubin"
        path.write_bytes(binary.asm["cubin"])
        usage = subprocess.check_output([cuobjdump(), "-res-usage", path], text=True)
        # Spilled registers live on the stack.
        assert re.findall(r"STACK:(\d+)", usage) == ["0"] and re.findall(r"LOCAL:(\d+)", usage) == ["0"], usage
        # A fused multiply-add rounds differently, and denormals are kept.
        assert not re.search(r"\bfma\.|\.ftz\b|\.approx\b", assembly)
        loads, stores = (rf"{way}\.global\S*\.(?:v4\.b32|v2\.b64)" for way in ("ld", "st"))
    assert len(re.findall(loads, assembly)) >= spec.loads // (16 * spec.threads)
    assert len(re.findall(stores, assembly)) >= spec.stores // (16 * spec.threads)


def cuobjdump():
    return triton.knobs.nvidia.cuobjdump.path


def test_every_kernel_has_a_spec():
    for module in MODULES:
        launched = {
            value
            for name, value in vars(module).items()
            if isinstance(value, JITFunction) and name.endswith("_kernel") and value.fn.__module__ == module.__name__
        }
        assert launched == {spec.kernel for spec in module.SPECS}
    assert {name.rstrip("_") for name in registry.OPS} == {module.__name__.rpartition(".")[2] for module in MODULES} - {
        "common"
    }


@pytest.mark.parametrize("ratio", [1e-6, 1e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.03, 0.1])
@pytest.mark.parametrize("numel", [2**22, 2**28, 2**33])
def test_select_has_room_for_what_reaches_its_guess(numel, ratio):
    k = max(1, int(numel * ratio))
    reached = select.sample_rank(k, numel) / (select.SAMPLE_RUNS * select.SAMPLE_RUN) * numel
    # A guess is right to within a few per cent.
    assert 1.05 * reached < select.capacity(k, numel)
