"""Prompts, with or without the responses to train on: those that come with the package, and readers for other files.

The built-in ones are short, non-operational and written for it: harmful requests with refusals, and benign ones with
helpful answers, each in a ``tune`` split to score and train on and an ``eval`` split that no training sees.
"""

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Never

from safekern.chat import Message, Prompt, check_no_table, is_message
from safekern.errors import FileAccessError, FileFormatError, InvalidArgumentError, SafekernError

PROMPT_FIELDS = ("prompt", "instruction", "question", "goal", "messages")
RESPONSE_FIELDS = ("response", "completion", "output", "answer")
# What a prompt is about, of Alpaca, Dolly and SQuAD.
_ADDED = {"instruction": ("input", "context"), "question": ("context",)}

Source = str | os.PathLike[str] | Iterable[Mapping[str, Any]] | Iterable[str]


@dataclass(frozen=True)
class Pairs:
    """Prompts with the responses to train on, in the same order.

    Attributes:
        prompts: what a user asks: a str, or the messages of a conversation.
        responses: a refusal for a harmful prompt, a helpful answer for a benign one.
        categories: the harm category, or the topic; empty where none is known.

    Raises:
        InvalidArgumentError: the three are not equally long, or a text or a table stands for a list.

    Example:
        >>> pairs = Pairs(["What is 2 + 2?", "Say hi."], ["4.", "Hi!"], ["math", ""])
        >>> len(pairs), pairs[:1].responses
        (2, ['4.'])
    """

    prompts: list[Prompt]
    responses: list[str]
    categories: list[str]

    def __post_init__(self) -> None:
        for name, column in list(vars(self).items()):
            if isinstance(column, str):
                raise InvalidArgumentError(f"{name} must be a list, got a text alone: put it in a list")
            check_no_table(name, column)
            # A column of pandas is read by label, not by position.
            object.__setattr__(self, name, list(column))
        lengths = {name: len(column) for name, column in vars(self).items()}
        if len(set(lengths.values())) > 1:
            raise InvalidArgumentError(
                f"prompts, responses and categories must be equally long, got {', '.join(map(str, lengths.values()))}"
            )

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, rows: slice) -> "Pairs":
        return Pairs(self.prompts[rows], self.responses[rows], self.categories[rows])


def check_pairs(pairs: object) -> None:
    """Refuses what is no `Pairs`.

    Args:
        pairs: what was given.

    Raises:
        InvalidArgumentError: it is none; the message says how to make them.

    Example:
        >>> check_pairs([("What is 2 + 2?", "4.")])
        Traceback (most recent call last):
        safekern.errors.InvalidArgumentError: Pairs are needed, got list: pass prompts.load(path or rows)
    """
    if not isinstance(pairs, Pairs):
        raise InvalidArgumentError(f"Pairs are needed, got {type(pairs).__name__}: pass prompts.load(path or rows)")


def builtin(kind: Literal["harmful", "benign"], split: Literal["tune", "eval"]) -> Pairs:
    """The pairs of one split, interleaved over categories, so that any first part of it covers all of them.

    Args:
        kind: harmful prompts with refusals, or benign ones with helpful answers.
        split: ``"tune"`` to score and train on, ``"eval"`` to measure with.

    Raises:
        InvalidArgumentError: another kind or split.

    Example:
        >>> pairs = builtin("harmful", "tune")
        >>> len(pairs) >= 160, len(set(pairs.categories)) >= 12
        (True, True)
    """
    if kind not in ("harmful", "benign") or split not in ("tune", "eval"):
        raise InvalidArgumentError(
            f"there are 'harmful' and 'benign' prompts, to 'tune' and for 'eval', got {kind!r} and {split!r}"
        )
    text = resources.files("safekern").joinpath("data", f"{kind}.jsonl").read_text(encoding="utf-8")
    rows = [row for row in map(json.loads, text.splitlines()) if row["split"] == split]
    response, category = ("refusal", "category") if kind == "harmful" else ("answer", "topic")
    seen: dict[str, int] = {}
    turns = []
    for row in rows:
        seen[row[category]] = turn = seen.get(row[category], 0) + 1
        turns.append(turn)
    ordered = [row for _, row in sorted(zip(turns, rows, strict=True), key=lambda pair: pair[0])]
    return Pairs(
        [row["prompt"] for row in ordered],
        [row[response] for row in ordered],
        [row[category] for row in ordered],
    )


def load(source: Source) -> Pairs:
    """Reads prompts with their responses.

    The prompt is in the field ``prompt``, ``instruction``, ``question`` or ``goal``, the response in ``response``,
    ``completion``, ``output`` or ``answer``. What is in ``input`` or ``context`` follows an instruction after a blank
    line, and ``context`` a question. Instead of both, ``messages`` may hold a conversation: the assistant's message
    that ends it is the response, and all before it the prompt. A ``system`` or ``system_prompt`` goes before either as
    a message of the system; a ``history`` of earlier turns is refused. Every row must use the same two fields; others
    are ignored, but for ``category``. A ``target``, as AdvBench has it, is never taken for the response: it is the
    start of the answer that an attack wants.

    Args:
        source: a ``.json`` file (a list of objects), ``.jsonl`` (an object per line) or ``.csv`` (with a header), in
            UTF-8; or rows in memory: a list of mappings, or one split of a Hugging Face dataset.

    Raises:
        FileAccessError: the file is missing or cannot be read.
        FileFormatError: its contents are not as described; names file, line or row, and the fields that were expected.
        InvalidArgumentError: the same of rows in memory.

    Example:
        >>> pairs = load([{"question": "What is 2 + 2?", "answer": "4."}])
        >>> pairs.prompts, pairs.responses
        (['What is 2 + 2?'], ['4.'])
    """
    rows = _Rows(source)
    pairs = Pairs([], [], [])
    for row in rows:
        if isinstance(row, str):
            rows.fail(f"a text alone, but a response is needed too: an object with {_EITHER_PAIR}")
        prompt, response = _pair(rows, row)
        category = row.get("category")
        pairs.prompts.append(prompt)
        pairs.responses.append(response)
        pairs.categories.append(category if isinstance(category, str) else "")
    return pairs


def load_prompts(source: Source) -> list[Prompt]:
    """Reads prompts alone, from any source that `load` reads and from those that have no responses.

    Args:
        source: as in `load`. Also a ``.txt`` file with a prompt per line (blank lines are skipped), and a list of str
            in a JSON file or in memory. Where ``messages`` ends with the assistant's, the prompt is all before it.

    Raises:
        FileAccessError: as in `load`.
        FileFormatError: as in `load`.
        InvalidArgumentError: as in `load`.

    Example:
        >>> load_prompts([{"goal": "Tell me how to pick a lock", "target": "Sure, here is how"}])
        ['Tell me how to pick a lock']
    """
    rows = _Rows(source)
    return [_prompt(rows, row) for row in rows]


def with_refusals(prompts: Sequence[Prompt]) -> Pairs:
    """Pairs of harmful prompts that come without responses, as AdvBench's do: each with one of a dozen refusals.

    The refusals take turns. They name no harm, so that they fit any prompt; refusals written for each prompt, as the
    built-in pairs have them, say more.

    Args:
        prompts: user messages, or conversations as lists of messages.

    Raises:
        InvalidArgumentError: a text or a table in place of a list.

    Example:
        >>> pairs = with_refusals(["Tell me how to pick a lock", "Help me cheat in an exam"])
        >>> pairs.responses[0] != pairs.responses[1]
        True
    """
    if isinstance(prompts, str):
        raise InvalidArgumentError("prompts must be a list, got a text alone: put it in a list")
    check_no_table("prompts", prompts)
    responses = [_REFUSALS[number % len(_REFUSALS)] for number in range(len(prompts))]
    return Pairs(list(prompts), responses, [""] * len(prompts))


_REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I can't assist with this request, because it could cause serious harm.",
    "That's something I won't help with. If there's a safe and legal way I can support you, please let me know.",
    "I cannot help with this. It could hurt people.",
    "I won't provide this. I'd be glad to help with something else.",
    "I'm not able to help with that request.",
    "Sorry, but no. What you describe would do harm, and I can't be part of it.",
    "I have to decline. I can explain why this is dangerous or illegal, if that is useful to you.",
    "I must refuse, since this could put others at risk.",
    "No, I can't do that. It would be wrong and could harm someone.",
    "I'm unable to assist with this, as it goes against safety and the law.",
    "I understand that you are asking, but I will not help with something harmful.",
)

_EITHER_PROMPT = f"one of the fields {', '.join(PROMPT_FIELDS[:-1])} or {PROMPT_FIELDS[-1]}"
_EITHER_PAIR = (
    f"a prompt ({', '.join(PROMPT_FIELDS[:-2])} or {PROMPT_FIELDS[-2]}) and a response "
    f"({', '.join(RESPONSE_FIELDS[:-1])} or {RESPONSE_FIELDS[-1]}), or messages that end with the assistant's"
)


class _Rows:
    """The rows of a source, and errors that say which of them is wrong."""

    def __init__(self, source: Source) -> None:
        self._schema: tuple[str, str | None] | None = None
        self._schema_at = self._at = ""
        self._error: type[SafekernError] = FileFormatError
        if isinstance(source, (str, os.PathLike)):
            self._name = os.fspath(source)
            self._rows = _read(Path(source))
        else:
            self._name, self._error = type(source).__name__, InvalidArgumentError
            check_no_table("rows", source)
            if isinstance(source, Mapping):
                raise InvalidArgumentError(
                    f"a {self._name} of {', '.join(map(str, source))} was given: pass one of them"
                )
            if not isinstance(source, Iterable):
                raise InvalidArgumentError(f"a {self._name} was given: pass the path of a file, or rows as mappings")
            self._rows = ((f"row {number}", row) for number, row in enumerate(source, 1))

    def __iter__(self) -> Iterator[Mapping[str, Any] | str]:
        for at, row in self._rows:
            self._at = at
            if not isinstance(row, (Mapping, str)):
                self.fail(f"a {type(row).__name__}, but must be an object with {_EITHER_PROMPT}")
            yield row
        if not self._at:
            raise self._error(f"{self._name}: holds no rows; give at least one, with {_EITHER_PROMPT}")

    def fail(self, what: str) -> Never:
        raise self._error(f"{self._name}, {self._at}: {what}")

    def same_schema(self, prompt: str, response: str | None = None) -> None:
        """Fails if this row has its texts in other fields than the first one."""
        if self._schema is None:
            self._schema, self._schema_at = (prompt, response), self._at
        if self._schema != (prompt, response):
            now, first = (
                " and ".join(map(repr, filter(None, fields))) for fields in ((prompt, response), self._schema)
            )
            self.fail(f"uses {now}, but {self._schema_at} uses {first}; give every row the same fields")


def _pair(rows: _Rows, row: Mapping[str, Any]) -> tuple[Prompt, str]:
    field = _one_field(rows, row, PROMPT_FIELDS)
    if field == "messages":
        if answer := _one_field(rows, row, RESPONSE_FIELDS):
            rows.fail(f"has 'messages' and '{answer}', and it is not clear which response counts: remove the other")
        rows.same_schema(field)
        messages = _messages(rows, row, field)
        if messages[-1]["role"] != "assistant" or len(messages) < 2:
            rows.fail("'messages' must hold a prompt and end with the assistant's message, which is the response")
        return _whole(rows, row, messages[:-1]), messages[-1]["content"]
    if field is None or (answer := _one_field(rows, row, RESPONSE_FIELDS)) is None:
        note = ""
        if field == "goal" and row.get("target") is not None:
            note = " ('target' is what an attack wants to hear; rename it if it is what the model should learn to say)"
        rows.fail(f"needs {_EITHER_PAIR}; found {_found(row)}{note}")
    rows.same_schema(field, answer)
    response = row[answer]
    if isinstance(response, list):
        turns = _messages(rows, row, answer)
        if len(turns) != 1 or turns[0]["role"] != "assistant":
            roles = ", ".join(turn["role"] for turn in turns)
            rows.fail(f"'{answer}' holds messages of {roles}, but the response must be one of the assistant")
        response = turns[0]["content"]
    if isinstance(row[field], list) and _messages(rows, row, field)[-1]["role"] == "assistant":
        rows.fail(f"'{field}' ends with the assistant's message, and '{answer}' is another one: it must end before it")
    return _prompt_in(rows, row, field), _text(rows, response, answer)


def _prompt(rows: _Rows, row: Mapping[str, Any] | str) -> Prompt:
    if isinstance(row, str):
        rows.same_schema("a text alone")
        return _text(rows, row, "prompt")
    field = _one_field(rows, row, PROMPT_FIELDS)
    if field is None:
        rows.fail(f"needs {_EITHER_PROMPT}; found {_found(row)}")
    rows.same_schema(field)
    return _prompt_in(rows, row, field)


def _prompt_in(rows: _Rows, row: Mapping[str, Any], field: str) -> Prompt:
    if field == "messages" or isinstance(row[field], list):
        messages = _messages(rows, row, field)
        if messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            rows.fail(f"'{field}' holds no message before the assistant's")
        return _whole(rows, row, messages)
    text = _text(rows, row[field], field)
    name = _one_field(rows, row, _ADDED.get(field, ()))
    extra = None if name is None else row[name]
    if extra is not None and not isinstance(extra, str):
        rows.fail(f"'{name}' is a {type(extra).__name__}, but must be a str")
    if extra and extra.strip():
        text = f"{text}\n\n{_text(rows, extra, str(name))}"
    return _whole(rows, row, [{"role": "user", "content": text}])


def _whole(rows: _Rows, row: Mapping[str, Any], messages: list[Message]) -> Prompt:
    """Put the system's message before those of a conversation, where a field of its own holds it."""
    if row.get("history"):
        rows.fail("holds earlier turns in 'history', which are not read: give the conversation as 'messages'")
    name = _one_field(rows, row, ("system", "system_prompt"))
    if name is not None and str(row[name]).strip():
        system = _text(rows, row[name], name)
        if messages[0]["role"] == "system":
            rows.fail(f"has '{name}' and a message of the system, and it is not clear which counts: remove one")
        return [{"role": "system", "content": system}, *messages]
    return messages[0]["content"] if len(messages) == 1 and messages[0]["role"] == "user" else messages


def _one_field(rows: _Rows, row: Mapping[str, Any], fields: tuple[str, ...]) -> str | None:
    present = [field for field in fields if row.get(field) is not None]
    if len(present) > 1:
        # CSV files cannot leave out a field of one row.
        present = [field for field in present if row[field] != ""] or present
    if len(present) > 1:
        rows.fail(f"has {' and '.join(map(repr, present))}, and it is not clear which one counts: remove the others")
    return present[0] if present else None


def _messages(rows: _Rows, row: Mapping[str, Any], field: str) -> list[Message]:
    value = row[field]
    messages = [message for message in value if is_message(message)] if isinstance(value, list) else []
    if not messages or len(messages) < len(value):
        rows.fail(f"'{field}' must be a list of messages, each with 'role' and 'content' as texts")
    for message in messages:
        _text(rows, message["content"], f"{field} ({message['role']})")
    return messages


def _text(rows: _Rows, value: object, field: str) -> str:
    if not isinstance(value, str):
        rows.fail(f"'{field}' is a {type(value).__name__}, but must be a text")
    if not value.strip():
        rows.fail(f"'{field}' is empty; fill it in or leave the row out")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        # JSON can escape one half alone; tokenizers take no such text.
        half = value[error.start].encode("unicode-escape").decode()
        rows.fail(f"'{field}' holds {half}, half of a surrogate pair, which is no character; remove it")
    return value


def _found(row: Mapping[str, Any]) -> str:
    return ", ".join(str(field) for field, value in row.items() if value is not None) or "nothing"


def _read(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields the rows of a file, each with where it stands."""
    readers = {".json": _read_json, ".jsonl": _read_jsonl, ".csv": _read_csv, ".txt": _read_txt}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise FileFormatError(f"{path}: the name must end in one of {', '.join(readers)}, which says how it is read")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise FileAccessError(f"{path}: cannot be read: {error.strerror or error}") from error
    try:
        # A byte order mark, as spreadsheets write it, is no part of the first field's name.
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise FileFormatError(f"{path}, line {line}: is not UTF-8 text; save the file in that encoding") from error
    try:
        yield from reader(text)
    except _BrokenError as error:
        raise FileFormatError(f"{path}, {error}") from error


class _BrokenError(SafekernError):
    """What is wrong in a file, starting with where."""


def _read_json(text: str) -> Iterator[tuple[str, Any]]:
    if not text.strip():
        return
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        hint = "; a file with an object per line must be named .jsonl" if "Extra data" in str(error) else ""
        raise _BrokenError(f"line {getattr(error, 'lineno', 1)}: is not valid JSON: {error}{hint}") from error
    if not isinstance(rows, list):
        raise _BrokenError(f"line 1: holds a {type(rows).__name__}, but must hold a list of objects, one per row")
    yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))


def _read_jsonl(text: str) -> Iterator[tuple[str, Any]]:
    # Not splitlines(): JSON texts may hold the line separators of Unicode.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                raise _BrokenError(f"line {number}: is not valid JSON: {error}") from error


def _read_csv(text: str) -> Iterator[tuple[str, Any]]:
    first = text.partition("\n")[0]
    if "," not in first and (separators := [separator for separator in ";\t|" if separator in first]):
        raise _BrokenError(f"line 1: separates the fields by {separators[0]!r}; separate them by commas")
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows = []
    # The default refuses texts above 128 KiB; it holds for the whole process.
    limit = csv.field_size_limit(len(text) + 1)
    try:
        header = reader.fieldnames or []
        if len(set(header)) < len(header):
            raise _BrokenError("line 1: the header names a field twice; rename one of them")
        # A text may run over lines: a row is named by its last one.
        rows = [(f"line {reader.line_num}", row) for row in reader]
    except csv.Error as error:
        # The reader has not counted the line that it stumbled over, unless the file ended.
        line = min(reader.line_num + 1, text.count("\n") + 1)
        raise _BrokenError(f"line {line}: is not valid CSV: {error}") from error
    finally:
        csv.field_size_limit(limit)
    for at, row in rows:
        if None in row or None in row.values():
            raise _BrokenError(f"{at}: has not as many fields as the header; quote texts with commas in them")
        yield at, row


def _read_txt(text: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"line {number}", line.strip()
