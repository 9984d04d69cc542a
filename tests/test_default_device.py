"""A model on the CPU works while torch's default device or dtype is another, as after ``set_default_device("cuda")``.

The meta device stands for it here: it is always there, and a tensor that was made on it by mistake cannot be computed.
"""

import subprocess
import sys
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import islice

import pytest
import torch
from language_models import byte_tokenizer, tiny_llama
from small_net import Net, full_mask, random_mask

import safekern
from safekern.evaluation import mean_nll
from safekern.sharding import Shard


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.fixture(
    params=[
        partial(torch.device, "meta"),
        *(partial(default_dtype, dtype) for dtype in (torch.bfloat16, torch.float64)),
    ],
    ids=["device", "bfloat16", "float64"],
)
def otherwise(request):
    """Makes a context in which torch's defaults are others."""
    return request.param


@pytest.fixture
def model():
    return Net(torch.bfloat16)


@pytest.fixture
def mask(model):
    return random_mask(model)


@pytest.fixture
def batches():
    return [torch.randn(8, 13) for _ in range(2)]


def objective(model, batch):
    return model(batch).float().square().mean()


def train(model, optimizer, batches):
    before = [param.detach().clone() for param in model.parameters()]
    for batch in batches:
        objective(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert any(not torch.equal(param, old) for param, old in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("in_backward", [False, True])
def test_set_adamw(otherwise, model, mask, batches, in_backward, transposed):
    if transposed:
        model.first.weight.data = model.first.weight.data.t().contiguous().t()
    with otherwise():
        optimizer = safekern.SETAdamW(model.named_parameters(), mask, in_backward=in_backward)
        train(model, optimizer, batches)
        optimizer.load_state_dict(optimizer.state_dict())
        train(model, optimizer, batches)
    assert all(value.device.type == "cpu" for state in optimizer.state.values() for value in state.values())


def test_spa_adamw(otherwise, model, mask, batches):
    with otherwise():
        optimizer = safekern.SPAAdamW(model.named_parameters(), mask)
        train(model, optimizer, batches)
        optimizer.load_state_dict(optimizer.state_dict())
        train(model, optimizer, batches)


def test_protect(otherwise, model, mask, batches):
    with otherwise():
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with safekern.protect(optimizer, mask, model.named_parameters()):
            train(model, optimizer, batches)


def test_perturb(otherwise, model, mask):
    before = model.first.weight.detach().clone()
    with otherwise(), safekern.perturb(model, mask):
        assert not torch.equal(model.first.weight, before)
    assert torch.equal(model.first.weight, before)


def test_score_and_masks(otherwise, model, batches, tmp_path):
    with otherwise():
        scores = safekern.score(model, batches, objective)
        scores.save(tmp_path / "scores.safetensors")
        loaded = safekern.Scores.load(tmp_path / "scores.safetensors")
        masks = [loaded.top(0.1), loaded.bottom(0.1, per="tensor"), loaded.random(0.1)]
        for mask in masks:
            mask.save(tmp_path / "mask.safetensors")
            assert safekern.Mask.load(tmp_path / "mask.safetensors") == mask
            assert all(mask.bool(name).device.type == "cpu" for name in mask)
        assert masks[0] == scores.top(0.1)
        assert scores.report().distribution.total == pytest.approx(scores.selected(scores.top(1.0)).total)
        assert safekern.Mask.from_indices({"w": [1, 3]}, {"w": (2, 2)}).numel == 2
    assert full_mask(model).numel == scores.model_numel


def test_steps_are_counted_beyond_256(otherwise):
    weight = torch.nn.Parameter(torch.zeros(4))
    mask = safekern.Mask.from_indices({"w": range(4)}, {"w": (4,)})
    with otherwise():
        optimizer = safekern.SETAdamW([("w", weight)], mask)
        for _ in range(300):
            weight.grad = torch.ones(4, dtype=torch.float32, device="cpu")
            optimizer.step()
    assert optimizer.state[weight]["step"] == 300


def test_language_models(otherwise):
    tokenizer, model, guard = byte_tokenizer(), tiny_llama(), tiny_llama()
    pairs = safekern.prompts.builtin("harmful", "tune")[:4]
    found = []
    for context in (nullcontext, otherwise):
        with context():
            batches = list(islice(safekern.training.shuffled(tokenizer, pairs, 2, seed=0), 2))
            assert all(tensor.device.type == "cpu" for batch in batches for tensor in batch.values())
            answers = safekern.attack_success_rate(model, tokenizer, pairs.prompts, max_new_tokens=4).responses
            nll = mean_nll(model, tokenizer, pairs.prompts, pairs.responses)
            judge = safekern.objectives.GuardJudge(guard, tokenizer, tokenizer, max_new_tokens=4, sample=True)
            scores = safekern.score(model, [pairs.prompts], judge)
        found.append((answers, nll, scores.top(0.01)))
    assert found[0] == found[1]


def test_shards(otherwise):
    with otherwise():
        shard = Shard(torch.Size((4, 4)), (0, 2), (4, 2), True)
        places = shard.inside(torch.tensor([0, 2, 3, 6, 9], dtype=torch.int32, device="cpu"))
    assert places.tolist() == [1, 2, 3]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_selftest_does_not_blame_kernels_for_a_default_dtype(dtype):
    with default_dtype(dtype):
        assert not safekern.selftest(device="cpu", quick=True).failures


def test_the_first_import_may_be_on_another_device():
    code = """
import torch
with torch.device("meta"):
    import safekern
weight = torch.nn.Parameter(torch.zeros(4))
mask = safekern.Mask.from_indices({"w": [0]}, {"w": (4,)})
for make in (safekern.SETAdamW, safekern.SPAAdamW):
    optimizer = make([("w", weight)], mask)
    for _ in range(2):
        weight.grad = torch.ones(4)
        optimizer.step()
    assert optimizer.state[weight]["step"] == 2
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
