import itertools

import pytest
import torch
from language_models import byte_tokenizer, tiny_llama

from safekern.errors import InvalidArgumentError, NonFiniteError
from safekern.objectives import refusal
from safekern.prompts import Pairs
from safekern.training import balanced, in_order, shuffled, tune, with_rehearsal


def pairs(tag, count):
    return Pairs([f"{tag} {i}?" for i in range(count)], [f"{tag.upper()} {i}." for i in range(count)], [tag] * count)


def texts(tokenizer, batch):
    return [
        tokenizer.decode(ids[mask.bool()])
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


def test_in_order_gives_every_pair_once():
    tokenizer = byte_tokenizer()
    batches = in_order(tokenizer, pairs("a", 7), 3)
    assert [len(batch["input_ids"]) for batch in batches] == [3, 3, 1]
    rows = [text for batch in batches for text in texts(tokenizer, batch)]
    assert all(f"a {i}?" in text and f"A {i}." in text for i, text in enumerate(rows))


def test_shuffled_sees_every_pair_each_pass():
    tokenizer = byte_tokenizer()
    batches = [texts(tokenizer, b) for b in itertools.islice(shuffled(tokenizer, pairs("a", 6), 4, 0), 9)]
    answers = [next(i for i in range(6) if f"A {i}." in text) for batch in batches for text in batch]
    passes = [answers[start : start + 6] for start in range(0, 36, 6)]
    assert all(sorted(seen) == list(range(6)) for seen in passes)
    assert len(set(map(tuple, passes))) > 1


def test_shuffled_is_seeded():
    tokenizer = byte_tokenizer()

    def first(seed):
        return [b["input_ids"].tolist() for b in itertools.islice(shuffled(tokenizer, pairs("a", 20), 2, seed), 10)]

    assert first(1) == first(1) != first(2)


@pytest.mark.parametrize("batches", [in_order, lambda *args: next(shuffled(*args, seed=0))])
def test_what_gives_no_batch_is_refused(batches):
    with pytest.raises(InvalidArgumentError, match="batch_size is 0"):
        batches(byte_tokenizer(), pairs("a", 2), 0)
    with pytest.raises(InvalidArgumentError, match="no pairs"):
        batches(byte_tokenizer(), pairs("a", 0), 1)


def test_tune_weighs_the_parts_of_the_loss():
    tokenizer, model = byte_tokenizer(), tiny_llama()
    one, other = (in_order(tokenizer, pairs(tag, 1), 1) for tag in "ab")
    losses = [refusal(model, batch).item() for batch in (one[0], other[0])]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    gradients = []
    optimizer.register_step_pre_hook(lambda *_: gradients.append(model.lm_head.weight.grad.clone()))
    assert tune(model, optimizer, [(0.2, one), (0.8, other)], 1) == [pytest.approx(0.2 * losses[0] + 0.8 * losses[1])]
    tune(model, optimizer, [(1.0, one)], 1)
    tune(model, optimizer, [(1.0, other)], 1)
    torch.testing.assert_close(gradients[0], 0.2 * gradients[1] + 0.8 * gradients[2])


def test_batches_may_hold_what_is_no_tensor():
    model, tokenizer = tiny_llama(), byte_tokenizer()
    batch = {**in_order(tokenizer, pairs("a", 1), 1)[0], "output_hidden_states": False}
    assert tune(model, torch.optim.SGD(model.parameters(), lr=0.1), [(1.0, [batch])], 1)


def test_tune_lowers_the_loss_and_clears_gradients():
    tokenizer, model = byte_tokenizer(), tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = tune(model, optimizer, [(1.0, shuffled(tokenizer, pairs("a", 4), 4, 0))], 20)
    assert len(losses) == 20 and losses[-1] < losses[0]
    assert all(param.grad is None for param in model.parameters())


def test_tune_says_when_the_batches_run_out():
    tokenizer, model = byte_tokenizer(), tiny_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with pytest.raises(InvalidArgumentError, match="after 2 of 3"):
        tune(model, optimizer, [(1.0, in_order(tokenizer, pairs("a", 2), 1))], 3)


def test_skipped_batches_are_those_of_the_beginning():
    tokenizer = byte_tokenizer()
    whole = [texts(tokenizer, b) for b in itertools.islice(shuffled(tokenizer, pairs("a", 5), 3, 0), 8)]
    rest = [texts(tokenizer, b) for b in itertools.islice(shuffled(tokenizer, pairs("a", 5), 3, 0, skip=3), 5)]
    assert rest == whole[3:]


def test_balanced_mixes_both_kinds():
    tokenizer = byte_tokenizer()
    (weight, refusals), (rest, answers) = balanced(
        tokenizer, pairs("bad", 4), pairs("good", 4), batch_size=4, refusal_weight=0.2
    )
    assert (weight, rest) == (0.2, 0.8)
    for tag, batches in (("BAD", refusals), ("GOOD", answers)):
        rows = texts(tokenizer, next(batches))
        assert len(rows) == 2 and all(tag in row for row in rows)
    for wrong in ({"batch_size": 3}, {"batch_size": 0}, {"refusal_weight": 1.5}):
        with pytest.raises(InvalidArgumentError):
            balanced(tokenizer, pairs("a", 4), pairs("b", 4), **wrong)
    with pytest.raises(InvalidArgumentError, match="no pairs"):
        balanced(tokenizer, pairs("a", 4), pairs("b", 0))


def test_rehearsal_comes_with_a_task():
    tokenizer = byte_tokenizer()
    task, harmful, benign = pairs("task", 5), pairs("bad", 4), pairs("good", 3)
    parts = with_rehearsal(
        tokenizer, task, harmful, benign, batch_size=5, rehearsal=0.4, refusal_weight=0.25, seed=3, skip=2
    )
    assert [weight for weight, _ in parts] == pytest.approx([0.6, 0.1, 0.3])
    for tag, count, (_, batches) in zip(("TASK", "BAD", "GOOD"), (5, 2, 2), parts, strict=True):
        rows = texts(tokenizer, next(batches))
        assert len(rows) == count and all(tag in row for row in rows)
    both = balanced(tokenizer, harmful, benign, batch_size=4, seed=3, skip=3)
    assert [texts(tokenizer, next(batches)) for _, batches in parts[1:]] == [
        texts(tokenizer, next(batches)) for _, batches in both
    ]
    ((whole, alone),) = with_rehearsal(tokenizer, task, harmful, benign, batch_size=4, rehearsal=0, seed=5)
    assert whole == 1
    assert texts(tokenizer, next(alone)) == texts(tokenizer, next(shuffled(tokenizer, task, 4, seed=5)))
    smallest = with_rehearsal(tokenizer, task, harmful, benign, batch_size=1)
    assert [len(texts(tokenizer, next(batches))) for _, batches in smallest] == [1, 1, 1]
    for wrong in ({"batch_size": 0}, {"rehearsal": 1.0}, {"rehearsal": -0.1}, {"refusal_weight": 2}):
        with pytest.raises(InvalidArgumentError):
            with_rehearsal(tokenizer, task, harmful, benign, **wrong)
    for kinds in ((pairs("task", 0), harmful, benign), (task, pairs("bad", 0), benign), (task, harmful, pairs("b", 0))):
        with pytest.raises(InvalidArgumentError, match="no pairs"):
            with_rehearsal(tokenizer, *kinds)


def test_tune_goes_on_from_what_is_done():
    tokenizer, model = byte_tokenizer(), tiny_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    seen = []
    losses = tune(
        model,
        optimizer,
        [(1.0, in_order(tokenizer, pairs("a", 3), 1))],
        5,
        done=[9.0, 8.0],
        after_step=lambda losses: seen.append(len(losses)),
    )
    assert losses[:2] == [9.0, 8.0] and len(losses) == 5 and seen == [3, 4, 5]


def test_tune_stops_at_a_loss_that_is_not_finite():
    tokenizer, model = byte_tokenizer(), tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    before = model.model.embed_tokens.weight.clone()
    with pytest.raises(NonFiniteError, match="iteration 0"):
        tune(
            model,
            torch.optim.AdamW(model.parameters()),
            [(1.0, in_order(tokenizer, pairs("a", 1), 1))],
            1,
        )
    assert torch.equal(model.model.embed_tokens.weight, before)


def test_tune_steps_on_no_gradients_but_its_own():
    tokenizer = byte_tokenizer()
    batch, other = in_order(tokenizer, pairs("a", 2), 1)
    model, untouched = tiny_llama(), tiny_llama()
    optimizer, theirs = (torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, untouched))
    with pytest.raises(NonFiniteError):
        tune(model, optimizer, [(1.0, [other]), (float("inf"), [other])], 1)
    forwards = []

    def interrupt(*_):
        forwards.append(1)
        if len(forwards) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        handle = model.register_forward_pre_hook(interrupt)
        tune(model, optimizer, [(1.0, [other]), (1.0, [other])], 1)
    handle.remove()
    assert all(param.grad is None for param in model.parameters())
    # Of the caller's own.
    refusal(model, other).backward()
    for each, opt in ((model, optimizer), (untouched, theirs)):
        tune(each, opt, [(1.0, [batch, other])], 2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), untouched.parameters(), strict=True))


def test_an_error_names_the_pair_in_the_data():
    data = pairs("a", 9)
    data.responses[7] = " "
    with pytest.raises(InvalidArgumentError, match=r"^pair 8: response 0 is empty"):
        in_order(byte_tokenizer(), data, 4)
    with pytest.raises(InvalidArgumentError, match=r"^pair 8: response 0 is empty"):
        list(itertools.islice(shuffled(byte_tokenizer(), data, 4, seed=0), 3))
