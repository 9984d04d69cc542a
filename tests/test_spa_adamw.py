"""SPAAdamW: protected weights keep their bits, all others follow AdamW, and it behaves as a torch optimizer."""

import copy
import io
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
from protected_training import (
    assert_protected,
    assert_same_weights,
    backward,
    make_mask,
    make_model,
    same_bits,
    small_llama,
    snapshot,
    train,
)
from torch import nn

from safekern import InvalidArgumentError, Mask, MaskMismatchError, SPAAdamW, StepError
from safekern.ops.spa_adamw import reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


# What it computes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("state_dtype", [None, torch.float32])
def test_protected_weights_keep_their_bits_and_the_others_train(dtype, state_dtype):
    model = make_model(dtype)
    mask = make_mask(model)
    with torch.no_grad():
        protected = model[0].weight[mask.bool("0.weight")]
        protected[:3] = torch.tensor([-0.0, 1e-41, 5e-8]).to(dtype)
        model[0].weight[mask.bool("0.weight")] = protected
    before = snapshot(model)
    optimizer = SPAAdamW(model.named_parameters(), mask, lr=1e-2, weight_decay=0.1, state_dtype=state_dtype)
    first_loss = backward(model).item()
    train(model, optimizer, 30)
    assert_protected(model, before, mask)
    assert backward(model).item() < first_loss / 2
    for name, param in model.named_parameters():
        free = ~mask.bool(name) if name in mask else torch.ones(param.shape, dtype=torch.bool)
        assert (param.detach() != before[name])[free].double().mean() > 0.9
        assert optimizer.state[param]["exp_avg"].dtype == (state_dtype or dtype)


def test_with_an_almost_empty_mask_it_equals_torch():
    model, twin = make_model(), make_model()
    mask = Mask.from_indices({"0.weight": [5]}, {"0.weight": (33, 7)})
    kept = model[0].weight[0, 5].item()
    options = {"lr": 3e-3, "betas": (0.8, 0.99), "eps": 1e-7, "weight_decay": 0.2}
    optimizer = SPAAdamW(model.named_parameters(), mask, **options)
    theirs = torch.optim.AdamW(twin.parameters(), **options)
    for step in range(20):
        backward(model, step)
        for param, other in zip(model.parameters(), twin.parameters(), strict=True):
            other.grad = param.grad.clone()
        optimizer.step()
        theirs.step()
        with torch.no_grad():
            twin[0].weight[0, 5] = kept
        for param, other in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(param, other, rtol=1e-6, atol=1e-8)


def test_a_thousand_steps_on_a_language_model():
    model = small_llama()
    mask = make_mask(model, 0.05)
    before = snapshot(model)
    optimizer = SPAAdamW(model.named_parameters(), mask, lr=1e-3)
    twin = [param.clone() for param in before.values()]
    moments = [[torch.zeros_like(param) for param in twin] for _ in range(2)]
    theirs = [param.clone().requires_grad_() for param in before.values()]
    adamw = torch.optim.AdamW(theirs, lr=1e-3)
    indices = [mask.get(name, torch.empty(0, dtype=torch.int64)) for name in before]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(61, (4, 2, 8), generator=generator)
    for step in range(1, 1001):
        model(input_ids=tokens[step % 4], labels=tokens[step % 4]).loss.backward()
        optimizer.step()
        grads = [param.grad for param in model.parameters()]
        count = len(twin)
        reference(
            twin,
            grads,
            indices,
            *moments,
            [1e-3 / (1 - 0.9**step)] * count,
            [(1 - 0.999**step) ** 0.5] * count,
            0.9,
            0.999,
            1e-8,
            1 - 1e-3 * 0.01,
        )
        if step == 1:
            for param, grad in zip(theirs, grads, strict=True):
                param.grad = grad
            adamw.step()
            for (name, param), other in zip(model.named_parameters(), theirs, strict=True):
                free = ~mask.bool(name) if name in mask else ...
                torch.testing.assert_close(param[free], other[free], rtol=1e-6, atol=1e-8)
        optimizer.zero_grad()
        if step % 100 == 0:
            for (name, param), other in zip(model.named_parameters(), twin, strict=True):
                assert same_bits(param, other), (name, step)
    assert_protected(model, before, mask)
    assert (model.model.embed_tokens.weight != before["model.embed_tokens.weight"]).double().mean() > 0.9


# Memory layouts


@pytest.mark.parametrize("masked", ["transposed", "permuted", "plain"])
def test_parameters_that_are_not_contiguous(masked):
    torch.manual_seed(0)
    values = {
        "transposed": torch.randn(9, 6).t(),
        "permuted": torch.randn(4, 3, 5).permute(2, 0, 1),
        "plain": torch.randn(8),
    }
    params = {name: nn.Parameter(value) for name, value in values.items()}
    twins = {name: nn.Parameter(value.contiguous().clone()) for name, value in values.items()}
    assert not params["transposed"].is_contiguous() and not params["permuted"].is_contiguous()
    mask = Mask.from_bool({masked: torch.rand(values[masked].shape) < 0.4})
    optimizers = [SPAAdamW(given.items(), mask, lr=0.1) for given in (params, twins)]
    before = params[masked].detach().clone()
    for _ in range(3):
        for name in params:
            twins[name].grad = torch.randn(twins[name].shape)
            params[name].grad = twins[name].grad.clone()
        # An expanded gradient has no memory of its own for each element.
        params["plain"].grad = twins["plain"].grad = torch.ones(1).expand(8)
        for optimizer in optimizers:
            optimizer.step()
    for name in params:
        assert same_bits(params[name], twins[name])
    assert same_bits(params[masked].detach()[mask.bool(masked)], before[mask.bool(masked)])


def test_a_parameter_laid_out_anew_stays_protected():
    torch.manual_seed(0)
    models = [nn.Conv2d(3, 4, 2) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    mask = Mask.from_bool({"weight": torch.rand(4, 3, 2, 2) < 0.5})
    optimizers = [SPAAdamW(model.named_parameters(), mask, lr=0.1) for model in models]
    before = models[0].weight.detach().clone()
    for step in range(4):
        if step == 2:
            models[1].to(memory_format=torch.channels_last)
            assert not models[1].weight.is_contiguous()
        for model, optimizer in zip(models, optimizers, strict=True):
            torch.manual_seed(step)
            for param in model.parameters():
                param.grad = torch.randn(param.shape)
            optimizer.step()
    assert_same_weights(*models)
    assert same_bits(models[1].weight.detach()[mask.bool("weight")], before[mask.bool("weight")])


def test_parameters_that_torch_swaps_in_place_stay_protected():
    models = [make_model(), make_model()]
    mask = make_mask(models[0])
    optimizers = [SPAAdamW(model.named_parameters(), mask, lr=1e-2) for model in models]
    for swap, model, optimizer in zip((False, True), models, optimizers, strict=True):
        train(model, optimizer, 2)
        torch.__future__.set_swap_module_params_on_conversion(swap)
        try:
            model.load_state_dict(make_model(seed=1).state_dict())
            model.double()
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)
        before = snapshot(model)
        train(model, optimizer, 2)
        assert_protected(model, before, mask)
    assert_same_weights(*models)


@pytest.mark.parametrize("param", [torch.zeros(4, 6)[:, :3], torch.zeros(1, 3).expand(4, 3)])
def test_layouts_that_share_memory_are_refused(param):
    mask = Mask.from_indices({"ok": [0]}, {"ok": (3,)})
    with pytest.raises(InvalidArgumentError, match="parameter odd has overlapping elements or gaps"):
        SPAAdamW([("ok", nn.Parameter(torch.zeros(3))), ("odd", nn.Parameter(param))], mask)


# A torch optimizer in every respect


def test_closure_scheduler_tensor_lr_and_groups():
    models = [make_model() for _ in range(3)]
    mask = make_mask(models[0])
    before = snapshot(models[0])

    def groups(model):
        named = dict(model.named_parameters())
        return [
            {"params": [(name, named[name]) for name in ("0.weight", "2.weight")], "weight_decay": 0.3},
            {"params": [(name, named[name]) for name in ("0.bias", "2.bias")], "lr": 5e-3, "betas": (0.5, 0.9)},
            {"params": []},
        ]

    optimizers = [
        SPAAdamW(groups(model), mask, lr=lr) for model, lr in zip(models, (1e-2, torch.tensor(1e-2), 1e-2), strict=True)
    ]
    schedulers = [torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.1) for optimizer in optimizers]
    calls = []
    optimizers[2].register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizers[2].register_step_post_hook(lambda *_: calls.append("post"))
    for step in range(5):
        for model, optimizer, scheduler in zip(models, optimizers, schedulers, strict=True):
            if optimizer is optimizers[2]:
                loss = optimizer.step(lambda step=step, model=model: backward(model, step))
                assert loss.requires_grad
            else:
                backward(model, step)
                assert optimizer.step() is None
            scheduler.step()
    assert calls == ["pre", "post"] * 5
    assert optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-4)
    assert optimizers[0].param_groups[1]["lr"] == pytest.approx(5e-5)
    for model in models:
        assert_protected(model, before, mask)
    assert_same_weights(models[0], models[2])
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other)
    optimizers[0].zero_grad()
    assert all(param.grad is None for param in models[0].parameters())

    twin = make_model()
    theirs = torch.optim.AdamW(groups(twin)[:2], lr=1e-2)
    mine = make_model()
    optimizer = SPAAdamW(groups(mine), mask, lr=1e-2)
    backward(mine)
    backward(twin)
    optimizer.step()
    theirs.step()
    for name, param in mine.named_parameters():
        free = ~mask.bool(name) if name in mask else ...
        torch.testing.assert_close(param[free], twin.get_parameter(name)[free], rtol=1e-6, atol=1e-8)


def test_add_param_group():
    model, extra = make_model(), nn.Linear(3, 2)
    mask = make_mask(model)
    before = snapshot(model)
    optimizer = SPAAdamW(model.named_parameters(), mask, lr=1e-2)
    optimizer.add_param_group({"params": [("extra.weight", extra.weight)], "lr": 0.5})
    old = extra.weight.detach().clone()
    backward(model)
    extra.weight.grad = torch.ones(2, 3)
    optimizer.step()
    torch.testing.assert_close(extra.weight.detach(), old * (1 - 0.5 * 0.01) - 0.5)
    assert_protected(model, before, mask)

    count = len(optimizer.param_groups)
    for pairs, message in (
        ([("extra.weight", nn.Parameter(torch.zeros(2)))], "extra.weight was given twice: "),
        ([("again", extra.weight)], "again was given twice, also as extra.weight"),
        ([extra.bias], "named_parameters"),
        ([("module.0.weight", nn.Parameter(torch.zeros(33, 7)))], "may be one that the mask means"),
        ([("meta", nn.Parameter(torch.zeros(2, device="meta")))], "meta device"),
    ):
        with pytest.raises((InvalidArgumentError, MaskMismatchError), match=message):
            optimizer.add_param_group({"params": pairs})
    with pytest.raises(InvalidArgumentError, match="lr must be"):
        optimizer.add_param_group({"params": [("bias", extra.bias)], "lr": -1.0})
    assert len(optimizer.param_groups) == count


def test_grad_scaler_skips_a_step_that_overflowed():
    model = make_model()
    mask = make_mask(model)
    before = snapshot(model)
    optimizer = SPAAdamW(model.named_parameters(), mask, lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for overflow in (True, False):
        model.zero_grad()
        loss = (model(torch.ones(4, 7)) - 1).square().mean()
        scaler.scale(loss).backward()
        if overflow:
            model[0].bias.grad[0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        assert all(same_bits(param, before[name]) for name, param in model.named_parameters()) is overflow
    assert_protected(model, before, mask)
    assert optimizer.state[model[0].bias]["step"] == 1


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_goes_on_as_the_original(how):
    def through_file(value):
        file = io.BytesIO()
        torch.save(value, file)
        file.seek(0)
        return torch.load(file, weights_only=False)

    ways = {
        "deepcopy": copy.deepcopy,
        "pickle": lambda value: pickle.loads(pickle.dumps(value)),
        "torch.save": through_file,
    }
    model = make_model(torch.bfloat16)
    mask = make_mask(model)
    before = snapshot(model)
    optimizer = SPAAdamW(model.named_parameters(), mask, lr=1e-2, state_dtype=torch.float32)
    train(model, optimizer, 3)
    other, theirs = ways[how]((model, optimizer))
    train(model, optimizer, 3, start=3)
    assert not same_bits(model[0].bias, other[0].bias)
    train(other, theirs, 3, start=3)
    assert_same_weights(model, other)
    assert_protected(other, before, mask)


def test_frozen_parameters_are_ignored_until_they_train():
    model = make_model()
    mask = make_mask(model)
    model[0].weight.requires_grad_(False)
    model.register_parameter("quantised", nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False))
    before = snapshot(model)
    optimizer = SPAAdamW(model.named_parameters(), mask, lr=1e-2)
    assert model[0].weight not in optimizer.state
    model[0].weight.grad = torch.ones(33, 7)
    backward(model)
    optimizer.step()
    assert same_bits(model[0].weight, before["0.weight"])
    model[0].weight.requires_grad_(True)
    train(model, optimizer, 2)
    assert_protected(model, before, mask)
    assert (model[0].weight != before["0.weight"])[~mask.bool("0.weight")].all()
    assert optimizer.state[model[0].weight]["step"] == 2


def test_parameters_swapped_by_position_keep_state_and_protection():
    model, twin = make_model(), make_model()
    mask = make_mask(model)
    before = snapshot(model)
    optimizers = [SPAAdamW(each.named_parameters(), mask, lr=1e-2) for each in (model, twin)]
    for each, optimizer in zip((model, twin), optimizers, strict=True):
        train(each, optimizer, 3)
    # As accelerate does for FSDP2: other parameters in the same places of the groups, and no word to the optimizer.
    other = copy.deepcopy(model)
    optimizers[0].param_groups[0]["params"] = list(other.parameters())
    assert set(optimizers[0].state_dict()["state"]) == {0, 1, 2, 3}
    train(other, optimizers[0], 3, start=3)
    train(twin, optimizers[1], 3, start=3)
    assert_same_weights(other, twin)
    assert_protected(other, before, mask)
    optimizers[0].param_groups[0]["params"][0] = nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(MaskMismatchError, match=r"0.weight changed its shape from \(33, 7\) to \(2, 2\)"):
        optimizers[0].step()


def test_accelerate_wraps_it():
    accelerate = pytest.importorskip("accelerate")
    model = make_model(torch.bfloat16)
    mask = make_mask(model)
    before = snapshot(model)
    optimizer = SPAAdamW(model.named_parameters(), mask, lr=1e-2, state_dtype=torch.float32)
    wrapped_model, wrapped = accelerate.Accelerator(cpu=True).prepare(model, optimizer)
    train(wrapped_model, wrapped, 3)
    assert_protected(model, before, mask)
    assert not same_bits(model[0].bias, before["0.bias"])
    assert optimizer.state[model[0].weight]["exp_avg"].dtype == torch.float32


# Saving and loading


@pytest.mark.parametrize(
    ("dtype", "state_dtype"), [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, torch.float32)]
)
def test_a_resumed_run_equals_the_uninterrupted_one(dtype, state_dtype):
    model = make_model(dtype)
    mask = make_mask(model)
    optimizer = SPAAdamW(model.named_parameters(), mask, lr=1e-2, state_dtype=state_dtype)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    train(model, optimizer, 3)
    scheduler.step()
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, 3, start=3)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = make_model(dtype, seed=1)
    theirs = SPAAdamW(other.named_parameters(), mask, lr=1.0, state_dtype=state_dtype)
    other.load_state_dict(saved["model"])
    calls = []
    theirs.register_load_state_dict_pre_hook(lambda _, given: calls.append(given is not saved["optimizer"]))
    theirs.register_load_state_dict_post_hook(lambda opt: calls.append(opt is theirs))
    theirs.load_state_dict(saved["optimizer"])
    assert calls == [True, True]
    assert theirs.param_groups[0]["lr"] == 5e-3
    # The saved state is copied, not shared.
    saved["optimizer"]["state"][0]["exp_avg"].fill_(7)
    train(other, theirs, 3, start=3)
    assert_same_weights(model, other)


def test_a_new_process_resumes_bit_for_bit(tmp_path):
    model = make_model(torch.bfloat16)
    mask = make_mask(model)
    optimizer = SPAAdamW(model.named_parameters(), mask, lr=1e-2, state_dtype=torch.float32)
    train(model, optimizer, 3)
    mask.save(tmp_path / "mask.safetensors")
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    code = """
        import sys, torch
        from torch import nn
        from pathlib import Path
        from safekern import Mask, SPAAdamW
        folder = Path(sys.argv[1])
        model = nn.Sequential(nn.Linear(7, 33), nn.Tanh(), nn.Linear(33, 5)).bfloat16()
        mask = Mask.load(folder / "mask.safetensors")
        optimizer = SPAAdamW(model.named_parameters(), mask, state_dtype=torch.float32)
        saved = torch.load(folder / "checkpoint.pt", weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        for param in model.parameters():
            param.grad = torch.linspace(-1, 1, param.numel()).view(param.shape).bfloat16()
        optimizer.step()
        torch.save(model.state_dict(), folder / "after.pt")
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], check=True)
    for param in model.parameters():
        param.grad = torch.linspace(-1, 1, param.numel()).view(param.shape).bfloat16()
    optimizer.step()
    for name, value in torch.load(tmp_path / "after.pt", weights_only=True).items():
        assert same_bits(value, model.state_dict()[name])


def test_loading_matches_parameters_by_name():
    model, other = make_model(), make_model()
    mask = make_mask(model)
    optimizer = SPAAdamW(model.named_parameters(), mask, lr=1e-2)
    train(model, optimizer, 3)
    other.load_state_dict(model.state_dict())
    wrapped = [(f"module.{name}", param) for name, param in other.named_parameters()]
    theirs = SPAAdamW(reversed(wrapped), mask, lr=1e-2)
    theirs.load_state_dict(optimizer.state_dict())
    assert theirs.param_groups[0]["param_names"] == [name for name, _ in reversed(wrapped)]
    train(model, optimizer, 3, start=3)
    train(other, theirs, 3, start=3)
    assert_same_weights(model, other)


@pytest.mark.parametrize("before", ["the first step", "a parameter's first gradient"])
def test_a_state_from_before_a_first_gradient_takes_the_optimizer_back(before):
    model, other = make_model(), make_model()
    mask = make_mask(model)
    optimizer = SPAAdamW(model.named_parameters(), mask, lr=1e-2)
    if before != "the first step":
        model[0](torch.ones(2, 7)).sum().backward()
        optimizer.step()
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    train(model, optimizer, 3)
    model.load_state_dict(weights)
    optimizer.load_state_dict(saved)
    assert optimizer.state_dict()["state"].keys() == saved["state"].keys()

    other.load_state_dict(weights)
    fresh = SPAAdamW(other.named_parameters(), mask, lr=1e-2)
    fresh.load_state_dict(saved)
    train(model, optimizer, 2)
    train(other, fresh, 2)
    assert_same_weights(model, other)


def test_states_that_do_not_fit_are_refused_and_change_nothing():
    model = make_model(torch.bfloat16)
    mask = make_mask(model)
    optimizer = SPAAdamW(model.named_parameters(), mask, lr=1e-2)
    train(model, optimizer, 2)
    good = copy.deepcopy(optimizer.state_dict())

    another = SPAAdamW(model.named_parameters(), make_mask(model, seed=1)).state_dict()
    incomplete, reshaped, missing, rounded, plain, regrouped = (copy.deepcopy(good) for _ in range(6))
    del incomplete["state"][1]["exp_avg"]
    reshaped["state"][0]["exp_avg_sq"] = torch.zeros(7, 33)
    missing["param_groups"][0]["params"].pop()
    missing["param_groups"][0]["param_names"].pop()
    rounded["state"][2]["exp_avg"] = rounded["state"][2]["exp_avg"].float()
    plain["param_groups"][0].pop("mask_fingerprint")
    group = regrouped["param_groups"][0]
    tail = {**group, "params": group["params"][2:], "param_names": group["param_names"][2:]}
    regrouped["param_groups"] = [
        {**group, "params": group["params"][:2], "param_names": group["param_names"][:2]},
        tail,
    ]
    for state, message in (
        (another, "another mask"),
        (plain, "an optimizer without a mask"),
        (incomplete, "state of parameter 0.bias is incomplete"),
        (reshaped, "state of parameter 0.weight is incomplete or of another shape"),
        (missing, "saved for other parameters"),
        (regrouped, "saved for other parameters, or for the same ones in other groups"),
        (rounded, "state_dtype=torch.float32"),
    ):
        with pytest.raises((MaskMismatchError, InvalidArgumentError), match=message):
            optimizer.load_state_dict(state)
        now = optimizer.state_dict()
        assert now["param_groups"] == good["param_groups"]
        for key, entry in good["state"].items():
            assert all(torch.equal(value, now["state"][key][field]) for field, value in entry.items())


def test_distributed_checkpoint_round_trip():
    dcp = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    model = make_model(torch.bfloat16)
    mask = make_mask(model)
    optimizer = SPAAdamW(model.named_parameters(), mask, lr=1e-2, state_dtype=torch.float32)
    other = make_model(torch.bfloat16, seed=1)
    theirs = SPAAdamW(other.named_parameters(), mask, lr=1.0, state_dtype=torch.float32)
    # A loader asks a fresh optimizer for its state, which must not take a step to have one.
    untouched = snapshot(other)
    dcp.get_state_dict(other, theirs)
    assert all(same_bits(param, untouched[name]) for name, param in other.named_parameters())
    train(model, optimizer, 3)
    for flat in (False, True):
        options = dcp.StateDictOptions(flatten_optimizer_state_dict=flat)
        weights, state = dcp.get_state_dict(model, optimizer, options=options)
        dcp.set_state_dict(
            other,
            theirs,
            model_state_dict=copy.deepcopy(weights),
            optim_state_dict=copy.deepcopy(state),
            options=options,
        )
        train(model, optimizer, 2, start=3)
        train(other, theirs, 2, start=3)
        assert_same_weights(model, other)


def test_state_with_a_compiled_models_mask_loads_with_the_plain_ones():
    model, other = make_model(), make_model()
    mask = make_mask(model)
    compiled = torch.compile(model, backend="eager")
    wrapped = Mask.from_indices(
        {f"_orig_mod.{name}": mask[name] for name in mask},
        {f"_orig_mod.{name}": shape for name, shape in mask.shapes.items()},
        model_numel=mask.model_numel,
    )
    optimizer, theirs = SPAAdamW(compiled.named_parameters(), wrapped), SPAAdamW(other.named_parameters(), mask)
    train(model, optimizer, 2)
    other.load_state_dict(model.state_dict())
    theirs.load_state_dict(optimizer.state_dict())
    train(model, optimizer, 2, start=2)
    train(other, theirs, 2, start=2)
    assert_same_weights(model, other)


# What it refuses


def test_masks_that_do_not_fit_are_refused():
    model = make_model()
    mask = make_mask(model)
    wrapped = [(f"_orig_mod.{name}", param) for name, param in model.named_parameters()]
    assert SPAAdamW(wrapped, mask)
    with pytest.raises(MaskMismatchError, match=r"2.weight: missing"):
        SPAAdamW(list(model.named_parameters())[:2], mask)
    with pytest.raises(MaskMismatchError, match="shape"):
        SPAAdamW(model.named_parameters(), Mask.from_indices({"0.weight": [0]}, {"0.weight": (7, 33)}))
    with pytest.raises(MaskMismatchError, match="selects nothing"):
        SPAAdamW(model.named_parameters(), Mask.from_indices({}, {}))
    for name in mask:
        model.get_parameter(name).requires_grad_(False)
    with pytest.raises(MaskMismatchError, match="no weight that trains"):
        SPAAdamW(model.named_parameters(), mask)


def test_arguments_that_cannot_work_are_refused():
    model = make_model()
    mask = make_mask(model)
    named = list(model.named_parameters())
    for options in (
        {"lr": -1},
        {"lr": float("nan")},
        {"eps": -1},
        {"betas": (1.0, 0.9)},
        {"state_dtype": torch.float16},
    ):
        with pytest.raises(InvalidArgumentError):
            SPAAdamW(named, mask, **options)
    with pytest.raises(InvalidArgumentError, match="weight_decay"):
        SPAAdamW([{"params": named, "weight_decay": -1}], mask)
    for params, message in (
        (model.parameters(), "named_parameters"),
        ([], "no named parameters"),
        ([*named, ("0.bias", nn.Parameter(torch.zeros(3)))], "0.bias was given twice"),
        ([*named, ("tied", named[0][1])], "tied was given twice, also as 0.weight"),
        ([*named, ("meta", nn.Parameter(torch.zeros(3, device="meta")))], "meta device"),
        ([*named, ("complex", nn.Parameter(torch.zeros(3, dtype=torch.complex64)))], "complex64"),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            SPAAdamW(params, mask)


@pytest.mark.parametrize(("before", "after"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_a_model_that_was_converted_trains_on(before, after):
    model = make_model(before)
    mask = make_mask(model)
    optimizer = SPAAdamW(model.named_parameters(), mask, lr=1e-2)
    train(model, optimizer, 2)
    moments = {param: state["exp_avg"].clone() for param, state in optimizer.state.items()}
    model.to(after)
    for param, state in optimizer.state.items():
        assert torch.equal(state["exp_avg"].float(), moments[param].float())
    converted = snapshot(model)
    train(model, optimizer, 2)
    assert all(state["step"] == 4 for state in optimizer.state.values())
    assert_protected(model, converted, mask)


def test_steps_that_cannot_be_taken_change_nothing():
    embedding = nn.Embedding(5, 3, sparse=True)
    linear = nn.Linear(3, 2)
    model = nn.ModuleDict({"embedding": embedding, "linear": linear})
    mask = Mask.from_indices({"linear.weight": [1]}, {"linear.weight": (2, 3)})
    optimizer = SPAAdamW(model.named_parameters(), mask)
    before = snapshot(model)
    with pytest.raises(StepError, match="no parameter received a gradient"):
        optimizer.step()
    linear(embedding(torch.tensor([1]))).sum().backward()
    with pytest.raises(StepError, match=r"embedding.weight has a sparse gradient"):
        optimizer.step()
    assert all(same_bits(param, before[name]) for name, param in model.named_parameters())
    assert all(state["step"] == 0 for state in optimizer.state.values())


def test_autograd_notices_the_step():
    model = make_model()
    optimizer = SPAAdamW(model.named_parameters(), make_mask(model))
    loss = (model(torch.ones(2, 7)) - 1).square().mean()
    backward(model)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_parameter_that_was_resized_is_named():
    model = make_model()
    optimizer = SPAAdamW(model.named_parameters(), make_mask(model), lr=1e-3)
    train(model, optimizer, 1)
    unmasked = next(name for name, _ in model.named_parameters() if name not in make_mask(model))
    param = model.get_parameter(unmasked)
    shape = tuple(param.shape)
    param.data = torch.zeros(1 + shape[0], *shape[1:])
    param.grad = torch.ones_like(param)
    with pytest.raises(StepError, match=f"{unmasked} now has the shape .*, and had .*{shape[0]}.*new optimizer"):
        optimizer.step()
