import pytest
import torch
from language_models import CHATML, PROMPTS, RESPONSES, byte_tokenizer, tiny_llama
from tokenizers import Tokenizer, models, normalizers
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GitConfig,
    GitForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from safekern import score
from safekern.chat import encode, end_of_turn, padding_id, prompt_ids
from safekern.errors import InvalidArgumentError
from safekern.evaluation import attack_success_rate
from safekern.objectives import refusal


@pytest.fixture
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


def joined(tokenizer, prompt, response):
    return prompt_ids(tokenizer, prompt) + tokenizer(response + "<|im_end|>").input_ids


def test_shapes_dtypes_and_right_padding(tokenizer):
    batch = encode(tokenizer, PROMPTS, RESPONSES)
    assert list(batch) == ["input_ids", "attention_mask", "labels"]
    rows = [joined(tokenizer, *pair) for pair in zip(PROMPTS, RESPONSES, strict=True)]
    length = max(map(len, rows))
    for tensor in batch.values():
        assert tensor.dtype == torch.int64
        assert tensor.shape == (3, length)
    for number, row in enumerate(rows):
        assert batch["input_ids"][number].tolist() == row + [padding_id(tokenizer)] * (length - len(row))
        assert batch["attention_mask"][number].tolist() == [1] * len(row) + [0] * (length - len(row))


def test_prompt_is_what_the_template_generates_from(tokenizer):
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        batch = encode(tokenizer, prompt, response)
        expected = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
        )
        assert prompt_ids(tokenizer, prompt) == expected
        assert batch["input_ids"][0, : len(expected)].tolist() == expected
        assert (batch["labels"][0, : len(expected)] == -100).all()


def test_labels_are_the_answer_and_its_end_of_turn(tokenizer):
    batch = encode(tokenizer, PROMPTS, RESPONSES)
    for number, response in enumerate(RESPONSES):
        labels = batch["labels"][number]
        assert tokenizer.decode(labels[labels != -100]) == response + "<|im_end|>"
        # The end-of-turn token is a target and attended to, although it is also the padding token.
        at = int((labels != -100).nonzero()[-1])
        assert labels[at] == tokenizer.pad_token_id
        assert batch["attention_mask"][number, at] == 1
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()


def test_an_answer_never_merges_with_the_prompt(tokenizer):
    prompt, response = "Hi", "\nNo."
    assert len(tokenizer("\n\n").input_ids) == 1
    batch = encode(tokenizer, prompt, response)
    assert batch["input_ids"][0].tolist() == joined(tokenizer, prompt, response)


def test_one_pair_equals_its_row_in_a_batch(tokenizer):
    together = encode(tokenizer, PROMPTS, RESPONSES)
    for number, pair in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        alone = encode(tokenizer, *pair)
        for name, tensor in alone.items():
            assert torch.equal(tensor[0], together[name][number, : tensor.shape[1]])


def test_padding_side_and_pad_token_do_not_matter(tokenizer):
    expected = encode(tokenizer, PROMPTS, RESPONSES)
    tokenizer.padding_side = "left"
    tokenizer.pad_token = None
    for name, tensor in encode(tokenizer, PROMPTS, RESPONSES).items():
        assert torch.equal(tensor, expected[name])
    assert tokenizer.padding_side == "left"


# What templates of models that reason write before an answer, and what the prompt has to end with.
THOUGHTS = {
    # As in Qwen3, which is asked not to reason by an option.
    "{{ 'assistant\n' }}{{ '<think>\n\n</think>\n\n' if enable_thinking is defined and not enable_thinking }}": (
        "<think>\n\n</think>\n\n",
        "assistant\n<think>\n\n</think>\n\n",
    ),
    # As in DeepSeek-R1: what the generation prompt opens is not part of a finished turn.
    "{{ 'assistant\n<think>\n' }}": ("", "assistant\n<think>\n\n</think>\n\n"),
    # As in GPT-OSS: an answer has a channel of its own.
    "{{ 'assistant\n' }}": ("<|channel|>final<|message|>", "assistant\n<|channel|>final<|message|>"),
}


@pytest.mark.parametrize("asking", THOUGHTS)
def test_templates_of_models_that_reason(asking):
    before, end = THOUGHTS[asking]
    tokenizer = byte_tokenizer(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{{ '"
        + before.replace("\n", "\\n")
        + "' }}{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}"
        + asking.replace("'assistant", "'<|im_start|>assistant").replace("\n", "\\n")
        + "{% endif %}"
    )
    batch = encode(tokenizer, "Hi", "No.")
    assert tokenizer.decode(batch["input_ids"][0]) == f"<|im_start|>user\nHi<|im_end|>\n<|im_start|>{end}No.<|im_end|>"
    labels = batch["labels"][0]
    assert tokenizer.decode(labels[labels != -100]) == "No.<|im_end|>"
    prompt = prompt_ids(tokenizer, "Hi")
    assert batch["input_ids"][0, : len(prompt)].tolist() == prompt
    assert tokenizer.decode(prompt).endswith(end)


def test_thoughts_in_an_answer_are_refused_where_the_template_has_closed_them():
    # As Qwen3's, which takes thoughts out of finished turns.
    template = CHATML.replace("m['content'] + ", "m['content'].split('</think>')[-1].lstrip('\n') + ").replace(
        "'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n\n</think>\n\n'"
    )
    assert template.count("think>") == 3
    answers = ["No.", "<think>\nAdd.\n</think>\n\n4."]
    with pytest.raises(InvalidArgumentError, match="response 1 holds thoughts"):
        encode(byte_tokenizer(template), ["Hi", "2+2?"], answers)
    batch = encode(byte_tokenizer(), ["Hi", "2+2?"], answers)
    labels = batch["labels"][1]
    assert byte_tokenizer().decode(labels[labels != -100]) == answers[1] + "<|im_end|>"


def test_a_template_that_writes_the_date_writes_the_same_one_every_day(monkeypatch):
    from transformers.utils import chat_template_utils

    class Tomorrow(chat_template_utils.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2099, 1, 1)

    tokenizer = byte_tokenizer(
        "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') + '\n' }}{% endif %}" + CHATML
    )
    today = encode(tokenizer, "Hi", "No.")["input_ids"]
    assert tokenizer.decode(today[0]).startswith("26 Jul 2024\n<|im_start|>user\nHi")
    monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False).startswith("01 Jan 2099")
    assert torch.equal(encode(tokenizer, "Hi", "No.")["input_ids"], today)


def test_messages_that_the_template_does_not_show():
    shows_two = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role in ('user', 'assistant') %}")
    assert shows_two != CHATML
    tokenizer, question = byte_tokenizer(shows_two), {"role": "user", "content": "Hi"}
    encode(tokenizer, [question], "No.")
    for turns in ([{"role": "developer", "content": "In French."}, question], [{"role": "human", "content": "Hi"}]):
        with pytest.raises(InvalidArgumentError, match=f"does not show messages of the role '{turns[0]['role']}'"):
            encode(tokenizer, turns, "No.")
        with pytest.raises(InvalidArgumentError, match=f"does not show messages of the role '{turns[0]['role']}'"):
            prompt_ids(tokenizer, turns)


def test_messages_that_the_template_changes_are_shown():
    as_json = byte_tokenizer(CHATML.replace("m['content'] + ", "(m['content'] | tojson) + "))
    for prompt in ('Say "hi".', [{"role": "tool", "content": '{"a": 1}'}, {"role": "user", "content": "Hi"}]):
        assert prompt_ids(as_json, prompt)


def test_a_template_that_shows_contents_in_parts():
    # As those of models of images do.
    in_parts = CHATML.replace(
        "m['content'] + ", "(m['content'] | selectattr('type', 'defined') | map(attribute='text') | join) + "
    )
    plain, parts = byte_tokenizer(), byte_tokenizer(in_parts)
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        expected = encode(plain, prompt, response)
        for name, tensor in encode(parts, prompt, response).items():
            assert torch.equal(tensor, expected[name])
    assert end_of_turn(parts) == "<|im_end|>"


def test_a_template_that_shows_nothing():
    tokenizer = byte_tokenizer("{% for m in messages %}{{ m.text }}{% endfor %}<|im_start|>")
    with pytest.raises(InvalidArgumentError, match="does not show what a user says"):
        encode(tokenizer, "Hi", "No.")
    with pytest.raises(InvalidArgumentError, match="does not show what a user says"):
        prompt_ids(tokenizer, "Hi")


def spaced_tokenizer(chat_template):
    """Characters, with the space that SentencePiece puts before a text, and that space and an N as one token."""
    symbols = [*map(chr, range(32, 127)), "\n", "\u2581", "\u2581N", "<unk>"]
    vocabulary = {symbol: number for number, symbol in enumerate(symbols)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("\u2581", "N")], unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    tokenizer.chat_template = chat_template
    return tokenizer


@pytest.mark.parametrize(
    ("turn", "asking", "first"), [("A: ", "A:", "\u2581N"), ("A:\n", "A:\n", "N")], ids=["space", "line"]
)
def test_an_answer_has_the_tokens_that_it_has_behind_the_prompt(turn, asking, first):
    tokenizer = spaced_tokenizer(
        "{% for m in messages %}{{ 'U: ' + m.content + '\n' if m.role == 'user' else '"
        + turn.replace("\n", "\\n")
        + "' + m.content }}{% endfor %}{% if add_generation_prompt %}{{ '"
        + asking.replace("\n", "\\n")
        + "' }}{% endif %}"
    )
    batch = encode(tokenizer, "Hi", "No.")
    whole = tokenizer(f"U: Hi\n{turn}No.", add_special_tokens=False).input_ids
    assert batch["input_ids"][0].tolist() == whole
    labels = batch["labels"][0]
    assert tokenizer.convert_ids_to_tokens(labels[labels != -100].tolist()) == [first, "o", "."]


def test_end_of_turn(tokenizer):
    assert end_of_turn(tokenizer) == "<|im_end|>"


def test_a_conversation_as_prompt(tokenizer):
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "And now?"},
    ]
    batch = encode(tokenizer, turns, "No.")
    expected = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert prompt_ids(tokenizer, turns) == expected
    assert batch["input_ids"][0, : len(expected)].tolist() == expected
    labels = batch["labels"][0]
    # The assistant's earlier turn is not learnt.
    assert tokenizer.decode(labels[labels != -100]) == "No.<|im_end|>"
    # Beside plain prompts, and a single user turn is one.
    together = encode(tokenizer, [turns, "Hi", [{"role": "user", "content": "Hi"}]], ["No.", "Yes.", "Yes."])
    assert torch.equal(together["input_ids"][0], batch["input_ids"][0])
    assert torch.equal(together["input_ids"][1], together["input_ids"][2])


@pytest.mark.parametrize(
    ("prompt", "response", "message"),
    [
        ([[]], ["No."], "prompt 0 is an empty list"),
        ([["Hi"]], ["No."], "prompt 0 must hold messages only"),
        ([{"role": "user", "content": None}], "No.", "prompt 0 must hold messages only"),
        ([{"role": "user", "content": "Hi"}], ["No."], "prompt 0 is a dict"),
        ([{"role": "assistant", "content": "Hi"}], "No.", "prompt 0 ends with the assistant's message"),
        ("Hi", "", "response 0 is empty"),
        (["Hi", "Ho"], ["No.", " \n"], "response 1 is empty"),
        (["Hi", "Ho"], ["No."], "2 prompts but 1 responses"),
        ("Hi", ["No."], "one each or a sequence"),
        ([], [], "no prompt"),
        ([None], ["No."], "prompt 0 is a NoneType"),
    ],
)
def test_wrong_texts(tokenizer, prompt, response, message):
    with pytest.raises(InvalidArgumentError, match=message):
        encode(tokenizer, prompt, response)


def test_a_template_that_refuses_a_system_message():
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    with pytest.raises(InvalidArgumentError, match="refuses messages of system, user: no system role"):
        encode(byte_tokenizer(template), turns, "No.")


def test_longer_than_the_models_positions():
    config = GPT2Config(vocab_size=260, n_embd=8, n_layer=1, n_head=1, n_positions=32)
    model, tokenizer = GPT2LMHeadModel(config), byte_tokenizer()
    with pytest.raises(InvalidArgumentError, match=r"up to \d+ tokens, but the model takes 32 at most"):
        refusal(model, encode(tokenizer, "Hi" * 40, "No."))
    with pytest.raises(InvalidArgumentError, match=r"up to \d+ tokens, but the model takes 32 at most"):
        attack_success_rate(model, tokenizer, ["Hi" * 40])


def test_no_chat_template():
    with pytest.raises(InvalidArgumentError, match=r"no chat template: load .* or set tokenizer\.chat_template"):
        encode(byte_tokenizer(None), "Hi", "No.")


def test_refusal_equals_the_models_own_loss(tokenizer, model):
    batch = encode(tokenizer, PROMPTS, RESPONSES)
    loss = refusal(model, batch)
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, model(**batch).loss, rtol=1e-6, atol=0)


def test_refusal_has_the_gradients_of_the_models_own_loss(tokenizer, model):
    batch = encode(tokenizer, PROMPTS, RESPONSES)
    parameters = list(model.parameters())
    ours = torch.autograd.grad(refusal(model, batch), parameters)
    theirs = torch.autograd.grad(model(**batch).loss, parameters)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_refusal_is_the_mean_over_all_answer_tokens(tokenizer, model):
    total, tokens = 0.0, 0
    with torch.no_grad():
        for pair in zip(PROMPTS, RESPONSES, strict=True):
            batch = encode(tokenizer, *pair)
            count = int((batch["labels"] != -100).sum())
            total += refusal(model, batch).item() * count
            tokens += count
        together = refusal(model, encode(tokenizer, PROMPTS, RESPONSES)).item()
    assert together == pytest.approx(total / tokens, rel=1e-5)


def test_refusal_in_bf16_upcasts_the_labelled_logits_only(tokenizer):
    model = tiny_llama().to(torch.bfloat16)
    batch = encode(tokenizer, PROMPTS, RESPONSES)
    upcast = []

    class Recorder(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if func is torch.Tensor.float and args[0].shape[-1:] == (259,):
                upcast.append(args[0].shape)
            return result

    with Recorder():
        loss = refusal(model, batch)
    assert upcast == [(int((batch["labels"] != -100).sum()), 259)]
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, model(**batch).loss.float(), rtol=1e-5, atol=0)


def test_positions_that_are_no_rows_answer_get_no_logits(tokenizer, model):
    batch = encode(tokenizer, PROMPTS, RESPONSES)
    length = batch["labels"].shape[1]
    batch["labels"][:, : length // 2] = -100
    batch["labels"][1, 4] = batch["labels"][:, -1] = 5
    columns = (batch["labels"] != -100).any(0).sum()
    shapes = []
    handle = model.lm_head.register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    try:
        loss = refusal(model, batch)
    finally:
        handle.remove()
    assert shapes == [(3, columns, 259)]
    torch.testing.assert_close(loss, model(**batch).loss, rtol=1e-6, atol=0)


class AllPositions(nn.Module):
    """A model whose forward does not know of ``logits_to_keep``."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, use_cache):
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)


def test_refusal_where_a_model_gives_all_logits(tokenizer, model):
    batch = encode(tokenizer, PROMPTS, RESPONSES)
    parameters = list(model.parameters())
    ours, whole = refusal(model, batch), refusal(AllPositions(model), batch)
    torch.testing.assert_close(whole, ours, rtol=1e-6, atol=0)
    for one, other in zip(*(torch.autograd.grad(loss, parameters) for loss in (whole, ours)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_refusal_keeps_no_cache(tokenizer, model):
    outputs = []
    handle = model.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        refusal(model, encode(tokenizer, "Hi", "No."))
    finally:
        handle.remove()
    assert outputs[0].past_key_values is None
    assert outputs[0].loss is None


def test_refusal_on_another_architecture(tokenizer):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=259, n_embd=16, n_layer=1, n_head=2)).eval()
    batch = encode(tokenizer, PROMPTS, RESPONSES)
    torch.testing.assert_close(refusal(model, batch), model(**batch).loss, rtol=1e-6, atol=0)


def test_refusal_without_a_labelled_token(tokenizer, model):
    batch = encode(tokenizer, "Hi", "No.")
    with pytest.raises(InvalidArgumentError, match="no token of the batch is labelled"):
        refusal(model, {**batch, "labels": torch.full_like(batch["labels"], -100)})
    with pytest.raises(InvalidArgumentError, match="no 'labels'"):
        refusal(model, {"input_ids": batch["input_ids"]})
    # The first position has no predecessor that could predict it.
    first = torch.full_like(batch["labels"], -100)
    first[:, 0] = 5
    with pytest.raises(InvalidArgumentError, match="no token of the batch is labelled"):
        refusal(model, {**batch, "labels": first})


def test_several_chat_templates_without_a_default_are_refused():
    tokenizer = byte_tokenizer({"rag": CHATML, "tool_use": CHATML})
    with pytest.raises(InvalidArgumentError, match=r"several chat templates \(rag, tool_use\)"):
        encode(tokenizer, "Hi", "Hello.")
    tokenizer = byte_tokenizer({"default": CHATML, "rag": "no"})
    assert torch.equal(
        encode(tokenizer, "Hi", "Hello.")["input_ids"], encode(byte_tokenizer(), "Hi", "Hello.")["input_ids"]
    )


class Prompted(nn.Module):
    """A model that puts tokens of its own before a batch, as PEFT's prompt tuning does."""

    def __init__(self):
        super().__init__()
        self.model = tiny_llama()

    def forward(self, input_ids, **options):
        return self.model(torch.cat([input_ids[:, :3], input_ids], dim=1))


def test_refusal_where_the_model_adds_positions(tokenizer):
    batch = encode(tokenizer, PROMPTS, RESPONSES)
    length = batch["labels"].shape[1]
    with pytest.raises(InvalidArgumentError, match=f"predicts {length + 3} positions for a batch of {length}"):
        refusal(Prompted(), batch)


def test_refusal_where_an_image_stands_before_the_text(tokenizer):
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    sizes = {"vocab_size": 259, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = GitForCausalLM(GitConfig(vision_config=vision, **sizes)).eval()
    batch = encode(tokenizer, PROMPTS, RESPONSES)
    assert refusal(model, batch).isfinite()
    with pytest.raises(InvalidArgumentError, match=r"the model predicts \d+ positions for a batch of"):
        refusal(model, {**batch, "pixel_values": torch.zeros(3, 3, 8, 8)})


def test_refusal_with_options_in_the_batch(tokenizer, model):
    batch = encode(tokenizer, PROMPTS, RESPONSES)
    assert torch.equal(refusal(model, {**batch, "use_cache": True, "logits_to_keep": 1}), refusal(model, batch))


def test_a_tokenizer_with_more_tokens_than_the_model(tokenizer, model):
    tokenizer.add_tokens(["<think>", "</think>"])
    batch = encode(tokenizer, "Hi", "</think>No.")
    with pytest.raises(InvalidArgumentError, match=r"has a token 260, but the model has embeddings for 259: .*resize"):
        refusal(model, batch)
    with pytest.raises(InvalidArgumentError, match="has a token 259, but the model has embeddings for 259"):
        attack_success_rate(model, tokenizer, ["<think>"])


def test_an_encoder_with_a_decoder_is_refused(tokenizer):
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    heads = {"encoder_attention_heads": 1, "decoder_attention_heads": 1}
    bart = BartForConditionalGeneration(BartConfig(vocab_size=len(tokenizer), d_model=8, **sizes, **heads))
    with pytest.raises(InvalidArgumentError, match=r"an encoder and a decoder.*its own loss"):
        refusal(bart, encode(tokenizer, PROMPTS, RESPONSES))
    with pytest.raises(InvalidArgumentError, match=r"an encoder and a decoder.*only causal"):
        attack_success_rate(bart, tokenizer, PROMPTS)


def test_rows_in_place_of_batches_are_explained(model, tokenizer):
    batch = encode(tokenizer, PROMPTS, RESPONSES)
    row = {name: tensor[0] for name, tensor in batch.items()}
    lists = {name: tensor.tolist() for name, tensor in row.items()}
    for objective, rows, what in (
        (refusal, row, r"tensor of shape \(\d+,\).*DataLoader"),
        (refusal, {**lists, "labels": row["labels"]}, "got a list.*DataLoader"),
        (None, lists, "got a list.*DataLoader"),
        (refusal, "a prompt", "no 'labels'"),
    ):
        with pytest.raises(InvalidArgumentError, match=what) as raised:
            score(model, [batch, rows], objective)
        assert raised.value.__notes__ == ["This was in batch 1 of the loader, counted from 0."]
