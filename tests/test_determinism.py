"""From gradients to trained weights: the same bits on every number of threads and every instruction set.

This file, run as a program, prints what the whole way gives.
"""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import safekern
from safekern import ops

THREADS = (1, 2, 3)
# The last one is cut into several chunks by every kernel, and sampled by the selection.
SHAPES = {"small": (3, 5), "middle": (67, 129), "large": (513, 1025)}


class Weights(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in SHAPES.items():
            setattr(self, name, nn.Parameter(torch.randn(shape, generator=generator).mul(0.05).to(dtype)))


def given_gradients(model, seed):
    """A loss whose gradients are random numbers that no matrix product, of torch's making, has a part in."""
    generator = torch.Generator().manual_seed(seed)
    given = {name: torch.randn(param.shape, generator=generator) for name, param in model.named_parameters()}
    return sum((model.get_parameter(name) * values.to(model.large.dtype)).sum() for name, values in given.items())


def digest(tensors: list[Tensor]) -> str:
    return hashlib.sha256(
        b"".join(t.detach().flatten().view(torch.uint8).numpy().tobytes() for t in tensors)
    ).hexdigest()


def way(dtype: torch.dtype) -> list[str]:
    """Score, mask, noise, SET steps in both modes and SPA steps on what these left."""
    model = Weights(dtype)
    scores = safekern.score(model, [1, 2, 3], given_gradients)
    mask = scores.top(0.01)
    results = {"scores": list(scores.values()), "mask": list(mask.values())}
    with safekern.perturb(model, mask):
        results["noise"] = [param.detach().clone() for param in model.parameters()]
    for name, make in {
        "SET": lambda: safekern.SETAdamW(model.named_parameters(), mask),
        "SET in backward": lambda: safekern.SETAdamW(model.named_parameters(), mask, in_backward=True),
        "SPA": lambda: safekern.SPAAdamW(model.named_parameters(), mask),
    }.items():
        optimizer = make()
        for step in range(3):
            optimizer.zero_grad()
            given_gradients(model, step).backward()
            optimizer.step()
        state = [value for param in model.parameters() for value in optimizer.state[param].values()]
        results[name] = [*(param.detach().clone() for param in model.parameters()), *state]
        optimizer.zero_grad()
        # With it go its hooks.
        del optimizer
    return [f"{str(dtype).removeprefix('torch.')} {name} {digest(tensors)}" for name, tensors in results.items()]


def report() -> list[str]:
    found = []
    for threads in THREADS:
        torch.set_num_threads(threads)
        found.append([line for dtype in (torch.float32, torch.bfloat16) for line in way(dtype)])
    return ["\n".join(lines) for lines in found]


def with_capability(name):
    environment = {**os.environ, "SAFEKERN_CPU_CAPABILITY": name, "SAFEKERN_BACKEND": "cpu"}
    ran = subprocess.run(
        [sys.executable, "-m", "tests.test_determinism"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(__file__).parent.parent,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.rstrip("\n").split("\n\n")


def test_the_whole_way_is_the_same_everywhere():
    if ops.BACKENDS["cpu"].backend != "cpu":
        pytest.skip("the compiled CPU kernels are not installed")
    widest_first = ["avx512", "avx2", "sse2"]
    if ops.cpu_capability() not in widest_first:
        pytest.skip("this processor has no choice of instruction sets")
    names = widest_first[widest_first.index(ops.cpu_capability()) :]
    reports = {(name, t): lines for name in names for t, lines in zip(THREADS, with_capability(name), strict=True)}
    want = reports["sse2", 1]
    assert len(want.splitlines()) == 2 * 6
    assert {where: lines for where, lines in reports.items() if lines != want} == {}


if __name__ == "__main__":
    print("\n\n".join(report()))
