"""Mixtures of experts: a sigma per expert, experts that no token reaches, and the layouts of GPT-OSS and Llama 4."""

import copy
import json

import pytest
import torch
import transformers
from cli_folder import PAIRS, write_rows
from exact import same_bits
from families import build
from hypothesis import given, settings
from hypothesis import strategies as st
from language_models import byte_tokenizer
from scored_models import Weights, assert_same_scores, linear
from torch import nn

import safekern
from safekern import Mask, Scores, files
from safekern.cli import main
from safekern.errors import FileFormatError, InvalidArgumentError, NonFiniteError
from safekern.scores import RunningTop, TopScores, count_of
from safekern.scoring import score

pytestmark = pytest.mark.usefixtures("poisoned_memory")

FUSED = "layers.0.experts.down_proj"
RATIOS = (1e-9, 0.01, 0.1, 0.4, 0.9, 1.0)


def mixture(*shapes, dtype=torch.float32, **others):
    """A model of fused experts of different scales, and its twin whose experts are tensors of their own."""
    torch.manual_seed(0)
    layers, twin_layers = nn.ModuleList(), nn.ModuleList()
    for shape in shapes:
        scales = 0.1 * 2.0 ** torch.arange(shape[0]).view(-1, 1, 1)
        weights = (torch.randn(shape) * scales).to(dtype)
        layers.append(nn.ModuleDict({"experts": Weights(down_proj=weights)}))
        twin_layers.append(nn.ModuleDict({"experts": nn.ModuleList(Weights(w1=one.clone()) for one in weights)}))
    models = Weights(**others), Weights(**copy.deepcopy(others))
    models[0].layers, models[1].layers = layers, twin_layers
    return models


def rounded(values):
    """Few distinct values, so that ties abound."""
    return values.mul(4).round()


def batches_of(model, count=3):
    """Batches of :func:`linear`; models of as many weights in the same order get the same gradients in that order."""
    generator = torch.Generator().manual_seed(1)
    params = dict(model.named_parameters())
    sizes = [param.numel() for param in params.values()]
    draws = [rounded(torch.randn(sum(sizes), generator=generator)).split(sizes) for _ in range(count)]
    return [
        {name: part.view(param.shape).to(param.dtype) for (name, param), part in zip(params.items(), draw, strict=True)}
        for draw in draws
    ]


def esi_of(scores):
    return torch.cat([scores[name].view(-1) for name in scores])


def selection(mask, scores):
    """Which of all scored weights, in the model's order."""
    none = {name: torch.zeros(scores[name].shape, dtype=torch.bool) for name in scores}
    return torch.cat([(mask.bool(name) if name in mask else none[name]).view(-1) for name in scores])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sigma_per_expert_scores_as_separate_tensors_do(dtype):
    fused, apart = mixture((3, 5, 7), (4, 1, 9), dtype=dtype, dense=torch.randn(6, 4).to(dtype))
    one = score(fused, batches_of(fused), linear, sigma_per="expert")
    other = score(apart, batches_of(apart), linear)
    assert {name: tuple(sigma.shape) for name, sigma in one.sigma.items()} == {
        "dense": (),
        FUSED: (3, 1, 1),
        "layers.1.experts.down_proj": (4, 1, 1),
    }
    assert len(other) == 8 and same_bits(esi_of(one), esi_of(other))
    for ratio in RATIOS:
        assert torch.equal(selection(one.top(ratio), one), selection(other.top(ratio), other))
        assert torch.equal(selection(one.bottom(ratio), one), selection(other.bottom(ratio), other))
    assert one.meta["sigma_per"] == one.top(0.1).meta["sigma_per"] == "expert"


def test_the_default_is_one_sigma_per_tensor():
    fused, apart = mixture((3, 5, 7), dense=torch.randn(6, 4))
    scores = score(fused, batches_of(fused), linear)
    assert_same_scores(score(fused, batches_of(fused), linear, sigma_per="tensor"), scores)
    assert scores.sigma[FUSED].shape == () and "sigma_per" not in scores.meta
    torch.testing.assert_close(scores.sigma[FUSED], fused.get_parameter(FUSED).detach().double().std().float())
    # Where no experts are fused, there is no difference but in what the scores say of themselves.
    batches = batches_of(apart)
    assert_same_scores(score(apart, batches, linear, sigma_per="expert"), score(apart, batches, linear))


def test_sigma_per_anything_else():
    model, _ = mixture((2, 3, 3))
    with pytest.raises(InvalidArgumentError, match="sigma_per must be 'tensor' or 'expert', got 'layer'"):
        score(model, batches_of(model), linear, sigma_per="layer")


def test_a_constant_expert_scores_zero():
    model, _ = mixture((3, 4, 5))
    with torch.no_grad():
        model.get_parameter(FUSED)[1] = 2.5
    scores = score(model, batches_of(model), linear, sigma_per="expert")
    assert scores.sigma[FUSED].view(-1)[1] == 0 and not scores[FUSED][1].any()
    assert scores[FUSED][0].any() and scores.top(1.0).numel == 60
    # One weight per expert has no deviation either.
    single, _ = mixture((3, 1, 1))
    assert score(single, batches_of(single), linear, sigma_per="expert").sigma[FUSED].tolist() == [[[0.0]]] * 3


def test_a_broken_expert_is_named():
    model, _ = mixture((3, 4, 5))
    with torch.no_grad():
        model.get_parameter(FUSED)[2, 1, 1] = float("nan")
    with pytest.raises(NonFiniteError, match=rf"{FUSED} holds NaN"):
        score(model, batches_of(model), linear, sigma_per="expert")


@pytest.mark.parametrize("per", ["tensor", "expert"])
def test_transposed_storage_is_ranked_in_logical_order(per):
    model, _ = mixture((3, 5, 7))
    batches = batches_of(model)
    want = score(model, batches, linear, sigma_per=per)
    param = model.get_parameter(FUSED)
    param.data = param.data.transpose(1, 2).contiguous().transpose(1, 2)
    assert not param.is_contiguous()
    assert_same_scores(score(model, batches, linear, sigma_per=per), want)


# Ranking


VALUES = [0.0, -0.0, 1e-45, -1e-40, 1.0, -1.0, 1.0000001, 2.0, 3e38]


@st.composite
def expert_scores(draw):
    shapes = draw(st.lists(st.tuples(*[st.integers(1, 4)] * 3), min_size=1, max_size=4))
    gradients, sigma = {}, {}
    for i, shape in enumerate(shapes):
        name = f"layers.{i}.experts.w" if draw(st.booleans()) else f"layers.{i}.w"
        numel = shape[0] * shape[1] * shape[2]
        values = draw(st.lists(st.sampled_from(VALUES), min_size=numel, max_size=numel))
        gradients[name] = torch.tensor(values).view(shape)
        count = shape[0] if "experts" in name else 1
        scales = torch.tensor(draw(st.lists(st.sampled_from([0.0, 1e-30, 0.5, 1.0]), min_size=count, max_size=count)))
        sigma[name] = scales.view(-1, 1, 1) if "experts" in name else scales[0]
    numel = sum(gradient.numel() for gradient in gradients.values())
    return Scores(gradients, sigma, num_batches=1, model_numel=numel, meta={})


def ranked(values, k, largest):
    """Which of them are the k largest or smallest, ties to the earlier, by a full stable sort."""
    chosen = torch.zeros(values.numel(), dtype=torch.bool)
    chosen[torch.sort(values, stable=True, descending=largest).indices[:k]] = True
    return chosen


def assert_ranked(scores, ratio, per):
    esi = {name: scores[name].view(-1) for name in scores}
    for largest in (True, False):
        mask = scores.top(ratio, per=per) if largest else scores.bottom(ratio, per=per)
        if per == "model":
            k = count_of(ratio, scores.model_numel, scores.numel)
            chosen = ranked(torch.cat(list(esi.values())), k, largest).split([part.numel() for part in esi.values()])
        else:
            chosen = [ranked(part, max(1, int(ratio * part.numel())), largest) for part in esi.values()]
        want = {name: part.nonzero().view(-1) for name, part in zip(esi, chosen, strict=True)}
        assert mask == Mask.from_indices(want, {name: scores[name].shape for name in scores})


@settings(max_examples=150, deadline=None)
@given(expert_scores(), st.floats(0.01, 1.0), st.sampled_from(["model", "tensor"]))
def test_ranking_is_a_stable_sort_of_the_scores(scores, ratio, per):
    assert_ranked(scores, ratio, per)


@settings(max_examples=100, deadline=None)
@given(expert_scores(), st.data())
def test_sweeps_rank_as_all_scores_do(scores, data):
    keep = data.draw(st.floats(0.01, 1.0))
    top, names = RunningTop(count_of(keep, scores.model_numel, scores.numel)), list(scores)
    while len(top.indices) < len(names):
        part = names[len(top.indices) :][: data.draw(st.integers(1, 3))]
        top.add({name: scores.gradient(name).clone() for name in part}, scores.sigma)
    shapes = {name: scores[name].shape for name in scores}
    details = {"num_batches": 1, "model_numel": scores.model_numel, "meta": {}}
    found = TopScores(top.gradients, top.indices, shapes, scores.sigma, keep=keep, **details)
    for ratio in (1e-9, keep / 2, keep):
        assert found.top(ratio) == scores.top(ratio)


def test_sweeps_and_files(tmp_path):
    model, _ = mixture((3, 5, 7), (4, 6, 9), dense=torch.randn(6, 4))
    batches = batches_of(model)
    whole = score(model, batches, linear, sigma_per="expert")
    swept = score(model, batches, linear, sigma_per="expert", memory=216 * 4 + 20 * 20, keep=0.05)
    assert isinstance(swept, TopScores)
    for name, scores in {"whole": whole, "swept": swept}.items():
        scores.save(tmp_path / name)
        loaded = Scores.load(tmp_path / name)
        assert loaded.meta == scores.meta and type(loaded) is type(scores)
        assert all(same_bits(loaded.sigma[tensor], scores.sigma[tensor]) for tensor in scores)
        for ratio in (0.001, 0.02, 0.05):
            assert loaded.top(ratio) == swept.top(ratio) == whole.top(ratio)
    assert_same_scores(Scores.load(tmp_path / "whole"), whole)


@pytest.mark.parametrize("sigma", [[[[1.0]], [[1.0]]], [1.0] * 3, [[[1.0]], [[1.0]], [[-1.0]]]])
def test_a_file_with_other_sigmas(tmp_path, sigma):
    # Where experts are not fused, there is one.
    for name in (FUSED, "w") if len(sigma) == 3 else (FUSED,):
        meta = {"sigma": {name: sigma}, "num_batches": 1, "model_numel": 12, "meta": {}}
        files.write(tmp_path / "scores", "scores", 1, {name: torch.ones(3, 2, 2)}, meta)
        with pytest.raises(FileFormatError, match=f"sigma of {name}, its standard deviation, must be"):
            Scores.load(tmp_path / "scores")


def test_reports():
    model, _ = mixture((3, 5, 7), dense=torch.randn(6, 4))
    scores = score(model, batches_of(model), linear, sigma_per="expert")
    mask = scores.top(0.2)
    selected = scores.selected(mask)
    want = torch.cat([scores[name][mask.bool(name)] for name in mask])
    assert selected.numel == want.numel() and selected.smallest == want.min() and selected.largest == want.max()
    assert selected.total == pytest.approx(want.double().sum().item())
    report = scores.report()
    (row,) = [row for row in report if row.component == "experts.down_proj"]
    assert row.largest == scores[FUSED].max() and row.numel == 105
    assert row.sigma == pytest.approx(scores.sigma[FUSED].double().square().mean().sqrt().item())
    assert report.distribution.total == pytest.approx(sum(esi.double().sum().item() for esi in scores.values()))


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = transformers.MixtralConfig(
        vocab_size=len(byte_tokenizer()),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    torch.manual_seed(0)
    transformers.MixtralForCausalLM(config).save_pretrained("base")
    byte_tokenizer().save_pretrained("base")
    write_rows(tmp_path / "harmful.jsonl", PAIRS)
    capsys.readouterr()
    arguments = ["--model", "base", "--pairs", "harmful.jsonl", "--limit", "2", "--out", "run", "--save-scores"]
    assert main(["score", *arguments, "--sigma-per", "expert", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["meta"]["sigma_per"] == "expert"
    scores = Scores.load("run/scores.safetensors")
    assert scores.sigma["model.layers.0.mlp.experts.down_proj"].shape == (4, 1, 1)
    assert scores.top(0.01) == Mask.load("run/mask.safetensors")


# Experts that no token reaches


@pytest.mark.parametrize("per", ["tensor", "expert"])
@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe"])
def test_unrouted_experts_do_not_break_ties(family, per):
    model = build(family)
    routed = {}
    for name, module in model.named_modules():
        if name.endswith("experts"):
            record = lambda _, args, name=name: routed.update({name: set(args[1].flatten().tolist())})  # noqa: E731
            module.register_forward_pre_hook(record)
    tokens = torch.tensor([[3, 3, 3]])
    scores = score(model, [{"input_ids": tokens, "labels": tokens}], sigma_per=per)
    zeros = 0
    for name, experts in routed.items():
        for kind in ("gate_up_proj", "down_proj"):
            for e, esi in enumerate(scores[f"{name}.{kind}"]):
                assert bool(esi.any()) == (e in experts)
                zeros += esi.numel() * (e not in experts)
    reached = 1 - zeros / scores.model_numel
    for ratio in (0.01, reached - 0.01, reached, reached + 0.1, 1.0):
        assert_ranked(scores, ratio, "model")
        assert_ranked(scores, ratio, "tensor")


# Experts stored as (experts, in, out)


@pytest.fixture(params=["GptOss", "Llama4"])
def transposed(request):
    return build(request.param)


BATCHES = [dict.fromkeys(("input_ids", "labels"), torch.tensor([[3, 4, 5, 6], [7, 8, 9, 3]]))]


def is_expert(name):
    return name.endswith(("experts.gate_up_proj", "experts.down_proj"))


@pytest.mark.parametrize("per", ["tensor", "expert"])
def test_flat_positions_are_row_major_in_the_parameter(transposed, per):
    scores = score(transposed, BATCHES, select=lambda name, param: is_expert(name), sigma_per=per)
    transposed(**BATCHES[0]).loss.backward()
    mask = scores.top(0.05, per="tensor")
    for name, param in transposed.named_parameters():
        if is_expert(name):
            assert same_bits(scores.gradient(name), param.grad)
            sigma = param.detach().double()
            sigma = sigma.flatten(1).std(1).view(-1, 1, 1) if per == "expert" else sigma.std()
            torch.testing.assert_close(scores[name], (param.grad.abs() * sigma).float())
            place = torch.unravel_index(mask[name], param.shape)
            rest = scores[name].clone()
            rest[place] = -1
            assert mask[name].numel() and scores[name][place].min() >= rest.max()


@pytest.mark.parametrize("optimizer", [safekern.SETAdamW, safekern.SPAAdamW])
def test_training_and_shipping(transposed, optimizer, tmp_path):
    base = copy.deepcopy(transposed)
    mask = score(transposed, BATCHES).top(0.05, per="tensor")
    trained = optimizer(transposed.named_parameters(), mask, lr=1e-2)
    for _ in range(2):
        transposed(**BATCHES[0]).loss.backward()
        trained.step()
        trained.zero_grad()
    updates_masked = optimizer is safekern.SETAdamW
    for name, before in base.named_parameters():
        after = transposed.get_parameter(name)
        selected = mask.bool(name) if name in mask else torch.zeros(before.shape, dtype=torch.bool)
        kept = ~selected if updates_masked else selected
        assert same_bits(after.detach()[kept], before.detach()[kept])
        if name in mask and is_expert(name):
            assert (after != before)[~kept].any()
    if updates_masked:
        delta, checkpoint = tmp_path / "delta.safetensors", tmp_path / "base"
        base.save_pretrained(checkpoint)
        safekern.save_delta(transposed, mask, delta, base=base)
        safekern.apply_delta(base, delta)
        safekern.apply_delta(checkpoint, delta)
        for tuned in (base, type(base).from_pretrained(checkpoint)):
            for name, param in tuned.named_parameters():
                assert same_bits(param.detach(), transposed.get_parameter(name).detach())
