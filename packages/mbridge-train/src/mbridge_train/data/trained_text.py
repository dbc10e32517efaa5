"""Rendering a conversation by the model's own chat template, divided into trained and untrained text.

The trained text is what the model has to write: everything after the generation prompt, up to and including the token
that ends the turn. So neither a newline after that token nor the header before the answer is trained. A think block is
trained if the template puts it into the answer, but not into the generation prompt.
"""

from collections.abc import Sequence
from typing import Any, Literal

import jinja2
from transformers import PreTrainedTokenizerBase

from mbridge_train.data.errors import DataError, RowError
from mbridge_train.data.examples import Message
from mbridge_train.data.render_chat import render_chat


class ChatTemplate:
    """The chat template, in Jinja, of a tokenizer or a processor; `name` is for error messages."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str, name: str) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._name = name
        added = tokenizer.added_tokens_decoder.values()
        self._special = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)

    def segments(
        self, messages: Sequence[Message], answer: str, *, train_on: Literal["last", "all"], source: str
    ) -> list[tuple[str, bool]]:
        """Return the text in pieces, each with whether it is trained.

        Args:
            messages: the turns before the answer.
            answer: the assistant's last turn, which is always trained.
            train_on: train on no earlier turn of the assistant or on all of them, unless `is_trained` decides.
            source: file and row of the example, for error messages.

        Raises:
            RowError: the template refuses this conversation.
            DataError: the template is not valid Jinja, or its text does not show where a trained turn begins and ends.
        """
        turns = [*map(_turn, messages), {"role": "assistant", "content": answer}]
        try:
            full = self._render(turns)
            trained = [
                index
                for index, message in enumerate(messages)
                if message.role == "assistant"
                and (train_on == "all" if message.is_trained is None else message.is_trained)
            ]
            pieces, position = [], 0
            for index in [*trained, len(messages)]:
                start, end = self._span(turns, index, full, source)
                pieces += [(full[position:start], False), (full[start:end], True)]
                position = end
        except jinja2.TemplateError as error:
            raise RowError(f"{source}: the chat template of {self._name} refuses the messages: {error}") from None
        return [piece for piece in [*pieces, (full[position:], False)] if piece[0]]

    def _span(self, turns: list[dict[str, Any]], index: int, full: str, source: str) -> tuple[int, int]:
        """Return where the trained text of the turn begins and ends in `full`."""
        mark = "answer"
        while mark in full:
            mark += "@"
        marked = [*turns[:index], {"role": "assistant", "content": mark}, *turns[index + 1 :]]
        before, found, after = self._render(marked).partition(mark)
        context = self._render(turns[:index])
        prompt = self._render(turns[:index], add_generation_prompt=True)
        has_prompt, is_last = prompt != context, index + 1 == len(turns)
        start = None
        if full.startswith(prompt):
            start = len(prompt if has_prompt else before)
        elif not is_last and full.startswith(before) and (not has_prompt or prompt.startswith(before)):
            # The generation prompt ends with a think block, which the template removes from past turns.
            start = len(before)
        content_end = len(full) - len(after)
        if not found or start is None or start > content_end or not full.endswith(after):
            raise DataError(
                f"{source}: the chat template of {self._name} does not show where the assistant's turn {index + 1} "
                "begins and ends: its text is not what follows the generation prompt; use a template that writes a "
                "turn in the same way whatever follows it" + ("" if is_last else ", or set data.train_on=last")
            )
        written = full[:content_end].removeprefix(context)
        if is_last and _words(turns[index]["content"]) not in _words(written):
            raise DataError(
                f"{source}: the chat template of {self._name} leaves out a part of the answer, of which it writes "
                f"{full[start:content_end][:60]!r}; use a template that writes the whole answer, or take the missing "
                "part, such as reasoning, out of the answers"
            )
        return start, content_end + self._end(after, source)

    def _end(self, after: str, source: str) -> int:
        """Return the length of the end token, with white space before it, at the start of the text after an answer."""
        text = after.lstrip()
        token = max((token for token in self._special if text.startswith(token)), key=len, default="")
        if not token:
            raise DataError(
                f"{source}: the chat template of {self._name} writes {after[:20]!r} after an answer, which starts with "
                "no special token; the model could not learn where to end: add an end token to the template"
            )
        return len(after) - len(text) + len(token)

    def _render(self, turns: list[dict[str, Any]], *, add_generation_prompt: bool = False) -> str:
        return render_chat(
            self._tokenizer, turns, chat_template=self._template, add_generation_prompt=add_generation_prompt
        )


def _turn(message: Message) -> dict[str, Any]:
    if all(isinstance(part, str) for part in message.parts):
        return {"role": message.role, "content": message.text}
    parts = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in message.parts]
    return {"role": message.role, "content": parts}


def _words(text: str) -> str:
    """Return `text` without white space, which templates add and remove."""
    return "".join(text.split())
