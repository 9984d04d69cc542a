import math

import pytest
import torch
from language_models import CHATML, byte_tokenizer, tiny_llama
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import safekern
from safekern.chat import answer_logits, encode, prompt_ids
from safekern.errors import InvalidArgumentError, JudgeError, NonFiniteError, ScoringError
from safekern.evaluation import attack_success_rate
from safekern.generation import generate
from safekern.guard import find_format
from safekern.objectives import CHAT_MODEL, LLAMA_GUARD, QWEN3_GUARD, GuardFormat, GuardJudge
from safekern.prompts import builtin

PROMPTS = ["Hi", "How do I pick a lock without being seen?", "What is the capital of France?"]
TEXTS = ["No, I can't help with that.", "Sure, the lock.", "Café — the answer 東 is Paris."]
TOKENS = 6
HEAD = (
    "<|im_start|>Task: {}.{{% for m in messages %}}\n\n{{{{ m.role }}}}: {}{{% endfor %}}\n\nEND<|im_end|><|im_start|>"
)
# Guards: the conversation in their own words, and the answer right after the header.
PLAIN = HEAD.format("First line must read 'safe' or 'unsafe'", "{{ m.content | trim }}")
PARTS = HEAD.format(
    "First line must read \\'safe\\' or \\'unsafe\\'",
    "{% for part in m.content | selectattr('type', 'equalto', 'text') %}{{ part.text }}{% endfor %}",
)
QWEN = HEAD.format("One of 'Safety: Safe', 'Safety: Unsafe'", "{{ m.content }}") + "assistant\n"


def trained_tokenizer(chat_template=CHATML):
    """Bytes and a hundred merges of them, so that its tokens and those of `byte_tokenizer` rarely coincide."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator([*PROMPTS, *TEXTS, "the help that answer lock is in the capital of France"], trainer)
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<|im_end|>", "<|im_start|>")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    tokenizer.chat_template = chat_template
    return tokenizer


def llama(vocab_size, seed=1):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def in_fp64(model):
    """Throughout: the norms of transformers compute in fp32 whatever they are given."""
    model.double()
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, LlamaRMSNorm):
                norm = torch.nn.RMSNorm(child.weight.shape, child.variance_epsilon, dtype=torch.float64)
                norm.weight = child.weight
                setattr(parent, name, norm)
    return model


def one_hot_means(tokenizer, guard_tokenizer, rows, columns):
    """[model's vocabulary, guard's vocabulary]: the mean of the guard's tokens for the text of each token."""
    means = torch.zeros(rows, columns, dtype=torch.float64)
    for token in range(rows):
        text = tokenizer.decode([token])
        if token not in tokenizer.added_tokens_decoder and "\ufffd" not in text:
            ids = guard_tokenizer(text, add_special_tokens=False)["input_ids"]
            for piece in ids:
                means[token, piece] += 1 / len(ids)
    return means


TOKENIZERS = {
    "shared": (byte_tokenizer, byte_tokenizer),
    "model coarser": (trained_tokenizer, byte_tokenizer),
    "guard coarser": (byte_tokenizer, trained_tokenizer),
}


@pytest.mark.parametrize("pair", TOKENIZERS)
@pytest.mark.parametrize("template", [CHATML, PLAIN, PARTS, QWEN])
def test_the_gradient_is_that_of_finite_differences(pair, template):
    tokenizer, guard_tokenizer = (make() for make in TOKENIZERS[pair])
    guard_tokenizer.chat_template = template
    guard = in_fp64(llama(len(guard_tokenizer)))
    judge = GuardJudge(guard, guard_tokenizer, tokenizer)
    answers = [judge._vocabularies.show(tokenizer(text)["input_ids"]) for text in TEXTS]
    log_odds, direction = judge._differentiate(PROMPTS, answers)
    size = len(tokenizer)
    assert log_odds.dtype == direction.dtype == torch.float64
    assert direction.shape == (sum(len(answer.ids) for answer in answers), size)

    table = guard.get_input_embeddings().weight.detach()
    words = one_hot_means(tokenizer, guard_tokenizer, size, len(guard_tokenizer)) @ table
    if pair == "shared":
        words = table
    generator = torch.Generator().manual_seed(0)
    for row, (prompt, answer) in enumerate(zip(PROMPTS, answers, strict=True)):
        inputs = judge._inputs([prompt], [answer])
        assert guard_tokenizer.decode(inputs.ids[0]).count(TEXTS[row]) == 1
        start, count = inputs.starts[0], len(answer.guard_ids)
        assert guard_tokenizer.decode(inputs.ids[0, start : start + count]) == TEXTS[row]
        cover = torch.eye(count, dtype=torch.float64) if answer.overlap is None else answer.overlap
        first = sum(len(answer.ids) for answer in answers[:row])
        for _ in range(3):
            change = torch.zeros(len(answer.ids), size, dtype=torch.float64)
            # A few entries at a time: any that is wrong would show.
            at = torch.randint(change.numel(), (5,), generator=generator)
            change.view(-1)[at] = torch.randn(5, generator=generator, dtype=torch.float64)
            values = []
            for sign in (1, -1):
                embeddings = table[inputs.ids].clone()
                embeddings[0, start : start + count] += sign * 1e-5 * cover.T @ change @ words
                values.append(judge._ask(embeddings, inputs).item())
            expected = (values[0] - values[1]) / 2e-5
            got = (direction[first : first + len(answer.ids)] * change).sum().item()
            assert got == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_log_odds_are_those_of_the_guards_own_text():
    tokenizer, guard_tokenizer = byte_tokenizer(), byte_tokenizer(PLAIN)
    guard = llama(259)
    judge = GuardJudge(guard, guard_tokenizer, tokenizer)
    text = guard_tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPTS[1]}, {"role": "assistant", "content": TEXTS[0]}], tokenize=False
    )
    # Not "\n\n" alone, which this tokenizer would take for one token.
    ids = guard_tokenizer(text + "\n\nsafe", return_tensors="pt", add_special_tokens=False)["input_ids"]
    logs = guard(ids[:, : -len("safe")]).logits[0, -1].log_softmax(-1)
    safe, unsafe = (guard_tokenizer(word)["input_ids"][0] for word in "su")
    expected = (logs[safe] - logs[unsafe]).item()
    assert judge.log_odds(PROMPTS[1], TEXTS[0]) == pytest.approx(expected, rel=1e-4)
    assert judge.unsafe(PROMPTS[1], TEXTS[0]) is (expected < 0)
    # The conversation before it counts.
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    longer = judge.log_odds([*turns, {"role": "user", "content": PROMPTS[1]}], TEXTS[0])
    assert longer != pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("pair", TOKENIZERS)
def test_the_gradient_reaches_the_weights_through_the_models_predictions(pair, monkeypatch):
    tokenizer, guard_tokenizer = (make() for make in TOKENIZERS[pair])
    model, guard = llama(len(tokenizer), 0), llama(len(guard_tokenizer))
    judge = GuardJudge(guard, guard_tokenizer, tokenizer, max_new_tokens=TOKENS, tau=0.7)
    asked = [prompt_ids(tokenizer, prompt) for prompt in PROMPTS]
    answers = [judge._vocabularies.show(ids) for ids in generate(model, tokenizer, asked, TOKENS)]
    log_odds, direction = judge._differentiate(PROMPTS, answers)
    noise = torch.randn(direction.shape)
    given = list(noise.split([len(answer.ids) for answer in answers]))
    monkeypatch.setattr(judge, "_gumbel", lambda count, logits: given.pop(0))

    value = judge(model, PROMPTS)
    assert value.shape == ()
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, log_odds.mean())
    got = torch.autograd.grad(value, list(model.parameters()))
    logits = torch.cat(
        [
            model(torch.tensor([ids + answer.ids])).logits[0, len(ids) - 1 : -1]
            for ids, answer in zip(asked, answers, strict=True)
        ]
    )
    contraction = (direction * ((logits + noise) / 0.7).softmax(-1)).sum() / len(PROMPTS)
    expected = torch.autograd.grad(contraction, list(model.parameters()))
    assert any(gradient.abs().max() > 1e-3 for gradient in expected)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_noise_is_gumbels_and_seeded():
    tokenizer = byte_tokenizer()
    guard, logits = llama(259), torch.zeros(200, 259)
    judges = [GuardJudge(guard, tokenizer, tokenizer, seed=seed) for seed in (0, 0, 1)]
    first, same, other = (judge._gumbel(200, logits) for judge in judges)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert not torch.equal(first, judges[0]._gumbel(200, logits))
    assert first.isfinite().all()
    assert first.mean().item() == pytest.approx(0.5772, abs=0.03)
    assert first.var().item() == pytest.approx(math.pi**2 / 6, rel=0.05)


def gradients(judge, model, batches):
    total = [torch.zeros_like(param) for param in model.parameters()]
    values = []
    for batch in batches:
        value = judge(model, batch)
        values.append(value.item())
        for sum_, gradient in zip(total, torch.autograd.grad(value, list(model.parameters())), strict=True):
            sum_ += gradient / len(batches)
    return sum(values) / len(values), total


@pytest.mark.parametrize("pair", TOKENIZERS)
@pytest.mark.usefixtures("poisoned_memory")
def test_a_batch_is_the_mean_of_its_rows(pair):
    tokenizer, guard_tokenizer = (make() for make in TOKENIZERS[pair])
    model, guard = in_fp64(llama(len(tokenizer), 0)), in_fp64(llama(len(guard_tokenizer)))
    results = [
        gradients(GuardJudge(guard, guard_tokenizer, tokenizer, max_new_tokens=TOKENS), model, batches)
        for batches in ([PROMPTS], [[prompt] for prompt in PROMPTS])
    ]
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    for one, other in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_one_guard_pass_for_a_batch_and_few_logits():
    tokenizer = byte_tokenizer()
    model, guard = tiny_llama(), llama(259)
    shapes, backwards = [], []
    guard.register_forward_hook(lambda module, args, output: shapes.append(output.logits.shape))
    guard.lm_head.register_full_backward_pre_hook(lambda module, gradient: backwards.append(1))
    GuardJudge(guard, tokenizer, tokenizer, max_new_tokens=TOKENS)(model, PROMPTS).backward()
    assert len(shapes) == len(backwards) == 1
    assert shapes[0][0] == 3
    assert shapes[0][1] <= 3


def state(model):
    return [
        [module.training for module in model.modules()],
        [(param.requires_grad, param.grad, param._backward_hooks) for param in model.parameters()],
        [len(module._forward_hooks) for module in model.modules()],
        {name: param.clone() for name, param in model.state_dict().items()},
    ]


def assert_unchanged(model, before):
    after = state(model)
    assert after[:3] == before[:3]
    assert all(torch.equal(tensor, before[3][name]) for name, tensor in after[3].items())


def test_the_guard_is_left_as_found():
    tokenizer = byte_tokenizer()
    model, guard = tiny_llama(), llama(259)
    guard.train()
    guard.model.layers[1].eval()
    guard.lm_head.weight.requires_grad_(False)
    before, seen = state(guard), []
    handle = guard.model.layers[0].register_forward_pre_hook(
        lambda module, args: seen.append((module.training, any(p.requires_grad for p in guard.parameters())))
    )
    judge = GuardJudge(guard, tokenizer, tokenizer, max_new_tokens=TOKENS)
    judge(model, PROMPTS).backward()
    assert seen == [(False, False)]
    judge.unsafe("Hi", "No.")
    handle.remove()
    assert_unchanged(guard, before)

    def fail(module, args):
        raise ZeroDivisionError

    handle = guard.model.layers[1].register_forward_pre_hook(fail)
    for call in (lambda: judge(model, PROMPTS), lambda: judge.unsafe("Hi", "No.")):
        with pytest.raises(ZeroDivisionError):
            call()
    handle.remove()
    assert_unchanged(guard, before)


@pytest.mark.parametrize("own", [False, True])
def test_score(own):
    tokenizer = byte_tokenizer()
    model = tiny_llama().train()
    guard = model if own else llama(259)
    batches = [PROMPTS[:2], PROMPTS[2:]]
    expected = gradients(GuardJudge(guard, tokenizer, tokenizer, max_new_tokens=TOKENS), model, batches)[1]
    by_name = dict(zip((name for name, _ in model.named_parameters()), expected, strict=True))
    before = state(model)
    scores = safekern.score(model, batches, GuardJudge(guard, tokenizer, tokenizer, max_new_tokens=TOKENS))
    assert_unchanged(model, before)
    for name in scores:
        torch.testing.assert_close(scores.gradient(name), by_name[name], rtol=1e-4, atol=1e-6)
    assert scores.top(0.01).meta["objective"] == "GuardJudge"
    # On the guard's own vocabulary a larger embedding is only padding.
    if not own:
        wide = llama(259)
        wide.resize_token_embeddings(300, mean_resizing=False)
        again = safekern.score(model, batches, GuardJudge(wide, tokenizer, tokenizer, max_new_tokens=TOKENS))
        for name in scores:
            torch.testing.assert_close(again.gradient(name), scores.gradient(name), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sample", [False, True])
def test_score_in_sweeps(sample):
    tokenizer, model, guard = byte_tokenizer(), tiny_llama(), llama(259)
    masks = []
    for memory in (None, 60_000):
        judge = GuardJudge(guard, tokenizer, tokenizer, max_new_tokens=TOKENS, sample=sample)
        scores = safekern.score(model, [PROMPTS[:2], PROMPTS[2:]], judge, memory=memory, keep=0.002)
        assert ("Top" in repr(scores)) == (memory is not None)
        masks.append(scores.top(0.002))
    assert masks[0] == masks[1]


def test_samples_leave_other_devices_alone(monkeypatch):
    tokenizer, model, seeded = byte_tokenizer(), tiny_llama(), []
    judge = GuardJudge(llama(259), tokenizer, tokenizer, max_new_tokens=TOKENS, sample=True)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    judge(model, PROMPTS)
    assert not seeded


@pytest.mark.parametrize(
    "wrong",
    [{"max_new_tokens": "40"}, {"max_new_tokens": 2.5}, {"max_new_tokens": 0}, {"seed": 1.5}, {"seed": 2**70}]
    + [{"tau": value} for value in ("x", 0.0, float("inf"), float("nan"))],
)
def test_wrong_arguments_are_named(wrong):
    tokenizer = byte_tokenizer()
    with pytest.raises(InvalidArgumentError, match=next(iter(wrong))):
        GuardJudge(llama(259), tokenizer, tokenizer, **wrong)


def test_samples_are_seeded_and_leave_the_global_generator():
    tokenizer = byte_tokenizer()
    model, guard = tiny_llama(), llama(259)
    with torch.no_grad():
        model.lm_head.weight *= 0.1
    values = []
    for seed in (0, 0, 1):
        judge = GuardJudge(guard, tokenizer, tokenizer, max_new_tokens=TOKENS, sample=True, seed=seed)
        before = torch.get_rng_state()
        values.append(judge(model, PROMPTS).item())
        assert torch.equal(torch.get_rng_state(), before)
    greedy = GuardJudge(guard, tokenizer, tokenizer, max_new_tokens=TOKENS)(model, PROMPTS).item()
    assert values[0] == values[1]
    assert len({*values, greedy}) == 3


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("guard weight", "the guard's log-odds of response 0 are NaN"),
        ("guard gradient", "the gradient of the guard's log-odds"),
        ("model weight", "the logits of the model that is scored"),
    ],
)
def test_nan_is_refused(broken, message):
    tokenizer = byte_tokenizer()
    model, guard = tiny_llama(), llama(259)
    judge = GuardJudge(guard, tokenizer, tokenizer, max_new_tokens=TOKENS)
    if broken == "guard gradient":

        def poison(module, args, output):
            output.register_hook(lambda gradient: gradient * float("nan"))

        guard.model.norm.register_forward_hook(poison)
    else:
        with torch.no_grad():
            (guard if broken == "guard weight" else model).lm_head.weight[:] = float("nan")
    with pytest.raises(NonFiniteError, match=message):
        judge(model, PROMPTS)
    if broken == "guard weight":
        with pytest.raises(NonFiniteError, match=message):
            judge.unsafe("Hi", "No.")
        with pytest.raises(JudgeError, match="prompt 0 with NonFiniteError"):
            attack_success_rate(model, tokenizer, PROMPTS, judge=judge.unsafe, max_new_tokens=1)


def test_in_bf16():
    tokenizer, guard_tokenizer = byte_tokenizer(), trained_tokenizer(PLAIN)
    model, guard = tiny_llama().bfloat16(), llama(len(guard_tokenizer)).bfloat16()
    judge = GuardJudge(guard, guard_tokenizer, tokenizer, max_new_tokens=TOKENS)
    value = judge(model, PROMPTS)
    assert value.dtype == torch.float32
    value.backward()
    assert model.lm_head.weight.grad.dtype == torch.bfloat16
    assert model.lm_head.weight.grad.any()
    rounded = judge.log_odds(PROMPTS[0], TEXTS[0])
    exact = GuardJudge(guard.float(), guard_tokenizer, tokenizer).log_odds(PROMPTS[0], TEXTS[0])
    assert rounded == pytest.approx(exact, abs=0.3)


def test_as_a_judge_of_attacks():
    tokenizer, guard_tokenizer = byte_tokenizer(), trained_tokenizer(PLAIN)
    judge = GuardJudge(llama(len(guard_tokenizer)), guard_tokenizer, tokenizer)
    result = attack_success_rate(tiny_llama(), tokenizer, PROMPTS, judge=judge.unsafe, max_new_tokens=TOKENS)
    expected = [judge.log_odds(*pair) < 0 for pair in zip(PROMPTS, result.responses, strict=True)]
    assert result.successes == expected


def test_special_tokens_of_a_response_do_not_reach_the_guard():
    for guard_tokenizer in (byte_tokenizer(PLAIN), trained_tokenizer(PLAIN)):
        tokenizer = byte_tokenizer()
        judge = GuardJudge(llama(len(guard_tokenizer)), guard_tokenizer, tokenizer)
        special = {guard_tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>")}
        marked = tokenizer("Yes<|im_end|><|im_start|>no")["input_ids"]
        answer = judge._vocabularies.show(marked)
        assert tokenizer.decode(answer.ids) == guard_tokenizer.decode(answer.guard_ids) == "Yesno"
        # Spelled out, they are text.
        spelled = judge._vocabularies.guard_ids("Yes<|im_end|>")
        assert guard_tokenizer.decode(spelled) == "Yes<|im_end|>"
        assert not special & set(spelled)


def test_spans():
    judge = GuardJudge(llama(400), trained_tokenizer(), byte_tokenizer())
    answer = judge._vocabularies.show(byte_tokenizer()("the é 東")["input_ids"])
    assert len(answer.guard_ids) < len(answer.ids) == 10
    torch.testing.assert_close(answer.overlap.sum(0), torch.ones(len(answer.guard_ids), dtype=torch.float64))
    # The guard's last token is the space and the three bytes of the character.
    last = answer.overlap[:, -1]
    assert last[:6].eq(0).all()
    assert last[6:].tolist() == [0.25] * 4


@pytest.mark.parametrize(
    ("template", "expected"), [(CHATML, CHAT_MODEL), (PLAIN, LLAMA_GUARD), (PARTS, LLAMA_GUARD), (QWEN, QWEN3_GUARD)]
)
def test_formats_are_found(template, expected):
    tokenizer = byte_tokenizer(template)
    assert find_format(tokenizer) is expected
    judge = GuardJudge(llama(259), tokenizer, byte_tokenizer())
    head, tail = (tokenizer.decode(ids) for ids in judge._template.around("pick {response} a lock"))
    assert head.count("pick {response} a lock") == 1
    assert tail.endswith(
        {CHAT_MODEL: "assistant\n", LLAMA_GUARD: "<|im_start|>\n\n", QWEN3_GUARD: "Safety: "}[expected]
    )
    first = [tokenizer.decode([token]) for token in (judge._template.safe, judge._template.unsafe)]
    assert first == {CHAT_MODEL: ["N", "Y"], LLAMA_GUARD: ["s", "u"], QWEN3_GUARD: ["S", "U"]}[expected]


def test_a_chat_model_is_shown_a_conversation_as_a_transcript():
    tokenizer = byte_tokenizer()
    judge = GuardJudge(llama(259), tokenizer, tokenizer)
    turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant", "user"), "abc", strict=True)]
    head, tail = (tokenizer.decode(ids) for ids in judge._template.around(turns))
    assert head.endswith("Request: User: a\n\nAssistant: b\n\nUser: c\n\nResponse: ")
    assert tail.startswith("\n\nDoes the response help")


def test_a_chat_model_answers_with_what_its_template_puts_before_an_answer():
    template = CHATML.replace("assistant\n' }}", "assistant:' }}")
    template = template.replace("'\n' + m", "('\n' if m['role'] == 'user' else ': ') + m")
    tokenizer = byte_tokenizer(template)
    judge = GuardJudge(llama(259), tokenizer, tokenizer)
    _, tail = judge._template.around("Hi")
    assert tokenizer.decode(tail).endswith("assistant: ")
    assert [tokenizer.decode([token]) for token in (judge._template.safe, judge._template.unsafe)] == ["N", "Y"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": GuardFormat("yes", "yes")}, "begins with the other"),
        ({"format": GuardFormat("safe", "safety")}, "begins with the other"),
        ({"format": GuardFormat("yes", "no", question="Safe? {response}")}, "does not show both prompt and response"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"tau": 0.0}, "tau is 0"),
        ({"tau": float("nan")}, "tau is nan"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(InvalidArgumentError, match=message):
        GuardJudge(llama(259), byte_tokenizer(), byte_tokenizer(), **options)


def test_no_chat_template():
    for pair in ((None, CHATML), (CHATML, None)):
        with pytest.raises(InvalidArgumentError, match="no chat template"):
            GuardJudge(llama(259), *map(byte_tokenizer, pair))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        *((batch, "is a list of prompts") for batch in ("Hi", "", encode(byte_tokenizer(), "Hi", "No."), 3)),
        ([], "is empty: cut batches"),
    ],
)
def test_wrong_batches(batch, message):
    judge = GuardJudge(llama(259), byte_tokenizer(), byte_tokenizer())
    with pytest.raises(InvalidArgumentError, match=message):
        judge(tiny_llama(), batch)


def test_a_template_that_refuses_the_prompt():
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + PLAIN
    judge = GuardJudge(llama(259), byte_tokenizer(template), byte_tokenizer())
    with pytest.raises(InvalidArgumentError, match="does not take the prompt"):
        judge.unsafe([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}], "No.")


def test_empty_responses(monkeypatch):
    tokenizer = byte_tokenizer()
    model, guard = tiny_llama(), llama(259)
    judge = GuardJudge(guard, tokenizer, tokenizer)
    answers = [[], tokenizer("No.")["input_ids"]]
    monkeypatch.setattr(judge, "_respond", lambda model, asked: answers[: len(asked)])
    expected = sum(judge.log_odds(*pair) for pair in zip(PROMPTS, ("", "No."), strict=False)) / 2
    value = judge(model, PROMPTS[:2])
    assert value.item() == pytest.approx(expected, rel=1e-4)
    assert torch.autograd.grad(value, model.lm_head.weight)[0].any()
    with pytest.raises(ScoringError, match="every response of the batch is empty"):
        judge(model, PROMPTS[:1])


def test_answer_logits_follow_the_rows():
    tokenizer, model = byte_tokenizer(), tiny_llama()
    logits, targets = answer_logits(model, encode(tokenizer, PROMPTS[:2], ["No.", "Yes."]))
    assert tokenizer.decode(targets) == "No.<|im_end|>Yes.<|im_end|>"
    assert logits.shape == (len(targets), 259)


def test_smollm2_as_its_own_guard(smollm2):
    model, tokenizer = smollm2
    harmful = builtin("harmful", "eval")
    judge = GuardJudge(model, tokenizer, tokenizer, max_new_tokens=8)
    refused = [judge.log_odds(*pair) for pair in zip(harmful.prompts[:2], harmful.responses[:2], strict=True)]
    complied = [judge.log_odds(prompt, "Sure, here is how to do it.") for prompt in harmful.prompts[:2]]
    assert all(one > other for one, other in zip(refused, complied, strict=True))
    value = judge(model, harmful.prompts[:1])
    (gradient,) = torch.autograd.grad(value, model.model.layers[-1].self_attn.v_proj.weight)
    assert gradient.isfinite().all()
    assert gradient.any()
