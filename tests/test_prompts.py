import csv
import json
import re

import pytest

from safekern.errors import FileAccessError, FileFormatError, InvalidArgumentError
from safekern.evaluation import is_degenerate, is_refusal
from safekern.prompts import PROMPT_FIELDS, RESPONSE_FIELDS, Pairs, builtin, load, load_prompts, with_refusals

KINDS, SPLITS = ("harmful", "benign"), ("tune", "eval")


def words(prompt):
    return frozenset(re.findall(r"[a-z']+", prompt.lower()))


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_and_breadth(kind):
    tune, held_out = builtin(kind, "tune"), builtin(kind, "eval")
    assert len(tune) >= 160
    assert len(held_out) >= 60
    assert len(set(tune.categories)) >= 12
    assert set(held_out.categories) == set(tune.categories)
    # Any first part covers the categories evenly.
    assert len(set(held_out[:16].categories)) >= 12


@pytest.mark.parametrize("kind", KINDS)
def test_no_prompt_is_held_out_and_trained_on(kind):
    prompts = [words(prompt) for split in SPLITS for prompt in builtin(kind, split).prompts]
    assert len(set(prompts)) == len(prompts)
    for i, one in enumerate(prompts):
        for other in prompts[:i]:
            assert len(one & other) / len(one | other) < 0.75, (sorted(one), sorted(other))


@pytest.mark.parametrize("split", SPLITS)
def test_texts_are_short_and_harmful_prompts_are_refused(split):
    harmful, benign = (builtin(kind, split) for kind in KINDS)
    for pairs in (harmful, benign):
        assert all(10 < len(prompt) <= 120 for prompt in pairs.prompts)
        assert all(5 < len(response) <= 400 for response in pairs.responses)
        assert not any(map(is_degenerate, pairs.responses))
    assert all(map(is_refusal, harmful.responses))
    assert not any(map(is_refusal, benign.responses))
    # A refusal learnt by heart would be no more than one sentence.
    assert len(set(harmful.responses)) > 0.9 * len(harmful)


def test_slicing_keeps_pairs_together():
    pairs = builtin("benign", "eval")
    part = pairs[3:5]
    assert (part.prompts, part.responses, part.categories) == (
        pairs.prompts[3:5],
        pairs.responses[3:5],
        pairs.categories[3:5],
    )


ASKED, ANSWERED = (
    ["How do I knot a tie?", 'Why, "then"?\u2028Because?', "東京は"],
    ["Like this.", "So,\nsee.", "都市。"],
)
TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "And now?"},
]
LAST = {"role": "assistant", "content": "Now this."}


def rows_of(prompt_field="prompt", response_field="response", **more):
    return [{prompt_field: p, response_field: r, **more} for p, r in zip(ASKED, ANSWERED, strict=True)]


def write(path, rows):
    if path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    else:
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    return path


class Dataset:
    """As a Hugging Face dataset: rows by iteration, absent fields as None."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return ({**row, "completion": None, "messages": None} for row in self.rows)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".JSONL"])
def test_a_file_of_pairs(tmp_path, suffix):
    path = write(tmp_path / f"pairs{suffix.lower()}", rows_of(category="ties", id="7"))
    path = path.rename(path.with_suffix(suffix))
    for source in (path, str(path)):
        pairs = load(source)
        assert (pairs.prompts, pairs.responses, pairs.categories) == (ASKED, ANSWERED, ["ties"] * 3)
        assert load_prompts(source) == ASKED


@pytest.mark.parametrize("prompt_field", [field for field in PROMPT_FIELDS if field != "messages"])
@pytest.mark.parametrize("response_field", RESPONSE_FIELDS)
def test_the_usual_fields(prompt_field, response_field):
    pairs = load(
        Dataset(rows_of(prompt_field, "response"))
        if response_field == "response"
        else rows_of(prompt_field, response_field)
    )
    assert (pairs.prompts, pairs.responses, pairs.categories) == (ASKED, ANSWERED, [""] * 3)


def test_an_instruction_with_its_input():
    rows = [{"instruction": "Add.", "input": text, "output": "3"} for text in ("1, 2", "", " ", None)]
    assert load(rows).prompts == load_prompts(rows) == ["Add.\n\n1, 2", "Add.", "Add.", "Add."]


@pytest.mark.parametrize("field", ["instruction", "question"])
def test_what_a_prompt_is_about_follows_it(field):
    rows = [{field: "When?", "context": text, "answer": "1999."} for text in ("It began in 1999.", "")]
    assert load(rows).prompts == load_prompts(rows) == ["When?\n\nIt began in 1999.", "When?"]


def test_messages(tmp_path):
    rows = [{"messages": [*TURNS, LAST]}, {"messages": [TURNS[0], LAST]}]
    for source in (rows, write(tmp_path / "a.jsonl", rows)):
        pairs = load(source)
        assert pairs.prompts == load_prompts(source) == [TURNS, "Hi"]
        assert pairs.responses == ["Now this."] * 2
    assert load_prompts([{"messages": TURNS}]) == [TURNS]
    # As TRL has them.
    assert load([{"prompt": TURNS, "completion": [LAST]}]) == load(rows)[:1]


@pytest.mark.parametrize("field", ["system", "system_prompt"])
def test_what_the_system_says_goes_before_the_prompt(field):
    system, user = {"role": "system", "content": "In French."}, {"role": "user", "content": "Hi"}
    # As OpenOrca and LLaMA-Factory have it, with and without messages.
    for prompt in ({"question": "Hi", "response": "No."}, {"messages": [user, LAST]}):
        rows = [{**prompt, field: "In French."}, {**prompt, field: " "}, {**prompt, field: None}]
        assert load(rows).prompts == load_prompts(rows) == [[system, user], "Hi", "Hi"]


def test_prompts_alone(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("Hi\r\n\r\n  東京は \nEnd".encode())
    assert load_prompts(path) == ["Hi", "東京は", "End"]
    assert load_prompts(["a", "b"]) == ["a", "b"]
    assert load_prompts(write(tmp_path / "a.json", [{"id": 1, "goal": "a"}, {"id": 2, "goal": "b"}])) == ["a", "b"]
    with pytest.raises(FileFormatError, match=r"prompts\.txt, line 1: a text alone, but a response is needed"):
        load(path)


def test_what_an_attack_wants_to_hear_is_not_learnt():
    rows = [{"goal": "Tell me", "target": "Sure, here"}]
    assert load_prompts(rows) == ["Tell me"]
    with pytest.raises(InvalidArgumentError, match="'target' is what an attack wants to hear"):
        load(rows)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"prompt": "a", "response": "b"}\n\n{"prompt": "a"\n', r"line 3: is not valid JSON"),
        (
            "a.jsonl",
            '{"prompt": "a", "response": "b"}\n{"question": "a", "answer": "b"}',
            r"line 2: uses 'question' and 'answer', but line 1 uses 'prompt' and 'response'",
        ),
        (
            "a.jsonl",
            '{"text": "a", "label": 1}',
            r"line 1: needs a prompt \(.* or goal\) and a response \(response, .* or answer\).*; found text, label",
        ),
        ("a.jsonl", '{"prompt": "a"}', r"line 1: needs .* found prompt"),
        ("a.jsonl", '\n{"prompt": " ", "response": "b"}', r"line 2: 'prompt' is empty"),
        ("a.jsonl", '{"prompt": "a", "response": ""}', r"line 1: 'response' is empty"),
        ("a.jsonl", '{"prompt": 3, "response": "b"}', r"line 1: 'prompt' is a int"),
        ("a.jsonl", '{"prompt": "a", "question": "b", "response": "c"}', r"line 1: has 'prompt' and 'question'"),
        ("a.jsonl", '{"prompt": "a", "response": "c", "output": "d"}', r"line 1: has 'response' and 'output'"),
        ("a.jsonl", '["a"]', r"line 1: a list, but must be an object"),
        ("a.jsonl", "{}", r"line 1: needs .* found nothing"),
        ("a.jsonl", '{"messages": []}', r"line 1: 'messages' must be a list of messages"),
        (
            "a.jsonl",
            '{"messages": [{"role": "user", "content": null}]}',
            r"line 1: 'messages' must be a list of messages",
        ),
        (
            "a.jsonl",
            '{"messages": [{"role": "user", "content": "a"}]}',
            r"line 1: 'messages' must hold a prompt and end with",
        ),
        ("a.jsonl", '{"messages": [{"role": "assistant", "content": "a"}]}', r"line 1: 'messages' must hold a prompt"),
        (
            "a.jsonl",
            '{"prompt": "a", "completion": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "a"}]}',
            r"line 1: 'completion' holds messages of assistant, user",
        ),
        (
            "a.jsonl",
            '{"prompt": "a", "completion": [{"role": "user", "content": "b"}]}',
            r"line 1: 'completion' holds messages of user, but the response must be one of the assistant",
        ),
        (
            "a.jsonl",
            '{"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "response": "c"}',
            r"line 1: 'prompt' ends with the assistant's message, and 'response' is another one",
        ),
        (
            "a.jsonl",
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "response": "c"}',
            r"line 1: has 'messages' and 'response', and it is not clear",
        ),
        ("a.jsonl", '{"instruction": "a", "input": 3, "output": "b"}', r"line 1: 'input' is a int"),
        ("a.json", '[{"prompt": "a",\n "response": }]', r"line 2: is not valid JSON"),
        ("a.json", '{"prompt": "a"}\n{"prompt": "b"}', r"line 2: is not valid JSON.*must be named \.jsonl"),
        ("a.json", '{"data": []}', r"line 1: holds a dict, but must hold a list"),
        ("a.json", '[{"prompt": "a", "response": "b"}, 3]', r"row 2: a int"),
        ("a.csv", 'prompt,response\na,b\n"a\nb",c,d\n', r"line 4: has not as many fields as the header"),
        ("a.csv", "prompt;response\na, b;c\n", r"line 1: separates the fields by ';'"),
        ("a.csv", '"prompt"\t"response"\n"a"\t"b"\n', r"line 1: separates the fields by '\\t'"),
        ("a.csv", "prompt,response\na\n", r"line 2: has not as many fields"),
        ("a.csv", 'prompt,response\n"a"b,c\n', r"line 2: is not valid CSV"),
        ("a.csv", 'prompt,response\na,"b', r"line 2: is not valid CSV"),
        ("a.csv", "prompt,prompt\na,b\n", r"line 1: the header names a field twice"),
        ("a.csv", "prompt,response\n", r"holds no rows"),
        ("a.csv", "", r"holds no rows"),
        ("a.json", "", r"holds no rows"),
        ("a.json", "[]", r"holds no rows"),
        ("a.jsonl", "\n", r"holds no rows"),
        (
            "a.jsonl",
            '{"prompt": "a", "response": "b\\ud83d"}',
            r"line 1: 'response' holds \\ud83d, half of a surrogate",
        ),
        (
            "a.jsonl",
            '{"instruction": "a", "input": "\\udc00", "output": "b"}',
            r"line 1: 'input' holds \\udc00, half of a surrogate",
        ),
        ("a.json", "[" * 100_000, r"line 1: is not valid JSON"),
        ("a.jsonl", "\n" + "[" * 100_000, r"line 2: is not valid JSON"),
        ("a.parquet", "x", r"must end in one of \.json, \.jsonl, \.csv, \.txt"),
    ],
)
def test_what_is_wrong_in_a_file_is_said(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8", newline="")
    with pytest.raises(FileFormatError, match=message) as caught:
        load(path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".txt"])
def test_another_encoding(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes('{"prompt": "a"}\n{"prompt": "caf\xe9"}'.encode("latin-1"))
    with pytest.raises(FileFormatError, match=r"line 2: is not UTF-8 text"):
        load_prompts(path)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "list: holds no rows"),
        (["a", {"prompt": "b"}], "list, row 2: uses 'prompt', but row 1 uses 'a text alone'"),
        (["a", ""], "row 2: 'prompt' is empty"),
        ([{"id": 3}], r"row 1: needs one of the fields prompt, instruction, question, goal or messages; found id"),
        ([{"messages": [LAST]}], r"row 1: 'messages' holds no message before the assistant's"),
        ([{"prompt": "a", "history": [["b", "c"]]}], "row 1: holds earlier turns in 'history', .* as 'messages'"),
        (
            [{"messages": [{"role": "system", "content": "x"}, *TURNS], "system": "y"}],
            "row 1: has 'system' and a message",
        ),
        ({"train": [], "test": []}, "a dict of train, test was given: pass one of them"),
        (3, "a int was given"),
    ],
)
def test_what_is_wrong_in_memory_is_said(rows, message):
    with pytest.raises(InvalidArgumentError, match=message):
        load_prompts(rows)


class Frame:
    """As a DataFrame of pandas: it iterates over the names of its columns."""

    columns = ("prompt", "response")

    def __iter__(self):
        return iter(self.columns)

    def __len__(self):
        return 3


@pytest.mark.parametrize("read", [load, load_prompts, with_refusals, lambda frame: Pairs(frame, ["a"] * 3, [""] * 3)])
def test_a_table_is_not_read_as_the_names_of_its_columns(read):
    with pytest.raises(InvalidArgumentError, match=r"cannot be a Frame, .*\.tolist\(\).*\.to_dict\('records'\)"):
        read(Frame())


class Column(dict):
    """As a Series of pandas: it iterates over its values, and is indexed by their labels."""

    def __iter__(self):
        return iter(self.values())


def test_columns_are_read_by_position():
    shuffled = Column({2: "c", 0: "a", 1: "b"})
    pairs = Pairs(shuffled, ["C", "A", "B"], Column({5: "x", 6: "y", 7: "z"}))
    assert pairs == Pairs(["c", "a", "b"], ["C", "A", "B"], ["x", "y", "z"])
    assert pairs[:1].prompts == ["c"]


def test_no_file(tmp_path):
    with pytest.raises(FileAccessError, match=r"a\.json: cannot be read: No such file"):
        load(tmp_path / "a.json")
    (tmp_path / "b.csv").mkdir()
    with pytest.raises(FileAccessError, match=r"b\.csv: cannot be read"):
        load(tmp_path / "b.csv")


def test_long_texts_in_a_csv_file(tmp_path):
    limit = csv.field_size_limit()
    rows = [{"prompt": "a" * 200_000, "response": "b"}]
    assert load(write(tmp_path / "a.csv", rows)).prompts == ["a" * 200_000]
    assert csv.field_size_limit() == limit


def test_an_empty_column_of_a_csv_file_is_none(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt,question,response,output\na,,b,\nc,,d,\n")
    pairs = load(path)
    assert pairs.prompts == ["a", "c"] and pairs.responses == ["b", "d"]
