"""Arguments of other kinds than are asked for: refused in words before anything is changed."""

from pathlib import Path

import numpy as np
import pytest
import torch
from small_net import Net, full_mask, loss_of, random_mask, train, weights

import safekern
from safekern import InvalidArgumentError, SETAdamW, SPAAdamW, perturb, protect

MASKLESS = {
    "SETAdamW": lambda model, mask: SETAdamW(model.named_parameters(), mask),
    "SPAAdamW": lambda model, mask: SPAAdamW(model.named_parameters(), mask),
    "protect": lambda model, mask: protect(torch.optim.SGD(model.parameters()), mask, model.named_parameters()),
    "perturb": lambda model, mask: perturb(model, mask).__enter__(),
    "save_delta": lambda model, mask: safekern.save_delta(model, mask, "delta.safetensors"),
    "merge_lora": safekern.merge_lora,
    "leave_to_set": safekern.integrations.leave_to_set,
}


@pytest.mark.parametrize("use", MASKLESS)
def test_what_is_no_mask(use, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = Net()
    before = weights(model)
    for mask in ("mask.safetensors", Path("mask.safetensors")):
        with pytest.raises(InvalidArgumentError, match=r"a mask is needed, got .*: pass Mask\.load\(path\)"):
            MASKLESS[use](model, mask)
    for mask in ({"first.weight": torch.ones(37, 13, dtype=torch.bool)}, None, [full_mask(model)]):
        with pytest.raises(InvalidArgumentError, match=r"a mask is needed, got .*from_bool"):
            MASKLESS[use](model, mask)
    assert not any(tmp_path.iterdir())
    assert all(torch.equal(weights(model)[name], value) for name, value in before.items())


@pytest.mark.parametrize("make", [SETAdamW, SPAAdamW])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[(name, value) for name in ("lr", "eps", "weight_decay") for value in (None, "1e-2", 1j, True, [0.1])],
        ("lr", torch.tensor([1e-3, 1e-3])),
        ("lr", torch.tensor(1j)),
        *[("betas", value) for value in (None, 0.9, ("0.9", "0.99"), (0.9,), (0.9, None), "ab")],
    ],
)
def test_hyperparameters_that_are_no_numbers(make, name, value):
    model = Net()
    mask = random_mask(model)
    with pytest.raises(InvalidArgumentError, match=f"^{name} must be"):
        make(model.named_parameters(), mask, **{name: value})
    with pytest.raises(InvalidArgumentError, match=f"^{name} must be"):
        make([{"params": model.named_parameters(), name: value}], mask)


def test_a_number_in_quotes_is_explained():
    with pytest.raises(InvalidArgumentError, match=r"got '1e-2' \(YAML reads"):
        SETAdamW(Net().named_parameters(), random_mask(Net()), weight_decay="1e-2")


@pytest.mark.parametrize("max_norm", [None, "1.0", torch.ones(2)])
def test_norms_that_are_no_numbers(max_norm):
    model = Net()
    optimizer = SETAdamW(model.named_parameters(), random_mask(model))
    loss_of(model, 0).backward()
    before = model.first.weight.grad.clone()
    with pytest.raises(InvalidArgumentError, match="max_norm must be a number"):
        optimizer.clip_grad_norm_(max_norm)
    assert torch.equal(model.first.weight.grad, before)


@pytest.mark.parametrize("make", [SETAdamW, SPAAdamW])
def test_numbers_of_numpy_are_numbers(make):
    models = Net(), Net()
    for model, kind in zip(models, (float, np.float32), strict=True):
        betas = (kind(0.875), kind(0.984375))
        options = {"lr": kind(2**-7), "betas": betas, "eps": kind(2**-27), "weight_decay": kind(2**-4)}
        optimizer = make(model.named_parameters(), random_mask(model), **options)
        train(model, optimizer, range(3))
        optimizer.zero_grad()
        loss_of(model, 0).backward()
        if make is SETAdamW:
            optimizer.clip_grad_norm_(kind(0.5))
    assert all(torch.equal(a, b) for a, b in zip(*(weights(model).values() for model in models), strict=True))


def test_perturb_takes_numbers_of_numpy():
    model = Net()
    noisy = []
    for noise, seed in ((0.375, 3), (np.float32(0.375), np.int64(3))):
        with perturb(model, full_mask(model), noise=noise, seed=seed):
            noisy.append(model.first.weight.detach().clone())
    assert torch.equal(*noisy)
