"""``score`` against full gradients in fp64, the model it has to leave as it was, and the memory it may take."""

import copy
import functools
import types
import warnings
from collections import UserDict
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import transformers
from exact import same_bits
from scored_models import (
    SCENARIOS,
    Deep,
    LiveBytes,
    Toy,
    Weights,
    assert_same_scores,
    assert_untouched,
    checkpointed,
    every,
    linear,
    model_loss,
    snapshot,
    tiny_llama,
    token_batches,
    toy,
    used_model,
)
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from safekern import scoring
from safekern.errors import InvalidArgumentError, NonFiniteError, SafekernError, ScoringError
from safekern.objectives import refusal
from safekern.scoring import score

REDUCTIONS = ("mean", "abs")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def full_gradients(model, batches, objective):
    """For every batch all gradients, of a copy of the model in fp64 in which everything is trained."""
    twin = copy.deepcopy(model).double().requires_grad_()
    results = []
    for batch in batches:
        twin.zero_grad()
        objective(twin, batch).backward()
        results.append(
            {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in twin.named_parameters()}
        )
    return twin, results


def assert_equals_the_definition(scores, model, batches, objective, reduction):
    twin, gradients = full_gradients(model, batches, objective)
    for name, esi in scores.items():
        each = [batch[name].abs() if reduction == "abs" else batch[name] for batch in gradients]
        mean = sum(each) / len(batches)
        sigma = twin.get_parameter(name).detach().std()
        assert esi.dtype == torch.float32
        scale = max(batch[name].abs().max().item() for batch in gradients)
        assert esi.dtype == torch.float32
        torch.testing.assert_close(scores.gradient(name).double(), mean, rtol=0, atol=1e-5 * scale)
        torch.testing.assert_close(scores.sigma[name].double(), sigma, rtol=1e-6, atol=0)
        torch.testing.assert_close(esi.double(), (mean * sigma).abs(), rtol=0, atol=1e-5 * scale * sigma.item())


# What is computed


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    ("build", "objective"), [(toy, model_loss), (tiny_llama, refusal)], ids=["toy with tied weights", "llama"]
)
def test_equals_full_gradients_in_fp64(build, objective, reduction):
    model, batches = build(), token_batches()
    scores = score(model, batches, objective, reduction=reduction)
    assert len(scores) >= 4
    assert scores.num_batches == len(batches)
    assert scores.model_numel == sum(param.numel() for param in model.parameters())
    assert scores.numel == sum(model.get_parameter(name).numel() for name in scores)
    assert_equals_the_definition(scores, model, batches, objective, reduction)


def test_adapters_that_are_chosen_count_among_the_models_weights():
    model = Weights(w=torch.randn(3, 3), lora_A=torch.randn(8, 4), lora_B=torch.randn(2, 2))
    batches = [{name: torch.randn(p.shape) for name, p in model.named_parameters()}]
    assert score(model, batches, linear).model_numel == 9
    scores = score(model, batches, linear, select=lambda name, _: name in ("w", "lora_A"))
    assert scores.model_numel == 9 + 32
    assert scores.top(0.5).numel == 20
    assert scores.top(1.0).numel == 41


def test_a_tied_head_can_be_chosen_and_counts_both_of_its_uses():
    model, batches = toy(), token_batches()
    scores = score(model, batches, select=every)
    assert list(scores) == [name for name, _ in model.named_parameters()]
    assert "head.weight" not in scores
    assert_equals_the_definition(scores, model, batches, model_loss, "mean")


def test_frozen_parameters_are_scored_and_stay_frozen():
    model, batches = toy(), token_batches()
    want = score(model, batches)
    model.requires_grad_(False)
    assert_same_scores(score(model, batches), want)
    assert not any(param.requires_grad for param in model.parameters())


def test_a_parameter_without_a_gradient_scores_zero():
    scores = score(toy(), token_batches())
    assert not scores["unused.weight"].any()
    assert scores.sigma["unused.weight"] > 0


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_accumulates_every_dtype_in_fp32(dtype, reduction):
    torch.manual_seed(0)
    model = Weights(a=torch.randn(33, 65).to(dtype), b=torch.randn(3, 2, 1).to(dtype))
    batches = [{name: torch.randn_like(param.detach()) for name, param in model.named_parameters()} for _ in range(5)]
    scores = score(model, batches, linear, reduction=reduction)
    for name, param in model.named_parameters():
        total = torch.zeros(param.shape)
        for batch in batches:
            total += batch[name].float().abs() if reduction == "abs" else batch[name].float()
        assert same_bits(scores.gradient(name), total / 5)
        torch.testing.assert_close(scores.sigma[name], param.double().std().float(), rtol=1e-6, atol=0)
        assert same_bits(scores[name], (total / 5).abs() * scores.sigma[name])


def test_reductions_differ_where_gradients_cancel():
    model = Weights(w=torch.randn(2, 3))
    batches = [{"w": torch.ones(2, 3)}, {"w": -torch.ones(2, 3)}]
    assert not score(model, batches, linear)["w"].any()
    assert torch.equal(score(model, batches, linear, reduction="abs").gradient("w"), torch.ones(2, 3))


def test_layouts_do_not_matter_and_indices_are_row_major():
    torch.manual_seed(0)
    plain = {
        name: torch.randn(shape) for name, shape in zip("abcd", [(7, 5), (4, 3, 2, 5), (5, 3), (6, 4)], strict=True)
    }
    laid_out = {
        "a": plain["a"].t().contiguous().t(),
        "b": plain["b"].to(memory_format=torch.channels_last),
        "c": plain["c"],
        "d": torch.stack([plain["d"], plain["d"]], dim=-1)[..., 0],
    }
    model = Weights(**laid_out)
    assert [param.is_contiguous() for param in model.parameters()] == [False, False, True, False]
    batches = [{name: torch.randn(values.shape) for name, values in plain.items()} for _ in range(3)]
    got, want = score(model, batches, linear), score(Weights(**plain), batches, linear)
    assert_same_scores(got, want)
    assert got.top(0.1) == want.top(0.1)
    name, position = next((name, int(got[name].argmax())) for name in got.top(1e-9))
    assert got.top(1e-9)[name].tolist() == [position]


def test_non_contiguous_gradients():
    class Permuted(torch.autograd.Function):
        """A product whose gradient has another layout than its parameter, where autograd keeps it as it is."""

        @staticmethod
        def forward(ctx, weight, values):
            ctx.save_for_backward(values)
            return (weight * values).sum()

        @staticmethod
        def backward(ctx, grad):
            (values,) = ctx.saved_tensors
            return (grad * values).t().contiguous().t(), None

    torch.manual_seed(0)
    model = Weights(w=torch.randn(3, 4), v=torch.randn(5, 2))
    batches = [torch.randn(3, 4) for _ in range(2)]
    scores = score(model, batches, lambda model, batch: Permuted.apply(model.w, batch) + model.v.sum())
    assert same_bits(scores.gradient("w"), (batches[0] + batches[1]) / 2)
    # The gradient of a sum is one number, expanded.
    assert same_bits(scores.gradient("v"), torch.ones(5, 2))


@pytest.mark.usefixtures("threads")
def test_does_not_depend_on_threads():
    torch.manual_seed(0)
    model = Weights(a=torch.randn(600, 301).bfloat16(), b=torch.randn(3, 70_001))
    batches = [{name: torch.randn_like(param.detach()) for name, param in model.named_parameters()} for _ in range(2)]
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(score(model, batches, linear))
    for other in results[1:]:
        assert_same_scores(other, results[0])
        assert other.top(0.01) == results[0].top(0.01)


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
        (
            "Qwen2Moe",
            {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "decoder_sparse_step": 1},
        ),
    ],
)
def test_mixtures_of_experts(family, config):
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = getattr(transformers, f"{family}Config")(**sizes, **heads, **config)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    model.set_experts_implementation("eager")
    tokens = torch.tensor([[3, 3, 3]])
    scores = score(model, [{"input_ids": tokens, "labels": tokens}])
    # One token, twice over the same two experts: the others have a gradient, and it is zero.
    experts = scores["model.layers.0.mlp.experts.down_proj"]
    assert (experts.flatten(1) != 0).any(1).sum() == 2


def test_autocast_and_its_cache_of_cast_weights():
    model, batches = tiny_llama(), token_batches()
    with torch.autocast("cpu", torch.bfloat16):
        scores = score(model, batches)
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
    for name in scores:
        torch.testing.assert_close(scores.gradient(name), model.get_parameter(name).grad / len(batches))


# Loaders, batches, objectives


class Pair(NamedTuple):
    input_ids: Tensor
    labels: Tensor


def test_batches_of_every_kind():
    class Loss(Toy):
        def forward(self, input_ids, labels):
            return super().forward(input_ids, labels).loss

    class OfTensor(Toy):
        def forward(self, batch):
            return super().forward(batch[0], batch[1]).loss

    torch.manual_seed(0)
    pairs = [(batch["input_ids"], batch["labels"]) for batch in token_batches()]
    want = score(toy(), token_batches())
    for model_class, batches in [
        (Toy, [UserDict(batch) for batch in token_batches()]),
        (Toy, [transformers.BatchEncoding(batch) for batch in token_batches()]),
        (Loss, pairs),
        (Loss, [list(pair) for pair in pairs]),
        (Loss, [Pair(*pair) for pair in pairs]),
        (OfTensor, torch.stack([torch.stack(pair) for pair in pairs]).unbind()),
    ]:
        torch.manual_seed(0)
        assert_same_scores(score(model_class(), batches), want)


def test_batches_reach_the_objective_as_they_are():
    batch = {"pair": Pair(torch.ones(1), torch.zeros(1)), "list": [torch.ones(2), "text"], "n": 3, "none": None}
    seen = []

    def objective(model, batch):
        seen.append(batch)
        return model.w.sum()

    score(Weights(w=torch.randn(2, 2)), [batch, batch["pair"], "text"], objective)
    assert isinstance(seen[0]["pair"], Pair)
    assert seen[0]["list"][1] == "text"
    assert (seen[0]["n"], seen[0]["none"]) == (3, None)
    assert isinstance(seen[1], Pair)
    assert seen[2] == "text"
    assert seen[0]["pair"].labels is batch["pair"].labels


class Attributes(dict):
    """A batch as some loaders make them: keys are attributes, and there is more."""

    def __init__(self, source, **items):
        super().__init__(items)
        self.source = source

    @property
    def labels(self):
        return self["labels"]


class Frozen(dict):
    def __setitem__(self, key, value):
        raise Exception("frozen")


def test_mappings_reach_the_objective_in_their_own_types():
    items = {"input_ids": torch.ones(2), "labels": torch.zeros(2)}
    batches = [
        transformers.BatchEncoding(items),
        transformers.BatchFeature(items),
        transformers.modeling_outputs.CausalLMOutput(loss=torch.ones(1), logits=torch.ones(2)),
        Attributes("here", **items),
        Frozen(items),
        types.MappingProxyType(items),
    ]
    moved = [scoring.to_device(batch, torch.device("meta")) for batch in batches]
    assert [type(batch) for batch in moved] == [*map(type, batches[:4]), dict, dict]
    assert moved[0].input_ids.is_meta and moved[1].labels.is_meta and moved[2].logits.is_meta
    assert moved[3].labels.is_meta and moved[3].source == "here"
    assert all(value.is_meta for batch in moved for value in batch.values())
    assert not any(value.is_meta for batch in batches for value in batch.values())


def test_batches_move_to_the_models_device():
    batch = {"pair": Pair(torch.ones(1), torch.zeros(1)), "nested": [(torch.ones(2), 5)], "text": "x"}
    moved = scoring.to_device(batch, torch.device("meta"))
    assert [leaf.device.type for leaf in tree_leaves(moved) if isinstance(leaf, Tensor)] == ["meta"] * 3
    assert isinstance(moved["pair"], Pair)
    assert moved["nested"][0][1] == 5
    assert batch["pair"].labels.device.type == "cpu"


class Sized:
    """A loader whose length cannot be asked for, or is wrong."""

    def __init__(self, batches, length):
        self.batches = batches
        self.length = length

    def __iter__(self):
        return iter(self.batches)

    def __len__(self):
        if isinstance(self.length, Exception):
            raise self.length
        return self.length


@pytest.mark.parametrize("progress", [True, False, None])
def test_loaders_of_every_kind(progress, capsys):
    model, batches = toy(), token_batches(3)
    want = score(model, batches)
    capsys.readouterr()
    for total, loader in [
        ("3/3", batches),
        ("3/3", tuple(batches)),
        ("3/3", torch.utils.data.DataLoader(batches, batch_size=None)),
        ("3batch", iter(batches)),
        ("3batch", (batch for batch in batches)),
        ("3batch", Sized(batches, TypeError("no length"))),
        ("3batch", Sized(batches, NotImplementedError("no length"))),
        ("3batch", Sized(batches, RuntimeError("no length"))),
        ("3batch", Sized(batches, -1)),
        ("3batch", Sized(batches, "three")),
        ("3batch", Sized(batches, 1)),
        ("3/30", Sized(batches, 30)),
    ]:
        assert_same_scores(score(model, loader, progress=progress), want)
        shown = capsys.readouterr().err
        if progress:
            assert "score" in shown
            assert total in shown.replace(" ", "")
        else:
            # Neither is stderr a terminal here.
            assert shown == ""


def test_the_progress_bar_is_closed_after_an_error(capsys):
    with pytest.raises(ZeroDivisionError):
        score(toy(), (1 / 0 for _ in range(3)), progress=True)
    assert not tqdm._instances


def test_gradient_modes():
    model, batches = toy(), token_batches()
    want = score(model, batches)
    modes = []

    def loader():
        for batch in batches:
            modes.append(torch.is_grad_enabled())
            yield batch

    with torch.no_grad():
        assert_same_scores(score(model, loader()), want)
        assert not torch.is_grad_enabled()
    assert modes == [False] * len(batches)


@pytest.mark.parametrize("training", [True, False])
def test_runs_in_the_mode_it_finds(training):
    model, modes = toy().train(training), []

    def objective(model, batch):
        modes.append(model.training)
        return model(**batch).loss

    score(model, token_batches(2), objective)
    assert modes == [training] * 2
    assert model.training is training


class Objective:
    def __call__(self, model, batch):
        return model_loss(model, batch)


def test_scores_say_where_they_come_from():
    model, batches = toy(), token_batches(2)
    scores = score(model, batches, refusal_like := lambda model, batch: model_loss(model, batch))
    assert scores.meta["objective"] == refusal_like.__qualname__
    assert score(model, batches, model_loss, reduction="abs").meta["reduction"] == "abs"
    assert score(model, batches, Objective()).meta["objective"] == "Objective"
    assert score(model, batches, functools.partial(model_loss)).meta["objective"] == "partial"
    meta = score(model, batches).top(0.1).meta
    versions = {"safekern": scoring.__version__, "torch": torch.__version__}
    assert meta == {
        "objective": "model loss",
        "reduction": "mean",
        "batches": 2,
        "versions": versions,
        "ranking": "top",
        "ratio": 0.1,
        "per": "model",
    }


# What is refused


def constant(value):
    return lambda model, batch: value


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"loader": []}, InvalidArgumentError, "yielded no batch"),
        ({"loader": iter(())}, InvalidArgumentError, "yielded no batch"),
        ({"loader": token_batches(1)[0]}, InvalidArgumentError, r"got dict: .* pass \[batch\]"),
        ({"loader": UserDict(token_batches(1)[0])}, InvalidArgumentError, r"got UserDict: .* pass \[batch\]"),
        ({"loader": torch.zeros(3)}, InvalidArgumentError, "got Tensor"),
        ({"loader": "prompts.json"}, InvalidArgumentError, "got str"),
        ({"loader": 3}, InvalidArgumentError, "got int"),
        ({"loader": None}, InvalidArgumentError, "got NoneType"),
        ({"reduction": "sum"}, InvalidArgumentError, "'mean' or 'abs', got 'sum'"),
        ({"reduction": None}, InvalidArgumentError, "'mean' or 'abs', got None"),
        ({"select": lambda name, param: False}, InvalidArgumentError, "no parameter of the model is eligible"),
        ({"objective": lambda model, batch: model.first.weight}, ScoringError, r"batch 0: .* shape \(8, 6\)"),
        ({"objective": constant(3.0)}, ScoringError, "batch 0: .* scalar tensor, got float"),
        ({"objective": constant(None)}, ScoringError, "batch 0: .* scalar tensor, got NoneType"),
        ({"objective": lambda model, batch: model(**batch)}, ScoringError, "got SimpleNamespace"),
        ({"objective": constant(torch.tensor(1.0))}, ScoringError, "batch 0: .* no graph"),
        ({"objective": lambda model, batch: model(**batch).loss.detach()}, ScoringError, "batch 0: .* no graph"),
        ({"objective": torch.inference_mode()(model_loss)}, ScoringError, "batch 0: .* no graph"),
        ({"objective": torch.no_grad()(model_loss)}, ScoringError, "batch 0: .* no graph"),
        ({"objective": lambda model, batch: toy()(**batch).loss}, ScoringError, "batch 0: no eligible parameter"),
    ],
)
def test_bad_input_is_refused_and_the_model_untouched(arguments, error, message):
    model = used_model()
    before = snapshot(model)
    with pytest.raises(error, match=message) as caught:
        score(model, **{"loader": token_batches(), **arguments})
    assert isinstance(caught.value, SafekernError)
    assert_untouched(model, before)


def test_the_default_objective_says_that_labels_are_missing():
    tokens = torch.tensor([[1, 2]])
    with pytest.raises(ScoringError, match="no loss for a batch: put 'labels'"):
        score(tiny_llama(), [{"input_ids": tokens}])


def test_models_that_cannot_be_scored():
    model = used_model()
    before = snapshot(model)
    with torch.inference_mode(), pytest.raises(ScoringError, match="score outside of it"):
        score(model, token_batches())
    assert_untouched(model, before)
    with torch.device("meta"):
        offloaded = toy()
    with pytest.raises(InvalidArgumentError, match=r"first\.weight is on the meta device"):
        score(offloaded, token_batches())
    for value in (float("nan"), float("inf")):
        with torch.no_grad():
            model.second.weight[1, 2] = value
        before = snapshot(model)
        with pytest.raises(NonFiniteError, match=r"parameter second\.weight holds NaN or infinity"):
            score(model, token_batches())
        assert_untouched(model, before)


def test_sparse_gradients_are_refused():
    model = nn.Embedding(5, 3, sparse=True)
    with pytest.raises(ScoringError, match="weight has a sparse gradient"):
        score(model, [torch.tensor([1, 2])], lambda model, batch: model(batch).sum(), select=every)
    assert model.weight.grad is None


# What is left as it was


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_model_is_left_as_it_was(name):
    loader, objective, error, message, options = SCENARIOS[name]
    model = used_model()
    before = snapshot(model)
    if error is None:
        score(model, loader(), objective, **options)
    else:
        with pytest.raises(error, match=message):
            score(model, loader(), objective, **options)
    assert_untouched(model, before)


def test_an_interrupt_while_hooks_are_set_undoes_them(monkeypatch):
    model, count = used_model(), 0
    before = snapshot(model)
    register = Tensor.register_post_accumulate_grad_hook

    def interrupted(param, hook):
        nonlocal count
        count += 1
        if count == 2:
            raise KeyboardInterrupt
        return register(param, hook)

    monkeypatch.setattr(Tensor, "register_post_accumulate_grad_hook", interrupted)
    with pytest.raises(KeyboardInterrupt):
        score(model, token_batches())
    assert count == 2
    assert_untouched(model, before)


def test_a_failed_run_does_not_show_in_the_next():
    model = used_model()
    want = score(model, token_batches())
    with pytest.raises(NonFiniteError):
        score(model, token_batches(), lambda model, batch: model(**batch).loss * float("inf"))
    assert_same_scores(score(model, token_batches()), want)


def test_hooks_on_parameters_rest_during_scoring_and_fire_again_afterwards():
    model, batches = used_model(), token_batches()
    want = score(toy(), batches, select=every)
    model.mixer.weight.register_hook(lambda grad: grad * 0)
    handle = model.mixer.weight.register_post_accumulate_grad_hook(lambda param: model.fired.append("once"))
    assert_same_scores(score(model, batches, select=every), want)
    assert model.fired == []

    grad = model.mixer.weight.grad.clone()
    model(**batches[0]).loss.backward()
    assert sorted(model.fired) == ["accumulated"] * 3 + ["gradient"] * 3 + ["once"]
    assert torch.equal(model.mixer.weight.grad, grad)

    handle.remove()
    model.fired.clear()
    model(**batches[0]).loss.backward()
    assert sorted(model.fired) == ["accumulated"] * 3 + ["gradient"] * 3


def test_an_optimizer_that_steps_in_backward_does_not_step():
    model = toy()
    optimizers = {param: torch.optim.SGD([param], lr=1.0) for param in model.parameters()}

    def step(param):
        optimizers[param].step()
        param.grad = None

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(step)
    before = snapshot(model)
    assert_same_scores(score(model, token_batches()), score(toy(), token_batches()))
    assert_untouched(model, before)
    model(**token_batches()[0]).loss.backward()
    assert not same_bits(model.mixer.weight, toy().mixer.weight)


def test_training_goes_on_as_if_nothing_had_been_scored():
    models = toy(), toy()
    for number, model in enumerate(models):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        for batch in token_batches():
            model(**batch).loss.backward()
            if number:
                score(model, token_batches(2, seed=5))
            optimizer.step()
            optimizer.zero_grad()
    assert all(same_bits(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


# Gradient checkpointing


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_nothing(reentrant, training, reduction):
    model, batches = tiny_llama().train(training), token_batches()
    want = score(model, batches, reduction=reduction)
    checkpointed(model, use_reentrant=reentrant)
    before = snapshot(model)
    assert_same_scores(score(model, batches, reduction=reduction), want)
    assert_untouched(model, before)


class Checkpointed(Toy):
    """Checkpoints its middle without a sign of it that could be seen from outside."""

    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant

    def forward(self, input_ids, labels):
        def run(layer, values):
            return checkpoint(layer, values, use_reentrant=self.reentrant)

        hidden = run(self.first, self.embed(input_ids)).tanh()
        hidden = self.norm(run(self.mixer, run(self.mixer, hidden).tanh()))
        logits = self.head(self.second(hidden))
        return SimpleNamespace(loss=nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten()))


def test_checkpointing_that_would_lose_gradients_is_an_error():
    batches = token_batches()
    torch.manual_seed(0)
    model = Checkpointed(reentrant=True)
    before = snapshot(model)
    with pytest.raises(ScoringError, match=r"lose the gradients .* use_reentrant=False"):
        score(model, batches)
    assert_untouched(model, before)
    model.reentrant = False
    assert_same_scores(score(model, batches), score(toy(), batches))


def test_checkpointing_of_a_later_batch_that_would_lose_gradients_is_an_error():
    model, batches = Checkpointed(reentrant=False), token_batches()
    seen = []

    def objective(model, batch):
        seen.append(batch)
        # As models do that checkpoint long inputs only.
        model.reentrant = len(seen) == 3
        return model(**batch).loss

    with pytest.raises(ScoringError, match=r"lose the gradients .* use_reentrant=False"):
        score(model, batches, objective)
    assert len(seen) == 3


def test_gradients_in_parts_add_up_but_their_absolute_values_do_not():
    batches = token_batches()
    torch.manual_seed(0)
    model = Checkpointed(reentrant=True)
    got, want = score(model, batches, select=every), score(toy(), batches, select=every)
    for name in want:
        torch.testing.assert_close(got.gradient(name), want.gradient(name), rtol=1e-4, atol=1e-7)
    before = snapshot(model)
    with pytest.raises(ScoringError, match=r"mixer\.weight came in parts.*use_reentrant=False"):
        score(model, batches, reduction="abs", select=every)
    assert_untouched(model, before)
    model.reentrant = False
    assert_same_scores(
        score(model, batches, reduction="abs", select=every), score(toy(), batches, reduction="abs", select=every)
    )


def test_other_warnings_stay_warnings():
    def objective(model, batch):
        warnings.warn("of the user's", UserWarning, stacklevel=1)
        return model(**batch).loss

    filters = warnings.filters[:]
    with pytest.warns(UserWarning, match="of the user's"):
        score(toy(), token_batches(), objective)
    with pytest.raises(UserWarning, match="of the user's"):
        score(toy(), token_batches(), objective)
    assert warnings.filters == filters


# Memory and waiting


def measured(run):
    with LiveBytes() as meter:
        result = run()
    del result
    return meter.peak


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_bounded_by_the_largest_gradient(dtype, reduction):
    depth, width = 12, 96
    torch.manual_seed(0)
    model = Deep(depth, width).to(dtype)
    batches = [torch.randn(1, width, dtype=dtype) for _ in range(3)]
    gradient, accumulators = width * width * dtype.itemsize, depth * width * width * 4
    activations = 4 * depth * width * dtype.itemsize

    def backward():
        model(batches[0]).backward()

    # The meter sees gradients that stay: a plain backward keeps all of them.
    assert measured(backward) > depth * gradient
    model.zero_grad()
    peak = measured(lambda: score(model, batches, reduction=reduction)) - accumulators
    assert gradient < peak < 1.5 * gradient + activations


def test_waits_for_the_device_once_per_batch():
    """Counts what makes the host wait for a GPU, which is as many per batch whatever the number of parameters."""
    waiting = {"item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__", "equal"}

    class Waits(TorchFunctionMode):
        def __init__(self):
            super().__init__()
            self.seen = []

        def __torch_function__(self, func, types, args=(), kwargs=None):
            if getattr(func, "__name__", "") in waiting:
                self.seen.append(func.__name__)
            return func(*args, **(kwargs or {}))

    for depth in (1, 20):
        model = Deep(depth, 4)
        counts = []
        for number in (10, 60):
            with Waits() as waits:
                score(model, [torch.ones(1, 4)] * number)
            counts.append(len(waits.seen))
        assert counts[1] - counts[0] == 50


def test_thousands_of_batches():
    model = Weights(w=torch.randn(3, 5))
    scores = score(model, ({"w": torch.full((3, 5), float(i % 2))} for i in range(3000)), linear)
    assert scores.num_batches == 3000
    assert torch.equal(scores.gradient("w"), torch.full((3, 5), 0.5))


# Models that change while they are scored


class Normalised(nn.Linear):
    """Puts a normalised weight in place of its own in the first forward, as Baichuan 2's head does."""

    replaced = False

    def forward(self, x):
        if not self.replaced:
            self.weight, self.replaced = nn.Parameter(nn.functional.normalize(self.weight)), True
        return super().forward(x)


class Growing(nn.Linear):
    """Makes a layer in the first forward."""

    def forward(self, x):
        if not hasattr(self, "late"):
            self.late = nn.Linear(3, 3)
        return self.late(super().forward(x))


@pytest.mark.parametrize(
    ("layer", "message"),
    [(Normalised, "replaced parameter 0.weight"), (Growing, r"made parameter 0\.late\.weight")],
)
def test_parameters_of_the_first_forward_are_asked_for_before(layer, message):
    torch.manual_seed(0)
    model, batches = nn.Sequential(layer(4, 3), nn.Linear(3, 2)), [torch.randn(5, 4) for _ in range(2)]

    def objective(module, batch):
        return module(batch).square().mean()

    with pytest.raises(ScoringError, match=message):
        score(model, batches, objective)
    assert all(param.grad is None and param.requires_grad for param in model.parameters())
    scores = score(model, batches, objective)
    assert all(scores[name].any() for name in scores)


def test_an_objective_that_is_empty_is_asked():
    class Recorded(list):
        def __call__(self, model, batch):
            self.append(-model_loss(model, batch))
            return self[-1]

    model, batches = toy(), token_batches(2)
    objective = Recorded()
    scores = score(model, batches, objective)
    assert len(objective) == 2 and scores.meta["objective"].endswith("Recorded")


def test_modes_that_an_objective_changes_are_put_back():
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.1)).train()
    model[1].eval()

    def objective(module, batch):
        return module.eval()(batch).square().mean()

    score(model, [torch.randn(2, 4)], objective)
    assert model.training and model[0].training and not model[1].training


def test_gradients_that_could_not_be_put_back_are_refused():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    model(torch.randn(2, 4)).sum().backward()
    for param in model.parameters():
        param.data = param.data.bfloat16()
    grads = [param.grad for param in model.parameters()]
    with pytest.raises(InvalidArgumentError, match=r"the \.grad that 0\.weight has .* model\.zero_grad\(\) first"):
        score(model, [torch.randn(2, 4, dtype=torch.bfloat16)], lambda module, batch: module(batch).float().mean())
    for param, grad in zip(model.parameters(), grads, strict=True):
        assert param.requires_grad and param.grad is grad


def test_a_bias_that_was_made_in_inference_mode_is_left_alone():
    model = nn.Linear(4, 3)
    with torch.inference_mode():
        model.bias = nn.Parameter(torch.zeros(3), requires_grad=False)
    score(model, [torch.randn(2, 4)], lambda module, batch: nn.functional.linear(batch, module.weight).square().mean())
    assert model.weight.requires_grad and not model.bias.requires_grad
