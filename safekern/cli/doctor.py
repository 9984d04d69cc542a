"""``safekern doctor``: what this installation runs on, which kernels serve it, and whether they are right."""

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from typing import Any

import torch

from safekern import ops
from safekern._version import __version__
from safekern.bench.measure import processor
from safekern.diagnosis import selftest
from safekern.faults import first_line
from safekern.ops.registry import OPS, has_kernel
from safekern.tables import Column, Table

_DESCRIPTION = """\
Shows what safekern runs on and whether it works here, for a look at a new machine or a bug report:

  devices      every processor and GPU that PyTorch sees, with its memory
  versions     of everything that matters
  kernels      which backend serves each op on each kind of device ("torch" is the plain PyTorch reference, which is
               right but slow), and why a better one does not
  environment  the variables that change any of this
  selftest     every op of every available backend, compared with the reference on this machine (half a minute)

Ends with status 1 if a comparison failed. A backend that is missing is no failure: it is listed with the reason.
"""

_VARIABLES = {
    "SAFEKERN_BACKEND": "insists on one backend: cpu, cuda, triton, or torch for the reference",
    "SAFEKERN_CPU_CAPABILITY": "makes the CPU kernels use sse2, avx2 or avx512",
    "TRITON_INTERPRET": "1 runs Triton kernels on the CPU, slowly",
    "CUDA_VISIBLE_DEVICES": "which GPUs PyTorch sees",
    "OMP_NUM_THREADS": "how many threads the CPU kernels use",
}


def add_parser(commands: Any) -> None:
    """Adds ``doctor`` to the subcommands."""
    parser = commands.add_parser(
        "doctor",
        help="show devices, versions and kernels, and check the kernels against the reference",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the findings; returns 1 if a kernel disagreed with the reference."""
    found = {"devices": _devices(), "versions": _versions(), "kernels": _kernels(), "environment": _environment()}
    if not args.json:
        print(_text(found), flush=True)
    result = selftest()
    if args.json:
        print(json.dumps({**found, "selftest": result.to_dicts(), "ok": result.ok}, indent=2))
    else:
        print(f"\nselftest\n{_indented(str(result))}\n\n{_verdict(result.ok, bool(result.failures))}")
    return 1 if result.failures else 0


def _verdict(ok: bool, failed: bool) -> str:
    if failed:
        return "Some kernels are wrong on this machine: use SAFEKERN_BACKEND=torch, and please report this output."
    if ok:
        return "All kernels that were compared agree with the reference."
    return "Nothing was compared: safekern runs on its plain PyTorch reference."


def _devices() -> list[dict[str, str]]:
    devices = [
        {
            "device": "cpu",
            "name": processor(),
            "capability": ops.cpu_capability() or torch.backends.cpu.get_cpu_capability().lower(),
            "memory": _host_memory(),
            "parallelism": f"{torch.get_num_threads()} threads",
        }
    ]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        try:
            properties = torch.cuda.get_device_properties(index)
            free, total = torch.cuda.mem_get_info(index)
        # One that is full, another process's alone, or too new for the driver.
        except RuntimeError as error:
            unknown = dict.fromkeys(("name", "capability", "memory", "parallelism"), "")
            devices.append({**unknown, "device": f"cuda:{index}", "name": f"unusable: {first_line(error)}"})
            continue
        devices.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory": f"{_gigabytes(total)}, {_gigabytes(free)} free",
                "parallelism": f"{properties.multi_processor_count} multiprocessors",
            }
        )
    return devices


def _versions() -> dict[str, str]:
    versions = {
        "safekern": __version__,
        "torch": str(torch.__version__),
        "CUDA of torch": torch.version.cuda or "none: this PyTorch is built without CUDA",
        "NVIDIA driver": _driver(),
    }
    for package in ("triton", "transformers", "numpy", "safetensors"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {**versions, "python": platform.python_version(), "system": platform.platform()}


def _kernels() -> dict[str, dict[str, Any]]:
    return {
        device: {
            "backend": served.backend,
            "passed_over": served.passed_over,
            "ops": {name: served.backend if has_kernel(name, device) else "torch" for name in OPS},
        }
        for device, served in ops.BACKENDS.items()
    }


def _environment() -> dict[str, str | None]:
    return {name: os.environ.get(name) for name in _VARIABLES}


def _text(found: dict[str, Any]) -> str:
    kernels = found["kernels"]
    by_op = [(name, *(kernels[device]["ops"][name] for device in kernels)) for name in OPS]
    reasons = [
        (device, backend, reason)
        for device, of_device in kernels.items()
        for backend, reason in of_device["passed_over"].items()
    ]
    environment = [
        (name, "not set" if value is None else repr(value), _VARIABLES[name])
        for name, value in found["environment"].items()
    ]
    sections = {
        "devices": Table.from_records(found["devices"], list(found["devices"][0])),
        "versions": Table([Column("of"), Column("version")], list(found["versions"].items())),
        "kernels": Table([Column("op"), *map(Column, kernels)], by_op),
        "not used": Table([Column("device"), Column("backend"), Column("reason")], reasons),
        "environment": Table([Column("variable"), Column("value"), Column("meaning")], environment),
    }
    return "\n\n".join(f"{title}\n{_indented(str(table))}" for title, table in sections.items() if table.rows)


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())


def _host_memory() -> str:
    try:
        return _gigabytes(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, OSError, ValueError):
        return "unknown"


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"


def _driver() -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return "unknown: no nvidia-smi"
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown: nvidia-smi failed ({type(error).__name__})"
    return ran.stdout.splitlines()[0].strip() if ran.stdout.strip() else "unknown: nvidia-smi shows none"
