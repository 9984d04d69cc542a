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
from functools import partial
from typing import Any

import torch
from torch import Tensor

import safekern
from safekern.bench import baselines, measure
from safekern.bench.measure import index_bytes, state_bytes
from safekern.bench.models import llama, token_batches
from safekern.errors import BenchmarkError
from safekern.tables import Column, Table

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
class _Task:
    """What a method is given.

    Attributes:
        model: bf16, to be trained in place.
        batches: one per training step.
        ratio: of the mask.
        memory: of :func:`safekern.score`.
    """

    model: Any
    batches: list[dict[str, Tensor]]
    ratio: float
    memory: float | None

    def random_mask(self) -> safekern.Mask:
        """Which weights are selected makes no difference to memory."""
        generator = torch.Generator().manual_seed(0)
        indices, shapes = {}, {}
        for name, param in self.model.named_parameters():
            count = int(self.ratio * param.numel()) if param.ndim == 2 else 0
            drawn = torch.randint(param.numel(), (count,), generator=generator)
            indices[name], shapes[name] = drawn.unique(), param.shape
        return safekern.Mask.from_indices(indices, shapes)

    def top_mask(self) -> safekern.Mask:
        """The mask that scoring one batch gives."""
        return safekern.score(self.model, self.batches[:1], memory=self.memory, keep=self.ratio).top(self.ratio)

    def train(self, update: measure.Run) -> None:
        """Takes a step on every batch."""
        for batch in self.batches:
            self.model(**batch).loss.backward()
            update()
            self.model.zero_grad()


@dataclass(frozen=True)
class _Method:
    """A way to train or score.

    Attributes:
        what: for tables.
        estimate: bytes per weight of the model, above the model, for deciding whether to try it.
        run: does it, and gives the bytes held between steps and the weights in the mask; None where it is not measured.
        bounded: whether it takes less where ``memory`` of the task says so.
        computed: where the figures come from instead.
    """

    what: str
    estimate: float
    run: Callable[[_Task], tuple[int, int]] | None
    bounded: bool = False
    computed: str = ""


def _score(task: _Task) -> tuple[int, int]:
    mask = task.top_mask()
    return index_bytes(mask), mask.numel


def _set(task: _Task) -> tuple[int, int]:
    return _set_steps(task, task.random_mask())


def _score_and_set(task: _Task) -> tuple[int, int]:
    return _set_steps(task, task.top_mask())


def _set_steps(task: _Task, mask: safekern.Mask) -> tuple[int, int]:
    optimizer = safekern.SETAdamW(task.model.named_parameters(), mask, lr=1e-4, in_backward=True)
    task.train(optimizer.step)
    return state_bytes(optimizer) + index_bytes(mask), mask.numel


def _spa(task: _Task, dtype: torch.dtype | None) -> tuple[int, int]:
    mask = task.random_mask()
    optimizer = safekern.SPAAdamW(task.model.named_parameters(), mask, lr=1e-5, state_dtype=dtype)
    task.train(optimizer.step)
    # Its state is for all weights but the selected.
    return state_bytes(optimizer) + index_bytes(mask), 0


def _adamw(task: _Task) -> tuple[int, int]:
    optimizer = torch.optim.AdamW(task.model.parameters(), fused=True)
    task.train(optimizer.step)
    return state_bytes(optimizer), 0


def _adamw_fp32(task: _Task) -> tuple[int, int]:
    params = list(task.model.parameters())
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

    task.train(step)
    return state_bytes(optimizer, masters), 0


def _dense_mask(task: _Task) -> tuple[int, int]:
    mask, params = task.random_mask(), dict(task.model.named_parameters())
    masks = baselines.dense_masks(mask, params)
    optimizer = baselines.DenseMaskAdamW(params.values(), masks)
    task.train(optimizer.step)
    return state_bytes(optimizer, masks), mask.numel


METHODS = {
    "score + top": _Method("fp32 accumulators, or what --score-memory says, and the mask", 5, _score, bounded=True),
    "SETAdamW": _Method("SET steps with in_backward=True", 1, _set),
    "score + top + SETAdamW": _Method("all of SET in one process", 5, _score_and_set, bounded=True),
    "SPAAdamW": _Method("moments in bf16", _GRADIENT + 4, partial(_spa, dtype=None)),
    "SPAAdamW, fp32 state": _Method("moments in fp32", _GRADIENT + 8, partial(_spa, dtype=torch.float32)),
    "AdamW, bf16 state": _Method("torch.optim.AdamW(fused=True) on the bf16 weights", _GRADIENT + 4, _adamw),
    "AdamW, fp32 state": _Method(
        "fp32 masters, moments and gradients beside the bf16 model: mixed precision as usual", 16, _adamw_fp32
    ),
    "AdamW, 8 bit": _Method(
        "bitsandbytes' AdamW8bit",
        _GRADIENT + 2 + 8 / 256,
        None,
        computed="computed: two 8-bit moments, each with an fp32 scale per block of 256",
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
    if need > left and not (score_memory and method.bounded):
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
        said = ran.stderr.strip().splitlines() or ["it said nothing"]
        raise BenchmarkError(f"{name} failed: {said[-1]}")
    return Usage(**json.loads(ran.stdout.splitlines()[-1]))


def table(usages: list[Usage]) -> str:
    """The usages for people."""
    columns = [
        Column("method"),
        Column("state", "{:.3f}", "state B/param"),
        Column("selected", "{:.2f}", "B/selected"),
        Column("peak", "{:.2f}", "peak B/param"),
        Column("peak_gb", "{:.2f}", "peak GB"),
        Column("what"),
    ]
    rows = [
        (
            usage.method,
            usage.state_bytes / usage.params if usage.state_bytes else None,
            usage.state_bytes / usage.selected if usage.selected else None,
            usage.peak_bytes / usage.params if usage.peak_bytes else None,
            usage.peak_bytes / 1e9 if usage.peak_bytes else None,
            usage.what if usage.source == "measured" else f"{usage.what} ({usage.source})",
        )
        for usage in usages
    ]
    params = max(usage.params for usage in usages)
    return f"a model of {params:,} bf16 weights; what each method takes above it\n{Table(columns, rows)}"


def _main(name: str, params: str, ratio: str, steps: str, score_memory: str = "") -> None:
    method = METHODS[name]
    assert method.run is not None
    torch.manual_seed(0)
    model = llama(float(params), torch.bfloat16)
    batches = token_batches(model, count=int(steps), examples=1, tokens=32)
    numel = sum(param.numel() for param in model.parameters())
    with measure.ResidentPeak() as peak:
        state, selected = method.run(_Task(model, batches, float(ratio), float(score_memory) if score_memory else None))
    usage = Usage(name, method.what, "measured", numel, selected, state, peak.bytes or 0)
    print(json.dumps(asdict(usage)))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    _main(*sys.argv[1:])
