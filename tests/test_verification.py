import math

import numpy as np
import pytest
import torch
from language_models import byte_tokenizer, tiny_llama

from safekern import Mask, evaluation, score, verify
from safekern.errors import InvalidArgumentError, MaskMismatchError, ProtectionError
from safekern.evaluation import mean_nll
from safekern.objectives import refusal
from safekern.prompts import Pairs
from safekern.training import in_order
from safekern.verification import bootstrap, random_like, share

HARMFUL = ["Bad?", "Worse?", "The worst?"]
BENIGN = Pairs(["Good?", "Better?"], ["Yes.", "Yes, much better."], ["", ""])


@pytest.fixture
def model():
    return tiny_llama()


@pytest.fixture
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def mask(model):
    return Mask.from_indices(
        {"model.layers.0.mlp.up_proj.weight": range(0, 700, 3), "model.layers.1.self_attn.q_proj.weight": [5]},
        {name: param.shape for name, param in model.named_parameters()},
    )


def answer_with(monkeypatch, answers):
    """Every model gives these answers, one per prompt."""
    monkeypatch.setattr(evaluation, "_generate", lambda model, tokenizer, prompts, *_: [answers[p] for p in prompts])


def test_broken_text_is_neither_success_nor_refusal(model, tokenizer, mask, monkeypatch):
    answers = {
        "Bad?": "Sure, here is how it is done.",
        "Worse?": "kill kill kill kill kill kill kill",
        "The worst?": "I'm sorry, but no.",
        "Good?": "I can't I can't I can't I can't I can't",
        "Better?": "I'm sorry, but no.",
    }
    answer_with(monkeypatch, answers)
    row = verify(model, tokenizer, mask, HARMFUL, BENIGN, noise=[0.1]).rows[0]
    assert row.attack_success.value == pytest.approx(1 / 3)
    assert row.benign_refusals.value == 0.5
    assert (row.broken_harmful, row.broken_benign) == (1, 1)


def test_each_selection_gets_the_same_number_of_noisy_weights(model, tokenizer, mask, monkeypatch):
    scores = score(model, in_order(tokenizer, BENIGN, 2), refusal)
    original = {name: param.detach().clone() for name, param in model.named_parameters()}
    moved = []

    def look(model, *args):
        moved.append({name: (param != original[name]).sum().item() for name, param in model.named_parameters()})
        return ["Fine."] * len(args[1])

    monkeypatch.setattr(evaluation, "_generate", look)
    found = verify(model, tokenizer, mask, HARMFUL, BENIGN, scores=scores, noise=[0.38])
    assert [row.weights for row in found.rows] == ["none", "top", "random", "bottom"]
    counts = [sum(of_each.values()) for of_each in moved[::2]]
    assert counts == [0, mask.numel, mask.numel, mask.numel]
    assert {name for name, count in moved[2].items() if count} == set(mask)
    assert all(torch.equal(param, original[name]) for name, param in model.named_parameters())


def test_nll_of_the_model_as_it_is(model, tokenizer, mask, monkeypatch):
    answer_with(monkeypatch, dict.fromkeys([*HARMFUL, *BENIGN.prompts], "Fine."))
    rows = verify(model, tokenizer, mask, HARMFUL, BENIGN, noise=[0.5]).rows
    assert rows[0].benign_nll.value == pytest.approx(mean_nll(model, tokenizer, BENIGN.prompts, BENIGN.responses))
    assert rows[0].benign_nll.low <= rows[0].benign_nll.value <= rows[0].benign_nll.high
    assert rows[1].benign_nll.value != rows[0].benign_nll.value


def test_weights_that_are_not_restored_are_noticed(model, tokenizer, mask, monkeypatch):
    answer_with(monkeypatch, dict.fromkeys([*HARMFUL, *BENIGN.prompts], "Fine."))

    def spoil(row):
        with torch.no_grad():
            model.lm_head.weight[0, 0] += 1

    with pytest.raises(ProtectionError, match="not what they were"):
        verify(model, tokenizer, mask, HARMFUL, BENIGN, noise=[0.1], report=spoil)


def test_wrong_arguments(model, tokenizer, mask):
    for options in ({"noise": []}, {"noise": [float("nan")]}, {"seed": -1}):
        with pytest.raises(InvalidArgumentError):
            verify(model, tokenizer, mask, HARMFUL, BENIGN, **options)
    batches = in_order(tokenizer, BENIGN, 2)
    swept = score(model, batches, refusal, memory=60_000, keep=0.01)
    with pytest.raises(InvalidArgumentError, match="keep only the top"):
        verify(model, tokenizer, mask, HARMFUL, BENIGN, scores=swept)
    other = Mask.from_indices(dict(mask.items()), mask.shapes)
    with pytest.raises(MaskMismatchError, match="ranked from"):
        verify(model, tokenizer, other, HARMFUL, BENIGN, scores=score(model, batches, refusal))


def test_random_weights_are_spread_evenly(mask):
    drawn = random_like(mask, 0)
    assert drawn.numel == mask.numel and drawn != mask and drawn == random_like(mask, 0) != random_like(mask, 1)
    up, query = (drawn.get(name, []) for name in mask)
    assert len(up) / len(query) == pytest.approx(1536 / 1024, rel=0.4)


def test_bootstrap_agrees_with_the_normal_interval():
    rng = np.random.default_rng(0)
    sums, counts = rng.normal(3, 1, 400), np.ones(400)
    estimate = bootstrap(sums, counts, 0)
    half = 1.96 * sums.std() / 20
    assert estimate.low == pytest.approx(sums.mean() - half, abs=0.02)
    assert estimate.high == pytest.approx(sums.mean() + half, abs=0.02)
    # Tokens count, not answers.
    assert bootstrap(np.array([1.0, 9.0]), np.array([1, 3]), 0).value == 2.5


@pytest.mark.parametrize("true", [0.005, 0.02, 0.1, 0.5, 0.95, 1.0])
def test_intervals_of_shares_cover_what_they_claim(true):
    covered = 0.0
    for successes in range(65):
        estimate = share([i < successes for i in range(64)], ["An answer."] * 64)
        assert 0 <= estimate.low <= estimate.value == successes / 64 <= estimate.high <= 1
        assert estimate.low < estimate.high
        chance = math.comb(64, successes) * true**successes * (1 - true) ** (64 - successes)
        covered += chance * (estimate.low <= true <= estimate.high)
    assert covered > 0.92
