"""Arguments of other kinds than are asked for: refused in words before anything is changed."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from language_models import byte_tokenizer, tiny_llama
from small_net import Net, full_mask, loss_of, random_mask, train, weights
from torch import nn

import safekern
from safekern import InvalidArgumentError, Mask, ScoringError, SETAdamW, SPAAdamW, perturb, protect, score
from safekern.prompts import Pairs, builtin, with_refusals
from safekern.training import balanced, in_order, shuffled, tune, with_rehearsal

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


DENSE = torch.ones(2, 2, dtype=torch.bool)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"w": [[True]]}, "'w': a bool tensor is needed, got list"),
        ({"w": np.ones((2, 2), dtype=bool)}, "'w': a bool tensor is needed, got ndarray"),
        ({"w": DENSE.to("meta")}, "'w': .* on the meta device"),
        ({"w": DENSE.to_sparse()}, "'w': .* sparse"),
        ({1: DENSE}, "1 is not the name of a parameter"),
        ([DENSE], "mapping by parameter name is needed, got list"),
        (None, "mapping by parameter name is needed, got NoneType"),
    ],
)
def test_what_makes_no_mask_of_bools(masks, message):
    with pytest.raises(InvalidArgumentError, match=message):
        Mask.from_bool(masks)


@pytest.mark.parametrize(
    ("indices", "shapes", "model_numel", "message"),
    [
        ({1: [0]}, {1: (2,)}, None, "1 is not the name of a parameter"),
        ({"w": [0]}, {"w": (2,), None: (2,)}, None, "None is not the name of a parameter"),
        ({"w": [0]}, None, None, "mapping by parameter name is needed, got NoneType"),
        ([0], {"w": (2,)}, None, "mapping by parameter name is needed, got list"),
        ({"w": torch.tensor([0, 1]).to_sparse()}, {"w": (2,)}, None, "'w': .* sparse"),
        ({"w": [0]}, {"w": (2,)}, "2", "model_numel is '2'"),
        ({"w": [0]}, {"w": (2,)}, 2.5, "model_numel is 2.5"),
    ],
)
def test_what_makes_no_mask_of_indices(indices, shapes, model_numel, message):
    with pytest.raises(InvalidArgumentError, match=message):
        Mask.from_indices(indices, shapes, model_numel=model_numel)


def test_masks_take_integers_of_numpy():
    mask = Mask.from_indices({"w": [np.int64(3)]}, {"w": tuple(np.array([2, 2]))}, model_numel=np.int32(9))
    assert mask == Mask.from_indices({"w": [3]}, {"w": (2, 2)})
    assert type(mask.model_numel) is int


def test_a_model_of_lazy_modules():
    model = nn.Sequential(nn.Linear(3, 3), nn.LazyLinear(4))
    mask = Mask.from_indices({"0.weight": [0]}, {"0.weight": (3, 3)})
    for use in (
        lambda: score(model, [torch.ones(2, 3)], lambda model, batch: model(batch).sum()),
        lambda: SETAdamW(model.named_parameters(), mask),
        lambda: protect(torch.optim.SGD(model[0].parameters()), mask, model.named_parameters()),
    ):
        with pytest.raises(InvalidArgumentError, match=r"parameter 1\.weight is of a lazy module"):
            use()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"select": ["first.weight"]}, InvalidArgumentError, "select must be a function .* got list"),
        ({"objective": "refusal"}, InvalidArgumentError, "objective must be a function .* got str"),
        ({"model": loss_of}, InvalidArgumentError, r"a model is a torch\.nn\.Module, got function"),
        ({"objective": lambda model, step: loss_of(model, step) * 1j}, ScoringError, "batch 0: .* real number"),
    ],
)
def test_what_cannot_be_scored(options, error, message):
    with pytest.raises(error, match=message):
        score(**{"model": Net(), "loader": [0], "objective": loss_of, **options})


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        (iter(["a"]), {}, "prompts is of type list_iterator, but must be a sequence"),
        ({"a": "b"}, {}, "prompts is of type dict, but must be a sequence"),
        (["a"], {"batch_size": 1.5}, r"batch_size is 1\.5, but must be a whole number"),
        (["a"], {"max_new_tokens": None}, "max_new_tokens is None, but must be a whole number"),
    ],
)
def test_what_cannot_be_answered(prompts, options, message):
    for rate in (safekern.attack_success_rate, safekern.refusal_rate):
        with pytest.raises(InvalidArgumentError, match=message):
            rate(tiny_llama(), byte_tokenizer(), prompts, **options)


@pytest.mark.parametrize("path", [io.BytesIO(), b"mask", None, 3])
def test_what_is_no_path(path):
    for use in (Mask.load, safekern.Scores.load, Mask.from_indices({"w": [0]}, {"w": (2,)}).save):
        with pytest.raises(InvalidArgumentError, match=f"path is needed, got {type(path).__name__}"):
            use(path)


def test_tune_explains_what_its_parts_are():
    model = tiny_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = in_order(byte_tokenizer(), Pairs(["a", "b"], ["x", "y"], ["", ""]), 1)
    before = weights(model)
    for parts in (batches, batches[0], [], None, (1.0, batches), [("1", batches)], [(1.0, batches[0])], [(1.0, 2)]):
        with pytest.raises(InvalidArgumentError, match=r"pass \[\(1\.0, batches\)\]"):
            tune(model, optimizer, parts, 1)
    assert all(torch.equal(weights(model)[name], value) for name, value in before.items())
    assert len(tune(model, optimizer, [(np.float32(1.0), batches)], 2)) == 2


PAIRS = Pairs(["a", "b"], ["x", "y"], ["", ""])


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda: Pairs(["a"], ["x", "y"], [""]), "equally long, got 1, 2, 1"),
        (lambda: Pairs(["a"], ["x"], []), "equally long, got 1, 1, 0"),
        (lambda: Pairs("ab", ["x", "y"], ["", ""]), "prompts must be a list, got a text"),
        (lambda: with_refusals("abc"), "prompts must be a list, got a text"),
        (lambda: builtin("harmfull", "tune"), "'harmful' and 'benign' prompts, .* got 'harmfull'"),
        (lambda: builtin("benign", "test"), "got 'benign' and 'test'"),
        (lambda: in_order(byte_tokenizer(), ["a"], 1), r"Pairs are needed, got list: pass prompts\.load"),
        (lambda: in_order(byte_tokenizer(), PAIRS, "1"), "batch_size is '1', but must be a whole number"),
        (
            lambda: next(shuffled(byte_tokenizer(), PAIRS, 1, "0")),
            r"seed must be a whole number from 0 to 2\^63 - 1, got '0'",
        ),
        (lambda: next(shuffled(byte_tokenizer(), PAIRS, 1, 0, skip=-1)), "skip is -1, but must be a whole number"),
        (lambda: balanced(byte_tokenizer(), PAIRS, None), "Pairs are needed, got NoneType"),
        (lambda: balanced(byte_tokenizer(), PAIRS, PAIRS, refusal_weight="0.1"), "refusal_weight is 0.1, but must be"),
        (
            lambda: balanced(byte_tokenizer(), PAIRS, PAIRS, batch_size=5, refusal_weight=0.2),
            "batch_size is 5, but must be even: half of each batch is of each kind",
        ),
        (lambda: with_rehearsal(byte_tokenizer(), PAIRS, PAIRS, PAIRS, rehearsal=None), "rehearsal is None, but must"),
        (
            lambda: with_rehearsal(byte_tokenizer(), PAIRS, PAIRS, PAIRS, rehearsal=1.0),
            r"rehearsal is 1\.0, but must be at least 0 and less than 1",
        ),
        (lambda: safekern.models.load(None), "path is needed, got NoneType"),
        (lambda: safekern.integrations.for_trainer("SETAdamW"), "optimizer_class must be one such as SETAdamW"),
    ],
)
def test_what_cannot_be_prepared(use, message):
    with pytest.raises(InvalidArgumentError, match=message):
        use()


@pytest.mark.parametrize("iterations", [-1, 1.5, "1", None])
def test_iterations_that_are_no_number_of_steps(iterations):
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(InvalidArgumentError, match=r"iterations is .* whole number of at least 0"):
        tune(model, optimizer, [(1.0, [])], iterations)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"mask": "mask.safetensors"}, "a mask is needed, got str"),
        ({"benign": ["a"]}, "Pairs are needed, got list"),
        ({"scores": Mask.from_indices({"w": [0]}, {"w": (2,)})}, "scores must be Scores, .* got Mask"),
        ({"noise": 0.1}, "noise must be finite numbers of at least 0, got 0.1"),
        ({"noise": ["0.1"]}, "noise must be finite numbers"),
        ({"seed": "0"}, "seed must be a whole number"),
    ],
)
def test_what_cannot_be_verified(changed, message):
    model, tokenizer = tiny_llama(), byte_tokenizer()
    scores = score(model, in_order(tokenizer, PAIRS, 2), safekern.objectives.refusal)
    right = {"mask": scores.top(0.01), "harmful": PAIRS.prompts, "benign": PAIRS}
    with pytest.raises(InvalidArgumentError, match=message):
        safekern.verify(model, tokenizer, **right | changed)


def test_masks_are_compared_with_masks():
    mask = Mask.from_indices({"w": [0]}, {"w": (2,)})
    scores = safekern.Scores({"w": torch.ones(2)}, {"w": torch.ones(())}, num_batches=1, model_numel=2, meta={})
    for use in (mask.jaccard, mask.named_like, scores.selected):
        with pytest.raises(InvalidArgumentError, match="a mask is needed, got dict"):
            use({"w": [0]})
