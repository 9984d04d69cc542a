"""Scoring and training on a device: as on the CPU, and without waiting for it more than once a step."""

import copy
import warnings

import pytest
import torch
from exact import bits
from gpu_device import DEVICE, on_cuda, require_device
from language_models import tiny_llama

import safekern
from safekern import Scores, diagnosis
from safekern.ops.cases import Case

require_device()

DTYPES = [torch.float32, torch.bfloat16]
STEPS = 4


def batches(count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(0, 250, (2, 24), generator=generator) for _ in range(count)]
    return [{"input_ids": each, "labels": each} for each in ids]


def models(dtype):
    on_cpu = tiny_llama().to(dtype)
    return on_cpu, copy.deepcopy(on_cpu).to(DEVICE)


def random_mask(model, share=0.05, seed=0):
    generator = torch.Generator().manual_seed(seed)
    named = [(name, param) for name, param in model.named_parameters() if param.dim() == 2]
    return safekern.Mask.from_bool({name: torch.rand(p.shape, generator=generator) < share for name, p in named})


def give_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        param.grad = (torch.randn(param.shape, generator=generator) * 0.1).to(param.dtype).to(param.device)


def assert_close(mine, other, ulps):
    for (name, got), want in zip(mine.named_parameters(), other.parameters(), strict=True):
        got, want = got.detach().cpu(), want.detach().cpu()
        assert not diagnosis._difference(got, want, want, Case(name, (), ulps=ulps)), name


def masked_bits(model, mask, inside):
    found = {}
    for name, param in model.named_parameters():
        chosen = mask.bool(name) if name in mask else torch.zeros(param.shape, dtype=torch.bool)
        value = param.detach().cpu()[chosen if inside else ~chosen]
        found[name] = bits(value).clone()
    return found


def assert_same_bits(before, after):
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_scores_are_those_of_the_cpu():
    on_cpu, on_device = models(torch.float32)
    theirs, mine = (safekern.score(model, batches()) for model in (on_cpu, on_device))
    for name in theirs:
        scale = theirs[name].abs().max()
        torch.testing.assert_close(mine[name].cpu(), theirs[name], rtol=1e-3, atol=float(scale) * 1e-4)
        torch.testing.assert_close(mine.sigma[name], theirs.sigma[name], rtol=1e-6, atol=0)
    assert mine.top(0.01).jaccard(theirs.top(0.01)) >= 0.95
    assert all(param.grad is None for param in on_device.parameters())


@pytest.mark.parametrize("per", ["model", "tensor"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_masks_of_equal_scores_are_the_same_bit_for_bit(dtype, per):
    _, model = models(dtype)
    scores = safekern.score(model, batches())
    moved = Scores(
        {name: scores.gradient(name).cpu() for name in scores},
        scores.sigma,
        num_batches=scores.num_batches,
        model_numel=scores.model_numel,
        meta=scores.meta,
    )
    for ratio in (0.001, 0.01, 0.3, 1.0):
        assert scores.top(ratio, per=per) == moved.top(ratio, per=per)
        assert scores.bottom(ratio, per=per) == moved.bottom(ratio, per=per)


def test_a_sigma_per_expert():
    torch.manual_seed(0)
    experts = torch.nn.ParameterDict({"w": torch.randn(5, 20, 33) * torch.arange(1, 6).view(-1, 1, 1)})
    model = torch.nn.ModuleDict({"experts": experts, "dense": torch.nn.Linear(30, 40)}).to(DEVICE)
    loader = [{name: torch.randn(param.shape) for name, param in model.named_parameters()} for _ in range(2)]

    def linear(model, batch):
        return sum((param * batch[name]).sum() for name, param in model.named_parameters())

    scores = safekern.score(model, loader, linear, sigma_per="expert")
    kept = {name: scores.gradient(name).cpu() for name in scores}
    moved = Scores(kept, scores.sigma, num_batches=2, model_numel=scores.model_numel, meta=scores.meta)
    swept = safekern.score(model, loader, linear, sigma_per="expert", memory=3300 * 4 + 4540 * 20 * 0.05, keep=0.05)
    for ratio in (0.001, 0.05):
        assert scores.top(ratio) == moved.top(ratio) == swept.top(ratio)
    assert scores.bottom(0.7) == moved.bottom(0.7) and scores.top(1.0, per="tensor") == moved.top(1.0, per="tensor")
    assert torch.equal(scores["experts.w"].cpu(), moved["experts.w"])
    assert scores.selected(scores.top(0.05)).total == moved.selected(scores.top(0.05)).total


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", [safekern.SETAdamW, safekern.SPAAdamW])
def test_masked_optimizers_step_as_on_the_cpu(make, dtype):
    pair = models(dtype)
    mask = random_mask(pair[0])
    outside = make is safekern.SETAdamW
    before = masked_bits(pair[1], mask, inside=not outside)
    optimizers = [make(model.named_parameters(), mask, lr=1e-2) for model in pair]
    for step in range(STEPS):
        for model, optimizer in zip(pair, optimizers, strict=True):
            give_gradients(model, step)
            optimizer.step()
    assert_close(pair[1], pair[0], ulps=STEPS)
    assert_same_bits(before, masked_bits(pair[1], mask, inside=not outside))
    state = optimizers[1].state_dict()
    fresh = make(pair[1].named_parameters(), mask, lr=1e-2)
    fresh.load_state_dict(state)
    clones = [copy.deepcopy(param.detach()) for param in pair[1].parameters()]
    give_gradients(pair[1], 99)
    optimizers[1].step()
    after = [param.detach().clone() for param in pair[1].parameters()]
    with torch.no_grad():
        for param, clone in zip(pair[1].parameters(), clones, strict=True):
            param.copy_(clone)
    fresh.step()
    assert all(torch.equal(param, want) for param, want in zip(pair[1].parameters(), after, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_set_in_backward_frees_dense_gradients(dtype):
    models_, lr, trained = [models(dtype)[1] for _ in range(2)], 1e-3, []
    mask = random_mask(models_[0])
    for model, in_backward in zip(models_, (True, False), strict=True):
        before = {name: model.get_parameter(name).detach().clone() for name in mask}
        optimizer = safekern.SETAdamW(model.named_parameters(), mask, lr=lr, in_backward=in_backward)
        for batch in batches():
            model(**{key: value.to(DEVICE) for key, value in batch.items()}).loss.backward()
            if in_backward:
                grads = [param.grad for param in model.parameters() if param.grad is not None]
                assert grads and all(type(grad).__name__ == "SelectedGrad" for grad in grads)
            optimizer.clip_grad_norm_(1.0)
            optimizer.step()
            optimizer.zero_grad()
        values = []
        for name, old in before.items():
            param, chosen = model.get_parameter(name), mask.bool(name).to(DEVICE)
            assert (param - old)[chosen].abs().max() > lr
            # A 16-bit weight would round a difference away, or make a unit in its last place of it.
            values.append(optimizer.state[param].get("master", param.detach()[chosen]))
        trained.append(torch.cat(values))
    # Device kernels of torch may add up in another order in each run, and AdamW divides by the size of a gradient.
    assert ((trained[0] - trained[1]).abs() <= 0.1 * lr).float().mean() > 0.99


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "make",
    [lambda params: torch.optim.AdamW(params, lr=1e-2, fused=True), lambda params: torch.optim.SGD(params, lr=0.1)],
    ids=["AdamW", "SGD"],
)
def test_protect(make, dtype):
    _, model = models(dtype)
    mask = random_mask(model)
    before, others = masked_bits(model, mask, inside=True), masked_bits(model, mask, inside=False)
    optimizer = make(model.parameters())
    with safekern.protect(optimizer, mask, model.named_parameters()) as handle:
        for step in range(STEPS):
            give_gradients(model, step)
            optimizer.step()
        handle.verify()
        assert_same_bits(before, masked_bits(model, mask, inside=True))
        assert any(not torch.equal(bits, others[name]) for name, bits in masked_bits(model, mask, False).items())
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.add_(1)
        with pytest.raises(safekern.ProtectionError, match="up_proj"):
            optimizer.step()
        handle.restore()


def test_a_gradient_that_is_not_finite_changes_nothing():
    _, model = models(torch.bfloat16)
    mask = random_mask(model)
    optimizer = safekern.SETAdamW(model.named_parameters(), mask, lr=1e-2)
    give_gradients(model, 0)
    name = next(iter(mask))
    model.get_parameter(name).grad.view(-1)[mask[name][3]] = float("nan")
    before = [param.detach().clone() for param in model.parameters()]
    with pytest.raises(safekern.NonFiniteError, match=name):
        optimizer.step()
    assert all(torch.equal(param, old) for param, old in zip(model.parameters(), before, strict=True))


def test_perturb_adds_the_noise_of_the_cpu_and_takes_it_away():
    pair = models(torch.bfloat16)
    mask = random_mask(pair[0])
    before = [param.detach().clone() for param in pair[1].parameters()]
    with safekern.perturb(pair[0], mask, seed=5), safekern.perturb(pair[1], mask, seed=5):
        # sigma may differ in its last bit, and the noise with it.
        for mine, other in zip(pair[1].parameters(), pair[0].parameters(), strict=True):
            torch.testing.assert_close(mine.cpu(), other, rtol=1e-2, atol=1e-4)
        assert any(not torch.equal(param, old) for param, old in zip(pair[1].parameters(), before, strict=True))
    assert all(torch.equal(param, old) for param, old in zip(pair[1].parameters(), before, strict=True))


def waits(action):
    """What made the host wait for the device in an action, but for events, which torch's mode does not look at."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # Of the mode itself, at its first use in a process: a prototype.
        warnings.filterwarnings("ignore", "Synchronization debug mode", UserWarning)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            action()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [str(warning.message) for warning in caught if "synchroniz" in str(warning.message)]


@on_cuda
def test_waits_are_noticed():
    number = torch.ones((), device=DEVICE)
    assert waits(number.item) and not waits(number.neg)


def adamw(model, mask):
    return torch.optim.AdamW(model.parameters(), fused=True)


def protected(model, mask):
    optimizer = adamw(model, mask)
    optimizer.handle = safekern.protect(optimizer, mask, model.named_parameters())
    return optimizer


def set_in_backward(model, mask):
    return safekern.SETAdamW(model.named_parameters(), mask, in_backward=True)


@on_cuda
@pytest.mark.parametrize(
    ("make", "most"),
    [
        (lambda model, mask: safekern.SPAAdamW(model.named_parameters(), mask), 0),
        # Whether it stepped at all they learn from an event, after they have launched everything.
        (lambda model, mask: safekern.SETAdamW(model.named_parameters(), mask), 0),
        (set_in_backward, 0),
        (protected, 1),
        (adamw, 0),
    ],
    ids=["SPAAdamW", "SETAdamW", "SETAdamW in_backward", "protect", "AdamW"],
)
def test_a_step_waits_for_the_device_at_most_once(make, most):
    _, model = models(torch.bfloat16)
    optimizer = make(model, random_mask(model))
    batch = {key: value.to(DEVICE) for key, value in batches(1)[0].items()}

    def step():
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(2):
        model(**batch).loss.backward()
        step()
    model(**batch).loss.backward()
    assert len(waits(step)) <= most


@on_cuda
def test_gradients_are_collected_in_backward_without_waiting():
    _, model = models(torch.bfloat16)
    optimizer = set_in_backward(model, random_mask(model))
    batch = {key: value.to(DEVICE) for key, value in batches(1)[0].items()}
    model(**batch).loss.backward()
    optimizer.zero_grad()
    loss = model(**batch).loss
    assert len(waits(loss.backward)) == 0


@on_cuda
def test_scoring_waits_once_a_batch():
    _, model = models(torch.bfloat16)
    given = [{key: value.to(DEVICE) for key, value in batch.items()} for batch in batches(8)]
    safekern.score(model, given[:1], progress=False)
    few, many = (
        len(waits(lambda count=count: safekern.score(model, given[:count], progress=False))) for count in (2, 8)
    )
    assert many - few <= 6


@on_cuda
def test_the_loss_of_a_batch_on_the_cpu_waits_for_nothing_that_the_model_does_not():
    on_cpu, model = models(torch.float32)
    batch = batches(1)[0]
    loss = safekern.objectives.refusal(model, batch)
    assert loss.device.type == "cuda"
    torch.testing.assert_close(loss.cpu(), safekern.objectives.refusal(on_cpu, batch), rtol=1e-4, atol=0)
    there = {key: value.to(DEVICE) for key, value in batch.items()}
    own = len(waits(lambda: model(**there).loss.backward()))
    assert len(waits(lambda: safekern.objectives.refusal(model, batch).backward())) <= own


@on_cuda
def test_a_token_beyond_the_vocabulary_is_refused_before_the_device_sees_it():
    _, model = models(torch.float32)
    batch = batches(1)[0]
    wrong = {**batch, "input_ids": batch["input_ids"] + 300}
    with pytest.raises(safekern.SafekernError, match="the model has embeddings for"):
        safekern.objectives.refusal(model, wrong)
    assert torch.ones(2, device=DEVICE).sum().item() == 2


@on_cuda
@pytest.mark.parametrize("make", [safekern.SETAdamW, safekern.SPAAdamW])
def test_optimizers_work_on_a_stream_of_their_own(make):
    pair = [models(torch.bfloat16)[1] for _ in range(2)]
    mask = random_mask(pair[0])
    optimizers = [make(model.named_parameters(), mask, lr=1e-2) for model in pair]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    for step in range(STEPS):
        give_gradients(pair[0], step)
        optimizers[0].step()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)
            give_gradients(pair[1], step)
            optimizers[1].step()
    torch.cuda.synchronize()
    assert all(torch.equal(mine, other) for mine, other in zip(pair[0].parameters(), pair[1].parameters(), strict=True))


@on_cuda
def test_files_wait_for_the_callers_stream(tmp_path):
    model = models(torch.bfloat16)[1]
    mask = random_mask(model)
    base = {name: param.detach().clone() for name, param in model.named_parameters()}
    optimizer = safekern.SETAdamW(model.named_parameters(), mask, lr=1e-2)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(1_000_000_000)
        give_gradients(model, 0)
        optimizer.step()
        safekern.save_delta(model, mask, tmp_path / "delta.safetensors", base=base)
    torch.cuda.synchronize()
    tuned = [param.detach().clone() for param in model.parameters()]
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(base[name])
    safekern.apply_delta(model, tmp_path / "delta.safetensors")
    assert all(torch.equal(param, want) for param, want in zip(model.parameters(), tuned, strict=True))


@on_cuda
def test_grad_scaler_skips_a_step_that_overflowed():
    model = tiny_llama().to(DEVICE)
    mask = random_mask(model)
    optimizer = safekern.SETAdamW(model.named_parameters(), mask, lr=1e-2)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    before = [param.detach().clone() for param in model.parameters()]
    for factor, moves in ((float("inf"), False), (1.0, True)):
        loss = model(**{key: value.to(DEVICE) for key, value in batches(1)[0].items()}).loss
        scaler.scale(loss * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        moved = any(not torch.equal(param, old) for param, old in zip(model.parameters(), before, strict=True))
        assert moved == moves
