"""protect: no masked bit moves, whatever the optimizer, and nothing that happens meanwhile goes unnoticed."""

import copy
import gc
import io
import pickle
import warnings

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
from torch.multiprocessing.reductions import StorageWeakRef

from safekern import InvalidArgumentError, Mask, MaskMismatchError, ProtectionError, protect

pytestmark = pytest.mark.usefixtures("poisoned_memory")

OPTIMIZERS = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1),
    "adamw_foreach": lambda params: torch.optim.AdamW(params, lr=1e-2, foreach=True),
    "adamw_fused": lambda params: torch.optim.AdamW(params, lr=1e-2, fused=True),
    "adamw_named": lambda params: torch.optim.AdamW([(str(i), param) for i, param in enumerate(params)], lr=1e-2),
    "sgd": lambda params: torch.optim.SGD(params, lr=1e-1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adafactor": lambda params: torch.optim.Adafactor(params, lr=1e-2),
    "muon": lambda params: torch.optim.Muon([param for param in params if param.ndim == 2], lr=1e-2),
    "lbfgs": lambda params: torch.optim.LBFGS(params, lr=1e-2, max_iter=3),
}


def protected(make=OPTIMIZERS["adamw"], dtype=torch.float32, **options):
    model = make_model(dtype)
    mask = make_mask(model)
    optimizer = make(list(model.parameters()))
    return model, mask, optimizer, protect(optimizer, mask, model.named_parameters(), **options)


def free_weights(model, mask):
    return {
        name: param.detach()[~mask.bool(name)] if name in mask else param.detach().clone()
        for name, param in model.named_parameters()
    }


# Around any optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_masked_bit_moves_and_the_others_train(name, dtype):
    if name == "lbfgs" and dtype != torch.float32:
        pytest.skip("LBFGS needs fp32")
    model, mask, optimizer, handle = protected(OPTIMIZERS[name], dtype)
    twin = make_model(dtype)
    unprotected = OPTIMIZERS[name](list(twin.parameters()))
    before, first = snapshot(model), free_weights(model, mask)
    held = {id(param) for group in optimizer.param_groups for param in group["params"]}
    for step in range(8):
        optimizer.step(lambda step=step: backward(model, step))
        if step == 0:
            # Where the mask does not reach, the first step is the unprotected one.
            unprotected.step(lambda: backward(twin, 0))
            free, theirs = free_weights(model, mask), free_weights(twin, mask)
            assert all(same_bits(free[each], theirs[each]) for each in free)
    assert_protected(model, before, mask)
    handle.verify()
    for each, values in free_weights(model, mask).items():
        if id(model.get_parameter(each)) in held:
            assert (values != first[each]).double().mean() > (0.9 if dtype == torch.float32 else 0.3)


def test_every_bit_pattern_is_kept():
    torch.manual_seed(0)
    extremes = torch.tensor([float("nan"), float("inf"), float("-inf"), -0.0, 0.0, 1e-41, -1e-41])
    param = nn.Parameter(torch.cat([extremes, torch.randn(5)]))
    before = param.detach().clone()
    optimizer = torch.optim.AdamW([param], lr=0.1)
    handle = protect(optimizer, Mask.from_indices({"w": range(7)}, {"w": (12,)}), [("w", param)])
    for _ in range(3):
        param.grad = torch.randn(12)
        optimizer.step()
        handle.verify()
    assert same_bits(param[:7], before[:7])
    assert (param[7:] != before[7:]).all()


def test_a_thousand_steps_on_a_language_model():
    model = small_llama()
    mask = make_mask(model, 0.05)
    before = snapshot(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    handle = protect(optimizer, mask, model.named_parameters())
    # The same done by hand: the same gradients, and the values written back.
    twins = {name: param.clone().requires_grad_() for name, param in before.items()}
    by_hand = torch.optim.AdamW(twins.values(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(61, (4, 2, 8), generator=generator)
    for step in range(1, 1001):
        model(input_ids=tokens[step % 4], labels=tokens[step % 4]).loss.backward()
        for name, param in model.named_parameters():
            twins[name].grad = param.grad.clone()
        optimizer.step()
        by_hand.step()
        with torch.no_grad():
            for name in mask:
                twins[name].view(-1)[mask[name]] = before[name].view(-1)[mask[name]]
        optimizer.zero_grad()
        if step % 100 == 0:
            for name, param in model.named_parameters():
                assert same_bits(param, twins[name]), (name, step)
    handle.verify()
    assert_protected(model, before, mask)
    assert (model.model.embed_tokens.weight != before["model.embed_tokens.weight"]).double().mean() > 0.9


def test_8_bit_adamw_of_bitsandbytes():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bitsandbytes = pytest.importorskip("bitsandbytes")
    model, mask, optimizer, handle = protected(
        lambda params: bitsandbytes.optim.AdamW8bit(params, lr=1e-2, min_8bit_size=1)
    )
    before = snapshot(model)
    train(model, optimizer, 3)
    state = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, 3)
    optimizer.load_state_dict(state)
    train(model, optimizer, 3)
    handle.verify()
    assert_protected(model, before, mask)
    assert optimizer.state[model[0].weight]["state1"].dtype == torch.uint8
    assert (model[2].bias != before["2.bias"]).all()


@pytest.mark.parametrize("name", ["_AdamW", "AdamW8bit"])
def test_torchao(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torchao = pytest.importorskip("torchao.optim")
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64)).bfloat16()
        mask = make_mask(model)
        optimizer = getattr(torchao, name)(model.parameters(), lr=1e-2, bf16_stochastic_round=True)
        handle = protect(optimizer, mask, model.named_parameters())
        before = snapshot(model)
        with torch.compiler.set_stance("force_eager"):
            for _ in range(3):
                for param in model.parameters():
                    param.grad = torch.randn_like(param)
                optimizer.step()
    handle.verify()
    assert_protected(model, before, mask)
    assert (model[0].weight != before["0.weight"]).double().mean() > 0.5


# Schedule-free optimizers swap weights


@pytest.mark.parametrize(
    "name", ["AdamWScheduleFree", "SGDScheduleFree", "RAdamScheduleFree", "AdamWScheduleFreeReference"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_schedule_free_shows_the_protected_weights_in_both_modes(name, dtype):
    schedulefree = pytest.importorskip("schedulefree")
    model, mask, optimizer, handle = protected(lambda params: getattr(schedulefree, name)(params, lr=1e-2), dtype)
    before = snapshot(model)
    for start in (0, 3, 6):
        optimizer.train()
        train(model, optimizer, 3, start=start)
        handle.verify()
        optimizer.eval()
        handle.verify()
        assert_protected(model, before, mask)
    assert (model[2].bias != before["2.bias"]).any()
    # The swap is exact also when nobody watches any more.
    optimizer.train()
    handle.remove()
    optimizer.eval()
    assert_protected(model, before, mask)


def test_schedule_free_protected_in_the_middle_of_training():
    schedulefree = pytest.importorskip("schedulefree")
    model = make_model()
    mask = make_mask(model)
    optimizer = schedulefree.AdamWScheduleFree(model.parameters(), lr=1e-2)
    optimizer.train()
    train(model, optimizer, 3)
    before = snapshot(model)
    handle = protect(optimizer, mask, model.named_parameters())
    optimizer.eval()
    handle.verify()
    assert_protected(model, before, mask)
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.train()
    train(model, optimizer, 2)
    optimizer.load_state_dict(state)
    optimizer.train()
    train(model, optimizer, 2)
    optimizer.eval()
    handle.verify()


def test_schedule_free_with_weights_that_its_swap_would_change():
    schedulefree = pytest.importorskip("schedulefree")
    model = make_model()
    with torch.no_grad():
        model[0].weight[3, 2] = -0.0
    optimizer = schedulefree.AdamWScheduleFree(model.parameters())
    mask = Mask.from_indices({"0.weight": [3 * 7 + 2]}, {"0.weight": (33, 7)})
    with pytest.raises(InvalidArgumentError, match=r"0.weight is -0.0, NaN or infinite"):
        protect(optimizer, mask, model.named_parameters())
    assert not optimizer._optimizer_step_pre_hooks


# Weights that change outside a step


def load_other_weights(model):
    model.load_state_dict(make_model(model[0].weight.dtype, seed=1).state_dict())


def through_data(model):
    for param in model.parameters():
        param.data.add_(0.25)


def one_weight_through_numpy(model):
    model[2].weight.detach().numpy()[make_mask(model).bool("2.weight").numpy()] += 0.25


def replace_data(model):
    model[0].weight.data = model[0].weight.data + 0.25


def another_dtype(model):
    model.double()


@pytest.mark.parametrize(
    "edit",
    [load_other_weights, through_data, one_weight_through_numpy, replace_data, another_dtype],
    ids=lambda f: f.__name__,
)
def test_weights_changed_on_purpose_are_never_overwritten(edit):
    model, mask, optimizer, handle = protected()
    train(model, optimizer, 2)
    edit(model)
    loaded = snapshot(model)
    backward(model)
    for raising in (optimizer.step, handle.verify):
        with pytest.raises(ProtectionError, match=r"protected weights are not what they were.*handle.refresh\(\)"):
            raising()
        assert all(same_bits(param, loaded[name]) for name, param in model.named_parameters())
    if edit is another_dtype:
        with pytest.raises(ProtectionError, match=r"in torch.float32 and cannot be written back in torch.float64"):
            handle.restore()
    handle.refresh()
    if edit is not another_dtype:
        train(model, optimizer, 3)
        assert (model[0].bias != loaded["0.bias"]).all()
    handle.verify()
    assert_protected(model, loaded, mask)


def test_edits_of_large_parameters_are_noticed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 200))
    mask = make_mask(model)
    assert mask.numel > 4_000
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    handle = protect(optimizer, mask, model.named_parameters())
    before = snapshot(model)

    def step():
        for param in model.parameters():
            param.grad = torch.randn(param.shape)
        optimizer.step()

    for _ in range(30):
        step()
    handle.verify()
    assert_protected(model, before, mask)
    protected_ones = mask["0.weight"]
    # Torch sees an edit to a single weight; it does not see one through .data, but there is no loading a few weights.
    with torch.no_grad():
        model[0].weight.view(-1)[protected_ones[1_234]] += 1
    with pytest.raises(ProtectionError, match=r"^1 protected weights are not what they were, in 0.weight \(1\)"):
        step()
    handle.restore()
    handle.verify()
    model[0].weight.data.mul_(2)
    with pytest.raises(ProtectionError):
        step()
    handle.restore()
    assert_protected(model, before, mask)
    # The version of the parameter is known again, and an edit behind its back still shows in verify().
    step()
    model[0].weight.data.view(-1)[protected_ones[77]] += 1
    with pytest.raises(ProtectionError, match=r"^1 protected"):
        handle.verify()


def test_verify_names_parameters_and_counts_weights():
    model, mask, _, handle = protected()
    handle.verify()
    with torch.no_grad():
        model[0].weight.view(-1)[mask["0.weight"][:3]] += 1
        model[2].weight.view(-1)[mask["2.weight"][0]] *= -1
        model[0].weight.view(-1)[~mask.bool("0.weight").view(-1)] += 1
    with pytest.raises(ProtectionError, match=r"^4 protected weights .* in 0.weight \(3\), 2.weight \(1\)\. If"):
        handle.verify()


# Exceptions, nesting, several handles


class Interrupted(torch.optim.SGD):
    fail = False

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                param.add_(1)
                if self.fail:
                    raise KeyboardInterrupt


def test_an_exception_inside_a_step():
    model, mask, optimizer, handle = protected(lambda params: Interrupted(params, lr=0.1))
    before = snapshot(model)
    optimizer.step()
    assert_protected(model, before, mask)
    optimizer.fail = True
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    optimizer.fail = False
    for raising in (optimizer.step, handle.verify, optimizer.step):
        with pytest.raises(ProtectionError, match=r"ended in an exception: handle.restore\(\)"):
            raising()
    handle.restore()
    optimizer.step()
    handle.verify()
    assert_protected(model, before, mask)
    # Loading the last checkpoint after a failure brings the protected weights back too, and training goes on.
    checkpoint = copy.deepcopy(model.state_dict())
    optimizer.fail = True
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    optimizer.fail = False
    model.load_state_dict(checkpoint)
    optimizer.step()
    assert_protected(model, before, mask)


def test_an_exception_inside_a_closure():
    model, mask, optimizer, handle = protected(OPTIMIZERS["lbfgs"])
    before = snapshot(model)
    calls = []

    def closure():
        calls.append(1)
        if len(calls) == 3:
            raise ZeroDivisionError
        return backward(model)

    with pytest.raises(ZeroDivisionError):
        optimizer.step(closure)
    with pytest.raises(ProtectionError, match="ended in an exception"):
        handle.verify()
    handle.restore()
    handle.verify()
    assert_protected(model, before, mask)


def test_as_a_context_manager():
    model = make_model()
    mask = make_mask(model)
    before = snapshot(model)
    optimizer = Interrupted(model.parameters(), lr=0.1)
    with protect(optimizer, mask, model.named_parameters()) as handle:
        optimizer.step()
        handle.verify()
    assert_protected(model, before, mask)
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks

    optimizer.fail = True
    with pytest.raises(KeyboardInterrupt), protect(optimizer, mask, model.named_parameters()):
        optimizer.step()
    assert_protected(model, before, mask)
    optimizer.fail = False

    with pytest.raises(ProtectionError), protect(optimizer, mask, model.named_parameters()):
        load_other_weights(model)
    with pytest.raises(ZeroDivisionError), protect(optimizer, mask, model.named_parameters()):
        load_other_weights(model)
        raise ZeroDivisionError
    optimizer.step()
    with pytest.raises(AssertionError):
        assert_protected(model, before, mask)


@pytest.mark.parametrize("fails", [False, True])
def test_a_step_that_calls_the_step_of_its_parent(fails):
    class Decaying(torch.optim.SGD):
        fail = False

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for param in group["params"]:
                    param.mul_(0.5)
            super().step()
            if self.fail:
                raise ZeroDivisionError
            for group in self.param_groups:
                for param in group["params"]:
                    param.mul_(0.5)

    # torch gives the hooks to the `step` of a class when its first instance is made: here, to both.
    torch.optim.SGD([nn.Parameter(torch.ones(1))])
    model, mask, optimizer, handle = protected(lambda params: Decaying(params, lr=0.1))
    # Without hooks of the inner step, this would prove nothing.
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append(1))
    before = snapshot(model)
    train(model, optimizer, 2)
    assert len(calls) == 4
    handle.verify()
    assert_protected(model, before, mask)
    if fails:
        optimizer.fail = True
        with pytest.raises(ZeroDivisionError):
            optimizer.step()
        optimizer.fail = False
        with pytest.raises(ProtectionError, match="ended in an exception"):
            optimizer.step()
        load_other_weights(model)
        loaded = snapshot(model)
        with pytest.raises(ProtectionError):
            optimizer.step()
        assert_protected(model, loaded, mask)


def test_several_handles_on_one_optimizer():
    model = make_model()
    masks = [make_mask(model, 0.2, seed) for seed in range(2)]
    assert (masks[0] & masks[1]).numel
    before = snapshot(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    handles = [protect(optimizer, mask, model.named_parameters()) for mask in (*masks, masks[0])]
    train(model, optimizer, 4)
    for handle in handles:
        handle.verify()
    assert_protected(model, before, masks[0] | masks[1])
    handles[0].remove()
    handles[0].remove()
    train(model, optimizer, 2)
    assert_protected(model, before, masks[0] | masks[1])
    handles[2].remove()
    train(model, optimizer, 2)
    assert_protected(model, before, masks[1])
    with pytest.raises(ProtectionError):
        handles[0].verify()


def test_several_optimizers_with_one_mask():
    model = make_model()
    mask = Mask.from_bool({name: torch.rand(param.shape) < 0.3 for name, param in model.named_parameters()})
    before = snapshot(model)
    optimizers = [
        torch.optim.Muon([param for param in model.parameters() if param.ndim == 2], lr=1e-2),
        torch.optim.AdamW([param for param in model.parameters() if param.ndim == 1], lr=1e-2),
    ]
    handles = [protect(optimizer, mask, model.named_parameters()) for optimizer in optimizers]
    for step in range(4):
        backward(model, step)
        for optimizer in optimizers:
            optimizer.step()
    for handle in handles:
        handle.verify()
    assert_protected(model, before, mask)
    # One that is left unprotected is found out by the other.
    handles[1].remove()
    backward(model)
    optimizers[1].step()
    with pytest.raises(ProtectionError, match=r"0.bias \(\d+\)"):
        optimizers[0].step()


# Hooks, copies, state


def test_protection_outlives_its_handle():
    model, mask, optimizer, handle = protected()
    before = snapshot(model)
    del handle
    gc.collect()
    train(model, optimizer, 3)
    assert_protected(model, before, mask)


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))], ids=["deepcopy", "pickle"]
)
def test_copies_of_the_optimizer_are_without_it(how):
    model, mask, optimizer, handle = protected()
    before = snapshot(model)
    other, theirs = how((model, optimizer))
    train(other, theirs, 2)
    with pytest.raises(AssertionError):
        assert_protected(other, before, mask)
    train(model, optimizer, 2)
    handle.verify()
    assert_protected(model, before, mask)


def test_state_dicts_are_as_without_it():
    model, mask, optimizer, handle = protected()
    before = snapshot(model)
    train(model, optimizer, 3)
    plain = torch.optim.AdamW(model.parameters(), lr=1e-2)
    assert optimizer.state_dict().keys() == plain.state_dict().keys()
    assert optimizer.state_dict()["param_groups"][0].keys() == plain.state_dict()["param_groups"][0].keys()
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    train(model, optimizer, 3, start=3)

    other, _, theirs, other_handle = protected()
    other.load_state_dict(saved["model"])
    theirs.load_state_dict(saved["optimizer"])
    train(other, theirs, 3, start=3)
    assert_same_weights(model, other)
    for each in (handle, other_handle):
        each.verify()
    assert_protected(other, before, mask)


def test_a_state_that_replaces_the_hooks():
    class Replacing(torch.optim.AdamW):
        def load_state_dict(self, state_dict):
            self._optimizer_step_pre_hooks = type(self._optimizer_step_pre_hooks)()
            self._optimizer_step_post_hooks = type(self._optimizer_step_post_hooks)()
            super().load_state_dict(state_dict)

    model, mask, optimizer, handle = protected(Replacing)
    before = snapshot(model)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.load_state_dict(optimizer.state_dict())
    train(model, optimizer, 2)
    assert_protected(model, before, mask)
    handle.verify()
    handle.remove()
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_load_state_dict_post_hooks


@pytest.mark.parametrize("named", [False, True])
def test_parameters_swapped_by_position(named):
    model = make_model()
    mask = make_mask(model)
    before = snapshot(model)
    optimizer = torch.optim.AdamW(model.named_parameters() if named else model.parameters(), lr=1e-2)
    handle = protect(optimizer, mask, model.named_parameters())
    train(model, optimizer, 2)
    other = copy.deepcopy(model)
    optimizer.param_groups[0]["params"] = list(other.parameters())
    train(other, optimizer, 2)
    handle.verify()
    assert_protected(other, before, mask)
    assert (other[0].bias != model[0].bias).all()
    with torch.no_grad():
        other[0].weight.view(-1)[mask["0.weight"][0]] += 1
    with pytest.raises(ProtectionError):
        handle.verify()
    handle.restore()

    third = make_model(seed=3)
    optimizer.param_groups[0]["params"] = list(third.parameters())
    with pytest.raises(ProtectionError, match=r"0.weight .* 2.weight"):
        optimizer.step()
    optimizer.param_groups[0]["params"] = list(third.parameters())[::-1]
    with pytest.raises((ProtectionError, MaskMismatchError)):
        optimizer.step()
    optimizer.param_groups.clear()
    with pytest.raises(ProtectionError, match=r"no longer holds parameter 0.weight"):
        handle.verify()


def test_a_neighbour_is_not_taken_for_a_parameter_that_was_taken_out():
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(7, 7) for _ in range(3)])
    mask = make_mask(model[:1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = protect(optimizer, mask, model.named_parameters())
    before = snapshot(model)
    group = optimizer.param_groups[0]
    group["params"] = [param for param in group["params"] if param is not model[0].weight]
    for attempt in (optimizer.step, handle.verify, handle.restore, handle.refresh):
        with pytest.raises(ProtectionError, match=r"no longer holds parameter 0\.weight"):
            attempt()
    assert all(same_bits(param, before[name]) for name, param in model.named_parameters())
    named = torch.optim.SGD(model.named_parameters(), lr=0.1)
    handle = protect(named, mask, model.named_parameters())
    named.param_groups[0]["params"] = named.param_groups[0]["params"][1:]
    with pytest.raises(InvalidArgumentError, match="5 parameters and 6 names"):
        named.step()


class Wrapper(torch.optim.Optimizer):
    """As those of several libraries, which do not call Optimizer.__init__."""

    def __init__(self, inside):
        self.inside, self.param_groups, self.defaults = inside, inside.param_groups, inside.defaults
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = {}, {}

    def step(self):
        self.inside.step()


def test_a_wrapper_that_runs_no_hooks_is_refused():
    model = make_model()
    inside = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(InvalidArgumentError, match="got Wrapper, which it does not run: pass the optimizer inside"):
        protect(Wrapper(inside), make_mask(model), model.named_parameters())
    wrapped = Wrapper(inside)
    wrapped.optimizer = inside
    with protect(wrapped, make_mask(model), model.named_parameters()):
        train(model, inside, 2)


def test_accelerate_wraps_the_optimizer():
    accelerate = pytest.importorskip("accelerate")
    model = make_model()
    mask = make_mask(model)
    before = snapshot(model)
    wrapped_model, wrapped = accelerate.Accelerator(cpu=True).prepare(
        model, torch.optim.AdamW(model.parameters(), lr=1e-2)
    )
    handle = protect(wrapped, mask, wrapped_model.named_parameters())
    train(wrapped_model, wrapped, 3)
    handle.verify()
    assert_protected(model, before, mask)
    assert (model[0].bias != before["0.bias"]).all()


@pytest.mark.parametrize("held", [["a", "b"], ["a", "b", "c"]])
def test_graphs_stay_valid_over_a_step_that_left_their_weights_alone(held):
    nets = nn.ModuleDict({name: nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)) for name in "abc"})
    mask = Mask.from_indices({f"{name}.2.weight": [1] for name in nets}, {f"{name}.2.weight": (1, 8) for name in nets})
    optimizer = torch.optim.AdamW([param for name in held for param in nets[name].parameters()])
    handle = protect(optimizer, mask, nets.named_parameters())
    losses = {name: net(torch.ones(4, 8)).mean() for name, net in nets.items()}
    losses["a"].backward(retain_graph=True)
    optimizer.step()
    losses["b"].backward()
    losses["c"].backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses["a"].backward()
    handle.verify()


def test_schedulers_and_scalers_go_through_the_hooks():
    model, mask, optimizer, handle = protected()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = snapshot(model)
    for _ in range(3):
        model.zero_grad()
        scaler.scale((model(torch.ones(2, 7)) - 1).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
    handle.verify()
    assert_protected(model, before, mask)
    assert (model[0].bias != before["0.bias"]).all()


# Memory layouts


def test_parameters_that_are_not_contiguous():
    torch.manual_seed(0)
    params = {
        "transposed": nn.Parameter(torch.randn(9, 6).t()),
        "sliced": nn.Parameter(torch.randn(4, 6)[:, :3]),
    }
    mask = Mask.from_bool({name: torch.rand(param.shape) < 0.4 for name, param in params.items()})
    before = {name: param.detach().clone() for name, param in params.items()}
    optimizer = torch.optim.SGD(params.values(), lr=0.1)
    handle = protect(optimizer, mask, params.items())
    for _ in range(2):
        for param in params.values():
            param.grad = torch.randn(param.shape)
        optimizer.step()
        handle.verify()
    for name, param in params.items():
        moved = param.detach() != before[name]
        assert torch.equal(moved, ~mask.bool(name))


def test_a_parameter_laid_out_anew():
    torch.manual_seed(0)
    model = nn.Conv2d(3, 4, 2)
    mask = Mask.from_bool({"weight": torch.rand(4, 3, 2, 2) < 0.5})
    before = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = protect(optimizer, mask, model.named_parameters())
    for step in range(4):
        if step == 2:
            model.to(memory_format=torch.channels_last)
            assert not model.weight.is_contiguous()
        model.weight.grad = torch.randn(4, 3, 2, 2)
        optimizer.step()
    handle.verify()
    assert torch.equal(model.weight.detach() != before, ~mask.bool("weight"))


# What it refuses


def test_masks_and_optimizers_that_do_not_fit_are_refused():
    model, other = make_model(), make_model()
    mask = make_mask(model)
    named = list(model.named_parameters())
    optimizer = torch.optim.AdamW(model.parameters())
    wrapped = [(f"module.{name}", param) for name, param in named]
    protect(optimizer, mask, wrapped).remove()
    meta = nn.Sequential(nn.Linear(7, 33, device="meta"), nn.Tanh(), nn.Linear(33, 5, device="meta"))
    wide = nn.Parameter(torch.zeros(1, 3).expand(4, 3))
    for make, error, message in (
        (lambda: protect(optimizer, mask, named[:2]), MaskMismatchError, "2.weight: missing"),
        (
            lambda: protect(optimizer, Mask.from_indices({"0.weight": [0]}, {"0.weight": (7, 33)}), named),
            MaskMismatchError,
            "shape",
        ),
        (lambda: protect(optimizer, Mask.from_indices({}, {}), named), MaskMismatchError, "selects nothing"),
        (
            lambda: protect(torch.optim.AdamW(other.parameters()), mask, named),
            MaskMismatchError,
            r"holds none of the parameters that the mask names \(0.weight, 2.weight\)",
        ),
        (
            lambda: protect(torch.optim.AdamW(meta.parameters()), mask, meta.named_parameters()),
            InvalidArgumentError,
            "0.weight is on the meta device",
        ),
        (
            lambda: protect(
                torch.optim.SGD([wide]), Mask.from_indices({"wide": [0]}, {"wide": (4, 3)}), [("wide", wide)]
            ),
            InvalidArgumentError,
            "wide has overlapping memory",
        ),
        (lambda: protect(optimizer, mask, model.parameters()), InvalidArgumentError, "named_parameters"),
        (
            lambda: protect(model, mask, named),
            InvalidArgumentError,
            "step hooks of a torch.optim.Optimizer, got Sequential",
        ),
        (
            lambda: protect(optimizer, mask, [*named, ("2.weight", other[2].weight)]),
            InvalidArgumentError,
            "2.weight was given twice",
        ),
    ):
        with pytest.raises(error, match=message):
            make()
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks


def test_memory_that_the_model_left_is_freed():
    param = torch.nn.Parameter(torch.randn(8, 4))
    mask = Mask.from_indices({"w": [1, 5]}, {"w": (8, 4)})
    optimizer = torch.optim.SGD([param], lr=0.1)
    handle = protect(optimizer, mask, [("w", param)])
    param.grad = torch.ones_like(param)
    optimizer.step()
    left = StorageWeakRef(param.untyped_storage())
    param.data = param.data.clone()
    assert left.expired()
    handle.verify()
