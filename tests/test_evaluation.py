import copy
import logging
import sys

import numpy as np
import pytest
import torch
from language_models import PROMPTS, RESPONSES, byte_tokenizer, tiny_llama

from safekern.chat import prompt_ids
from safekern.errors import InvalidArgumentError, JudgeError
from safekern.evaluation import (
    REFUSAL_PHRASES,
    attack_success_rate,
    is_degenerate,
    is_refusal,
    mean_nll,
    refusal_rate,
)
from safekern.objectives import encode, refusal

TOKENS = 12


@pytest.fixture
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def model():
    return tiny_llama()


@pytest.fixture
def transformers_log(caplog):
    """Transformers keeps its records from the root logger, where caplog listens."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def greedy_ids(model, tokenizer, prompt, tokens=TOKENS):
    ids = prompt_ids(tokenizer, prompt)
    start = len(ids)
    with torch.no_grad():
        for _ in range(tokens):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[start:]


def greedy_text(model, tokenizer, prompt):
    ids = greedy_ids(model, tokenizer, prompt)
    stop = ids.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids else len(ids)
    return tokenizer.decode(ids[:stop], skip_special_tokens=True).strip()


@pytest.mark.parametrize(
    "response",
    [
        "I'm sorry, but I can't help with that.",
        "I\u2019m sorry.",
        "I CANNOT do that",
        "Unfortunately, I won\u02bct write this.",
        "No. I am unable to assist.",
        "Sure, I thought, but no: I\ncan't.",
        "As a responsible assistant I must respectfully decline.",
    ],
)
def test_refusals(response):
    assert is_refusal(response)


@pytest.mark.parametrize(
    "response",
    [
        "",
        "Sure! First, whisk the eggs.",
        "Hawaii cannot be reached by car, and Miami can't be missed.",
        "Hawai\u2018i cannot be reached by car.",
        "As an AI language model, I find this illegal move in chess funny.",
        "Sorry for the delay! Here is the recipe.",
        "You can't divide by zero, so it isn't possible to solve this.",
        "I'm so sorry to hear that you are ill. Here is what helps against a cold:",
    ],
)
def test_helpful_answers(response):
    assert not is_refusal(response)


def test_refusal_phrases_are_in_the_form_that_is_searched_for():
    for phrase in REFUSAL_PHRASES:
        assert phrase == phrase.lower().strip()
        assert phrase.isascii()
        assert is_refusal(phrase)
    assert len(set(REFUSAL_PHRASES)) == len(REFUSAL_PHRASES)


@pytest.mark.parametrize(
    "response",
    [
        "",
        " \n",
        "?!",
        "!" * 40,
        "a" * 40,
        "the the the the the the the",
        "Boil an egg:\n\nBoil an egg:\n\nBoil an egg:\n\nBoil",
        "Here is the plan. " + "And then I went home. " * 3 + "And then",
        "1.\n" * 20,
        "はい、" * 12,
        "ha ha ha ha ha ha ha",
        "4/7799" + "/4" * 10,
        "The best time to water is in the morning. The best time to water is in the mor",
        "Take a bag that suits you. I can help with a bag that is light. I can help with a bag that is light.",
    ],
)
def test_degenerate(response):
    assert is_degenerate(response)


@pytest.mark.parametrize(
    "response",
    [
        "No",
        "42",
        "No, no, no!",
        "ha ha ha",
        "I cannot help with that. I cannot help with that because it would hurt somebody.",
        "1. Wash the rice.\n2. Boil the rice.\n3. Serve the rice.",
        "Chorus: la la la la. After this comes a long verse about the sea and the wind.",
        "10, 20, 30, 40, 50, 60, 70, 80, 90, 100",
        "I can help you find a bag that suits you. I can help you find a bus that is on time.",
        "It is done. It is done.",
    ],
)
def test_not_degenerate(response):
    assert not is_degenerate(response)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_responses_are_greedy_whatever_the_batch(model, tokenizer, batch_size):
    prompts = [*PROMPTS, "x" * 60, "y"]
    expected = [greedy_text(model, tokenizer, prompt) for prompt in prompts]
    assert len(set(expected)) == len(prompts)
    result = attack_success_rate(model, tokenizer, prompts, max_new_tokens=TOKENS, batch_size=batch_size)
    assert result.responses == expected


def test_generation_stops_where_the_model_says_so(model, tokenizer):
    ids = greedy_ids(model, tokenizer, PROMPTS[0])
    at = next(i for i in range(2, TOKENS) if ids[i] not in ids[:i])
    model.generation_config.eos_token_id = [ids[at], 3]
    responses = attack_success_rate(model, tokenizer, PROMPTS, max_new_tokens=TOKENS).responses
    # The stopped row is shorter than its neighbours and filled up with the padding token.
    assert responses[0] == tokenizer.decode(ids[:at], skip_special_tokens=True).strip()


def test_generation_stops_at_the_templates_end_of_turn(model, tokenizer):
    # A base model knows only the end of a document; the row would run on after the turn.
    tokenizer.eos_token = "<|im_start|>"
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        model.lm_head.weight[tokenizer.convert_tokens_to_ids("<|im_end|>")] = 0
        hidden = model.model(torch.tensor([prompt_ids(tokenizer, "Hi")])).last_hidden_state[0, -1]
        model.lm_head.weight[tokenizer.convert_tokens_to_ids("<|im_end|>")] = 10 * hidden
    lengths = []
    handle = model.register_forward_hook(lambda module, args, output: lengths.append(output.logits.shape[1]))
    result = attack_success_rate(model, tokenizer, ["Hi"], max_new_tokens=TOKENS)
    handle.remove()
    assert result.responses == [""]
    assert result.degenerate == 1
    assert len(lengths) == 1


def snapshot(model, tokenizer):
    return {
        "modes": [module.training for module in model.modules()],
        "generation_config": copy.deepcopy(model.generation_config.to_dict()),
        "config": copy.deepcopy(model.config.to_dict()),
        "gradients": [(p.requires_grad, p.grad) for p in model.parameters()],
        "grad_mode": torch.is_grad_enabled(),
        "tokenizer": (tokenizer.padding_side, tokenizer.pad_token, tokenizer.chat_template),
    }


@pytest.fixture
def unusual(model, tokenizer):
    """A model in the middle of its training, in mixed modes and with another generation configuration."""
    model.train()
    model.model.layers[1].eval()
    model.config.use_cache = False
    model.generation_config.update(
        do_sample=True, temperature=0.6, top_p=0.8, top_k=7, typical_p=0.9, min_p=0.1, max_length=30, use_cache=False
    )
    model.generation_config.update(
        max_new_tokens=1, min_new_tokens=1, min_length=500, repetition_penalty=5.0, no_repeat_ngram_size=2
    )
    return model


def test_state_is_left_as_found(unusual, tokenizer):
    before = snapshot(unusual, tokenizer)
    attack_success_rate(unusual, tokenizer, PROMPTS, max_new_tokens=2)
    refusal_rate(unusual, tokenizer, PROMPTS, max_new_tokens=2)
    mean_nll(unusual, tokenizer, PROMPTS, RESPONSES)
    assert snapshot(unusual, tokenizer) == before


def test_state_is_left_as_found_on_an_exception(unusual, tokenizer):
    before = snapshot(unusual, tokenizer)
    seen = []

    def fail(module, args):
        seen.append((torch.is_grad_enabled(), [m.training for m in unusual.modules()]))
        raise ZeroDivisionError

    handle = unusual.model.layers[0].register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        attack_success_rate(unusual, tokenizer, PROMPTS, max_new_tokens=2)
    with pytest.raises(ZeroDivisionError):
        mean_nll(unusual, tokenizer, PROMPTS, RESPONSES)
    handle.remove()
    assert len(seen) == 2
    assert not any(grad_mode or any(modes) for grad_mode, modes in seen)
    assert snapshot(unusual, tokenizer) == before


def test_a_sampling_configuration_changes_nothing(unusual, tokenizer, transformers_log):
    expected = [greedy_text(unusual, tokenizer, prompt) for prompt in PROMPTS]
    result = attack_success_rate(unusual, tokenizer, PROMPTS, max_new_tokens=TOKENS)
    assert result.responses == expected
    assert [record.getMessage() for record in transformers_log.records] == []


@pytest.mark.parametrize(
    "options",
    [
        {"guidance_scale": 1.5},
        {"encoder_repetition_penalty": 1.5, "encoder_no_repeat_ngram_size": 2},
        {"exponential_decay_length_penalty": (1, 1.5)},
        {"max_time": 1e-9},
        {"stop_strings": ["e"]},
        {"forced_eos_token_id": 3},
        {"sequence_bias": [[[60], 50.0]]},
        {"penalty_alpha": 0.6},
        {"prompt_lookup_num_tokens": 3},
        {"token_healing": True},
        {"dola_layers": "high"},
        {"assistant_early_exit": 1},
    ],
    ids=lambda options: next(iter(options)),
)
def test_nothing_in_the_models_configuration_makes_answers_less_than_greedy(model, tokenizer, options):
    expected = [greedy_text(model, tokenizer, prompt) for prompt in PROMPTS]
    for name, value in options.items():
        setattr(model.generation_config, name, value)
    before = snapshot(model, tokenizer)
    assert attack_success_rate(model, tokenizer, PROMPTS, max_new_tokens=TOKENS).responses == expected
    assert snapshot(model, tokenizer) == before


def test_rates_and_repr(model, tokenizer):
    judged = []

    def judge(prompt, response):
        judged.append((prompt, response))
        return np.bool_(prompt == "Hi")

    result = attack_success_rate(model, tokenizer, PROMPTS, judge=judge, max_new_tokens=TOKENS)
    assert judged == list(zip(PROMPTS, result.responses, strict=True))
    assert result.successes == [False, True, False]
    assert all(type(success) is bool for success in result.successes)
    assert result.rate == pytest.approx(1 / 3)
    assert repr(result) == "AttackResult(rate=0.333, successes=1/3, degenerate=0/3)"

    benign = refusal_rate(model, tokenizer, PROMPTS, judge=lambda prompt, response: prompt != "Hi", max_new_tokens=1)
    assert benign.refused == [True, False, True]
    assert benign.rate == pytest.approx(2 / 3)
    assert repr(benign).startswith("RefusalResult(rate=0.667, refused=2/3, degenerate=")


def test_default_judges_are_each_others_opposite(tokenizer, monkeypatch):
    answers = ["I'm sorry, I can't.", "Sure, here it is.", ""]
    monkeypatch.setattr("safekern.evaluation._generate", lambda *args: list(answers))
    attack = attack_success_rate(None, tokenizer, PROMPTS)
    assert attack.successes == [False, True, True]
    # Not refusing is not complying: the empty answer is told apart.
    assert attack.degenerate == 1
    benign = refusal_rate(None, tokenizer, PROMPTS)
    assert benign.refused == [True, False, False]
    assert benign.degenerate == 1


@pytest.mark.parametrize("measure", [attack_success_rate, refusal_rate])
def test_a_judge_that_fails(model, tokenizer, measure):
    def judge(prompt, response):
        if prompt == "Hi":
            raise OSError("guard is down")
        return True

    with pytest.raises(JudgeError, match=r"prompt 1 with OSError: guard is down") as caught:
        measure(model, tokenizer, PROMPTS, judge=judge, max_new_tokens=1)
    assert isinstance(caught.value.__cause__, OSError)


class Remembering(dict):
    """A judge that is empty, and so false, until it is asked."""

    def __call__(self, prompt, response):
        self[prompt] = response
        return False


@pytest.mark.parametrize("measure", [attack_success_rate, refusal_rate])
def test_a_judge_that_is_empty_is_asked(model, tokenizer, measure):
    judge = Remembering()
    assert measure(model, tokenizer, PROMPTS, judge=judge, max_new_tokens=1).rate == 0
    assert list(judge) == PROMPTS


def test_texts_may_be_in_any_container(model, tokenizer):
    expected = attack_success_rate(model, tokenizer, PROMPTS, max_new_tokens=3).responses
    for container in (tuple, np.array, lambda texts: dict(enumerate(texts)).values()):
        assert attack_success_rate(model, tokenizer, container(PROMPTS), max_new_tokens=3).responses == expected
        assert mean_nll(model, tokenizer, container(PROMPTS), container(RESPONSES)) == mean_nll(
            model, tokenizer, PROMPTS, RESPONSES
        )


@pytest.mark.parametrize("verdict", [None, 1, 0.0, "unsafe", torch.tensor(True), np.array([True])])
def test_a_judge_that_answers_no_bool(model, tokenizer, verdict):
    with pytest.raises(JudgeError, match=f"prompt 0 with a {type(verdict).__name__} instead of True or False"):
        attack_success_rate(model, tokenizer, ["Hi"], judge=lambda prompt, response: verdict, max_new_tokens=1)


@pytest.mark.parametrize("measure", [attack_success_rate, refusal_rate])
@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "prompts is empty"),
        ("Hi", {}, "put it in a list"),
        (["Hi", {"goal": "Hi"}], {}, "prompt 1 is a dict"),
        (["Hi"], {"batch_size": 0}, "batch_size is 0"),
        (["Hi"], {"max_new_tokens": 0}, "max_new_tokens is 0"),
    ],
)
def test_wrong_arguments(model, tokenizer, measure, prompts, options, message):
    with pytest.raises(InvalidArgumentError, match=message):
        measure(model, tokenizer, prompts, **options)


class Frame(list):
    """As a DataFrame of pandas."""

    columns = ("prompt",)


def test_a_table_is_not_read_as_the_names_of_its_columns(model, tokenizer):
    prompts = Frame(["prompt"])
    for measure in (attack_success_rate, refusal_rate):
        with pytest.raises(InvalidArgumentError, match=r"prompts cannot be a Frame"):
            measure(model, tokenizer, prompts)
    with pytest.raises(InvalidArgumentError, match=r"responses cannot be a Frame"):
        mean_nll(model, tokenizer, ["Hi"], prompts)
    with pytest.raises(InvalidArgumentError, match=r"prompts cannot be a Frame"):
        encode(tokenizer, prompts, ["No."])


def test_no_chat_template(model):
    with pytest.raises(InvalidArgumentError, match="no chat template"):
        attack_success_rate(model, byte_tokenizer(None), ["Hi"])


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_is_shown_on_a_terminal_only(model, tokenizer, monkeypatch, capsys, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    attack_success_rate(model, tokenizer, PROMPTS, max_new_tokens=1)
    assert ("3/3" in capsys.readouterr().err) == terminal


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_mean_nll_weighs_every_token_equally(model, tokenizer, batch_size):
    expected = refusal(model, encode(tokenizer, PROMPTS, RESPONSES)).item()
    assert mean_nll(model, tokenizer, PROMPTS, RESPONSES, batch_size) == pytest.approx(expected, rel=1e-5)


def test_mean_nll_without_dropout(tokenizer):
    model = tiny_llama()
    expected = mean_nll(model, tokenizer, PROMPTS, RESPONSES)
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    assert mean_nll(model, tokenizer, PROMPTS, RESPONSES) == expected
    assert model.training


@pytest.mark.parametrize(
    ("prompts", "responses", "options", "message"),
    [
        ([], [], {}, "prompts is empty"),
        (["Hi"], ["No.", "Yes."], {}, "1 prompts but 2 responses"),
        (["Hi"], [""], {}, "is empty"),
        (["Hi"], ["No."], {"batch_size": 0}, "batch_size is 0"),
        ("Hi", "No", {}, "put it in a list"),
        (["Hi", "Ho"], "No", {}, "responses is one str"),
        (["Hi"], [None], {}, "response 0 is a NoneType"),
        ({"Hi": 1}, ["No."], {}, "prompts is of type dict"),
    ],
)
def test_mean_nll_wrong_arguments(model, tokenizer, prompts, responses, options, message):
    with pytest.raises(InvalidArgumentError, match=message):
        mean_nll(model, tokenizer, prompts, responses, **options)


def test_smollm2_answers_in_any_batch_and_stops(smollm2, transformers_log, capfd):
    model, tokenizer = smollm2
    prompts = ["What is the capital of France?", "Name one colour.", "Write a haiku about rain, in three short lines."]
    results = [refusal_rate(model, tokenizer, prompts, max_new_tokens=16, batch_size=size) for size in (1, 3)]
    assert results[0].responses == results[1].responses
    assert results[0].responses[0] == "The capital of France is Paris."
    assert results[0].rate == 0.0
    assert results[0].degenerate == 0
    assert transformers_log.records == []
    assert capfd.readouterr() == ("", "")


def test_smollm2_finds_true_answers_likelier(smollm2):
    model, tokenizer = smollm2
    prompts = ["What is the capital of France?", "What is the capital of Italy?"]
    right = ["The capital of France is Paris.", "The capital of Italy is Rome."]
    wrong = ["The capital of France is Rome.", "The capital of Italy is Paris."]
    assert mean_nll(model, tokenizer, prompts, right) + 0.5 < mean_nll(model, tokenizer, prompts, wrong)


def test_data_parallel_models_answer(model, tokenizer):
    wrapped = torch.nn.DataParallel(model)
    assert attack_success_rate(wrapped, tokenizer, PROMPTS) == attack_success_rate(model, tokenizer, PROMPTS)
    given = (tokenizer, PROMPTS, RESPONSES)
    assert mean_nll(wrapped, *given) == mean_nll(model, *given)
