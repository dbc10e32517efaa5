"""Problems to train and validate on: what one is, reading them from json and jsonl files, tokenizing their prompts."""

import dataclasses
import json
import math
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mbridge_train.data.errors import DataError

if TYPE_CHECKING:  # reward workers import this module, and must not import torch
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One problem.

    `prompt`: text, or chat messages with `role` and `content`. `solutions`: the right answers, any of which counts.
    `source`: where it comes from, for messages. `prompt_tokens`: the token ids that a policy is given, once
    `tokenize_problems` has run. `entry`: reasoning-gym's own record of a made problem, which its scorer reads.
    """

    prompt: str | list[Message]
    solutions: tuple[str, ...]
    source: str
    prompt_tokens: tuple[int, ...] = ()
    entry: dict[str, Any] | None = None


def read_problems(
    paths: Sequence[str | Path], *, prompt_key: str = "prompt", solutions_key: str = "solutions"
) -> list[Problem]:
    """Read problems from `.jsonl` files (one JSON object a line) and `.json` files (one array of objects).

    Order is kept: files as given, records as they lie in them. Raises `DataError` with the file and line or record.
    """
    problems: list[Problem] = []
    for path in map(Path, paths):
        count = len(problems)
        for source, record in _records(path):
            problems.append(_problem(record, source, prompt_key, solutions_key))
        if len(problems) == count:
            raise DataError(f"{path} holds no problems: give a file with at least one record, or take it out")
    if not problems:
        raise DataError("no data files are given: set data.train_data_paths and data.val_data_paths")
    return problems


def tokenize_problems(
    problems: Sequence[Problem],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_prompt_length: int,
    apply_chat_template: bool,
    filter_long: bool,
) -> list[Problem]:
    """The same problems with `prompt_tokens`.

    A text prompt becomes one user message if `apply_chat_template` is set, and is tokenized as it stands otherwise;
    a list of messages always goes through the template. `max_prompt_length` counts tokens, those of the template
    included. Longer prompts are left out if `filter_long` is set, and raise `DataError` otherwise.
    """
    tokenized = []
    for problem in problems:
        tokens = _prompt_tokens(problem, tokenizer, apply_chat_template)
        if len(tokens) > max_prompt_length:
            if filter_long:
                continue
            raise DataError(
                f"{problem.source}: the prompt has {len(tokens)} tokens, data.max_prompt_length allows "
                f"{max_prompt_length}; raise data.max_prompt_length (and runner.seq_length with it), or leave such "
                "prompts out with data.filter_prompt_by_length=true"
            )
        tokenized.append(dataclasses.replace(problem, prompt_tokens=tuple(tokens)))
    if not tokenized:
        raise DataError(
            f"all {len(problems)} prompts are longer than data.max_prompt_length={max_prompt_length} tokens, so "
            "data.filter_prompt_by_length left none; raise data.max_prompt_length"
        )
    return tokenized


def _prompt_tokens(problem: Problem, tokenizer: "PreTrainedTokenizerBase", apply_chat_template: bool) -> list[int]:
    import jinja2
    from mbridge_train.data.chat import render_chat

    prompt = problem.prompt
    if isinstance(prompt, str) and not apply_chat_template:
        tokens: list[int] = tokenizer(prompt)["input_ids"]
    else:
        if tokenizer.chat_template is None:
            reason = (
                "data.apply_chat_template is true" if isinstance(prompt, str) else "the prompt is a list of messages"
            )
            fix = "set it to false" if isinstance(prompt, str) else "write the prompt as plain text"
            raise DataError(
                f"{problem.source}: {reason}, but the tokenizer has no chat template; {fix}, or put a "
                "chat_template.jinja beside the tokenizer's files"
            )
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        # In two steps, because the template itself places the special tokens.
        try:
            text = render_chat(tokenizer, messages, add_generation_prompt=True)
        except jinja2.TemplateError as error:
            raise DataError(
                f"{problem.source}: the chat template of {tokenizer.name_or_path} refuses the prompt: {error}; write "
                "the messages as it takes them"
            ) from None
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not tokens:
        raise DataError(f"{problem.source}: the prompt gives no tokens; write a prompt that is not empty")
    return tokens


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    """(where, record) of a file, in order."""
    if path.suffix not in (".json", ".jsonl"):
        raise DataError(f"{path} is neither .json nor .jsonl: give one of these, named so")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(
            f"{path} does not exist (from {Path.cwd()}): correct data.train_data_paths or data.val_data_paths"
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    if path.suffix == ".json":
        try:
            records = json.loads(text) if text.strip() else []
        except (ValueError, RecursionError) as error:
            raise DataError(f"{_json_fault(path, text, 1, error)}; a .json file holds one array of objects") from None
        if not isinstance(records, list):
            raise DataError(f"{path} holds a JSON {_json_type(records)}, not an array of objects: write [{{…}}, {{…}}]")
        yield from ((f"{path}, record {number}", record) for number, record in enumerate(records, start=1))
        return
    # Not str.splitlines: JSON strings may hold line separators such as U+2028.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{_json_fault(path, line, number, error)}; each line of a .jsonl file is one JSON object: "
                f"correct or delete the line, which starts {line.strip()[:60]!r}"
            ) from None
        yield f"{path}:{number}", record


def _json_fault(path: Path, text: str, line: int, error: ValueError | RecursionError) -> str:
    """What is wrong with `text`, which begins in `line` of the file, and in which line."""
    if isinstance(error, json.JSONDecodeError):
        return f"{path}:{line + error.lineno - 1}: not JSON: {error.msg} at column {error.colno}"
    if isinstance(error, RecursionError):
        return f"{path}:{line}: JSON nested too deep to read"
    most = sys.get_int_max_str_digits()  # what Python makes a number of, since more would take it long
    if number := re.search(rf"\d{{{most + 1}}}", text):
        line += text.count("\n", 0, number.start())
    return f"{path}:{line}: a number has more than {most} digits: write it as text, in quotes"


def _problem(record: Any, source: str, prompt_key: str, solutions_key: str) -> Problem:
    if not isinstance(record, dict):
        raise DataError(
            f"{source}: a JSON {_json_type(record)}, not an object: write {{{prompt_key!r}: …, {solutions_key!r}: …}}"
        )
    for key, setting in ((prompt_key, "data.prompt_key"), (solutions_key, "data.answer_key")):
        if key not in record:
            raise DataError(
                f"{source}: no key {key!r}; the keys here are {', '.join(map(repr, record)) or 'none'}: "
                f"add it, or set {setting} to the key that your file uses"
            )
    prompt = _prompt(record[prompt_key], source, prompt_key)
    solutions = _solutions(record[solutions_key], source, solutions_key)
    texts = [prompt] if isinstance(prompt, str) else [text for message in prompt for text in message.values()]
    _refuse_half_characters(texts, source, prompt_key)
    _refuse_half_characters(solutions, source, solutions_key)
    return Problem(prompt=prompt, solutions=solutions, source=source)


def _refuse_half_characters(texts: Iterable[str], source: str, key: str) -> None:
    """Raise `DataError` for text with one of a pair of escapes such as \\ud83d\\ude00, which tokenizers do not take."""
    for text in texts:
        if half := re.search(r"[\ud800-\udfff]", text):
            raise DataError(
                f"{source}: {key!r} holds {half[0]!r} as character {half.start() + 1}, which is half of a character: "
                "write both halves (Python's json.dumps does), or take it out"
            )


def _prompt(value: Any, source: str, key: str) -> str | list[Message]:
    if isinstance(value, str) and value.strip():
        return value
    if (
        isinstance(value, list)
        and value
        and all(
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
            for message in value
        )
    ):
        return [{"role": message["role"], "content": message["content"]} for message in value]
    raise DataError(
        f"{source}: {key!r} is {json.dumps(value)[:60]}: write text that is not empty, or a list of messages "
        'such as {"role": "user", "content": "…"}'
    )


def _solutions(value: Any, source: str, key: str) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    valid = all(map(_is_answer, values))
    solutions = tuple(str(item) for item in values) if valid else ()
    if not solutions or not all(solution.strip() for solution in solutions):
        raise DataError(
            f"{source}: {key!r} is {json.dumps(value)[:60]}: write the right answer as text, or a list of such texts"
        )
    return solutions


def _is_answer(value: Any) -> bool:
    # Python's JSON has NaN and Infinity, which are what a failed computation left, and makes Infinity of 1e999.
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, str | int) and not isinstance(value, bool)  # bool is an int for Python, not for a reader


def _json_type(value: Any) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")
