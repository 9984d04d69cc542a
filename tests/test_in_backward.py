"""SETAdamW(in_backward=True): gradients reduced to their selected entries as backward makes them."""

import copy
import functools
import gc
import math
import pickle
import weakref

import pytest
import torch
from small_net import MASKED, Net, assert_same, bits, full_mask, loss_of, random_mask, snapshot, train, weights
from torch import nn
from torch.utils.checkpoint import checkpoint

from safekern import InvalidArgumentError, Mask, NonFiniteError, SETAdamW, StepError
from safekern.optim.selected_grad import SelectedGrad

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def pair(make=Net, mask_of=random_mask, **options):
    """Two equal models, with an optimizer that keeps dense gradients and one that does not."""
    models = [make(), make()]
    models[1].load_state_dict(models[0].state_dict())
    return [
        (model, SETAdamW(model.named_parameters(), mask_of(model), in_backward=in_backward, **options))
        for model, in_backward in zip(models, (False, True), strict=True)
    ]


def collecting(*args, **options):
    """The second of a pair. The optimizer has to be kept: with it, the hooks and the gradients they collected go."""
    return pair(*args, **options)[1]


def assert_same_training(pairs):
    (dense_model, dense), (model, optimizer) = pairs
    assert_same(snapshot(model, optimizer), snapshot(dense_model, dense))
    assert any(state["step"] > 0 for state in optimizer.state.values())


def accumulate(model, step, micro_batches=3):
    for micro_batch in range(micro_batches):
        (loss_of(model, 10 * step + micro_batch) / micro_batches).backward()


# Against the dense mode, bit for bit


def clip_values(model, optimizer):
    torch.nn.utils.clip_grad_value_([model.get_parameter(name) for name in MASKED], 0.001)


def clip(model, optimizer):
    return optimizer.clip_grad_norm_(0.05)


def rescale(model, optimizer):
    for name in MASKED:
        model.get_parameter(name).grad.mul_(0.5).div_(torch.tensor(0.75))


@pytest.mark.parametrize("change", [None, clip, clip_values, rescale])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_training_equals_the_dense_mode(micro_batches, change):
    pairs = pair(lr=1e-2, weight_decay=0.1)
    for model, optimizer in pairs:
        for step in range(4):
            accumulate(model, step, micro_batches)
            if change is not None:
                change(model, optimizer)
            optimizer.step()
            optimizer.zero_grad()
    assert_same_training(pairs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_equal_the_dense_mode(dtype):
    pairs = pair(functools.partial(Net, dtype), lr=1e-2)
    for model, optimizer in pairs:
        train(model, optimizer, range(4))
    assert_same_training(pairs)


def test_micro_batches_of_bf16_gradients_add_up_in_fp32():
    pairs = pair(functools.partial(Net, torch.bfloat16), full_mask)
    exact = None
    for model, _ in pairs:
        terms = []
        for step in range(16):
            model.zero_grad()
            loss_of(model, step).backward()
            grad = model.second.weight.grad
            terms.append((grad.selected if isinstance(grad, SelectedGrad) else grad.float()).view(5, 37).double())
        exact = torch.stack(terms).sum(0)
        model.zero_grad()
        for step in range(16):
            loss_of(model, step).backward()
    (dense, _), (selected, _) = pairs
    mine = (selected.second.weight.grad.selected.view(5, 37).double() - exact).abs().max()
    theirs = (dense.second.weight.grad.double() - exact).abs().max()
    assert mine <= 1e-6 * exact.abs().max()
    assert mine < theirs / 100


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant):
    class Checkpointed(Net):
        def forward(self, x):
            x = x.to(self.first.weight.dtype).requires_grad_()
            hidden = checkpoint(self.first, x, use_reentrant=use_reentrant).tanh()
            again = checkpoint(self.first, x, use_reentrant=use_reentrant).sigmoid()
            return checkpoint(self.second, self.norm(hidden * again), use_reentrant=use_reentrant)

    pairs = pair(Checkpointed)
    for model, optimizer in pairs:
        for step in range(3):
            accumulate(model, step)
            optimizer.step()
            optimizer.zero_grad()
    assert_same_training(pairs)


def test_autocast():
    pairs = pair()
    for model, optimizer in pairs:
        for step in range(3):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = loss_of(model, step)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same_training(pairs)


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_models(whole):
    pairs = pair()
    for model, optimizer in pairs:
        compiled = torch.compile(model, backend="aot_eager") if whole else model
        if not whole:
            model.first.compile(backend="aot_eager")
        for step in range(2):
            accumulate(compiled, step, 2)
            optimizer.step()
            optimizer.zero_grad()
            assert whole or all(p.grad is None for p in model.parameters())
    assert_same_training(pairs)
    torch.compiler.reset()


@pytest.mark.parametrize("in_backward", [False, True])
def test_a_compiled_training_step(in_backward):
    def step(model, optimizer, x):
        model(x).square().mean().backward()
        optimizer.clip_grad_norm_(0.5)
        optimizer.step()
        optimizer.zero_grad()

    models = [Net(), Net()]
    for model, run in zip(models, (step, torch.compile(step, backend="aot_eager")), strict=True):
        optimizer = SETAdamW(model.named_parameters(), random_mask(model), in_backward=in_backward)
        for seed in range(3):
            run(model, optimizer, torch.randn(8, 13, generator=torch.Generator().manual_seed(seed)))
    torch.compiler.reset()
    assert_same(weights(models[0]), weights(models[1]))


def test_tied_weights():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.head = nn.Embedding(11, 13), nn.Linear(13, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x):
            return self.head(self.embed(x.long().abs() % 11))

    def mask_of(model):
        return random_mask(model, names=["embed.weight"])

    pairs = pair(Tied, mask_of)
    for model, optimizer in pairs:
        for step in range(3):
            accumulate(model, step)
            optimizer.step()
            optimizer.zero_grad()
    assert_same_training(pairs)


def test_noncontiguous_parameters():
    def make():
        model = Net()
        model.first.weight.data = model.first.weight.data.t().contiguous().t()
        return model

    pairs = pair(make)
    for model, optimizer in pairs:
        for step in range(3):
            accumulate(model, step)
            optimizer.step()
            optimizer.zero_grad()
        assert not model.first.weight.is_contiguous()
    assert_same_training(pairs)


def test_closures():
    pairs = pair()
    for model, optimizer in pairs:
        for step in range(3):

            def closure(model=model, optimizer=optimizer, step=step):
                optimizer.zero_grad()
                loss = loss_of(model, step)
                loss.backward()
                return loss

            optimizer.step(closure)
    assert_same_training(pairs)


def test_parameters_that_get_no_gradient_or_are_frozen_for_a_while():
    pairs = pair()
    for model, optimizer in pairs:
        for step in range(6):
            model.second.requires_grad_(step not in (0, 3))
            train(model, optimizer, [step])
        assert optimizer.state[model.second.weight]["step"] == 4
    assert_same_training(pairs)


def test_sparse_gradients_outside_the_mask():
    def make():
        return nn.Sequential(nn.Embedding(7, 13, sparse=True), Net())

    pairs = pair(make, functools.partial(random_mask, names=[f"1.{name}" for name in MASKED]))
    for model, optimizer in pairs:
        for tokens in ([1, 2], [3], [0, 6, 6]):
            for _ in range(2):
                model(torch.tensor(tokens)).square().mean().backward()
            optimizer.step()
            grad = model[0].weight.grad
            optimizer.zero_grad()
    assert_same_training(pairs)
    # Refused by whoever wants it.
    assert isinstance(grad, SelectedGrad) and not grad.selected.numel()


@pytest.mark.parametrize("trained", [False, True])
def test_parameters_outside_the_mask_that_were_made_under_inference_mode(trained):
    pairs = []
    for in_backward in (False, True):
        model = Net()
        with torch.inference_mode():
            model.first.bias = nn.Parameter(torch.ones(37), requires_grad=trained)
        mask = random_mask(model, names=["first.weight", "second.weight"])
        optimizer = SETAdamW(model.named_parameters(), mask, lr=1e-2, in_backward=in_backward)
        pairs.append((model, optimizer))
        accumulate(model, 0, 2)
        optimizer.step()
        grad = model.first.bias.grad
        train(model, optimizer, [1])
    assert_same_training(pairs)
    assert grad.selected.numel() == 0 if trained else grad is None


def test_parameters_frozen_at_construction():
    def make():
        model = Net()
        model.first.requires_grad_(False)
        return model

    pairs = pair(make)
    for model, optimizer in pairs:
        assert not model.first.weight.requires_grad
        train(model, optimizer, [0])
        model.first.requires_grad_(True)
        train(model, optimizer, [1, 2])
        assert optimizer.state[model.first.weight]["step"] == 2
    assert_same_training(pairs)
    assert isinstance(pairs[1][0].first.weight.grad, SelectedGrad)


def test_dense_gradients_set_by_hand_are_used():
    pairs = pair()
    for model, optimizer in pairs:
        loss_of(model, 0).backward()
        model.first.weight.grad = torch.ones_like(model.first.weight)
        loss_of(model, 1).backward()
        model.second.weight.grad = torch.ones_like(model.second.weight)
        optimizer.step()
    assert_same_training(pairs)


# Discarding gradients


@pytest.mark.parametrize("by", ["model", "optimizer"])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_discards_what_was_accumulated(by, set_to_none):
    pairs = pair()
    for model, optimizer in pairs:
        for step in range(2):
            loss_of(model, 99).backward()
            {"model": model, "optimizer": optimizer}[by].zero_grad(set_to_none=set_to_none)
            accumulate(model, step, 2)
            optimizer.step()
            {"model": model, "optimizer": optimizer}[by].zero_grad(set_to_none=set_to_none)
    assert_same_training(pairs)
    grads = [param.grad for param in pairs[1][0].parameters()]
    assert all(grad is None or (not set_to_none and not grad.selected.any()) for grad in grads)


def test_a_step_without_gradients_raises():
    model, optimizer = collecting()
    loss_of(model, 0).backward()
    model.zero_grad()
    before = snapshot(model, optimizer)
    with pytest.raises(StepError, match="no selected weight received a gradient"):
        optimizer.step()
    assert_same(snapshot(model, optimizer), before)


# Overflow and clipping


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_nonfinite_gradient_raises_and_changes_nothing(value):
    model, optimizer = collecting()
    train(model, optimizer, range(2))
    optimizer.zero_grad()
    model.second.weight.register_hook(lambda grad: grad * value)
    loss_of(model, 2).backward()
    before = snapshot(model, optimizer)
    with pytest.raises(NonFiniteError, match=r"gradient of second\.weight holds NaN"):
        optimizer.step()
    assert_same(snapshot(model, optimizer), before)


def test_a_nonfinite_gradient_outside_the_mask_does_not_matter():
    pairs = pair()
    for model, optimizer in pairs:
        outside = ~random_mask(model).bool("second.weight")
        model.second.weight.register_hook(lambda grad, outside=outside: grad.masked_fill(outside, float("nan")))
        train(model, optimizer, range(2))
    assert_same_training(pairs)


def test_grad_scaler_skips_and_recovers_as_with_dense_gradients():
    pairs = pair()
    for model, optimizer in pairs:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, growth_interval=3)
        for step in range(30):
            with torch.autocast("cpu", dtype=torch.float16):
                loss = loss_of(model, step)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            optimizer.clip_grad_norm_(0.05)
            before = snapshot(model, optimizer)
            scaler.step(optimizer)
            if scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"][torch.device("cpu")]:
                assert_same(snapshot(model, optimizer), before)
            scaler.update()
            optimizer.zero_grad()
        assert 0 < optimizer.state[model.first.weight]["step"] < 25
    assert_same_training(pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("by", ["torch", "optimizer"])
def test_clipping_measures_and_scales_the_selected_entries(by, dtype):
    model, optimizer = collecting(functools.partial(Net, dtype))
    loss_of(model, 0).backward()
    before = torch.cat([model.get_parameter(name).grad.selected.clone() for name in MASKED])
    if by == "torch":
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    else:
        norm = optimizer.clip_grad_norm_(0.01)
    torch.testing.assert_close(norm, before.norm())
    after = torch.cat([model.get_parameter(name).grad.selected for name in MASKED])
    torch.testing.assert_close(after, before * 0.01 / (before.norm() + 1e-6))


# What takes the place of a gradient


def test_a_selected_grad_has_the_form_of_its_parameter():
    model, _optimizer = collecting(functools.partial(Net, torch.bfloat16))
    loss_of(model, 0).backward()
    grad, param = model.first.weight.grad, model.first.weight
    assert type(grad) is SelectedGrad
    assert (grad.shape, grad.stride(), grad.dtype, grad.device) == (
        param.shape,
        param.stride(),
        param.dtype,
        param.device,
    )
    assert grad.selected.dtype == torch.float32
    assert grad.selected.numel() == random_mask(model)["first.weight"].numel()
    assert "SelectedGrad(" in repr(grad) and "(37, 13)" in repr(grad)
    assert model.norm.weight.grad.shape == model.norm.weight.shape
    assert not model.norm.weight.grad.selected.numel()


@pytest.mark.parametrize(
    "operation",
    [
        lambda grad: grad + grad,
        lambda grad: grad.add_(1),
        lambda grad: torch.zeros_like(grad, device="meta").add_(grad),
        lambda grad: torch.zeros(grad.shape).add_(grad),
        lambda grad: grad.mul_(torch.ones(grad.shape)),
        lambda grad: grad.mul_(torch.ones(grad.shape[-1])),
        lambda grad: torch.linalg.vector_norm(grad, dim=0),
        lambda grad: grad.isnan().any(),
        lambda grad: grad.mean(),
        lambda grad: grad.clone(),
        lambda grad: grad.view(-1),
        lambda grad: grad[0],
        lambda grad: grad.copy_(torch.zeros(grad.shape)),
        copy.deepcopy,
        copy.copy,
        pickle.dumps,
        lambda grad: torch._foreach_add_([grad], 2.0),
    ],
)
def test_other_operations_say_what_to_do(operation):
    model, _optimizer = collecting()
    loss_of(model, 0).backward()
    grad = model.first.weight.grad
    before = grad.selected.clone()
    with pytest.raises(InvalidArgumentError, match=r"does not work on a SelectedGrad.*`selected`"):
        operation(grad)
    assert torch.equal(grad.selected, before)


@pytest.mark.parametrize(
    ("move", "dtype", "device"),
    [
        (lambda model: model.to(torch.bfloat16), torch.bfloat16, "cpu"),
        (lambda model: model.double(), torch.float64, "cpu"),
        (lambda model: model.cpu(), torch.float32, "cpu"),
        (lambda model: model.to("meta"), torch.float32, "meta"),
        (lambda model: model.share_memory(), torch.float32, "cpu"),
    ],
)
def test_a_model_is_moved_with_the_gradients_it_has(move, dtype, device):
    model, optimizer = collecting()
    loss_of(model, 0).backward()
    optimizer.step()
    before = {name: model.get_parameter(name).grad.selected.clone() for name in MASKED}
    move(model)
    for name, param in model.named_parameters():
        assert (param.dtype, param.device.type) == (dtype, device)
        if name in MASKED:
            assert type(param.grad) is SelectedGrad and (param.grad.dtype, param.grad.device.type) == (dtype, device)
            assert device == "meta" or torch.equal(param.grad.selected, before[name])


def test_the_values_follow_a_gradient_that_is_given_new_data():
    # As Module.to does for another device of the same kind of tensor, such as a GPU.
    model, optimizer = collecting()
    loss_of(model, 0).backward()
    grad = model.first.weight.grad
    moved = SelectedGrad(grad, grad.positions.clone(), grad.selected + 1)
    grad.data = moved
    assert grad.selected is moved.selected and grad.positions is moved.positions
    assert type(grad.data) is SelectedGrad and grad.data.selected is moved.selected
    optimizer.step()


def test_gradients_wider_than_their_parameter():
    weights = [nn.Parameter(torch.linspace(-1, 1, 64).bfloat16().view(8, 8)) for _ in range(2)]
    mask = Mask.from_indices({"w": [1, 5, 63]}, {"w": (8, 8)})
    for weight, in_backward in zip(weights, (False, True), strict=True):
        weight.grad_dtype = torch.float32
        optimizer = SETAdamW([("w", weight)], mask, lr=1e-2, in_backward=in_backward)
        for _ in range(2):
            weight.float().square().sum().backward()
        assert weight.grad.dtype == torch.float32 and (type(weight.grad) is SelectedGrad) == in_backward
        optimizer.step()
    assert torch.equal(bits(weights[0]), bits(weights[1]))


def write_each(optimizer):
    for param, state in list(optimizer.state.items()):
        optimizer.state[param] = dict(state)


@pytest.mark.parametrize("write", [write_each, lambda optimizer: optimizer.state.clear()])
def test_state_may_be_written_between_backward_and_step(write):
    pairs = pair(lr=1e-2)
    for model, optimizer in pairs:
        train(model, optimizer, range(2))
        loss_of(model, 2).backward()
        write(optimizer)
        optimizer.step()
    assert_same_training(pairs)


@pytest.mark.parametrize("fused", [False, True])
def test_another_optimizer_over_the_same_parameters_is_refused(fused):
    model, optimizer = collecting()
    loss_of(model, 0).backward()
    before = weights(model)
    with pytest.raises(InvalidArgumentError, match="does not work on a SelectedGrad"):
        torch.optim.AdamW([model.first.weight], weight_decay=0, fused=fused).step()
    other = SETAdamW(model.named_parameters(), random_mask(model, seed=2))
    with pytest.raises(StepError, match="another optimizer selects"):
        other.step()
    assert_same(weights(model), before)
    optimizer.step()


def test_two_collecting_optimizers_over_one_parameter_are_refused():
    model, optimizer = collecting()
    other = SETAdamW(model.named_parameters(), random_mask(model, seed=2), in_backward=True)
    with pytest.raises(StepError, match="another optimizer selects"):
        loss_of(model, 0).backward()
    del other
    model.zero_grad()
    train(model, optimizer, range(2))


def test_two_optimizers_over_different_parameters_work_side_by_side():
    model, reference = Net(), Net()
    for net, in_backward in ((reference, False), (model, True)):
        named = dict(net.named_parameters())
        optimizers = [
            SETAdamW([(name, named[name])], random_mask(net, names=[name]), in_backward=in_backward)
            for name in ("first.weight", "second.weight")
        ]
        for step in range(3):
            net.zero_grad()
            loss_of(net, step).backward()
            for optimizer in optimizers:
                optimizer.step()
    assert_same(weights(model), weights(reference))


def test_create_graph_and_sparse_gradients_are_refused():
    model, _optimizer = collecting()
    with pytest.warns(UserWarning, match="create_graph"), pytest.raises(StepError, match="create_graph"):
        loss_of(model, 0).backward(create_graph=True)
    embedding = nn.Embedding(10, 4, sparse=True)
    optimizer = SETAdamW(embedding.named_parameters(), full_mask(embedding), in_backward=True)
    with pytest.raises(StepError, match="sparse gradient"):
        embedding(torch.tensor([1, 2])).sum().backward()
    del optimizer


def test_gradients_selected_by_different_masks_are_not_added():
    model, _optimizer = collecting()
    other, _other_optimizer = collecting(mask_of=functools.partial(random_mask, seed=2))
    for net in (model, other):
        loss_of(net, 0).backward()
    with pytest.raises(InvalidArgumentError, match="another mask"):
        model.first.weight.grad.add_(other.first.weight.grad)
    before = model.first.weight.grad.selected.clone()
    model.first.weight.grad.add_(model.first.weight.grad.detach(), alpha=2)
    torch.testing.assert_close(model.first.weight.grad.selected, 3 * before)


# Memory


LAYERS, WIDTH = 8, 256


def peak_of_backward(in_backward, micro_batches):
    """The most memory that backward held at a time above what was there before, in gradients of one layer."""
    model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)])
    # Only every other layer is masked: the gradients of the others have to go, too.
    indices = {f"{i}.weight": range(0, WIDTH * WIDTH, 100) for i in range(0, LAYERS, 2)}
    mask = Mask.from_indices(
        {name: list(values) for name, values in indices.items()},
        {name: param.shape for name, param in model.named_parameters()},
    )
    optimizer = SETAdamW(model.named_parameters(), mask, in_backward=in_backward)
    for _ in range(micro_batches - 1):
        model(torch.randn(1, WIDTH)).sum().backward()
    loss = model(torch.randn(1, WIDTH)).sum()
    gc.collect()  # What earlier tests left would be freed, and counted, meanwhile.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        loss.backward()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    optimizer.step()
    return peak / (WIDTH * WIDTH * 4)


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_backward_holds_one_dense_gradient_at_a_time(micro_batches):
    # Not exactly 1: activations of forward, and what other threads hold, are freed meanwhile.
    assert 0.5 < peak_of_backward(True, micro_batches) < 1.5


def test_the_memory_measure_sees_gradients_that_stay():
    assert peak_of_backward(False, 1) > LAYERS - 0.5


def test_no_dense_gradient_is_left_after_backward():
    model, _optimizer = collecting()
    accumulate(model, 0)
    for name, param in model.named_parameters():
        assert isinstance(param.grad, SelectedGrad) and (name in MASKED or not param.grad.selected.numel())


@pytest.mark.parametrize("options", [{}, {"foreach": False}, {"fused": True}])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_another_optimizer_refuses_gradients_outside_the_mask(kind, options):
    model, _optimizer = collecting()
    others = [param for name, param in model.named_parameters() if name not in MASKED]
    accumulate(model, 0, 2)
    with pytest.raises(InvalidArgumentError, match=r"SelectedGrad.*give this one other parameters"):
        kind(others, lr=0.1, **options).step()


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
def test_clipping_with_gradients_outside_the_mask(norm_type, foreach):
    model, _optimizer = collecting()
    accumulate(model, 0, 2)
    selected = [model.get_parameter(name).grad.selected.clone() for name in MASKED]
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.01, norm_type, foreach=foreach)
    torch.testing.assert_close(norm, torch.linalg.vector_norm(torch.cat(selected), norm_type))
    nn.utils.clip_grad_value_(model.parameters(), 1e-5, foreach=foreach)
    for name in MASKED:
        assert 0 < model.get_parameter(name).grad.selected.abs().max() <= 1e-5


# Hooks come and go with the optimizer


def number_of_hooks(model):
    return [len(param._post_accumulate_grad_hooks or ()) for param in model.parameters()]


def test_hooks_and_collected_gradients_go_with_the_optimizer():
    model = Net()
    optimizer = SETAdamW(model.named_parameters(), random_mask(model), in_backward=True)
    assert number_of_hooks(model) == [1] * 5
    loss_of(model, 0).backward()
    train(model, optimizer, [0])
    selected = weakref.ref(model.first.weight.grad.selected)
    gone = weakref.ref(optimizer)
    gc.collect()
    gc.disable()
    try:
        del optimizer
        assert gone() is None and selected() is None
    finally:
        gc.enable()
    assert number_of_hooks(model) == [0] * 5
    assert all(param.grad is None for param in model.parameters())
    loss_of(model, 0).backward()
    assert all(type(param.grad) is torch.Tensor for param in model.parameters())


def test_an_optimizer_that_was_refused_leaves_no_hooks():
    model = Net()
    bad = Mask.from_indices({"first.weight": [0]}, {"first.weight": (1, 1)})
    for mask, options in ((bad, {}), (random_mask(model), {"lr": -1})):
        with pytest.raises(ValueError, match=r"lr|does not fit"):
            SETAdamW(model.named_parameters(), mask, in_backward=True, **options)
    groups = [{"params": model.named_parameters()}, {"params": [("x", nn.Parameter(torch.ones(1)))], "eps": -1}]
    with pytest.raises(InvalidArgumentError, match="eps"):
        SETAdamW(groups, random_mask(model), in_backward=True)
    assert number_of_hooks(model) == [0] * 5


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_collect_from_their_own_parameters(duplicate):
    model = Net()
    optimizer = SETAdamW(model.named_parameters(), random_mask(model), in_backward=True)
    train(model, optimizer, range(2))
    other_model, other = duplicate((model, optimizer))
    assert number_of_hooks(model) == number_of_hooks(other_model) == [1] * 5
    before = snapshot(model, optimizer)
    train(other_model, other, range(2, 4))
    assert_same(snapshot(model, optimizer), before)
    train(model, optimizer, range(2, 4))
    assert_same(snapshot(model, optimizer), snapshot(other_model, other))
    del other
    assert number_of_hooks(model) == [1] * 5 and number_of_hooks(other_model) == [0] * 5


def test_loading_state_places_no_second_hook():
    (dense_model, dense), (model, optimizer) = pairs = pair()
    for _ in range(2):
        optimizer.load_state_dict(optimizer.state_dict())
    assert number_of_hooks(model) == [1] * 5
    train(model, optimizer, range(2))
    dense.load_state_dict(optimizer.state_dict())
    dense_model.load_state_dict(model.state_dict())
    for net, mine in pairs:
        train(net, mine, range(2, 4))
    assert_same_training(pairs)


def test_hooks_follow_swapped_parameters():
    pairs = pair()
    for model, optimizer in pairs:
        train(model, optimizer, [0])
        before = dict(model.named_parameters())
        others = dict(copy.deepcopy(model).named_parameters())
        for group in optimizer.param_groups:
            group["params"] = [others[name] for name in group["param_names"]]
        for name, param in others.items():
            module, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(module), attribute, param)
        optimizer.state_dict()
        train(model, optimizer, [1, 2])
        assert not any(param._post_accumulate_grad_hooks for param in before.values())
    assert number_of_hooks(pairs[1][0]) == [1] * 5
    assert_same_training(pairs)


def test_added_groups_are_freed_too():
    model, extra = Net(), nn.Linear(5, 1)
    optimizer = SETAdamW(model.named_parameters(), random_mask(model), in_backward=True)
    optimizer.add_param_group({"params": [(f"extra.{name}", param) for name, param in extra.named_parameters()]})
    before = bits(extra.weight).clone()
    extra(model(torch.randn(3, 13))).sum().backward()
    assert not extra.weight.grad.selected.numel() and not extra.bias.grad.selected.numel()
    optimizer.step()
    assert torch.equal(bits(extra.weight), before)


def test_integer_parameters_do_not_get_in_the_way():
    model = Net()
    model.codes = nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
    optimizer = SETAdamW(model.named_parameters(), random_mask(model), in_backward=True)
    train(model, optimizer, range(2))


def test_scoring_beside_a_collecting_optimizer():
    import safekern

    model, optimizer = collecting()
    accumulate(model, 0)
    before = {name: param.grad.selected.clone() for name, param in model.named_parameters() if name in MASKED}
    scores = safekern.score(model, [0, 1], loss_of)
    assert set(scores) == {"first.weight", "second.weight"}
    for name, selected in before.items():
        assert torch.equal(model.get_parameter(name).grad.selected, selected)
    optimizer.step()
