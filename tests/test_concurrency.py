"""Threads and forked processes: what runs at once gives the bits that it gives alone, or is refused."""

import os
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from small_net import Net, assert_same, loss_of, random_mask, train, weights
from stops import at_backward
from torch import nn
from torch.utils.data import DataLoader, Dataset

from safekern import ModelInUseError, ScoringError, SETAdamW, SPAAdamW, StepError, ops, perturb, protect, score

BATCHES = list(range(4))
LARGE = 1 << 18  # several chunks of every kernel


def together(*calls):
    """Runs the calls in threads that start at the same moment; returns their results."""
    barrier = threading.Barrier(len(calls))

    def run(call):
        barrier.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


def in_another_thread(call):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


def gradients(scores):
    return {name: scores.gradient(name) for name in scores}


# Kernels


def every_kernel(seed):
    """What each op makes of the same inputs."""
    generator = torch.Generator().manual_seed(seed)
    params = [torch.randn(LARGE + 3, generator=generator) for _ in range(2)]
    grads = [torch.randn(LARGE + 3, generator=generator) for _ in range(2)]
    accs = [torch.zeros(LARGE + 3) for _ in range(2)]
    ops.accumulate_(accs, grads, torch.zeros(2, dtype=torch.bool), False)
    sigma = ops.sigma(params)
    indices = ops.select(accs, sigma, LARGE // 10, True)
    values = [torch.empty(len(index)) for index in indices]
    ops.gather_(values, params, indices, torch.zeros(2, dtype=torch.bool))
    ops.perturb_(params, indices, [0.1, 0.1], [1, 2], seed)
    ops.restore_(params, indices, values)
    assert ops.count_changed(params, indices, values).tolist() == [0, 0]
    compact = [[torch.zeros(len(index)) for index in indices] for _ in range(2)]
    none = [torch.empty(0)] * 2
    ops.set_adamw_(params, values, indices, *compact, none, [1e-3] * 2, [1.0] * 2, 0.9, 0.999, 1e-8, 1.0)
    dense = [[torch.zeros(LARGE + 3) for _ in range(2)] for _ in range(2)]
    ops.spa_adamw_(params, grads, indices, *dense, [1e-3] * 2, [1.0] * 2, 0.9, 0.999, 1e-8, 1.0)
    return torch.cat([sigma, *params, *indices, *accs, *(m for moments in (*compact, *dense) for m in moments)])


def test_kernels_in_threads():
    want = [every_kernel(seed) for seed in range(3)]
    got = together(*(lambda seed=seed: every_kernel(seed) for seed in range(3)))
    assert all(map(torch.equal, got, want))


class Results(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, seed):
        return every_kernel(seed)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork is of POSIX")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_kernels_in_forked_workers(threads):
    torch.set_num_threads(2)
    # After this, the threads of this process exist, and those of its children do not.
    want = [Results()[seed] for seed in range(4)]
    loader = DataLoader(Results(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60)
    assert all(map(torch.equal, loader, want))


# Scoring


def test_two_models_are_scored_at_once():
    filters = warnings.filters[:]
    nets = [Net(seed=seed) for seed in range(2)]
    want = [gradients(score(net, BATCHES, loss_of)) for net in nets]
    for _ in range(5):
        got = together(*(lambda net=net: gradients(score(net, BATCHES, loss_of)) for net in nets))
        assert_same(dict(enumerate(got)), dict(enumerate(want)))
        assert warnings.filters == filters


def scored_while(inside, at=1):
    """Scores a model whose objective calls ``inside(net)`` at that batch; the model, and what came of it."""
    net = Net()

    def objective(model, batch):
        if batch == at:
            inside(model)
        return loss_of(model, batch)

    want, before = gradients(score(net, BATCHES, loss_of)), weights(net)
    got = gradients(score(net, BATCHES, objective))
    assert_same(got, want)
    assert_same(weights(net), before)
    assert all(param.grad is None and not param._post_accumulate_grad_hooks for param in net.parameters())


def test_one_model_is_scored_by_one_thread_at_a_time():
    def elsewhere(net):
        with pytest.raises(ModelInUseError, match=r"first\.weight is being scored in another thread"):
            in_another_thread(lambda: score(net, BATCHES, loss_of))
        # Another model with a layer of this one.
        with pytest.raises(ModelInUseError, match=r"0\.weight is being scored in another thread"):
            in_another_thread(lambda: score(nn.Sequential(net.first), [torch.ones(13)], lambda m, x: m(x).sum()))
        with pytest.raises(ModelInUseError, match=r"and cannot be perturbed meanwhile"):
            in_another_thread(lambda: perturb(net, random_mask(net)).__enter__())

    scored_while(elsewhere)


def test_an_objective_may_score_its_own_model():
    scored_while(lambda net: score(net, BATCHES, loss_of))


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("start", [lambda call: call(), in_another_thread])
def test_an_objective_may_score_another_model(start, at):
    filters = warnings.filters[:]
    scored_while(lambda _: start(lambda: score(Net(seed=5), BATCHES, loss_of)), at)
    assert warnings.filters == filters


@pytest.mark.parametrize("start", [lambda call: call(), in_another_thread])
def test_another_backward_pass_does_not_count(start):
    def backward(net):
        with pytest.raises(ScoringError, match=r"a backward pass other than that of score reached"):
            start(lambda: loss_of(net, 0).backward())
        net.zero_grad()

    scored_while(backward)


def test_a_backward_pass_inside_backward_is_part_of_it():
    def objective(net, batch):
        def another():
            with torch.enable_grad():
                loss_of(net, 7).backward()

        # As reentrant checkpointing does.
        return at_backward(loss_of(net, batch), another)

    net = Net()
    got = score(net, [1, 1], objective)
    want = score(net, [1, 7], loss_of)
    for name in want:
        torch.testing.assert_close(got.gradient(name), 2 * want.gradient(name))


# Optimizers


@pytest.mark.parametrize("in_backward", [False, True])
def test_training_in_another_thread(in_backward):
    nets = [Net(torch.bfloat16) for _ in range(2)]
    optimizers = [SETAdamW(net.named_parameters(), random_mask(net), in_backward=in_backward) for net in nets]
    train(nets[0], optimizers[0], range(4))
    train(nets[1], optimizers[1], range(2))
    in_another_thread(lambda: train(nets[1], optimizers[1], range(2, 4)))
    assert_same(weights(nets[0]), weights(nets[1]))


@pytest.mark.parametrize(
    "make",
    [
        lambda net: SETAdamW(net.named_parameters(), random_mask(net), in_backward=True),
        lambda net: SPAAdamW(net.named_parameters(), random_mask(net)),
    ],
)
def test_two_models_are_trained_at_once(make):
    pairs = [(net, make(net)) for net in (Net(seed=0), Net(seed=1), Net(seed=0), Net(seed=1))]
    for pair in pairs[:2]:
        train(*pair, range(5))
    together(*(lambda pair=pair: train(*pair, range(5)) for pair in pairs[2:]))
    assert [weights(net)["first.weight"].tolist() for net, _ in pairs[:2]] == [
        weights(net)["first.weight"].tolist() for net, _ in pairs[2:]
    ]


def test_an_optimizer_steps_in_a_thread_and_protection_holds():
    nets = [Net(), Net()]
    for net, start in zip(nets, (lambda call: call(), in_another_thread), strict=True):
        optimizer = torch.optim.AdamW(net.parameters())
        handle = protect(optimizer, random_mask(net), net.named_parameters())
        start(lambda net=net, optimizer=optimizer: train(net, optimizer, range(4)))
        handle.verify()
    assert_same(weights(nets[0]), weights(nets[1]))


def while_in_backward(net, step, call):
    """A backward pass that calls a function between the gradients of the last layer and those of the first."""
    called = []

    def once(module, grads):
        if not called:
            called.append(True)
            call()

    handle = net.norm.register_full_backward_pre_hook(once)
    try:
        loss_of(net, step).backward()
    finally:
        handle.remove()
    assert called


def test_backward_passes_of_two_threads_are_not_mixed():
    net, reference = Net(), Net()
    optimizer = SETAdamW(net.named_parameters(), random_mask(net), in_backward=True)
    with pytest.raises(StepError, match=r"two threads ran backward at once"):
        while_in_backward(net, 0, lambda: in_another_thread(lambda: loss_of(net, 1).backward()))
    # Afterwards, and after backward in another thread, it goes on as if nothing had happened.
    optimizer.zero_grad()
    in_another_thread(lambda: train(net, optimizer, [0]))
    train(net, optimizer, [1])
    train(reference, SETAdamW(reference.named_parameters(), random_mask(reference)), [0, 1])
    assert_same(weights(net), weights(reference))


def test_backward_inside_backward_collects():
    nets = [Net(), Net()]
    for net, in_backward in zip(nets, (False, True), strict=True):
        optimizer = SETAdamW(net.named_parameters(), random_mask(net), in_backward=in_backward)
        while_in_backward(net, 0, loss_of(net, 1).backward)
        optimizer.step()
    assert_same(weights(nets[0]), weights(nets[1]))


def test_training_during_the_backward_pass_of_scoring_is_refused():
    net = Net()
    want = gradients(score(net, BATCHES, loss_of))

    def train_elsewhere(grad):
        with pytest.raises(ScoringError, match=r"a backward pass other than that of score reached"):
            in_another_thread(lambda: loss_of(net, 1).backward())
        for param in net.parameters():
            param.grad = None

    def objective(model, batch):
        loss = loss_of(model, batch)
        if batch == 1:
            loss.register_hook(train_elsewhere)
        return loss

    assert_same(gradients(score(net, BATCHES, objective)), want)


def test_two_protections_of_one_model():
    nets = [Net(), Net()]
    mask = random_mask(nets[0])
    for net, at_once in zip(nets, (False, True), strict=True):
        matrices = [net.first.weight, net.second.weight]
        optimizers = [
            torch.optim.SGD(matrices, lr=0.1),
            torch.optim.AdamW([p for p in net.parameters() if not any(p is m for m in matrices)], lr=0.1),
        ]
        handles = [protect(optimizer, mask, net.named_parameters()) for optimizer in optimizers]
        before = {name: param.detach().clone() for name, param in net.named_parameters()}
        for step in range(3):
            net.zero_grad()
            loss_of(net, step).backward()
            for optimizer in optimizers:
                (in_another_thread if at_once else lambda call: call())(optimizer.step)
        for handle in handles:
            handle.verify()
        moved = [name for name, param in net.named_parameters() if not torch.equal(param, before[name])]
        assert moved == list(before)
    assert_same(weights(nets[0]), weights(nets[1]))


def test_collecting_optimizers_do_not_free_each_others_gradients():
    net = Net()
    first, second = (random_mask(net, names=[name]) for name in ("first.weight", "second.weight"))
    optimizers = [SETAdamW(net.named_parameters(), mask, in_backward=True) for mask in (first, second)]
    with pytest.raises(StepError, match=r"second\.weight was given to two optimizers"):
        loss_of(net, 0).backward()
    # One that is gone does not count, and what neither selects is of no account.
    del optimizers[1]
    net.zero_grad()
    named = dict(net.named_parameters())
    optimizers.append(
        SETAdamW([(name, named[name]) for name in ("second.weight", "norm.weight")], second, in_backward=True)
    )
    named.pop("second.weight")
    optimizers[0] = SETAdamW(named.items(), first, in_backward=True)
    loss_of(net, 0).backward()
    for optimizer in optimizers:
        optimizer.step()


# Perturbing


def test_a_model_is_perturbed_in_one_thread_at_a_time():
    net = Net()
    mask, other = random_mask(net, names=["first.weight"]), random_mask(net, names=["second.weight"])
    before = weights(net)

    def noisy(mask):
        with perturb(net, mask, noise=1.0, seed=1):
            return weights(net)

    with perturb(net, mask, noise=1.0):
        found = weights(net)
        # The blocks of one thread end in turn; those of two threads need not.
        assert not noisy(mask)["first.weight"].equal(found["first.weight"])
        with pytest.raises(ModelInUseError, match=r"first\.weight is being perturbed in another thread"):
            in_another_thread(lambda: noisy(mask))
        with pytest.raises(ModelInUseError, match=r"first\.weight is being perturbed .* cannot be scored"):
            in_another_thread(lambda: score(net, BATCHES, loss_of))
        assert_same(weights(net), found)
        assert not in_another_thread(lambda: noisy(other))["second.weight"].equal(before["second.weight"])
    in_another_thread(lambda: noisy(mask))
    assert_same(weights(net), before)
