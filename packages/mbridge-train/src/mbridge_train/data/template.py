"""A conversation as text by the model's own chat template, divided into what is trained and what is not.

Trained is what the model has to write: whatever follows the generation prompt, up to and including the token that ends
the turn. So a newline after that token is not trained, nor the header before the answer; a think block is, where the
template puts one into the answer without asking for it in the generation prompt.
"""

from collections.abc import Sequence
from typing import Any, Literal

import jinja2
from transformers import PreTrainedTokenizerBase

from mbridge_train.data.chat import render_chat
from mbridge_train.data.errors import DataError, RowError
from mbridge_train.data.examples import Message
from mbridge_train.errors import TrainError


class ChatTemplate:
    """The chat template of a tokenizer or a processor.

    Args:
        tokenizer: of the model.
        template: the template, in Jinja.
        name: of the model's directory, for messages.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str, name: str) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._name = name
        added = tokenizer.added_tokens_decoder.values()
        self._special = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)

    def segments(
        self, messages: Sequence[Message], answer: str, *, train_on: Literal["last", "all"], source: str
    ) -> list[tuple[str, bool]]:
        """The text in pieces, each with whether it is trained.

        Args:
            messages: before the answer.
            answer: the assistant's last turn.
            train_on: the answer alone, or each turn of the assistant, where the turn does not say so itself.
            source: of the example, for messages.

        Raises:
            RowError: the template refuses this conversation.
            DataError: the template is not Jinja, or does not tell where the answer begins or ends in its text.
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
        """Where the trained text of the turn begins and ends in `full`."""
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
            # The generation prompt ends with a think block that the template takes out of past turns.
            start = len(before)
        content_end = len(full) - len(after)
        if not found or start is None or start > content_end or not full.endswith(after):
            raise DataError(
                f"{source}: the chat template of {self._name} does not show where the assistant's turn {index + 1} "
                "begins and ends: its text is not what follows the generation prompt; use a template that writes a "
                "turn in the same way whatever comes later" + ("" if is_last else ", or set data.train_on=last")
            )
        written = full[:content_end].removeprefix(context)
        if is_last and _words(turns[index]["content"]) not in _words(written):
            raise DataError(
                f"{source}: the chat template of {self._name} leaves out a part of the answer, of which it writes "
                f"{full[start:content_end][:60]!r}; use a template that writes all of it, or take that part, such as "
                "reasoning, out of the answers"
            )
        return start, content_end + self._end(after, source)

    def _end(self, after: str, source: str) -> int:
        """Length of the end token, and of white space before it, at the start of the text after an answer."""
        text = after.lstrip()
        token = max((token for token in self._special if text.startswith(token)), key=len, default="")
        if not token:
            raise DataError(
                f"{source}: the chat template of {self._name} writes {after[:20]!r} after an answer, which starts with "
                "no special token; the model could not learn where to end: add an end token to the template"
            )
        return len(after) - len(text) + len(token)

    def _render(self, turns: list[dict[str, Any]], *, add_generation_prompt: bool = False) -> str:
        try:
            return render_chat(
                self._tokenizer, turns, chat_template=self._template, add_generation_prompt=add_generation_prompt
            )
        except TrainError as error:  # no row could be used, so it is no row's fault
            raise DataError(str(error)) from None


def _turn(message: Message) -> dict[str, Any]:
    if all(isinstance(part, str) for part in message.parts):
        return {"role": message.role, "content": message.text}
    parts = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in message.parts]
    return {"role": message.role, "content": parts}


def _words(text: str) -> str:
    """Without white space, which templates add and take away."""
    return "".join(text.split())
