"""Positions past 2^31 in one tensor, as fused expert weights have: on the CPU, in memory mostly never touched."""

import mmap

import pytest
import torch

from safekern import Mask, Scores, ops
from safekern.ops.registry import OPS

pytestmark = pytest.mark.full

NUMEL = 2**31 + 4099
PLACES = torch.tensor([0, 2**31 - 1, 2**31, 2**31 + 7, NUMEL - 1])
# What int32 would make of the last three.
WRAPPED = [NUMEL - 1 - 2**31, 7]


@pytest.fixture
def param():
    # Anonymous memory, which the system clears page by page as it is touched; torch.zeros would write all of it.
    memory = mmap.mmap(-1, NUMEL * 2)
    return torch.frombuffer(memory, dtype=torch.bfloat16)


@pytest.fixture(params=["torch", "kernels"])
def run(request):
    if request.param == "kernels" and ops.BACKENDS["cpu"].backend == "torch":
        pytest.skip("the compiled CPU kernels are not installed")
    return {name: op.reference if request.param == "torch" else op.call for name, op in OPS.items()}


def test_scattered_ops(run, param):
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]).bfloat16()
    run["restore_"]([param], [PLACES], [values])
    assert param[PLACES].tolist() == [1, 2, 3, 4, 5] and param[WRAPPED].tolist() == [0, 0]
    assert run["count_changed"]([param], [PLACES], [values]).tolist() == [0]
    out, flag = torch.empty(5), torch.zeros(1, dtype=torch.bool)
    run["gather_"]([out], [param], [PLACES], flag)
    assert out.tolist() == [1, 2, 3, 4, 5]
    run["perturb_"]([param], [PLACES], [1.0], [3], 0)
    assert run["count_changed"]([param], [PLACES], [values]).item() >= 4
    # The noise depends on all bits of the position.
    low = torch.zeros(NUMEL - 2**31, dtype=torch.bfloat16)
    run["perturb_"]([low], [PLACES[3:] - 2**31], [1.0], [3], 0)
    assert not torch.equal(low[PLACES[3:] - 2**31], param[PLACES[3:]] - values[3:])
    run["restore_"]([param], [PLACES], [values])
    state, masters = [torch.zeros(5) for _ in range(2)], [values.float()]
    steps = ([0.5], [1.0], 0.9, 0.999, 1e-8, 1.0)
    run["set_adamw_"]([param], [torch.ones(5)], [PLACES], state[:1], state[1:], masters, *steps)
    assert (param[PLACES] < values).all() and param[WRAPPED].tolist() == [0, 0]


def test_masks(tmp_path):
    mask = Mask.from_indices({"experts": PLACES}, {"experts": (NUMEL,)})
    mask.save(tmp_path / "mask.safetensors")
    assert torch.equal(Mask.load(tmp_path / "mask.safetensors")["experts"], PLACES)


def test_ranking_with_a_sigma_per_expert():
    shape = (3, 2**15, 2**15 + 1)
    numel = shape[0] * shape[1] * shape[2]
    gradient = torch.frombuffer(mmap.mmap(-1, numel * 4), dtype=torch.float32).view(shape)
    places = torch.tensor([5, 2**31 - 1, 2**31 + 7, numel - 1])
    gradient.view(-1)[places] = torch.tensor([1.0, 1.0, 2.0, 1.0])
    # The first expert's largest gradient ranks below those of the others.
    sigma = torch.tensor([0.5, 1.0, 1.0]).view(3, 1, 1)
    name = "layers.0.experts.down_proj"
    scores = Scores({name: gradient}, {name: sigma}, num_batches=1, model_numel=numel, meta={})
    assert scores.top(3.5 / numel)[name].tolist() == places[1:].tolist()
