"""Ctrl-C at any moment: the model, its hooks and modes are as before, a file is the old one or the new one."""

import contextlib
import copy
import shutil

import pytest
import torch
from language_models import byte_tokenizer, tiny_gpt2, tiny_llama, with_adapter
from scored_models import assert_untouched, model_loss, snapshot, token_batches, used_model
from small_net import Net, assert_same, loss_of, random_mask, weights
from stops import calls, interrupt, spread
from tuned_models import contents, llama_mask, save_folder, tuned

import safekern
from safekern import (
    Mask,
    SETAdamW,
    SPAAdamW,
    apply_delta,
    attack_success_rate,
    files,
    models,
    perturb,
    protect,
    save_delta,
    score,
)
from safekern.objectives import GuardJudge

# Files and generators that are collected instead of closed, where the interrupt hit between making and using them.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def most(request):
    """How many places to try."""
    return None if request.config.getoption("--full") else 60


def places(run, most):
    run()
    return spread(calls(run), most)


def interrupted(run, place, packages=(safekern,)):
    # Python itself drops what is raised while it collects an object that is no longer used.
    with contextlib.suppress(KeyboardInterrupt):
        calls(run, place, interrupt, packages)
    # What strikes between the start of torch.no_grad() and its block leaves it in force, for the tests after this one.
    torch.set_grad_enabled(True)


@pytest.mark.parametrize("options", [{}, {"reduction": "abs"}, {"memory": 3000}], ids=str)
def test_score(options, most):
    model, batches = used_model(), token_batches()[:2]

    def run():
        score(model, batches, model_loss, progress=False, **options)

    before = snapshot(model)
    for place in places(run, most):
        interrupted(run, place)
        assert_untouched(model, before)


def test_perturb(most):
    model = Net(torch.bfloat16)
    mask, before = random_mask(model), weights(model)

    def run():
        with perturb(model, mask):
            loss_of(model, 0)

    for place in places(run, most):
        interrupted(run, place)
        assert_same(weights(model), before)


def test_generation(most):
    model, tokenizer = tiny_llama(), byte_tokenizer()
    model.model.layers[0].train()
    before = snapshot(model)

    def run():
        attack_success_rate(model, tokenizer, ["Hi", "Bad"], max_new_tokens=2)

    for place in places(run, most):
        interrupted(run, place)
        assert_untouched(model, before)


def test_a_guard_model_as_judge(most):
    model, guard, tokenizer = tiny_llama(), tiny_llama(seed=1), byte_tokenizer()
    guard.model.layers[0].train()
    guard.lm_head.weight.requires_grad_(False)
    judge = GuardJudge(guard, tokenizer, tokenizer, max_new_tokens=2)
    before = snapshot(model), snapshot(guard)

    def run():
        score(model, [["Hi"]], judge, progress=False)

    for place in places(run, most and most // 2):
        interrupted(run, place)
        assert_untouched(model, before[0])
        assert_untouched(guard, before[1])


def test_collecting_in_backward(most):
    model = Net(torch.bfloat16)
    optimizer = SETAdamW(model.named_parameters(), random_mask(model), in_backward=True)
    before = weights(model)
    hooks = [dict(param._post_accumulate_grad_hooks) for param in model.parameters()]

    def run():
        optimizer.zero_grad()
        loss_of(model, 0).backward()

    run()
    want = [param.grad.selected.clone() if param.grad is not None else None for param in model.parameters()]
    for place in places(run, most):
        interrupted(run, place)
        assert_same(weights(model), before)
        assert [dict(param._post_accumulate_grad_hooks) for param in model.parameters()] == hooks
        # As if nothing had been: what the interrupted backward left goes with zero_grad.
        run()
        for param, grad in zip(model.parameters(), want, strict=True):
            assert (param.grad is None) if grad is None else torch.equal(param.grad.selected, grad)


@pytest.mark.parametrize("kind", [SETAdamW, SPAAdamW])
def test_a_step_keeps_what_it_must_not_move(kind, most):
    model = Net(torch.bfloat16)
    mask = random_mask(model)
    optimizer = kind(model.named_parameters(), mask)

    def run():
        loss_of(model, 0).backward()
        optimizer.step()

    def counted():
        return {name: int(optimizer.state[param]["step"]) for name, param in model.named_parameters()}

    run()
    before = weights(model)
    for place in places(run, most):
        start, count = weights(model), counted()
        interrupted(run, place)
        for name, now in weights(model).items():
            selected = mask.bool(name) if name in mask else torch.zeros(now.shape, dtype=torch.bool)
            kept = ~selected if kind is SETAdamW else selected
            assert torch.equal(now[kept], before[name][kept])
            # Or a state that is saved then would not go on from where the weights are.
            assert torch.equal(now, start[name]) or counted()[name] == count[name] + 1


def test_protect(most):
    model = Net()
    mask, before = random_mask(model), weights(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hooks = dict(optimizer._optimizer_step_pre_hooks), dict(optimizer._optimizer_step_post_hooks)

    def run():
        loss_of(model, 0).backward()
        with protect(optimizer, mask, model.named_parameters()):
            optimizer.step()

    for place in places(run, most):
        interrupted(run, place)
        for name, now in weights(model).items():
            selected = mask.bool(name) if name in mask else torch.zeros(now.shape, dtype=torch.bool)
            assert torch.equal(now[selected], before[name][selected])
        assert (dict(optimizer._optimizer_step_pre_hooks), dict(optimizer._optimizer_step_post_hooks)) == hooks


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
@pytest.mark.parametrize(
    ("make", "options"),
    [
        (tiny_llama, {"targets": ["q_proj", "down_proj"], "modules_to_save": ["lm_head"]}),
        (tiny_gpt2, {"targets": ["c_attn", "wte"], "use_dora": True}),
    ],
)
def test_merging_an_adapter(make, options, most):
    packages = (safekern, pytest.importorskip("peft"))
    torch.manual_seed(0)
    base = make()
    mask = Mask.from_bool({name: torch.rand(p.shape) < 0.1 for name, p in base.named_parameters() if p.ndim == 2})
    adapted = with_adapter(base, **options).eval()
    first, model = copy.deepcopy(adapted), copy.deepcopy(adapted)
    before, output = snapshot(model), model(torch.arange(12).view(2, 6)).logits
    merged = []
    # Also in the code of PEFT, where nearly all of the time is spent.
    total = calls(lambda: merged.append(safekern.merge_lora(first, mask)), packages=packages)
    for place in spread(total, most):
        interrupted(lambda model=model: merged.append(safekern.merge_lora(model, mask)), place, packages)
        if len(merged) > 1:
            # Python dropped what was raised while it collected an object.
            assert_same(weights(merged.pop()), weights(merged[0]))
            model = copy.deepcopy(adapted)
            before = snapshot(model)
        assert_untouched(model, before)
        assert torch.equal(model(torch.arange(12).view(2, 6)).logits, output)
    assert_same(weights(safekern.merge_lora(model, mask)), weights(merged[0]))


@pytest.fixture
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr("os.fsync", lambda _: None)


@pytest.mark.usefixtures("no_waiting_for_the_disk")
def test_saving_a_mask(tmp_path, most):
    path = tmp_path / "mask"
    old, new = random_mask(Net(), seed=1), random_mask(Net(), seed=2)
    new.save(path)
    replacement = path.read_bytes()
    for place in places(lambda: new.save(path), most):
        old.save(path)
        before = path.read_bytes()
        interrupted(lambda: new.save(path), place)
        assert path.read_bytes() in (before, replacement)
        assert list(tmp_path.iterdir()) == [path]


@pytest.mark.usefixtures("no_waiting_for_the_disk")
def test_applying_a_delta_to_a_folder(tmp_path, most):
    base = tiny_llama().bfloat16()
    mask = llama_mask(base)
    model = tuned(base, mask)
    original = save_folder(base, tmp_path / "original", max_shard_size="20KB")
    want = contents(save_folder(model, tmp_path / "tuned", max_shard_size="20KB"))
    before = contents(original)
    delta, folder = tmp_path / "delta", tmp_path / "folder"
    save_delta(model, mask, delta, base=original)

    def run():
        apply_delta(folder, delta)

    shutil.copytree(original, folder)
    total = calls(run)
    assert contents(folder) == want
    mixed = 0
    # The last calls are those of the files that take the places of the old ones.
    last = {total - 1 - place for place in spread(200, most and 40)}
    for place in sorted(last | set(spread(total, 12))):
        shutil.rmtree(folder)
        shutil.copytree(original, folder)
        interrupted(run, place)
        found = contents(folder)
        assert found.keys() == before.keys()
        assert all(content in (before[name], want[name]) for name, content in found.items())
        mixed += found not in (before, want)
        if found != want:
            run()
        assert contents(folder) == want
    assert mixed


def test_looking_whether_a_file_can_be_written(tmp_path):
    def run():
        files.check_writable(tmp_path / "mask")

    for place in places(run, None):
        interrupted(run, place)
        assert list(tmp_path.iterdir()) == []


def test_saving_a_model(tmp_path):
    model, tokenizer = tiny_llama(), byte_tokenizer()
    folder = tmp_path / "model"

    def run(scale=1.0):
        with torch.no_grad():
            model.model.norm.weight.fill_(scale)
        models.save(model, tokenizer, folder)

    run(2.0)
    new = contents(folder)
    run()
    old = contents(folder)
    found = set()
    for place in range(calls(run)):
        interrupted(lambda: run(2.0), place)
        assert list(tmp_path.iterdir()) == [folder]
        now = contents(folder)
        assert now in (old, new)
        found.add(now == new)
        run()
    assert found == {False, True}
