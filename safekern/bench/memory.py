"""Memory of whole processes: what training takes above the model, with safekern and with others.

Every method runs in a process of its own (``python -m safekern.bench.memory METHOD ...``), on a random-initialised bf16
model in the shape of Llama, and reports how far its resident memory rose above what it was with the model alone.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

import safekern
from safekern.bench import baselines, measure
from safekern.bench.models import llama, token_batches
from safekern.errors import BenchmarkError

# Per weight: the bf16 weight and, in methods that keep them, its bf16 gradient.
_WEIGHT, _GRADIENT = 2, 2


@dataclass(frozen=True)
class Usage:
    """What a method takes.

    Attributes:
        method: its name.
        what: what it is.
        source: ``"measured"``, or why it was computed instead.
        params: weights of the model.
        selected: weights in the mask, 0 without one.
        state_bytes: what is held between steps, weights and gradients apart.
        peak_bytes: the peak of resident memory above the model; 0 where it did not run.
    """

    method: str
    what: str
    source: str
    params: int
    selected: int
    state_bytes: int
    peak_bytes: int


@dataclass(frozen=True)
class _Method:
    what: str
    # For deciding whether to try it: bytes per weight of the model, above the model.
    estimate: float
    run: Callable[[Any, list[dict[str, Tensor]], float, float | None], tuple[int, int]] | None
    computed: str = ""


def _mask(model: Any, ratio: float) -> safekern.Mask:
    """A random mask: which weights are selected makes no difference to memory."""
    generator = torch.Generator().manual_seed(0)
    indices, shapes = {}, {}
    for name, param in model.named_parameters():
        count = int(ratio * param.numel()) if param.ndim == 2 else 0
        drawn = torch.randint(param.numel(), (count,), generator=generator)
        indices[name], shapes[name] = drawn.unique(), param.shape
    return safekern.Mask.from_indices(indices, shapes)


def _steps(model: Any, batches: list[dict[str, Tensor]], step: Callable[[], object]) -> None:
    for batch in batches:
        model(**batch).loss.backward()
        step()
        model.zero_grad()


def _score(model: Any, batches: list[dict[str, Tensor]], ratio: float, memory: float | None) -> tuple[int, int]:
    mask = safekern.score(model, batches[:1], memory=memory, keep=ratio).top(ratio)
    return sum(mask.compact(name).nbytes for name in mask), mask.numel


def _held(optimizer: torch.optim.Optimizer) -> int:
    return sum(v.nbytes for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor))


def _set(model: Any, batches: list[dict[str, Tensor]], ratio: float, memory: float | None) -> tuple[int, int]:
    return _set_steps(model, batches, _mask(model, ratio))


def _score_and_set(model: Any, batches: list[dict[str, Tensor]], ratio: float, memory: float | None) -> tuple[int, int]:
    return _set_steps(model, batches, safekern.score(model, batches[:1], memory=memory, keep=ratio).top(ratio))


def _set_steps(model: Any, batches: list[dict[str, Tensor]], mask: safekern.Mask) -> tuple[int, int]:
    optimizer = safekern.SETAdamW(model.named_parameters(), mask, lr=1e-4, in_backward=True)
    _steps(model, batches, optimizer.step)
    return _held(optimizer) + sum(mask.compact(name).nbytes for name in mask), mask.numel


def _spa(dtype: torch.dtype | None) -> Callable[..., tuple[int, int]]:
    def run(model: Any, batches: list[dict[str, Tensor]], ratio: float, memory: float | None) -> tuple[int, int]:
        mask = _mask(model, ratio)
        optimizer = safekern.SPAAdamW(model.named_parameters(), mask, lr=1e-5, state_dtype=dtype)
        _steps(model, batches, optimizer.step)
        # Its state is for all weights but the selected.
        return _held(optimizer) + sum(mask.compact(name).nbytes for name in mask), 0

    return run


def _adamw(model: Any, batches: list[dict[str, Tensor]], ratio: float, memory: float | None) -> tuple[int, int]:
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    _steps(model, batches, optimizer.step)
    return _held(optimizer), 0


def _adamw_fp32(model: Any, batches: list[dict[str, Tensor]], ratio: float, memory: float | None) -> tuple[int, int]:
    params = list(model.parameters())
    masters = [torch.nn.Parameter(param.detach().float()) for param in params]
    optimizer = torch.optim.AdamW(masters, fused=True)

    def step() -> None:
        for param, master in zip(params, masters, strict=True):
            # Each bf16 gradient goes as its fp32 copy comes.
            master.grad, param.grad = (None if param.grad is None else param.grad.float()), None
        optimizer.step()
        with torch.no_grad():
            for param, master in zip(params, masters, strict=True):
                param.copy_(master)
        optimizer.zero_grad()

    _steps(model, batches, step)
    return _held(optimizer) + sum(master.nbytes for master in masters), 0


def _dense_mask(model: Any, batches: list[dict[str, Tensor]], ratio: float, memory: float | None) -> tuple[int, int]:
    mask, params = _mask(model, ratio), dict(model.named_parameters())
    masks = [mask.bool(n).float() if n in mask else torch.zeros(p.shape) for n, p in params.items()]
    optimizer = baselines.DenseMaskAdamW(params.values(), masks)
    _steps(model, batches, optimizer.step)
    return _held(optimizer) + sum(m.nbytes for m in masks), mask.numel


METHODS = {
    "score + top": _Method("fp32 accumulators, or what --score-memory says, and the mask", 5, _score),
    "SETAdamW": _Method("SET steps with in_backward=True", 1, _set),
    "score + top + SETAdamW": _Method("all of SET in one process", 5, _score_and_set),
    "SPAAdamW": _Method("moments in bf16", _GRADIENT + 4, _spa(None)),
    "SPAAdamW, fp32 state": _Method("moments in fp32", _GRADIENT + 8, _spa(torch.float32)),
    "AdamW, bf16 state": _Method("torch.optim.AdamW(fused=True) on the bf16 weights", _GRADIENT + 4, _adamw),
    "AdamW, fp32 state": _Method(
        "fp32 masters, moments and gradients beside the bf16 model: mixed precision as usual", 16, _adamw_fp32
    ),
    "AdamW, 8 bit": _Method(
        "bitsandbytes' AdamW8bit",
        _GRADIENT + 2 + 8 / 256,
        None,
        "computed: two 8-bit moments, each with an fp32 scale per block of 256",
    ),
    "dense mask": _Method(
        "dense bf16 moments and a dense fp32 mask, as published research code does it", _GRADIENT + 12, _dense_mask
    ),
}


def measure_memory(
    params: float, *, ratio: float = 0.01, steps: int = 2, score_memory: float | None = None
) -> list[Usage]:
    """Runs every method in a process of its own.

    A method that is going to need more than this machine has left is not started, and says so.

    Args:
        params: size of the model.
        ratio: of the mask.
        steps: training steps.
        score_memory: ``memory`` of :func:`safekern.score`.

    Raises:
        BenchmarkError: a method failed for another reason than memory.
    """
    return [_usage(name, int(params), ratio, steps, score_memory) for name in METHODS]


def _usage(name: str, params: int, ratio: float, steps: int, score_memory: float | None) -> Usage:
    method = METHODS[name]
    need = int(params * (method.estimate + _WEIGHT))
    computed = Usage(name, method.what, method.computed, params, 0, int(params * (method.estimate - _GRADIENT)), 0)
    if method.run is None:
        return computed
    left = measure.available_memory()
    # Methods of safekern that can live with less are tried all the same.
    if need > left and not (score_memory and method.run in (_score, _score_and_set)):
        why = f"does not fit: needs about {need / 1e9:.1f} GB, {left / 1e9:.1f} GB are free"
        return Usage(name, method.what, why, params, 0, 0, 0)
    command = [sys.executable, "-m", "safekern.bench.memory", name, str(params), str(ratio), str(steps)]
    command += [str(score_memory)] if score_memory else []
    # With the system's allocator as it is: told to keep freed memory, it would count that as used.
    environment = {key: value for key, value in os.environ.items() if key not in measure.ALLOCATOR}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    if ran.returncode == -signal.SIGKILL:
        return Usage(name, method.what, "does not fit: killed for memory", params, 0, 0, 0)
    if ran.returncode:
        raise BenchmarkError(f"{name} failed: {ran.stderr.strip().splitlines()[-1:]}")
    return Usage(**json.loads(ran.stdout.splitlines()[-1]))


def table(usages: list[Usage]) -> str:
    """The usages for people."""
    params = max(usage.params for usage in usages)
    lines = [
        f"a model of {params:,} bf16 weights; what each method takes above it",
        f"{'':24}{'state B/param':>14}{'B/selected':>12}{'peak B/param':>14}{'peak GB':>10}",
    ]
    for usage in usages:
        selected = f"{usage.state_bytes / usage.selected:.2f}" if usage.selected else ""
        state = f"{usage.state_bytes / usage.params:.3f}" if usage.state_bytes else ""
        peak = f"{usage.peak_bytes / usage.params:.2f}" if usage.peak_bytes else ""
        gigabytes = f"{usage.peak_bytes / 1e9:.2f}" if usage.peak_bytes else ""
        source = f" ({usage.source})" if usage.source != "measured" else ""
        lines.append(f"{usage.method:24}{state:>14}{selected:>12}{peak:>14}{gigabytes:>10}  {usage.what}{source}")
    return "\n".join(lines)


def _main(name: str, params: str, ratio: str, steps: str, score_memory: str = "") -> None:
    method = METHODS[name]
    assert method.run is not None
    torch.manual_seed(0)
    model = llama(float(params), torch.bfloat16)
    batches = token_batches(model, count=int(steps), examples=1, tokens=32)
    numel = sum(param.numel() for param in model.parameters())
    with measure.ResidentPeak() as peak:
        state, selected = method.run(model, batches, float(ratio), float(score_memory) if score_memory else None)
    usage = Usage(name, method.what, "measured", numel, selected, state, peak.bytes or 0)
    print(json.dumps(asdict(usage)))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    _main(*sys.argv[1:])
