"""Prompts with verifiable answers: read them from json and jsonl files, and tokenize them."""

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mbridge_train.data.errors import DataError
from mbridge_train.data.json_records import JsonRecords

if TYPE_CHECKING:  # reward workers import this module, and must not import torch
    from mbridge_config import ReasoningConfig
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A question to the policy, with the right answers to it.

    Attributes:
        content: text, or chat messages with `role` and `content`.
        solutions: the right answers, any of which counts; empty where a reward function needs none.
        source: file and line, or task and item, for messages.
        row: all columns of the row that the prompt was read from; of a made one, reasoning-gym's own record.
        tokens: the token ids that the policy is given, once `tokenize_prompts` has run.
    """

    content: str | list[Message]
    solutions: tuple[str, ...]
    source: str
    row: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tokens: tuple[int, ...] = ()


def read_data_files(config: "ReasoningConfig") -> tuple[list[Prompt], list[Prompt]]:
    """Return the (training, validation) prompts of the files that `data` names; validation may be empty."""
    data = config.data

    def read(paths: list[str]) -> list[Prompt]:
        return read_prompts(
            [Path(path).expanduser() for path in paths],
            prompt_key=data.prompt_key,
            solutions_key=data.answer_key,
            need_solutions=config.reward.function is None,
        )

    return read(data.train_data_paths), read(data.val_data_paths) if data.val_data_paths else []


def read_prompts(
    paths: Sequence[str | Path],
    *,
    prompt_key: str = "prompt",
    solutions_key: str = "solutions",
    need_solutions: bool = True,
) -> list[Prompt]:
    """Read prompts, in order, from `.jsonl` files (one JSON object per line) and `.json` files (an array of objects).

    Without `need_solutions` a record may lack `solutions_key`. Raises `DataError`, with the file and the line or
    record, if one of them cannot be used.
    """
    prompts = [
        _prompt(records[index], records.source(index), prompt_key, solutions_key, need_solutions)
        for records in map(JsonRecords, map(Path, paths))
        for index in range(len(records))
    ]
    if not prompts:
        raise DataError("no data files are given: set data.train_data_paths and data.val_data_paths")
    return prompts


def tokenize_prompts(
    prompts: Sequence[Prompt],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_prompt_length: int,
    apply_chat_template: bool,
    filter_long: bool,
) -> list[Prompt]:
    """Return the same prompts with `tokens`.

    A text becomes one user message if `apply_chat_template` is set, and is tokenized as it is otherwise; a list of
    messages always goes through the template. `max_prompt_length` counts tokens, including those of the template.
    Longer prompts are left out if `filter_long` is set. Raises `DataError` if a prompt is longer and `filter_long` is
    not set, all of them are longer, a prompt gives no tokens, or the chat template is missing or refuses one.
    """
    tokenized = []
    for prompt in prompts:
        tokens = _tokenize(prompt, tokenizer, apply_chat_template)
        if len(tokens) > max_prompt_length:
            if filter_long:
                continue
            raise DataError(
                f"{prompt.source}: the prompt has {len(tokens)} tokens, data.max_prompt_length allows "
                f"{max_prompt_length}; raise data.max_prompt_length (and runner.seq_length with it), or leave such "
                "prompts out with data.filter_prompt_by_length=true"
            )
        tokenized.append(dataclasses.replace(prompt, tokens=tuple(tokens)))
    if not tokenized:
        raise DataError(
            f"all {len(prompts)} prompts are longer than data.max_prompt_length={max_prompt_length} tokens, so "
            "data.filter_prompt_by_length left none; raise data.max_prompt_length"
        )
    return tokenized


def _tokenize(prompt: Prompt, tokenizer: "PreTrainedTokenizerBase", apply_chat_template: bool) -> list[int]:
    import jinja2
    from mbridge_train.data.render_chat import render_chat

    content = prompt.content
    if isinstance(content, str) and not apply_chat_template:
        tokens: list[int] = tokenizer(content)["input_ids"]
    else:
        if tokenizer.chat_template is None:
            reason, fix = "the prompt is a list of messages", "write the prompt as plain text"
            if isinstance(content, str):
                reason, fix = "data.apply_chat_template is true", "set it to false"
            raise DataError(
                f"{prompt.source}: {reason}, but the tokenizer has no chat template; {fix}, or put a "
                "chat_template.jinja beside the tokenizer's files"
            )
        messages = [{"role": "user", "content": content}] if isinstance(content, str) else content
        # In two steps, because the template itself places the special tokens.
        try:
            text = render_chat(tokenizer, messages, add_generation_prompt=True)
        except jinja2.TemplateError as error:
            raise DataError(
                f"{prompt.source}: the chat template of {tokenizer.name_or_path} refuses the prompt: {error}; write "
                "the messages as it expects them"
            ) from None
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not tokens:
        raise DataError(f"{prompt.source}: the prompt gives no tokens; write a prompt that is not empty")
    return tokens


def _prompt(record: dict[str, Any], source: str, prompt_key: str, solutions_key: str, need_solutions: bool) -> Prompt:
    has_solutions = need_solutions or solutions_key in record
    for key, setting in ((prompt_key, "data.prompt_key"), (solutions_key, "data.answer_key")):
        if key not in record and (key == prompt_key or has_solutions):
            raise DataError(
                f"{source}: no key {key!r}; the keys here are {', '.join(map(repr, record)) or 'none'}: "
                f"add it, or set {setting} to the key that your file uses"
            )
    content = _content(record[prompt_key], source, prompt_key)
    solutions = _solutions(record[solutions_key], source, solutions_key) if has_solutions else ()
    texts = [content] if isinstance(content, str) else [text for message in content for text in message.values()]
    _refuse_half_characters(texts, source, prompt_key)
    _refuse_half_characters(solutions, source, solutions_key)
    return Prompt(content=content, solutions=solutions, source=source, row=record)


def _refuse_half_characters(texts: Iterable[str], source: str, key: str) -> None:
    """Raise `DataError` for half of a pair of escapes such as \\ud83d\\ude00, which tokenizers refuse."""
    for text in texts:
        if half := re.search(r"[\ud800-\udfff]", text):
            raise DataError(
                f"{source}: {key!r} holds {half[0]!r} as character {half.start() + 1}, which is half of a character: "
                "write both halves (Python's json.dumps does), or take it out"
            )


def _content(value: Any, source: str, key: str) -> str | list[Message]:
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, list) and value and all(isinstance(message, dict) for message in value):
        messages = [{key: message.get(key) for key in ("role", "content")} for message in value]
        if all(isinstance(text, str) for message in messages for text in message.values()):
            return messages
    raise DataError(
        f"{source}: {key!r} is {json.dumps(value)[:60]}: write text that is not empty, or a list of messages "
        'such as {"role": "user", "content": "…"}'
    )


def _solutions(value: Any, source: str, key: str) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    valid = all(map(_is_answer, values))
    solutions = tuple(str(item) for item in values) if valid else ()
    if not solutions or not all(map(str.strip, solutions)):
        raise DataError(
            f"{source}: {key!r} is {json.dumps(value)[:60]}: write the right answer as text, or a list of such texts"
        )
    return solutions


def _is_answer(value: Any) -> bool:
    # Python's JSON reads NaN and Infinity, which a failed computation leaves, and turns 1e999 into Infinity.
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, str | int) and not isinstance(value, bool)  # bool is an int for Python, not for a reader
