"""What is scored, and under which names it is reported, in every family of models that transformers builds alike."""

import pytest
import torch
from families import FAMILIES, HEAD, MOE, build

from safekern import Mask, names
from safekern.eligibility import eligible_parameters
from safekern.objectives import refusal
from safekern.scoring import score


def of_last_layer(named):
    return [(name, param) for name, param in named if names.layer(name) in (None, 1)]


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_scored_and_left_out(name):
    model, family = build(name), FAMILIES[name]
    scored = eligible_parameters(model)
    shapes = {names.component(name): tuple(param.shape) for name, param in of_last_layer(scored.items())}
    assert shapes == family.scored
    assert len(of_last_layer(scored.items())) == len(shapes)
    left_out = {names.component(n) for n, param in model.named_parameters() if param.ndim > 1 and n not in scored}
    assert left_out == {"embed"} | family.left_out
    assert family.buffers <= {name.rpartition(".")[2] for name, _ in model.named_buffers()}


@pytest.mark.parametrize("name", FAMILIES)
def test_refusal_is_the_models_own_loss(name):
    model = build(name)
    ids = torch.tensor([[3, 4, 5, 6, 7, 8], [9, 10, 11, 12, 0, 0]])
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": ids.masked_fill(ids == 0, -100)}
    batch["labels"][:, :3] = -100
    batch["labels"][0, 3] = -100
    params = list(eligible_parameters(model).values())
    results = []
    for loss in (refusal(model, batch), model(**batch).loss):
        results.append((loss.item(), torch.autograd.grad(loss, params, allow_unused=True)))
    (ours, our_grads), (theirs, their_grads) = results
    assert ours == pytest.approx(theirs, rel=1e-5)
    for one, other in zip(our_grads, their_grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_of_a_report(name):
    tokens = torch.tensor([[3, 4, 5, 6, 7, 8]])
    scores = score(build(name), [{"input_ids": tokens, "labels": tokens}])
    layered = set(FAMILIES[name].scored) - set(HEAD)
    for rows in (scores.top(1.0).summary(), scores.report()):
        assert {row.layer for row in rows} == {0, 1, *([None] if "lm_head" in FAMILIES[name].scored else [])}
        assert {row.component for row in rows if row.layer == 1} == layered
        assert sum(row.numel for row in rows) == scores.numel


@pytest.mark.parametrize("name", MOE)
def test_experts_of_a_report(name):
    scored = eligible_parameters(build(name))
    shapes = {name: param.shape for name, param in scored.items()}
    fused = {name: shape for name, shape in shapes.items() if names.fused_experts(name, shape)}
    assert {names.component(name) for name in fused} == {"experts.gate_up_proj", "experts.down_proj"}
    last = {name: shape for name, shape in fused.items() if names.layer(name) == 1}
    per_expert = sum(shape.numel() for shape in last.values()) // 4
    # The first weight of every slice of one tensor, and two of the last expert's of the other.
    first, second = last
    size = last[first].numel() // 4
    mask = Mask.from_indices({first: [0, size, 2 * size, 3 * size], second: [last[second].numel() - 1]}, shapes)
    rows = [(row.layer, row.expert, row.selected, row.numel) for row in mask.expert_summary()]
    assert rows == [(1, expert, 2 if expert == 3 else 1, per_expert) for expert in range(4)]


@pytest.mark.parametrize("name", MOE)
def test_experts_without_tokens_score_exactly_zero(name):
    # Equal tokens attend to equal values, so that all of them take the same way.
    tokens = torch.tensor([[3, 3, 3]])
    scores = score(build(name), [{"input_ids": tokens, "labels": tokens}])
    slices = {name: esi.flatten(1) for name, esi in scores.items() if names.fused_experts(name, esi.shape)}
    assert slices
    for expert in slices.values():
        assert (expert != 0).any(1).sum() == FAMILIES[name].config["num_experts_per_tok"]
