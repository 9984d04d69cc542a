"""SETAdamW against torch.optim.AdamW, and as a torch.optim.Optimizer among the tools that use one."""

import collections
import contextlib
import copy
import functools
import gc
import io
import pickle
import subprocess
import sys
import weakref

import pytest
import torch
from small_net import (
    MASKED,
    Net,
    assert_same,
    bits,
    full_mask,
    give_gradients,
    loss_of,
    random_mask,
    snapshot,
    train,
    weights,
)
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dcp

from safekern import InvalidArgumentError, Mask, MaskMismatchError, NonFiniteError, SETAdamW, SPAAdamW, StepError, ops

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

pytestmark = pytest.mark.usefixtures("poisoned_memory")


# What is updated


def transposed(param):
    return param.t().contiguous().t()


def spread(param):
    """The same values between others, as in a slice of a larger tensor."""
    larger = torch.full((*param.shape[:-1], 2 * param.shape[-1] + 3), 7.0, dtype=param.dtype)
    return larger[..., 1 : 1 + 2 * param.shape[-1] : 2].copy_(param)


@pytest.mark.parametrize("layout", [torch.clone, transposed, spread])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_weight_outside_the_mask_keeps_its_bits(dtype, layout):
    model = Net(dtype)
    for param in (model.first.weight, model.second.weight):
        param.data = layout(param.data)
        param.data[0, :4] = torch.tensor([-0.0, 0.0, 1e-7, -1e-7])
    mask = random_mask(model)
    before = weights(model)
    train(model, SETAdamW(model.named_parameters(), mask, lr=0.1), range(3))
    for name, after in weights(model).items():
        selected = mask.bool(name) if name in mask else torch.zeros(after.shape, dtype=torch.bool)
        assert torch.equal(after[~selected], before[name][~selected])
        assert (after != before[name])[selected].float().mean() > 0.95 or name not in mask
    if layout is spread:
        around = model.first.weight.data.untyped_storage()
        everything = torch.empty(0, dtype=dtype).set_(around)
        assert (everything == 7).sum() == everything.numel() - model.first.weight.numel()


def test_noncontiguous_parameters_follow_the_contiguous_ones_bit_for_bit():
    models = [Net(), Net()]
    models[1].first.weight.data = transposed(models[1].first.weight.data)
    models[1].second.weight.data = spread(models[1].second.weight.data)
    for model in models:
        optimizer = SETAdamW(model.named_parameters(), random_mask(model), lr=0.1)
        for step in range(5):
            give_gradients(model, step)
            optimizer.step()
    assert_same(weights(models[0]), weights(models[1]))


def groups(model):
    named = dict(model.named_parameters())
    return [
        {"params": [("first.weight", named["first.weight"])], "lr": 3e-3, "weight_decay": 0.2},
        {"params": [("second.weight", named["second.weight"])], "betas": (0.8, 0.99), "eps": 1e-5},
        {"params": [(name, named[name]) for name in ("first.bias", "norm.weight", "norm.bias")], "weight_decay": 0.0},
    ]


def unnamed(groups):
    return [{**group, "params": [param for _, param in group["params"]]} for group in groups]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scheduler", ["StepLR", "OneCycleLR"])
def test_a_full_mask_equals_adamw(dtype, scheduler):
    mine, theirs = Net(dtype), Net(dtype)
    defaults = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
    optimizers = [
        SETAdamW(groups(mine), full_mask(mine), **defaults),
        torch.optim.AdamW(unnamed(groups(theirs)), **defaults),
    ]
    options = {"StepLR": {"step_size": 3}, "OneCycleLR": {"max_lr": 2e-2, "total_steps": 30}}[scheduler]
    schedulers = [getattr(torch.optim.lr_scheduler, scheduler)(optimizer, **options) for optimizer in optimizers]
    for step in range(20):
        # The same gradients for both: those of two models that differ by a rounding part company over the steps.
        loss_of(mine, step).backward()
        for param, source in zip(theirs.parameters(), mine.parameters(), strict=True):
            param.grad = source.grad.clone()
        for optimizer, schedule in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        if step == 9:
            saved = torch.load(saved_bytes(optimizers[0].state_dict()), weights_only=True)
            last_lr = [group["lr"] for group in optimizers[0].param_groups]
            optimizers[0] = SETAdamW(groups(mine), full_mask(mine))
            optimizers[0].load_state_dict(saved)
            assert [group["lr"] for group in optimizers[0].param_groups] == last_lr
            state = schedulers[0].state_dict()
            schedulers[0] = getattr(torch.optim.lr_scheduler, scheduler)(optimizers[0], **options)
            schedulers[0].load_state_dict(state)
            optimizers[0].load_state_dict(saved)
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        # A few roundings of a weight of 1/4, which may lie near zero by now: releases of torch round differently.
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7 if dtype == torch.float32 else 1e-8)


def saved_bytes(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


def test_lr_may_be_a_tensor_and_is_read_at_every_step():
    models = [Net(), Net()]
    optimizers = [
        SETAdamW(models[0].named_parameters(), random_mask(models[0]), lr=torch.tensor(1e-2)),
        SETAdamW(models[1].named_parameters(), random_mask(models[1]), lr=float(torch.tensor(1e-2))),
    ]
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, range(2))
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"] * 0.5
        train(model, optimizer, range(2))
    assert_same(weights(models[0]), weights(models[1]))


def test_a_closure_gives_its_loss_and_its_gradients():
    models = [Net(), Net()]
    optimizers = [SETAdamW(model.named_parameters(), random_mask(model)) for model in models]

    def closure():
        optimizers[0].zero_grad()
        loss = loss_of(models[0], 0)
        loss.backward()
        return loss

    loss = optimizers[0].step(closure)
    assert loss.item() == loss_of(Net(), 0).item()
    train(models[1], optimizers[1], [0])
    assert_same(weights(models[0]), weights(models[1]))


# Small steps of 16-bit weights


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("master_weights", [True, False])
def test_small_steps_add_up_in_master_weights(dtype, master_weights):
    model = nn.Linear(64, 33, bias=False, dtype=dtype)
    # From 1.25 to 1.75 a step of 1e-5 is below half the distance between neighbours in both dtypes.
    model.weight.data.uniform_(1.25, 1.75)
    mask = random_mask(model, names=["weight"])
    optimizer = SETAdamW(model.named_parameters(), mask, lr=1e-5, weight_decay=0, master_weights=master_weights)
    before = model.weight.detach().clone()
    for _ in range(1000):
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
    moved = (before - model.weight.detach()).float()[mask.bool("weight")]
    if master_weights:
        master = optimizer.state[model.weight]["master"]
        way = before[mask.bool("weight")].float() - master
        torch.testing.assert_close(way, torch.full_like(way, 1e-2), rtol=1e-2, atol=0)
        torch.testing.assert_close(moved, torch.full_like(moved, 1e-2), rtol=0, atol=2**-8)
    else:
        assert (moved == 0).all()


def test_a_hundred_small_steps_move_every_master_weight():
    model = Net(torch.bfloat16)
    optimizer = SETAdamW(model.named_parameters(), random_mask(model), lr=1e-5, weight_decay=0)
    before = {
        name: optimizer.state[param]["master"].clone() for name, param in model.named_parameters() if name in MASKED
    }
    for _ in range(100):
        for param in model.parameters():
            param.grad = -torch.ones_like(param)
        optimizer.step()
    for name, old in before.items():
        master = optimizer.state[model.get_parameter(name)]["master"]
        torch.testing.assert_close(master - old, torch.full_like(old, 1e-3), rtol=1e-2, atol=0)


def load_state_dict(model, values):
    model.load_state_dict({"weight": values})


def copy_into_data(model, values):
    model.weight.data.copy_(values)


def replace_data(model, values):
    model.weight.data = values.clone()


def load_by_swapping(model, values):
    grad = model.weight.grad
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.load_state_dict({"weight": values})
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    model.weight.grad = grad


@pytest.mark.parametrize("edit", [load_state_dict, copy_into_data, replace_data, load_by_swapping])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_loaded_after_construction_are_noticed(dtype, edit):
    model = nn.Linear(8, 9, bias=False, dtype=dtype)
    optimizer = SETAdamW(model.named_parameters(), full_mask(model), lr=1e-3, weight_decay=0)
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    loaded = torch.rand_like(model.weight) + 0.25
    edit(model, loaded)
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), (loaded.double() - 1e-3).to(dtype), rtol=2e-2, atol=0)
    if dtype.itemsize == 2:
        master = optimizer.state[model.weight]["master"].view_as(loaded)
        torch.testing.assert_close(master, loaded.float() - 1e-3)


# Gradients that are missing or wrong


def test_a_step_without_any_gradient_raises_and_changes_nothing():
    model = Net()
    optimizer = SETAdamW(model.named_parameters(), random_mask(model))
    before = snapshot(model, optimizer)
    for attempt in (optimizer.step, functools.partial(optimizer.clip_grad_norm_, 1.0)):
        with pytest.raises(StepError, match="no selected weight received a gradient"):
            attempt()
    model.norm.weight.grad = torch.ones_like(model.norm.weight)
    with pytest.raises(StepError, match="no selected weight received a gradient"):
        optimizer.step()
    assert_same(snapshot(model, optimizer), before)


def test_a_parameter_without_gradient_rests():
    models = [Net(), Net()]
    optimizers = [
        SETAdamW(models[0].named_parameters(), full_mask(models[0]), lr=1e-2),
        torch.optim.AdamW(models[1].parameters(), lr=1e-2),
    ]
    for step in range(6):
        for model, optimizer in zip(models, optimizers, strict=True):
            model.second.requires_grad_(step % 2 == 0)
            train(model, optimizer, [step])
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert optimizers[0].state[a]["step"].item() == optimizers[1].state[b]["step"].item()
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert optimizers[0].state[models[0].second.weight]["step"].item() == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nonfinite_selected_gradient_raises_and_changes_nothing(dtype, value):
    model = Net(dtype)
    mask = random_mask(model)
    optimizer = SETAdamW(model.named_parameters(), mask)
    train(model, optimizer, range(2))
    loss_of(model, 2).backward()
    model.second.weight.grad.view(-1)[mask["second.weight"][-1]] = value
    before = snapshot(model, optimizer)
    with pytest.raises(NonFiniteError, match=r"gradient of second\.weight holds NaN"):
        optimizer.step()
    assert_same(snapshot(model, optimizer), before)
    train(model, optimizer, [2])


def test_a_nonfinite_gradient_outside_the_mask_does_not_matter():
    models = [Net(), Net()]
    for i, model in enumerate(models):
        mask = random_mask(model)
        optimizer = SETAdamW(model.named_parameters(), mask)
        loss_of(model, 0).backward()
        if i:
            model.second.weight.grad[~mask.bool("second.weight")] = float("nan")
            model.norm.weight.grad[:] = float("inf")
        optimizer.step()
    assert_same(weights(models[0]), weights(models[1]))


def test_gradients_whose_norm_overflows_are_finite():
    model = Net()
    mask = random_mask(model)
    optimizer = SETAdamW(model.named_parameters(), mask, lr=0.1, weight_decay=0)
    give_gradients(model, 0)
    model.first.weight.grad.mul_(5e18)
    assert model.first.weight.grad[mask.bool("first.weight")].norm().isinf()
    before = model.first.weight.detach().clone()
    optimizer.step()
    assert ((model.first.weight != before) == mask.bool("first.weight")).all()
    assert model.first.weight.isfinite().all()


def test_a_gradient_too_large_for_fp32_counts_as_infinite():
    model = Net(torch.float64)
    optimizer = SETAdamW(model.named_parameters(), random_mask(model))
    loss_of(model, 0).backward()
    model.first.weight.grad.mul_(1e300)
    with pytest.raises(NonFiniteError, match=r"first\.weight"):
        optimizer.step()


def test_sparse_gradients_are_refused():
    model = nn.Embedding(10, 4, sparse=True)
    optimizer = SETAdamW(model.named_parameters(), full_mask(model))
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(StepError, match="sparse gradient"):
        optimizer.step()


def test_gradients_may_lie_otherwise_in_memory_than_their_parameters():
    models = [Net(), Net()]
    for model, layout in zip(models, (torch.clone, transposed), strict=True):
        optimizer = SETAdamW(model.named_parameters(), random_mask(model))
        for step in range(2):
            loss_of(model, step).backward()
            model.first.weight.grad = layout(model.first.weight.grad)
            optimizer.clip_grad_norm_(0.1)
            optimizer.step()
            optimizer.zero_grad()
    assert_same(weights(models[0]), weights(models[1]))


def test_selected_gradients_begin_at_multiples_of_16_bytes(monkeypatch):
    """Elsewhere, kernels on a GPU would move them one by one."""
    model, addresses, step = Net(), [], ops.set_adamw_

    def noted(params, grads, *rest):
        addresses.extend(grad.data_ptr() for grad in grads)
        step(params, grads, *rest)

    monkeypatch.setattr(ops, "set_adamw_", noted)
    mask = random_mask(model)
    assert all(len(mask[name]) % 4 for name in MASKED)
    train(model, SETAdamW(model.named_parameters(), mask), range(1))
    assert len(addresses) == len(MASKED) and not any(address % 16 for address in addresses)


def test_an_autograd_graph_over_the_old_weights_is_refused():
    model = Net()
    optimizer = SETAdamW(model.named_parameters(), random_mask(model))
    loss = loss_of(model, 0)
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# Clipping and scaling


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_norm", [0.01, 1e6])
def test_clipping_measures_and_scales_the_selected_entries(dtype, max_norm):
    model = Net(dtype)
    mask = random_mask(model)
    optimizer = SETAdamW(model.named_parameters(), mask)
    loss_of(model, 0).backward()
    before = {name: model.get_parameter(name).grad.clone() for name in MASKED}
    selected = torch.cat([before[name][mask.bool(name)].double() for name in MASKED])
    norm = optimizer.clip_grad_norm_(max_norm)
    assert norm.dtype == torch.float32 and norm.dim() == 0
    torch.testing.assert_close(norm.double(), selected.norm())
    scale = min(1.0, max_norm / (selected.norm().item() + 1e-6))
    for name, old in before.items():
        got, chosen = model.get_parameter(name).grad, mask.bool(name)
        torch.testing.assert_close(got[chosen], (old[chosen].double() * scale).to(dtype))
        assert torch.equal(got[~chosen], old[~chosen])


@pytest.mark.parametrize("bad", [float("inf"), 3e38])
def test_an_infinite_norm_only_measures(bad):
    model = Net()
    optimizer = SETAdamW(model.named_parameters(), full_mask(model))
    loss_of(model, 0).backward()
    model.first.weight.grad[:] = bad
    before = {name: param.grad.clone() for name, param in model.named_parameters()}
    assert optimizer.clip_grad_norm_(float("inf")) == float("inf")
    for name, param in model.named_parameters():
        assert torch.equal(param.grad, before[name])


@pytest.mark.parametrize("max_norm", [-1.0, float("nan")])
def test_clipping_refuses_what_is_no_norm(max_norm):
    model = Net()
    optimizer = SETAdamW(model.named_parameters(), random_mask(model))
    loss_of(model, 0).backward()
    with pytest.raises(InvalidArgumentError, match="max_norm"):
        optimizer.clip_grad_norm_(max_norm)


def test_grad_scaler_skips_steps_with_infinities_and_recovers():
    model = Net()
    optimizer = SETAdamW(model.named_parameters(), random_mask(model))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=1000)
    before, skipped = snapshot(model, optimizer), 0
    for step in range(60):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = loss_of(model, step)
        scaler.scale(loss).backward()
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() < scale:
            skipped += 1
            assert_same(snapshot(model, optimizer), before)
        elif optimizer.state[model.first.weight]["step"] == 3:
            break
    assert skipped > 3
    assert optimizer.state[model.first.weight]["step"] == 3


def test_a_scaled_step_equals_the_unscaled_one():
    models = [Net(), Net()]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for model, scaled in zip(models, (False, True), strict=True):
        optimizer = SETAdamW(model.named_parameters(), random_mask(model))
        loss = loss_of(model, 0)
        if scaled:
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            optimizer.clip_grad_norm_(0.5)
            scaler.step(optimizer)
        else:
            loss.backward()
            optimizer.clip_grad_norm_(0.5)
            optimizer.step()
    assert_same(weights(models[0]), weights(models[1]))


# As a torch.optim.Optimizer


# torch 2.11 says so once in every process.
@pytest.mark.filterwarnings("ignore:.*Profiler clears events at the end of each cycle:UserWarning")
def test_step_hooks_and_profiler_see_the_steps():
    model = Net()
    optimizer = SETAdamW(model.named_parameters(), random_mask(model))
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train(model, optimizer, [0])
    assert seen == ["pre", "post"]
    names = {event.key for event in profile.key_averages()}
    assert {"Optimizer.step#SETAdamW.step", "Optimizer.zero_grad#SETAdamW.zero_grad"} <= names


def test_zero_grad_clears_every_gradient():
    model = Net()
    optimizer = SETAdamW(model.named_parameters(), random_mask(model))
    loss_of(model, 0).backward()
    optimizer.zero_grad(set_to_none=False)
    assert all((param.grad == 0).all() for param in model.parameters())
    optimizer.zero_grad()
    assert all(param.grad is None for param in model.parameters())


def test_state_dict_hooks_run():
    model = Net()
    optimizer = SETAdamW(model.named_parameters(), random_mask(model))
    seen = []
    optimizer.register_state_dict_pre_hook(lambda _: seen.append("save pre"))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "extra": 1})
    optimizer.register_load_state_dict_pre_hook(lambda _, state: seen.append("load pre") or rename(state))
    optimizer.register_load_state_dict_post_hook(lambda _: seen.append("load post"))

    def rename(state):
        groups = [
            {**g, "param_names": [n.removeprefix("old.") for n in g["param_names"]]} for g in state["param_groups"]
        ]
        return {**state, "param_groups": groups}

    state = optimizer.state_dict()
    assert state["extra"] == 1
    state["param_groups"][0]["param_names"] = [f"old.{name}" for name in state["param_groups"][0]["param_names"]]
    optimizer.load_state_dict(state)
    assert seen == ["save pre", "load pre", "load post"]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_with_their_model_go_their_own_way(duplicate):
    model = Net(torch.bfloat16)
    optimizer = SETAdamW(model.named_parameters(), random_mask(model))
    train(model, optimizer, range(2))
    other_model, other = duplicate((model, optimizer))
    before = weights(model)
    train(other_model, other, range(2, 4))
    assert_same(weights(model), before)
    train(model, optimizer, range(2, 4))
    assert_same(snapshot(model, optimizer), snapshot(other_model, other))


def assign_nothing(optimizer):
    optimizer.state = collections.defaultdict(dict)


def delete_each(optimizer):
    for param in list(optimizer.state):
        del optimizer.state[param]


def pop_each(optimizer):
    state = optimizer.state
    for param in list(state):
        assert "step" in state.pop(param)


def pop_items(optimizer):
    state = optimizer.state
    while state:
        state.popitem()


def update_to_nothing(optimizer):
    optimizer.state.update({param: {} for param in optimizer.state})


def unite_with_nothing(optimizer):
    state = optimizer.state
    state |= {param: {} for param in state}


def empty_each(optimizer):
    for param in optimizer.state:
        optimizer.state[param] = {}


@pytest.mark.parametrize(
    "reset",
    [
        assign_nothing,
        lambda optimizer: optimizer.state.clear(),
        delete_each,
        pop_each,
        pop_items,
        update_to_nothing,
        unite_with_nothing,
        empty_each,
    ],
)
@pytest.mark.parametrize(
    "make", [SETAdamW, SPAAdamW, functools.partial(SETAdamW, in_backward=True)], ids=["set", "spa", "in backward"]
)
def test_without_its_state_it_starts_anew(make, reset):
    model = Net(torch.bfloat16)
    optimizer = make(model.named_parameters(), random_mask(model), lr=1e-2)
    train(model, optimizer, range(3))
    other = copy.deepcopy(model)
    optimizer.zero_grad()
    kept = copy.deepcopy(optimizer.state)
    assert type(kept) is dict and len(kept) == len(list(model.parameters()))
    reset(optimizer)
    if make is not SPAAdamW:
        assert all(state["step"] == 0 for state in optimizer.state.values())
    fresh = make(other.named_parameters(), random_mask(other), lr=1e-2)
    train(model, optimizer, range(3, 6))
    train(other, fresh, range(3, 6))
    assert_same(snapshot(model, optimizer), snapshot(other, fresh))


def tie_by_data(model):
    model.second = nn.Linear(13, 37, bias=False)
    model.second.weight.data = model.first.weight.data


def view_a_part(model):
    model.second = nn.Parameter(model.first.weight.data[3:5])


@pytest.mark.parametrize("tie", [tie_by_data, view_a_part])
@pytest.mark.parametrize("make", [SETAdamW, SPAAdamW, functools.partial(SETAdamW, in_backward=True)])
def test_parameters_that_share_memory_are_refused(make, tie):
    model = nn.Module()
    model.first, model.other = nn.Linear(13, 37), nn.Linear(13, 37)
    tie(model)
    for name in ("first.weight", *(name for name, _ in model.named_parameters() if name.startswith("second"))):
        mask = Mask.from_indices({name: [0]}, {name: model.get_parameter(name).shape})
        with pytest.raises(InvalidArgumentError, match=r"parameters .*first\.weight.* share memory"):
            make(model.named_parameters(), mask)
    # The others are what torch's own optimizers make of them.
    make(model.named_parameters(), Mask.from_indices({"other.weight": [0]}, {"other.weight": (37, 13)}))


@pytest.mark.parametrize("make", [SETAdamW, SPAAdamW])
def test_parameters_that_come_to_share_memory_are_refused(make):
    model = nn.ModuleDict({"first": nn.Linear(4, 4), "second": nn.Linear(4, 4)})
    optimizer = make(model.named_parameters(), Mask.from_indices({"first.weight": [0]}, {"first.weight": (4, 4)}))
    model.second.weight.data = model.first.weight.data
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    before = weights(model)
    with pytest.raises(InvalidArgumentError, match=r"parameters first\.weight and second\.weight share memory"):
        optimizer.step()
    assert_same(weights(model), before)


def test_parameters_in_one_buffer_are_apart():
    buffer = torch.zeros(8, 8)
    model = nn.ParameterDict({"left": buffer[:4, :4], "right": buffer[:4, 4:], "below": buffer[4:]})
    optimizer = SETAdamW(model.named_parameters(), full_mask(model))
    assert len(optimizer.param_groups[0]["params"]) == 3
    model["corner"] = nn.Parameter(buffer[:3, 3:6:2])
    with pytest.raises(InvalidArgumentError, match="parameters left and corner share memory"):
        SETAdamW(model.named_parameters(), full_mask(model))


@pytest.mark.parametrize("make", [SETAdamW, SPAAdamW])
def test_state_that_was_taken_out_is_put_back(make):
    model = Net()
    optimizer = make(model.named_parameters(), random_mask(model), lr=1e-2)
    train(model, optimizer, range(2))
    before, param = snapshot(model, optimizer), model.first.weight
    state = optimizer.state
    taken = state.pop(param)
    assert state.setdefault(param, taken) is taken and state.setdefault(param, {}) is taken
    assert_same(snapshot(model, optimizer), before)


@pytest.mark.parametrize("make", [SETAdamW, SPAAdamW])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_parameter_whose_state_was_cleared_starts_anew(make, dtype):
    models = [Net(dtype), Net(dtype)]
    optimizers = [make(model.named_parameters(), random_mask(model), lr=1e-2) for model in models]
    for model, optimizer, clear in zip(models, optimizers, (dict.clear, None), strict=True):
        train(model, optimizer, range(2))
        for param in list(optimizer.state):
            if clear:
                clear(optimizer.state[param])
            else:
                optimizer.state[param] = {}
        train(model, optimizer, range(2, 4))
        assert all(state["step"] == 2 for param, state in optimizer.state.items() if "exp_avg" in state)
    assert_same(*(snapshot(model, optimizer) for model, optimizer in zip(models, optimizers, strict=True)))


def test_state_of_what_has_none_is_empty():
    model = Net()
    model.first.weight.requires_grad = False
    for optimizer in (SPAAdamW(model.named_parameters(), random_mask(model)), torch.optim.AdamW(model.parameters())):
        assert optimizer.state[model.first.weight] == {}


def test_repr_shows_hyperparameters():
    model = Net()
    text = repr(SETAdamW(groups(model), random_mask(model), lr=0.125))
    assert text.startswith("SETAdamW") and "lr: 0.125" in text and "betas: (0.8, 0.99)" in text


@pytest.mark.parametrize("make", [SETAdamW, SPAAdamW])
@pytest.mark.parametrize("option", ["maximize", "amsgrad"])
def test_options_of_other_optimizers_are_refused_in_groups(make, option):
    model = Net()
    for value in (False, None):
        make([{"params": list(model.named_parameters()), option: value}], random_mask(model))
    with pytest.raises(InvalidArgumentError, match=f"{option} is not supported"):
        make([{"params": list(model.named_parameters()), option: True}], random_mask(model))


@pytest.mark.parametrize("make", [SETAdamW, SPAAdamW])
@pytest.mark.parametrize(
    ("option", "value"), [("lr", float("nan")), ("lr", None), ("betas", (0.9, 1.0)), ("weight_decay", float("inf"))]
)
def test_hyperparameters_that_were_written_into_a_group_are_checked(make, option, value):
    model = Net()
    optimizer = make(groups(model), random_mask(model))
    train(model, optimizer, [0])
    before = snapshot(model, optimizer)
    optimizer.param_groups[-1][option] = value
    with pytest.raises(InvalidArgumentError, match=option):
        train(model, optimizer, [1])
    optimizer.param_groups[-1][option] = optimizer.defaults[option]
    assert_same(snapshot(model, optimizer), before)


@pytest.mark.parametrize("make", [SETAdamW, SPAAdamW])
def test_names_stay_with_their_parameters(make):
    model = Net()
    optimizer = make(model.named_parameters(), random_mask(model))
    group = optimizer.param_groups[0]
    group["params"] = group["params"][1:]
    with pytest.raises(InvalidArgumentError, match="4 parameters and 5 names"):
        train(model, optimizer, [0])


@pytest.mark.parametrize("make", [SETAdamW, SPAAdamW])
@pytest.mark.parametrize("given", [None, Net(), Net().named_parameters])
def test_what_holds_no_named_parameters(make, given):
    with pytest.raises(InvalidArgumentError, match=r"pass model\.named_parameters\(\)"):
        make(given, random_mask(Net()))


@pytest.mark.parametrize("make", [SETAdamW, SPAAdamW])
def test_a_group_that_is_refused_is_not_added(make):
    model = Net()
    optimizer = make(model.named_parameters(), random_mask(model))
    view = nn.Parameter(model.first.weight.detach()[2:])
    with pytest.raises(InvalidArgumentError, match="share memory"):
        optimizer.add_param_group({"params": [("view", view)]})
    assert len(optimizer.param_groups) == 1
    train(model, optimizer, [0])


def test_groups_can_be_added_for_parameters_outside_the_mask():
    model, extra = Net(), nn.Linear(3, 3)
    optimizer = SETAdamW(model.named_parameters(), random_mask(model), lr=0.5)
    optimizer.add_param_group({"params": [("extra.weight", extra.weight)], "lr": 0.1})
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.1]
    before = bits(extra.weight).clone()
    extra.weight.grad = torch.ones_like(extra.weight)
    loss_of(model, 0).backward()
    optimizer.step()
    assert torch.equal(bits(extra.weight), before)
    optimizer.zero_grad()
    assert extra.weight.grad is None
    for params in ([("again", model.first.weight)], [("first.weight", extra.bias)], [extra.bias], extra.bias):
        with pytest.raises(InvalidArgumentError):
            optimizer.add_param_group({"params": params})
    with pytest.raises(InvalidArgumentError, match="lr"):
        optimizer.add_param_group({"params": [("extra.bias", extra.bias)], "lr": -1})
    assert len(optimizer.param_groups) == 2


def test_an_optimizer_leaves_no_cycle_behind():
    model = Net()
    gc.collect()
    gc.disable()
    try:
        optimizer = SETAdamW(model.named_parameters(), random_mask(model))
        train(model, optimizer, [0])
        gone = weakref.ref(optimizer)
        del optimizer
        assert gone() is None
    finally:
        gc.enable()


def reachable_tensors(root):
    found, seen, todo = [], set(), [root]
    while todo:
        thing = todo.pop()
        if id(thing) in seen or isinstance(thing, (type, type(sys))):
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            found.append(thing)
        elif isinstance(thing, (dict, list, tuple, set)) or hasattr(thing, "__dict__") or hasattr(thing, "__slots__"):
            todo.extend(gc.get_referents(thing))
    return found


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 16), (torch.float16, 16), (torch.float32, 12)])
def test_state_takes_at_most_16_bytes_per_selected_weight(dtype, limit):
    model = nn.Linear(1000, 1000, bias=False, dtype=dtype)
    mask = random_mask(model, share=0.1, names=["weight"])
    selected = mask.numel
    optimizer = SETAdamW(model.named_parameters(), mask)
    del mask
    model(torch.randn(1, 1000, dtype=dtype)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    mine = [tensor for tensor in reachable_tensors(optimizer) if tensor is not model.weight]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in mine}
    assert len(storages) >= 4
    assert limit * selected <= sum(storages.values()) <= limit * selected + 1000


def test_state_is_there_before_the_first_step():
    model = Net(torch.bfloat16)
    optimizer = SETAdamW(model.named_parameters(), random_mask(model))
    assert set(optimizer.state[model.first.weight]) == {"step", "exp_avg", "exp_avg_sq", "master"}
    assert set(optimizer.state) == set(model.parameters())


# Construction


def test_wrapped_names_resolve():
    model = Net()
    mask = random_mask(model)
    for wrap in ("module.{}", "_orig_mod.{}", "base_model.model.{}", "module._orig_mod.{}"):
        optimizer = SETAdamW([(wrap.format(name), param) for name, param in model.named_parameters()], mask)
        train(model, optimizer, [0])
    renamed = [(name.replace(".weight", ".base_layer.weight"), param) for name, param in model.named_parameters()]
    train(model, SETAdamW(renamed, mask), [0])
    wrapped = nn.ModuleDict({"module": torch.compile(model, backend="eager")})
    assert "module._orig_mod.first.weight" in dict(wrapped.named_parameters())
    SETAdamW(wrapped.named_parameters(), mask)


def bad_masks(model):
    shapes = {name: param.shape for name, param in model.named_parameters()}
    return {
        "first.wait: missing": (Mask.from_indices({"first.wait": [1]}, {"first.wait": (2,)}), {}),
        r"shape \(13, 37\)|13": (Mask.from_indices({"first.weight": [1]}, {"first.weight": (13, 37)}), {}),
        "selects nothing": (Mask.from_indices({}, shapes), {}),
        "requires_grad=False": (Mask.from_indices({"norm.bias": [0]}, shapes), {"norm.bias"}),
    }


@pytest.mark.parametrize("message", bad_masks(Net()))
def test_masks_that_do_not_fit_are_refused(message):
    model = Net()
    mask, frozen = bad_masks(model)[message]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    with pytest.raises(MaskMismatchError, match=message):
        SETAdamW(model.named_parameters(), mask)
    assert not any(param._post_accumulate_grad_hooks for param in model.parameters())


def test_parameters_must_be_named_once_and_plain():
    model = Net()
    mask = random_mask(model)
    named = list(model.named_parameters())
    for wrong, message in (
        ([], "no named parameters"),
        (model.parameters(), "named_parameters"),
        ([{"params": list(model.parameters())}], "named_parameters"),
        ([{"params": named}, named[0]], "named_parameters"),
        ([*named, ("first.weight", nn.Parameter(torch.zeros(37, 13)))], r"first\.weight was given twice"),
        ([*named, ("other", model.first.weight)], r"other was given twice, also as first\.weight"),
        ([{"params": named}, {"params": named[:1]}], "twice"),
        ([("first.weight", 3.0)], "named_parameters"),
        ([*named[1:], ("first.weight", nn.Parameter(torch.zeros(37, 13, device="meta")))], "meta device"),
        ([*named[1:], ("first.weight", torch.zeros(1, 13).expand(37, 13).requires_grad_())], "overlapping"),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            SETAdamW(wrong, mask)


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": -1.0},
        {"lr": float("nan")},
        {"lr": torch.tensor(float("inf"))},
        {"eps": -1e-8},
        {"weight_decay": -0.1},
        {"betas": (0.9, 1.0)},
        {"betas": (-0.1, 0.9)},
        {"betas": (0.9,)},
    ],
)
def test_hyperparameters_out_of_range_are_refused(wrong):
    model = Net()
    with pytest.raises(InvalidArgumentError, match=next(iter(wrong))):
        SETAdamW(model.named_parameters(), random_mask(model), **wrong)
    with pytest.raises(InvalidArgumentError, match=next(iter(wrong))):
        SETAdamW([{"params": model.named_parameters(), **wrong}], random_mask(model))


def test_frozen_masked_parameters_wait_until_they_train():
    model = Net()
    model.first.requires_grad_(False)
    mask = random_mask(model)
    optimizer = SETAdamW(model.named_parameters(), mask, lr=0.1)
    before = weights(model)
    train(model, optimizer, range(2))
    assert torch.equal(bits(model.first.weight), before["first.weight"])
    model.first.requires_grad_(True)
    train(model, optimizer, range(2))
    assert optimizer.state[model.first.weight]["step"] == 2
    assert (bits(model.first.weight) != before["first.weight"])[mask.bool("first.weight")].all()


def test_a_model_converted_after_construction_is_refused():
    model = Net()
    optimizer = SETAdamW(model.named_parameters(), random_mask(model))
    model.bfloat16()
    loss_of(model, 0).backward()
    before = weights(model)
    with pytest.raises(StepError, match="make the optimizer after"):
        optimizer.step()
    assert_same(weights(model), before)


# Saving and loading


@pytest.mark.parametrize("dtype", DTYPES)
def test_loading_continues_bit_for_bit(dtype):
    model = Net(dtype)
    mask = random_mask(model)
    optimizer = SETAdamW(groups(model), mask, lr=1e-4)
    train(model, optimizer, range(3))
    copied = Net(dtype, seed=5)
    copied.load_state_dict(model.state_dict())
    restored = SETAdamW(groups(copied), mask, lr=99.0)
    restored.load_state_dict(torch.load(saved_bytes(optimizer.state_dict()), weights_only=True))
    assert_same(snapshot(copied, restored), snapshot(model, optimizer))
    for state in restored.state.values():
        assert all(value.dtype == torch.float32 for value in state.values())
    for pair in ((model, optimizer), (copied, restored)):
        train(*pair, range(3, 6))
    assert_same(snapshot(copied, restored), snapshot(model, optimizer))


@pytest.mark.parametrize("make", [SETAdamW, SPAAdamW, functools.partial(SETAdamW, in_backward=True)])
def test_a_run_goes_on_after_what_was_done_under_inference_mode(make):
    def run(context):
        model = Net(torch.bfloat16)
        with context():
            optimizer = make(model.named_parameters(), random_mask(model))
        train(model, optimizer, range(2))
        saved = copy.deepcopy(optimizer.state_dict())
        with context():
            optimizer.load_state_dict(saved)
        train(model, optimizer, range(2, 4))
        optimizer.state[model.second.weight].clear()
        with context():
            assert optimizer.state[model.second.weight]["step"] == 0
        train(model, optimizer, range(4, 6))
        loss_of(model, 6).backward()
        with context():
            optimizer.step()
        return snapshot(model, optimizer)

    assert_same(run(torch.inference_mode), run(contextlib.nullcontext))


@pytest.mark.parametrize("make", [SETAdamW, SPAAdamW])
def test_what_wrappers_keep_in_the_state_is_saved_and_loaded(make):
    # As timm's Lookahead does.
    model = Net()
    optimizer = make(model.named_parameters(), random_mask(model))
    train(model, optimizer, [0])
    for param in model.parameters():
        optimizer.state[param]["slow"] = param.detach().clone()
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(optimizer.state_dict())
    other = Net(seed=7)
    loaded = make(other.named_parameters(), random_mask(other))
    loaded.load_state_dict(saved)
    for (name, param), twin in zip(model.named_parameters(), other.parameters(), strict=True):
        for slow in (optimizer.state[param]["slow"], loaded.state[twin]["slow"]):
            assert torch.equal(slow, param), name
        assert loaded.state[twin]["slow"] is not optimizer.state[param]["slow"]
    other.first.weight.data = other.first.weight.data.t().contiguous().t()
    assert torch.equal(loaded.state[other.first.weight]["slow"], model.first.weight)


@pytest.mark.parametrize("make", [SETAdamW, SPAAdamW])
def test_what_wrappers_keep_in_the_state_is_loaded_where_the_parameter_is(make):
    model = Net()
    optimizer = make(model.named_parameters(), random_mask(model))
    train(model, optimizer, [0])
    # No other device is here.
    for param in model.parameters():
        optimizer.state[param]["slow"] = param.detach().to("meta")
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("make", [SETAdamW, SPAAdamW])
def test_groups_of_an_optimizer_with_another_mask(make):
    model = Net()
    old = make(model.named_parameters(), random_mask(model), lr=0.5)
    pairs = [zip(group["param_names"], group["params"], strict=True) for group in old.param_groups]
    groups = [{**group, "params": list(params)} for group, params in zip(old.param_groups, pairs, strict=True)]
    new = make(groups, random_mask(model, seed=9))
    assert new.param_groups[0]["lr"] == 0.5
    new.load_state_dict(new.state_dict())
    for one, other in ((old, new), (new, old)):
        with pytest.raises(MaskMismatchError, match="saved with another mask"):
            one.load_state_dict(other.state_dict())


@pytest.mark.parametrize("in_backward", [False, True])
def test_wrappers_that_take_over_the_class(in_backward):
    class Wrapper:
        """As `lightning.pytorch.core.optimizer.LightningOptimizer`."""

        def __init__(self, optimizer):
            self.__class__ = type("Lightning" + type(optimizer).__name__, (Wrapper, type(optimizer)), {})
            self._optimizer = optimizer

        def __getattr__(self, name):
            return getattr(self._optimizer, name)

        def step(self):
            self._optimizer.step()

    def run(wrap):
        model = Net()
        optimizer = wrap(SETAdamW(model.named_parameters(), random_mask(model), lr=0.1, in_backward=in_backward))
        norms = []
        for step in range(3):
            loss_of(model, step).backward()
            norms.append(optimizer.clip_grad_norm_(0.01))
            optimizer.step()
            optimizer.zero_grad()
        assert len(optimizer.state) == len(list(model.parameters()))
        return norms, snapshot(model, optimizer)

    (norms, end), (wanted, wanted_end) = run(Wrapper), run(lambda optimizer: optimizer)
    assert norms == wanted
    assert_same(end, wanted_end)


@pytest.mark.parametrize("make", [SETAdamW, SPAAdamW])
def test_what_is_no_state_is_refused(make):
    model = Net()
    optimizer = make(model.named_parameters(), random_mask(model))
    train(model, optimizer, [0])
    whole, before = optimizer.state_dict(), snapshot(model, optimizer)
    for wrong in (None, [], {}, {**whole, "state": list(whole["state"].values())}):
        with pytest.raises(InvalidArgumentError, match="this is no optimizer state"):
            optimizer.load_state_dict(wrong)
    without_lr = {**whole["param_groups"][0]}
    del without_lr["lr"]
    with pytest.raises(InvalidArgumentError, match="lr must be"):
        optimizer.load_state_dict({**whole, "param_groups": [without_lr]})
    broken = {key: {**state, "exp_avg": None} if "exp_avg" in state else state for key, state in whole["state"].items()}
    with pytest.raises(MaskMismatchError):
        optimizer.load_state_dict({**whole, "state": broken})
    assert_same(snapshot(model, optimizer), before)


@pytest.mark.parametrize("make", [SETAdamW, SPAAdamW])
def test_a_learning_rate_that_a_step_accepts_loads(make):
    model = Net()
    optimizer = make(model.named_parameters(), random_mask(model))
    optimizer.param_groups[0]["lr"] = -1e-20
    train(model, optimizer, [0])
    restored = make(model.named_parameters(), random_mask(model))
    restored.load_state_dict(optimizer.state_dict())
    assert restored.param_groups[0]["lr"] == -1e-20


RESUME = """
import sys, torch
sys.path.insert(0, {folder!r})
from test_set_adamw import Net, SETAdamW, Mask, groups, train
for dtype in (torch.bfloat16, torch.float32):
    name = str(dtype)
    state = torch.load({path!r} + name + ".pt", weights_only=True)
    model = Net(dtype, seed=9)
    model.load_state_dict(state["model"])
    optimizer = SETAdamW(groups(model), Mask.load({path!r} + name + ".safetensors"))
    optimizer.load_state_dict(state["optimizer"])
    train(model, optimizer, range(3, 5))
    torch.save((model.state_dict(), optimizer.state_dict()), {path!r} + name + ".out")
"""


def test_a_new_process_continues_bit_for_bit(tmp_path, request):
    runs = {}
    for dtype in (torch.bfloat16, torch.float32):
        model = Net(dtype)
        mask = random_mask(model)
        optimizer = SETAdamW(groups(model), mask, lr=1e-4)
        train(model, optimizer, range(3))
        mask.save(tmp_path / f"run{dtype}.safetensors")
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / f"run{dtype}.pt")
        train(model, optimizer, range(3, 5))
        runs[dtype] = model.state_dict(), optimizer.state_dict()
    script = RESUME.format(folder=str(request.path.parent), path=str(tmp_path / "run"))
    subprocess.run([sys.executable, "-c", script], check=True, cwd=request.config.rootpath)
    for dtype, (model_state, optimizer_state) in runs.items():
        got_model, got_optimizer = torch.load(tmp_path / f"run{dtype}.out", weights_only=True)
        assert_same(dict(got_model), dict(model_state))
        assert_same(got_optimizer["state"], optimizer_state["state"])


def test_a_loaded_state_shares_no_memory_with_its_source():
    models = [Net(), Net()]
    first, second = (SETAdamW(model.named_parameters(), random_mask(model)) for model in models)
    second.load_state_dict(first.state_dict())
    train(models[1], second, range(2))
    assert first.state[models[0].first.weight]["step"] == 0
    assert (first.state[models[0].first.weight]["exp_avg"] == 0).all()


def test_parameters_are_matched_by_name():
    model = Net()
    mask = random_mask(model)
    optimizer = SETAdamW(groups(model), mask, lr=1e-2)
    train(model, optimizer, range(3))
    other_order = [
        {"params": [(f"module.{name}", param) for name, param in reversed(group["params"])]}
        for group in reversed(groups(model))
    ]
    restored = SETAdamW(other_order, mask)
    restored.load_state_dict(optimizer.state_dict())
    for param in model.parameters():
        assert_same(restored.state[param], optimizer.state[param])
    assert [group["lr"] for group in restored.param_groups] == [1e-2, 1e-2, 3e-3]
    assert restored.param_groups[2]["param_names"] == ["module.first.weight"]


def test_state_of_another_mask_or_model_is_refused():
    model = Net()
    mask = random_mask(model)
    optimizer = SETAdamW(model.named_parameters(), mask)
    state = optimizer.state_dict()
    train(model, optimizer, range(2))
    before = snapshot(model, optimizer)

    def refused(wrong, message):
        with pytest.raises(MaskMismatchError, match=message):
            optimizer.load_state_dict(wrong)
        assert_same(snapshot(model, optimizer), before)

    refused(SETAdamW(model.named_parameters(), random_mask(model, seed=2)).state_dict(), "another mask")
    refused(torch.optim.AdamW(model.named_parameters()).state_dict(), "an optimizer without a mask")
    refused(SETAdamW(groups(model), mask).state_dict(), "other groups")
    masked_only = [(name, param) for name, param in model.named_parameters() if name in mask]
    refused(SETAdamW(masked_only, mask).state_dict(), "other parameters")
    refused({**state, "state": {}}, "no step")
    with pytest.raises(InvalidArgumentError, match="no optimizer state"):
        optimizer.load_state_dict(dict(model.state_dict()))
    refused({**state, "state": {**state["state"], 0: {"step": torch.tensor(1.0)}}}, "no exp_avg")
    wrong = {**state["state"][0], "exp_avg": torch.zeros(3)}
    refused({**state, "state": {**state["state"], 0: wrong}}, "no exp_avg")
    groups_without_names = [{k: v for k, v in group.items() if k != "param_names"} for group in state["param_groups"]]
    refused({**state, "param_groups": groups_without_names}, "other parameters")
    bfloat16 = Net(torch.bfloat16)
    optimizer = SETAdamW(bfloat16.named_parameters(), mask)
    model, before = bfloat16, snapshot(bfloat16, optimizer)
    refused(state, "no master")
    with_masters = optimizer.state_dict()
    optimizer = SETAdamW(bfloat16.named_parameters(), mask, master_weights=False)
    before = snapshot(bfloat16, optimizer)
    refused(with_masters, "a master, of which this optimizer keeps none")
    model = Net()
    optimizer = SETAdamW(model.named_parameters(), mask)
    before = snapshot(model, optimizer)
    refused(with_masters, "a master, of which this optimizer keeps none")


def test_a_state_loads_where_that_of_a_parameter_was_cleared():
    model = Net(torch.bfloat16)
    optimizer = SETAdamW(model.named_parameters(), random_mask(model))
    train(model, optimizer, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.state[model.first.weight].clear()
    optimizer.load_state_dict(saved)
    assert_same(optimizer.state_dict(), saved)


@pytest.mark.parametrize("flat", [False, True])
def test_torch_distributed_checkpoint_round_trip(flat):
    model = Net(torch.bfloat16)
    mask = random_mask(model)
    optimizer = SETAdamW(model.named_parameters(), mask, lr=1e-2)
    train(model, optimizer, range(3))
    options = dcp.StateDictOptions(flatten_optimizer_state_dict=flat)
    state = dcp.get_optimizer_state_dict(model, optimizer, options=options)
    backwards = SETAdamW(list(model.named_parameters())[::-1], mask)
    dcp.set_optimizer_state_dict(model, backwards, state, options=options)
    for param in model.parameters():
        assert_same(backwards.state[param], optimizer.state[param])
    assert backwards.param_groups[0]["lr"] == 1e-2


# Parameters that are swapped in the groups


@pytest.mark.parametrize(
    "reload", [lambda _: None, lambda optimizer: optimizer.load_state_dict(optimizer.state_dict())]
)
def test_swapped_parameters_keep_their_state(reload):
    """As accelerate's FSDP2 path does it: placeholders first, then other tensors at the same positions."""
    model = Net(torch.bfloat16)
    mask = random_mask(model)
    optimizer = SETAdamW(groups(model), mask)
    train(model, optimizer, range(2))
    swapped, untouched = copy.deepcopy((model, optimizer))
    others = dict(copy.deepcopy(model).named_parameters())
    for group in optimizer.param_groups:
        for i, param in enumerate(group["params"]):
            group["params"][i] = torch.empty(1, dtype=param.dtype)
        group["params"] = [others[name] for name in group["param_names"]]
    for name, param in others.items():
        module, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(module), attribute, param)
    reload(optimizer)
    train(model, optimizer, range(2, 4))
    train(swapped, untouched, range(2, 4))
    assert_same(snapshot(model, optimizer), snapshot(swapped, untouched))
    assert set(optimizer.state) == set(model.parameters())


def test_accelerate_prepares_model_and_optimizer():
    accelerate = pytest.importorskip("accelerate")
    models = [Net(torch.bfloat16), Net(torch.bfloat16)]
    plain, prepared = (SETAdamW(model.named_parameters(), random_mask(model), lr=1e-2) for model in models)
    model, prepared = accelerate.Accelerator(cpu=True).prepare(models[1], prepared)
    train(models[0], plain, range(3))
    train(model, prepared, range(3))
    assert_same(snapshot(models[1], prepared), snapshot(models[0], plain))


def test_a_step_that_the_op_refuses_is_not_counted(monkeypatch):
    model = Net()
    optimizer = SETAdamW(model.named_parameters(), random_mask(model))
    train(model, optimizer, range(1))
    before = snapshot(model, optimizer)

    def refuse(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("safekern.ops.set_adamw_", refuse)
    with pytest.raises(RuntimeError, match="out of memory"):
        train(model, optimizer, range(1, 2))
    assert_same(snapshot(model, optimizer), before)
