"""``selftest``: do the kernels of this installation agree with the plain-torch reference, on this machine?"""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from safekern import ops
from safekern.errors import InvalidArgumentError
from safekern.faults import first_line
from safekern.ops.cases import INTEGERS, Case
from safekern.ops.registry import INTERPRETED, OPS, Op, backends, has_kernel
from safekern.tables import Table

# On either side of every tensor, a number of elements that makes vector loads aligned, and one that does not.
_PADDINGS = (64, 11)
# Bytes that are NaN in every floating-point dtype, so that reading them shows, as well as writing.
_PADDING = 0xFF
# Of a backend in a process of its own, whose kernels may have to be compiled.
_TIMEOUT = 1200

_OUTPUT_MARK = "safekern-selftest:"
_CHILD = f"""
import json, sys
try:
    import safekern
except Exception as error:
    if type(error).__name__ != "BackendError":
        raise
    print({_OUTPUT_MARK!r} + json.dumps(str(error)))
else:
    from safekern.diagnosis import _checks_here
    checks = _checks_here(sys.argv[1], quick=sys.argv[2] == "quick")
    print({_OUTPUT_MARK!r} + json.dumps([vars(check) for check in checks]))
"""


@dataclass(frozen=True)
class Check:
    """How one op fared on one backend.

    Attributes:
        op: name of the op, or ``"*"`` for all ops of a backend that was skipped.
        device: ``"cpu"``, ``"cuda"`` or a numbered device.
        backend: whose kernels ran.
        status: ``"skipped"`` where nothing was compared.
        cases: how many inputs were compared.
        reason: in one line, what went wrong in the first case that failed, or why it was skipped.
    """

    op: str
    device: str
    backend: str
    status: Literal["passed", "failed", "skipped"]
    cases: int
    reason: str = ""


@dataclass(frozen=True)
class SelfTest:
    """What :func:`selftest` found; ``print`` shows it as a table.

    Attributes:
        checks: one for each op, device and backend.
    """

    checks: tuple[Check, ...]

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(check for check in self.checks if check.status == "failed")

    @property
    def ok(self) -> bool:
        """Whether something was compared, and nothing failed."""
        return not self.failures and any(check.status == "passed" for check in self.checks)

    def __str__(self) -> str:
        table = Table.from_records(self.to_dicts(), [field.name for field in fields(Check)])
        counts = {status: sum(c.status == status for c in self.checks) for status in ("passed", "failed", "skipped")}
        total = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
        return f"{table}\n{total}"

    def to_dicts(self) -> list[dict[str, Any]]:
        """The checks as plain values, for JSON."""
        return [asdict(check) for check in self.checks]


def selftest(*, device: str | torch.device | None = None, quick: bool = False) -> SelfTest:
    """Compares every op of every available backend with the plain-torch reference on the CPU, on this machine.

    Inputs are small and nasty: odd sizes, empty tensors, views off the 16-byte grid between guards, ties, NaN,
    infinities, denormals, negative zeros, every dtype. Moves and choices must agree bit for bit, optimizer steps within
    one unit in the last place of each result with all other weights bit-identical, sigma to 1e-6.

    Where a kind of device has several backends, those that do not serve in this process are tested in processes of
    their own, unless ``SAFEKERN_BACKEND`` insists on one. Using a CUDA device initialises CUDA in this process.

    Args:
        device: test this device only, such as ``"cpu"`` or ``"cuda:1"``; by default the CPU and, where there is one,
            the current CUDA device.
        quick: leave out the inputs of a few hundred thousand elements and more, for use under a sanitizer. Triton's
            interpreter (``TRITON_INTERPRET=1``) never gets them.

    Returns:
        A result per op, device and backend. A failure raises nothing: look at ``.ok`` or ``.failures``.

    Raises:
        InvalidArgumentError: no such device here, or one of a kind that safekern has no backends for.

    Example:
        >>> import safekern
        >>> safekern.selftest(device="cpu", quick=True).failures
        ()
    """
    checks: list[Check] = []
    for name in _devices(device):
        checks += _checks_here(name, quick=quick)
        kind = torch.device(name).type
        if not os.environ.get("SAFEKERN_BACKEND"):
            served = ops.BACKENDS[kind]
            for backend in backends(kind):
                if backend != served.backend and backend not in served.passed_over:
                    checks += _checks_elsewhere(backend, name, quick=quick)
    return SelfTest(tuple(checks))


def _devices(device: str | torch.device | None) -> list[str]:
    if device is None:
        return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    try:
        asked = torch.device(device)
        known = asked.type in ops.BACKENDS
        if known:
            torch.empty(1, device=asked)
    except (RuntimeError, AssertionError) as error:
        raise InvalidArgumentError(f"device {device} cannot be used here: {first_line(error)}") from error
    if not known:
        raise InvalidArgumentError(f"device {device}: safekern has backends for {', '.join(ops.BACKENDS)} only")
    return [str(asked)]


def _checks_here(device: str, *, quick: bool) -> list[Check]:
    """The checks of the backend that serves a device in this process."""
    kind = torch.device(device).type
    try:
        torch.empty(1, device=device)
    except RuntimeError as error:
        # No kernel's fault.
        reason = f"the device cannot be used: {first_line(error)}"
        return [Check("*", device, ops.BACKENDS[kind].backend, "skipped", 0, reason)]
    checks = []
    for name, op in OPS.items():
        backend = ops.BACKENDS[kind].backend if has_kernel(name, kind) else "torch"
        if backend == "torch" and kind == "cpu":
            checks.append(Check(name, device, backend, "skipped", 0, "it is the reference itself that runs here"))
            continue
        large = not quick and not (backend == "triton" and INTERPRETED)
        cases, problem = _run(op, torch.device(device), large=large)
        checks.append(Check(name, device, backend, "failed" if problem else "passed", cases, problem or ""))
    return checks


def _checks_elsewhere(backend: str, device: str, *, quick: bool) -> list[Check]:
    """The checks of another backend, in a process of its own: a process has one backend for each kind of device."""
    root = str(Path(__file__).parent.parent)
    environment = {
        **os.environ,
        "SAFEKERN_BACKEND": backend,
        "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH")))),
    }
    command = [sys.executable, "-c", _CHILD, device, "quick" if quick else "full"]
    try:
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        return [Check("*", device, backend, "failed", 0, f"its process took longer than {_TIMEOUT} s")]
    for line in reversed(ran.stdout.splitlines()):
        if line.startswith(_OUTPUT_MARK):
            found = json.loads(line.removeprefix(_OUTPUT_MARK))
            if isinstance(found, str):
                return [Check("*", device, backend, "skipped", 0, _one_line(found))]
            return [Check(**check) for check in found]
    said = [line for line in ran.stderr.splitlines() if line.strip()] or ["it said nothing"]
    return [Check("*", device, backend, "failed", 0, f"its process ended with status {ran.returncode}: {said[-1]}")]


def _run(op: Op, device: torch.device, *, large: bool) -> tuple[int, str | None]:
    """How many cases were run, and what went wrong in the first that failed."""
    count = 0
    for case in _made_on_cpu(op.cases(large)):
        for padding in _PADDINGS:
            count += 1
            try:
                with torch.no_grad():
                    problem = _problem(op, case, device, padding)
            except Exception as error:
                problem = f"raises {type(error).__name__}: {_one_line(str(error))}"
            if problem:
                aligned = "aligned" if padding == _PADDINGS[0] else "unaligned"
                return count, f"{case.name}, {aligned}: {problem}"
    return count, None


def _made_on_cpu(cases: Iterable[Case]) -> Iterator[Case]:
    """The cases, made on the CPU and in fp32 whatever the caller's defaults."""
    remaining = iter(cases)
    while True:
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            with torch.device("cpu"):
                case = next(remaining, None)
        finally:
            torch.set_default_dtype(dtype)
        if case is None:
            return
        yield case


def _problem(op: Op, case: Case, device: torch.device, padding: int) -> str | None:
    """What is wrong with what an op does in a case, if anything."""
    guarded: list[Tensor] = []
    arguments = _copied(case.arguments, device, padding, guarded)
    expected = _copied(case.arguments, torch.device("cpu"), 0, [])
    wanted, result = None, None
    if case.refused is None:
        wanted, result = op.reference(*expected), op.call(*arguments)
        _synchronize(device)
    elif problem := _not_refused(op, arguments, case.refused, device):
        return problem
    pairs = [*_tensors(arguments, "argument"), *_tensors((result,), "result")]
    references = [*_tensors(expected, "argument"), *_tensors((wanted,), "result")]
    befores = [*_tensors(case.arguments, "argument"), *_tensors((wanted,), "result")]
    if len(pairs) != len(references):
        return f"gives {len(pairs) - len(references):+} results too many"
    for (place, got), (_, want), (_, before) in zip(pairs, references, befores, strict=True):
        difference = _difference(got.cpu(), want, before, case)
        if difference:
            return f"{place}: {difference}"
    for t, kept in enumerate(case.kept):
        before, after = (_bits(tensors[t].cpu()).view(-1)[kept] for tensors in (case.arguments[0], arguments[0]))
        if not torch.equal(before, after):
            return f"argument 0[{t}]: {int((before != after).sum())} elements changed that had to stay"
    if guarded and bool((torch.cat(guarded) != _PADDING).any()):
        return "writes outside a tensor"
    return None


def _not_refused(op: Op, arguments: Sequence[Any], refused: str, device: torch.device) -> str | None:
    """What is wrong where an op should raise an error with a certain text, if anything."""
    try:
        op.call(*arguments)
        _synchronize(device)
    except RuntimeError as error:
        return None if refused in str(error) else f"is refused with another message: {_one_line(str(error))}"
    return f"is accepted instead of refused ({refused})"


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _copied(value: Any, device: torch.device, padding: int, guarded: list[Tensor]) -> Any:
    """A copy with all tensors on a device, each between ``padding`` elements that are added to ``guarded``."""
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(entry, device, padding, guarded) for entry in value)
    if not isinstance(value, Tensor):
        return value
    around, inside = padding * value.element_size(), value.numel() * value.element_size()
    buffer = torch.full((inside + 2 * around,), _PADDING, dtype=torch.uint8, device=device)
    copy = buffer[around : around + inside].view(value.dtype).view(value.shape)
    copy.copy_(value)
    guarded += [buffer[:around], buffer[around + inside :]]
    return copy


def _tensors(values: Sequence[Any], place: str) -> Iterator[tuple[str, Tensor]]:
    for position, value in enumerate(values):
        here = f"{place} {position}" if place[-1].isalpha() else f"{place}[{position}]"
        if isinstance(value, Tensor):
            yield here, value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value, here)


def _difference(got: Tensor, want: Tensor, before: Tensor, case: Case) -> str | None:
    if got.dtype != want.dtype or got.shape != want.shape:
        return f"is {got.dtype} {tuple(got.shape)} instead of {want.dtype} {tuple(want.shape)}"
    if torch.equal(_bits(got), _bits(want)):
        return None
    wrong = _bits(got) != _bits(want)
    if got.is_floating_point() and not case.verbatim:
        wrong &= ~(got.isnan() & want.isnan())
    if case.relative:
        wrong &= ~((got - want).abs() <= case.relative * want.abs()) & (want.isfinite() | got.isfinite())
    elif case.ulps and got.is_floating_point() and bool(wrong.any()):
        # Of the number before the step too: where an update nearly cancels it, the rest is rounding.
        unit = _spacing(want, before)
        wrong &= ~((got.double() - want.double()).abs() <= case.ulps * unit)
    if not wrong.any():
        return None
    first = int(wrong.view(-1).nonzero()[0])
    value, right = got.reshape(-1)[first].item(), want.reshape(-1)[first].item()
    return f"{int(wrong.sum()):,} of {got.numel():,} elements differ, first at {first}: {value!r} instead of {right!r}"


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(INTEGERS[tensor.element_size()])


def _spacing(*tensors: Tensor) -> Tensor:
    """The unit in the last place of the largest of several numbers, element by element."""
    info = torch.finfo(tensors[0].dtype)
    largest = torch.stack([tensor.double().abs() for tensor in tensors]).amax(0)
    return torch.ldexp(torch.full_like(largest, info.eps), largest.frexp().exponent - 1).clamp(min=info.tiny * info.eps)


def _one_line(text: str) -> str:
    lines = text.strip().splitlines() or [""]
    return lines[0][:200]
