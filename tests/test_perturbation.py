"""perturb: noise on the masked weights inside the block, the exact bits after it."""

import pytest
import torch
from small_net import MASKED, Net, bits, full_mask, loss_of, random_mask, weights
from torch import nn

import safekern
from safekern import (
    InvalidArgumentError,
    Mask,
    MaskMismatchError,
    NonFiniteError,
    ProtectionError,
    SETAdamW,
    ops,
    perturb,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def assert_weights(model, expected):
    for name, want in expected.items():
        assert torch.equal(bits(model.get_parameter(name)), want), name


def values(model):
    return {name: param.detach().double().clone() for name, param in model.named_parameters()}


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_masked_weights_move_and_all_come_back(dtype):
    model = Net(dtype)
    with torch.no_grad():
        model.first.weight.view(-1)[:3] = torch.tensor([-0.0, 1e-7, 3.0])
    mask = random_mask(model) | Mask.from_indices({"first.weight": [0, 1, 2]}, {"first.weight": (37, 13)})
    before = weights(model)
    with perturb(model, mask, noise=0.5):
        for name, param in model.named_parameters():
            moved = torch.zeros(param.numel(), dtype=torch.bool)
            moved[mask.get(name, torch.empty(0, dtype=torch.int64))] = True
            changed = (bits(param) != before[name]).view(-1)
            assert not (changed & ~moved).any()
            assert changed.sum() >= 0.9 * moved.sum()
    assert_weights(model, before)


def test_an_autocast_around_it_sees_the_noise_and_its_end():
    model, batch = Net(torch.float32), torch.randn(4, 13)
    with torch.autocast("cpu", torch.bfloat16):
        clean = model(batch)
        with perturb(model, full_mask(model), noise=3.0):
            assert not torch.equal(model(batch), clean)
        assert torch.equal(model(batch), clean)


def test_noise_has_the_standard_deviation_asked_for():
    model = nn.Sequential(nn.Linear(300, 400, bias=False), nn.Linear(400, 300, bias=False)).double()
    with torch.no_grad():
        model[1].weight.mul_(50).add_(3)
    before = values(model)
    with perturb(model, full_mask(model), noise=0.38):
        noise = {name: param.detach() - before[name] for name, param in model.named_parameters()}
    for name, added in noise.items():
        assert added.std() / before[name].std() == pytest.approx(0.38, rel=0.01)
        assert abs(added.mean()) < 4 * added.std() / 120_000**0.5
    one, other = (added.flatten() / added.std() for added in noise.values())
    assert abs((one * other).mean()) < 4 / 120_000**0.5


def test_noise_of_a_weight_depends_on_seed_name_and_index_alone():
    model, wide, narrow = Net(), full_mask(Net()), random_mask(Net(), names=MASKED[::-1])
    before = values(model)
    with perturb(model, wide, seed=3):
        reference = values(model)
    with perturb(model, narrow, seed=3):
        got = values(model)
    for name in narrow:
        index = narrow[name]
        assert torch.equal(got[name].view(-1)[index], reference[name].view(-1)[index])
    with perturb(nn.DataParallel(model), wide, seed=3):
        assert all(torch.equal(value, reference[name]) for name, value in values(model).items())
    with perturb(model, wide, seed=4):
        assert all(not torch.equal(values(model)[name], reference[name]) for name in MASKED)
    assert all(torch.equal(value, before[name]) for name, value in values(model).items())


def test_the_same_noise_in_every_version():
    # Published results refer to a seed, so its noise must stay what it is.
    layer = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -1.0], [1.0, -1.0]]))
    with perturb(layer, full_mask(layer), noise=1.0, seed=0):
        noise = (layer.weight.detach() - torch.tensor([[1.0, -1.0], [1.0, -1.0]])).flatten()
    want = ops.sigma([layer.weight.detach()]) * torch.tensor([-0.1875062, 0.6153125, 0.7292203, 0.0718569])
    torch.testing.assert_close(noise, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
def test_restores_after_an_exception(error):
    model = Net()
    before = weights(model)
    with pytest.raises(error), perturb(model, full_mask(model)):
        raise error
    assert_weights(model, before)


@pytest.mark.parametrize("after", [False, True])
def test_restores_when_adding_the_noise_is_interrupted(monkeypatch, after):
    model = Net()
    before = weights(model)
    perturb_ = ops.perturb_

    def interrupted(*arguments):
        if after:
            perturb_(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(ops, "perturb_", interrupted)
    with pytest.raises(KeyboardInterrupt), perturb(model, full_mask(model)):
        pytest.fail("the block must not run")
    assert_weights(model, before)


def test_nested_blocks_restore_in_turn():
    model = Net(torch.bfloat16)
    outer, inner = random_mask(model, 0.6), random_mask(model, 0.6, seed=2)
    before = weights(model)
    with perturb(model, outer, seed=1):
        noisy = weights(model)
        with perturb(model, inner, seed=1):
            assert not torch.equal(bits(model.first.weight), noisy["first.weight"])
        assert_weights(model, noisy)
        with pytest.raises(ValueError), perturb(model, inner, seed=2):
            raise ValueError
        assert_weights(model, noisy)
    assert_weights(model, before)


def test_training_inside_keeps_what_is_not_masked():
    model = Net()
    mask, rest = random_mask(model), None
    before = weights(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with perturb(model, mask):
        loss_of(model, 0).backward()
        optimizer.step()
        trained = weights(model)
    for name, param in model.named_parameters():
        masked = torch.zeros(param.shape, dtype=torch.bool)
        if name in mask:
            masked = mask.bool(name)
        want = torch.where(masked, before[name], trained[name])
        assert torch.equal(bits(param), want)
        rest = rest or bool((want != before[name]).any())
    assert rest


def test_a_masked_optimizer_takes_the_noise_as_the_new_weights_and_then_the_old_ones():
    model = Net(torch.bfloat16)
    mask = random_mask(model)
    optimizer = SETAdamW(model.named_parameters(), mask, lr=0.0)
    before = weights(model)
    with perturb(model, mask):
        noisy = weights(model)
        loss_of(model, 0).backward()
        optimizer.step()
        assert_weights(model, noisy)
    optimizer.step()
    assert_weights(model, before)


def test_a_graph_from_before_the_noise_or_the_restoring_does_not_go_on():
    model = Net()
    loss = loss_of(model, 0)
    with perturb(model, full_mask(model)):
        inside = loss_of(model, 0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        inside.backward()


@pytest.mark.parametrize("names", [("a.weight",), ("b.weight",), ("a.weight", "b.weight")])
def test_tied_weights_get_noise_once(names):
    model = nn.ModuleDict({"a": nn.Embedding(50, 40), "b": nn.Linear(40, 50, bias=False)})
    model["b"].weight = model["a"].weight
    mask = Mask.from_bool({name: torch.ones(50, 40, dtype=torch.bool) for name in names})
    before = model["a"].weight.detach().clone()
    with perturb(model, mask, noise=0.5):
        assert (model["a"].weight.detach() - before).std() / before.std() == pytest.approx(0.5, rel=0.1)
    assert torch.equal(model["a"].weight, before)


def test_frozen_models_and_modes_without_gradients():
    model = Net().requires_grad_(False)
    before = weights(model)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), perturb(model, full_mask(model)):
            assert not torch.equal(bits(model.first.weight), before["first.weight"])
        with perturb(model, full_mask(model)), mode():
            assert not torch.equal(bits(model.first.weight), before["first.weight"])
        assert_weights(model, before)


def test_no_noise_and_constant_tensors_change_nothing():
    model = Net()
    nn.init.constant_(model.second.weight, 0.25)
    before = weights(model)
    with perturb(model, full_mask(model), noise=0):
        assert_weights(model, before)
    with perturb(model, random_mask(model, names=("second.weight",))):
        assert_weights(model, before)


@pytest.mark.parametrize("noise", [-0.1, float("nan"), float("inf"), 1e41, "0.4", None, torch.tensor(0.38)])
def test_refuses_noise_that_means_nothing(noise):
    model = Net()
    before = weights(model)
    with pytest.raises(InvalidArgumentError, match="noise"), perturb(model, full_mask(model), noise=noise):
        pytest.fail("the block must not run")
    assert_weights(model, before)


@pytest.mark.parametrize("seed", [2**63, -(2**63) - 1, 0.5, None])
def test_refuses_seeds_that_are_not_64_bits(seed):
    model = Net()
    with pytest.raises(InvalidArgumentError, match="seed"), perturb(model, full_mask(model), seed=seed):
        pytest.fail("the block must not run")


def test_refuses_models_that_do_not_fit():
    model = Net()
    before = weights(model)
    wrong = Mask.from_indices({"first.weight": [0]}, {"first.weight": (3, 3)})
    missing = Mask.from_indices({"third.weight": [0]}, {"third.weight": (3, 3)})
    empty = Mask.from_indices({}, {})
    for mask, message in ((wrong, "shape"), (missing, "missing"), (empty, "selects nothing")):
        with pytest.raises(MaskMismatchError, match=message), perturb(model, mask):
            pytest.fail("the block must not run")
    assert_weights(model, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_refuses_weights_that_are_not_finite(bad):
    model = Net()
    with torch.no_grad():
        model.second.weight[0, 0] = bad
    before = weights(model)
    with pytest.raises(NonFiniteError, match=r"second\.weight"), perturb(model, full_mask(model)):
        pytest.fail("the block must not run")
    assert_weights(model, before)


def test_refuses_parameters_that_are_not_contiguous():
    model = Net()
    model.first.weight.data = model.first.weight.data.t().contiguous().t()
    before = weights(model)
    with (
        pytest.raises(InvalidArgumentError, match=r"first\.weight is not contiguous"),
        perturb(model, full_mask(model)),
    ):
        pytest.fail("the block must not run")
    assert_weights(model, before)


def test_refuses_parameters_without_memory():
    model = Net()
    model.second.to("meta")
    with pytest.raises(InvalidArgumentError, match="meta device"), perturb(model, random_mask(Net())):
        pytest.fail("the block must not run")


def test_says_so_when_a_changed_dtype_keeps_it_from_restoring():
    model = Net()
    before = weights(model)
    with pytest.raises(ProtectionError, match=r"second\.weight: changed dtype"), perturb(model, random_mask(model)):
        model.second.half()
    assert_weights(model, {name: value for name, value in before.items() if not name.startswith("second")})


def test_is_exported():
    assert safekern.perturb is perturb and "perturb" in safekern.__all__


def test_weights_come_back_where_parameters_were_replaced():
    model = Net()
    mask, before = random_mask(model), weights(model)
    with perturb(model, mask, 0.5):
        model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    assert_weights(model, before)


def test_weights_that_are_no_parameter_any_more_are_said_to_be_lost():
    model = Net()
    mask = random_mask(model)
    with pytest.raises(ProtectionError, match=r"first\.weight: .* or were replaced"), perturb(model, mask, 0.5):
        nn.utils.parametrizations.weight_norm(model.first)
