"""``score(memory=...)``: several sweeps give the mask of one, bit for bit, in the memory they were given."""

import json
import re
import struct
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scored_models import (
    SCENARIOS,
    Deep,
    LiveBytes,
    Weights,
    assert_untouched,
    checkpointed,
    every,
    linear,
    snapshot,
    tiny_llama,
    token_batches,
    toy,
    used_model,
)
from torch import nn
from torch.utils.data import DataLoader

from safekern import Mask, Scores, scoring
from safekern.errors import FileFormatError, InvalidArgumentError, ScoringError, UnknownNameError
from safekern.objectives import refusal
from safekern.scores import RunningTop, TopScores, count_of
from safekern.scoring import score

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def memory_for(model, params, keep, numel):
    """The memory in which accumulators of so many weights fit beside the candidates."""
    model_numel = sum(param.numel() for param in model.parameters())
    return 20 * count_of(keep, model_numel, sum(p.numel() for p in params.values())) + 4 * numel


def swept(model, batches, numel, *, keep=0.05, select=None, **options):
    """Scores in as many sweeps as it takes with accumulators for ``numel`` weights, or for the largest parameter."""
    params = scoring.eligible_parameters(model, select)
    numel = max(numel, *(param.numel() for param in params.values()))
    scores = score(model, batches, keep=keep, select=select, memory=memory_for(model, params, keep, numel), **options)
    assert isinstance(scores, TopScores)
    return scores


def assert_same_masks(got, want, keep):
    for ratio in (1e-9, keep / 3, keep / 2, 0.99 * keep, keep):
        assert got.top(ratio) == want.top(ratio)
        assert got.top(ratio).meta == want.top(ratio).meta
    assert repr(got).replace("Top", "") == repr(want)
    assert {name: float(s) for name, s in got.sigma.items()} == {name: float(s) for name, s in want.sigma.items()}


# The same mask


@pytest.mark.parametrize("reduction", ["mean", "abs"])
@pytest.mark.parametrize("numel", [1, 300, 900, 2000])
def test_a_llama_in_any_number_of_sweeps(numel, reduction):
    model, batches = tiny_llama(), token_batches()
    want = score(model, batches, refusal, reduction=reduction)
    got = swept(model, batches, numel, objective=refusal, reduction=reduction)
    assert_same_masks(got, want, 0.05)


@pytest.mark.parametrize("keep", [1e-9, 0.003, 0.05, 0.07])
@pytest.mark.parametrize("select", [None, every])
def test_tied_unused_and_frozen_parameters(select, keep):
    model, batches = toy(), token_batches()
    want = score(model, batches, select=select)
    model.requires_grad_(False)
    model.second.weight.requires_grad_(True)
    assert_same_masks(swept(model, batches, 1, keep=keep, select=select), want, keep)


def test_adapters_that_are_chosen():
    torch.manual_seed(0)
    model = Weights(w=torch.randn(33, 65), lora_A=torch.randn(80, 30))
    batches = [{name: torch.randn(p.shape) for name, p in model.named_parameters()} for _ in range(3)]
    got = swept(model, batches, 1, select=every, objective=linear)
    assert_same_masks(got, score(model, batches, linear, select=every), 0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype_and_layout(dtype):
    torch.manual_seed(0)
    model = Weights(
        a=torch.randn(33, 65).to(dtype), b=torch.randn(20, 30).to(dtype).t(), c=torch.randn(3, 2, 1).to(dtype)
    )
    batches = [{name: torch.randn(p.shape).to(dtype) for name, p in model.named_parameters()} for _ in range(3)]
    got = swept(model, batches, 1, keep=0.01, objective=linear)
    assert_same_masks(got, score(model, batches, linear), 0.01)


# Values that tie, vanish or nearly do, and two that differ in the last bit only.
VALUES = [0.0, -0.0, 1e-45, -1e-45, 1e-40, 1.0, -1.0, 1.0000001, 2.0, 3e38]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(st.sampled_from(VALUES), min_size=1, max_size=12), min_size=2, max_size=6), st.data())
def test_ties_zeros_and_denormals(gradients, data):
    means = {f"w{i}": torch.tensor([values]) for i, values in enumerate(gradients)}
    # Where sigma is 0 or tiny, all scores of a tensor are 0 or tie.
    sigma = {name: torch.tensor(data.draw(st.sampled_from([0.0, 1e-30, 0.5, 1.0]))) for name in means}
    numel = sum(map(len, gradients))
    details = {"num_batches": 1, "model_numel": numel, "meta": {}}
    want = Scores(means, sigma, **details)
    keep = data.draw(st.floats(0.01, 1.0))
    top, names = RunningTop(count_of(keep, numel, numel)), list(means)
    while len(top.indices) < len(names):
        seen = len(top.indices)
        part = names[seen : seen + data.draw(st.integers(1, 4))]
        top.add({name: means[name].clone() for name in part}, sigma)
    shapes = {name: mean.shape for name, mean in means.items()}
    assert_same_masks(TopScores(top.gradients, top.indices, shapes, sigma, keep=keep, **details), want, keep)


def test_fewer_non_zeros_than_candidates():
    model = Weights(a=torch.randn(40, 10), b=torch.randn(40, 10), c=torch.randn(40, 10))
    sparse = {name: torch.zeros(40, 10) for name in "abc"}
    sparse["b"][7, 3] = sparse["c"][0, 0] = 1.0
    want = score(model, [sparse], linear)
    got = swept(model, [sparse], 400, objective=linear)
    assert_same_masks(got, want, 0.05)
    assert got.top(0.05)["a"].tolist() == list(range(58))


@pytest.mark.usefixtures("threads")
def test_does_not_depend_on_threads():
    torch.manual_seed(0)
    model = Weights(a=torch.randn(600, 301).bfloat16(), b=torch.randn(3, 70_001), c=torch.randn(500, 3000))
    batches = [{name: torch.randn_like(p.detach()) for name, p in model.named_parameters()} for _ in range(2)]
    want = score(model, batches, linear)
    for count in (1, 3):
        torch.set_num_threads(count)
        assert_same_masks(swept(model, batches, 1, keep=0.01, objective=linear), want, 0.01)


@pytest.mark.parametrize("reentrant", [True, False])
def test_with_gradient_checkpointing(reentrant):
    model, batches = tiny_llama().train(), token_batches()
    want = score(model, batches)
    checkpointed(model, use_reentrant=reentrant)
    assert_same_masks(swept(model, batches, 1), want, 0.05)


class Shuffled:
    """Batches in another order each time, by the given random numbers."""

    def __init__(self, batches, generator=None):
        self.batches = batches
        self.generator = generator

    def __iter__(self):
        return (self.batches[i] for i in torch.randperm(len(self.batches), generator=self.generator).tolist())


def test_shuffling_and_dropout_repeat():
    model = tiny_llama(attention_dropout=0.5).train()
    batches = token_batches(6)
    for loader in (Shuffled(batches), DataLoader(batches, batch_size=None, shuffle=True)):
        torch.manual_seed(7)
        want = score(model, loader)
        after = torch.random.get_rng_state()
        torch.manual_seed(7)
        got = swept(model, loader, 1)
        assert_same_masks(got, want, 0.05)
        # What follows draws the random numbers that it would have drawn after one sweep.
        assert torch.equal(torch.random.get_rng_state(), after)
        torch.manual_seed(8)
        assert score(model, loader).top(0.05) != want.top(0.05)


def test_enough_memory_takes_one_sweep():
    model, batches = tiny_llama(), token_batches()
    want = score(model, batches)
    got = score(model, iter(batches), memory=4 * want.numel)
    assert type(got) is Scores
    assert got.random(0.5) == want.random(0.5)
    with pytest.raises(InvalidArgumentError, match="read only once"):
        score(model, iter(batches), memory=4 * want.numel - 1, keep=0.001)


# What is refused


def test_what_only_all_scores_can_answer():
    scores = swept(toy(), token_batches(), 1)
    assert list(scores) == ["first.weight", "mixer.weight", "second.weight", "unused.weight"]
    assert len(scores) == 4 and "mixer.weight" in scores and "absent" not in scores
    calls = {
        "the top 0.06": lambda: scores.top(0.06),
        "inside every tensor": lambda: scores.top(0.01, per="tensor"),
        "smallest": lambda: scores.bottom(0.01),
        "random": lambda: scores.random(0.01),
        "per-weight": lambda: scores["mixer.weight"],
        "per-weight values": lambda: scores.gradient("mixer.weight"),
        "values": lambda: dict(scores),
        "scores of a mask": lambda: scores.selected(scores.top(0.05)),
        "report": scores.report,
    }
    for what, call in calls.items():
        with pytest.raises(InvalidArgumentError, match=rf"{what}.* several sweeps, .* top 0\.05 .*offload=True"):
            call()
    # A larger ratio that comes to as many weights.
    kept = scores.top(0.05)
    assert scores.top((kept.numel + 0.5) / scores.model_numel) == kept
    with pytest.raises(UnknownNameError, match="absent"):
        scores["absent"]
    for ratio in (0, -1, float("nan"), "all"):
        with pytest.raises(InvalidArgumentError, match="ratio must be"):
            scores.top(ratio)
    with pytest.raises(InvalidArgumentError, match="per must be"):
        scores.top(0.01, per="layer")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": 0}, "memory must be a number above 0, got 0"),
        ({"memory": -5}, "memory must be"),
        ({"memory": True}, "memory must be"),
        ({"memory": "8 GB"}, "memory must be"),
        ({"memory": float("nan")}, "memory must be"),
        ({"memory": 1000, "keep": 0}, "keep must be a number above 0 and at most 1"),
        ({"memory": 1000, "keep": 1.5}, "keep must be"),
        ({"memory": 1}, r"memory=1 bytes is too little: mixer.weight needs 256 .*Give at least 516 bytes"),
        ({"memory": 515}, "at least 516"),
    ],
)
def test_bad_memory_is_refused_before_anything_runs(options, message):
    def never(model, batch):
        raise AssertionError

    model = toy()
    before = snapshot(model)
    with pytest.raises(InvalidArgumentError, match=message):
        score(model, token_batches(), never, **options)
    assert_untouched(model, before)


def test_the_smallest_memory_that_the_error_asks_for_is_enough():
    assert isinstance(score(toy(), token_batches(), memory=516), TopScores)


def test_one_shot_iterators_are_refused():
    for loader in (iter(token_batches()), (batch for batch in token_batches())):
        with pytest.raises(InvalidArgumentError, match=r"takes 3 sweeps .* read only once: pass a list"):
            score(toy(), loader, memory=600)


class OneShot:
    """Looks as if it could be read again."""

    def __init__(self, batches):
        self.batches = iter(batches)

    def __iter__(self):
        return self.batches


def shrinking():
    batches = token_batches(4)
    yielded = iter([4, 3])

    class Loader:
        def __iter__(self):
            return iter(batches[: next(yielded)])

    return Loader()


@pytest.mark.parametrize(
    ("loader", "error", "message"),
    [
        (lambda: OneShot(token_batches()), ScoringError, "4 batches in the first sweep and 0 in sweep 2"),
        (shrinking, ScoringError, "4 batches in the first sweep and 3 in sweep 2"),
        (
            lambda: Shuffled(token_batches(9), torch.Generator().manual_seed(0)),
            ScoringError,
            r"of sweep 2 has a loss of .* in the first sweep .* same order",
        ),
        (list, InvalidArgumentError, "yielded no batch"),
    ],
)
def test_sweeps_that_would_differ_are_errors(loader, error, message):
    model = used_model()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        score(model, loader(), memory=600)
    assert_untouched(model, before)


def noisy(generator):
    """An objective whose gradients depend on chance, and whose value does not."""

    def objective(model, batch):
        slope = model(**batch).loss * torch.rand((), generator=generator)
        return 1 + (slope - slope.detach())

    return objective


def test_gradients_of_chance_are_noticed_behind_equal_losses():
    model = used_model()
    before = snapshot(model)
    with pytest.raises(ScoringError, match="has the loss but not the gradients of the first sweep"):
        score(model, token_batches(), noisy(torch.Generator().manual_seed(0)), memory=600)
    assert_untouched(model, before)


def test_gradients_of_chance_are_noticed_where_some_experts_have_none():
    class OneExpert(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.Parameter(torch.linspace(-1, 1, 4 * 16 * 16).view(4, 16, 16))
            self.other = nn.Parameter(torch.ones(16, 16))

        def forward(self, x):
            return (x @ self.other @ self.experts[2]).square().mean()

    generator = torch.Generator().manual_seed(0)

    def objective(model, x):
        slope = model(x) * torch.rand((), generator=generator)
        return 1 + (slope - slope.detach())

    with pytest.raises(ScoringError, match="has the loss but not the gradients of the first sweep"):
        score(OneExpert(), [torch.ones(3, 16)] * 3, objective, memory=5000, keep=0.01)


def test_an_objectives_generator_is_put_back_for_every_sweep():
    states, masks = [], []
    for memory in (None, 600):
        generator = torch.Generator().manual_seed(0)
        objective = noisy(generator)
        objective.generator = generator
        masks.append(score(used_model(), token_batches(), objective, memory=memory, keep=0.05).top(0.05))
        states.append(generator.get_state())
    assert masks[0] == masks[1]
    # As many numbers are used up, so that what follows is the same as well.
    assert torch.equal(*states)


def test_a_growing_loader_is_an_error():
    batches, counts = token_batches(3), iter([2, 3])

    class Growing:
        def __iter__(self):
            return iter(batches[: next(counts)])

    with pytest.raises(ScoringError, match="2 batches in the first sweep and 3 in sweep 2"):
        score(toy(), Growing(), memory=600)


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_model_is_left_as_it_was(name):
    loader, objective, error, _, options = SCENARIOS[name]

    class Again:
        def __iter__(self):
            return iter(loader())

    model = used_model()
    before = snapshot(model)
    with nullcontext() if error is None else pytest.raises(error):
        assert isinstance(score(model, Again(), objective, memory=620, **options), TopScores)
    assert_untouched(model, before)


@pytest.mark.parametrize("sweep", [1, 2, 3])
def test_an_error_in_any_sweep_leaves_the_model_as_it_was(sweep):
    class Failing:
        seen = 0

        def __iter__(self):
            self.seen += 1
            yield token_batches()[0]
            if self.seen == sweep:
                raise OSError("disk")

    model = used_model()
    before = snapshot(model)
    with pytest.raises(OSError, match="disk"):
        score(model, Failing(), memory=600)
    assert_untouched(model, before)


def test_a_gradient_that_never_arrives_in_a_part_is_no_error():
    # `unused` is a part of its own.
    scores = swept(toy(), token_batches(), 1)
    assert scores.numel == 48 + 64 + 48 + 6


# Files


def test_files(tmp_path):
    model, batches = tiny_llama(), token_batches()
    want = swept(model, batches, 900)
    want.save(tmp_path / "top.safetensors")
    got = Scores.load(tmp_path / "top.safetensors")
    assert isinstance(got, TopScores) and got.keep == 0.05
    assert_same_masks(got, score(model, batches), 0.05)
    with pytest.raises(InvalidArgumentError, match="several sweeps"):
        got.bottom(0.01)
    got.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "top.safetensors").read_bytes()
    candidates = count_of(0.05, want.model_numel, want.numel)
    assert (tmp_path / "top.safetensors").stat().st_size < 8 * candidates + 10_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s._indices["a"].__setitem__(0, 10**6), "out of order or out of range"),
        (lambda s: s._indices["a"].__setitem__(0, -1), "out of order or out of range"),
        (lambda s: s._indices["a"].__setitem__(1, s._indices["a"][0]), "out of order"),
        (lambda s: s._indices.update(a=s._indices["a"][1:]), "one value per index"),
        (lambda s: s._indices.update(a=s._indices["a"].short()), "one value per index"),
        (lambda s: s._gradients["a"].fill_(float("nan")), "not finite"),
        (lambda s: s._shapes.pop("b"), "b"),
        (lambda s: setattr(s, "keep", 0.04), "not the top 0.04"),
        (lambda s: setattr(s, "keep", 7), "ratio must be"),
    ],
)
def test_files_that_contradict_themselves(tmp_path, change, message):
    torch.manual_seed(0)
    model = Weights(a=torch.randn(40, 10), b=torch.randn(40, 10))
    scores = swept(model, [{name: torch.randn(40, 10) for name in "ab"}], 400, objective=linear)
    change(scores)
    scores.save(tmp_path / "top.safetensors")
    with pytest.raises(FileFormatError, match=message):
        Scores.load(tmp_path / "top.safetensors")


def test_older_releases_refuse_the_file_by_its_number(tmp_path):
    path: Path = tmp_path / "top.safetensors"
    swept(toy(), token_batches(), 1).save(path)
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    assert header["__metadata__"]["safekern.version"] == "2"


# Progress, memory


def test_progress_shows_the_sweep(capsys):
    score(toy(), token_batches(3), memory=600, progress=True)
    shown = capsys.readouterr().err
    for sweep in (1, 2, 3):
        assert f"score, sweep {sweep}/3" in shown
    # The state that each bar ends with: a slow machine draws it before as well.
    assert re.findall(r"score, sweep (\d)/3: 100%[^\r\n]* 3/3 \[[^\r\n]*\n", shown) == ["1", "2", "3"]


def peak_of(run):
    with LiveBytes() as meter:
        result = run()
    del result
    return meter.peak


@pytest.mark.parametrize("keep", [0.001, 0.05])
@pytest.mark.parametrize("layers", [1, 3, 5])
def test_memory_is_what_was_given_and_the_largest_gradient(layers, keep):
    depth, width = 12, 96
    torch.manual_seed(0)
    model = Deep(depth, width)
    batches = [torch.randn(1, width) for _ in range(3)]
    layer, activations = width * width * 4, 4 * depth * width * 4
    memory = memory_for(model, dict(model.named_parameters()), keep, layers * width * width)
    sizes = []

    def run():
        sizes.append(score(model, batches, memory=memory, keep=keep))

    peak = peak_of(run)
    assert isinstance(sizes[0], TopScores)
    # Most of it is used, and 12 layers of accumulators would be far above it.
    assert layers * layer < peak < memory + 1.5 * layer + activations


def test_offload_is_no_change_on_the_cpu():
    model, batches = tiny_llama(), token_batches()
    want = score(model, batches)
    got = score(model, batches, offload=True)
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert_same_masks(swept(model, batches, 900, offload=True), want, 0.05)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_offload_accumulates_on_the_cpu():
    model, batches = tiny_llama().cuda(), token_batches()
    want = score(model, batches)
    got = score(model, batches, offload=True)
    assert {got.gradient(name).device.type for name in got} == {"cpu"}
    assert all(torch.equal(got.gradient(name), want.gradient(name).cpu()) for name in want)
    assert_same_masks(swept(model, batches, 900, offload=True), want, 0.05)
    assert_same_masks(swept(model, batches, 900), want, 0.05)


def test_spread_models_need_offload():
    class Spread(nn.Module):
        def __init__(self):
            super().__init__()
            self.near = nn.Parameter(torch.randn(4, 4))
            self.far = nn.Parameter(torch.randn(4, 4))

    spread = Spread()
    params = dict(spread.named_parameters())
    params["far"] = nn.Parameter(torch.empty(4, 4, device="meta"))
    with pytest.raises(InvalidArgumentError, match=r"spread over several: add offload=True"):
        scoring._parts(params, 100, 1, False)
    assert scoring._parts(params, 100, 1, True) == [["near"], ["far"]]


def test_the_mask_serves_like_any_other(tmp_path):
    mask = swept(tiny_llama(), token_batches(), 1).top(0.01)
    mask.save(tmp_path / "mask.safetensors")
    assert Mask.load(tmp_path / "mask.safetensors") == mask
    mask.check(tiny_llama())
