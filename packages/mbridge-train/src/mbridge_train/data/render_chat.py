"""Rendering conversations by the chat template, to the same text on every day."""

from datetime import date
from typing import TYPE_CHECKING, Any

import jinja2

from mbridge_train.data.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TODAY = date(2024, 7, 26)
"""The date for templates that write one into the system message: with the real date, a run resumed tomorrow would train
on other tokens. Llama 3's template falls back to this date."""


def render_chat(tokenizer: "PreTrainedTokenizerBase", messages: list[dict[str, Any]], **options: Any) -> str:
    """Render `messages` by the tokenizer's chat template, with `options` of `apply_chat_template`.

    Raises:
        DataError: the template is not valid Jinja.
        jinja2.TemplateError: the template refuses the messages.
    """
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, strftime_now=TODAY.strftime, **options)
    except jinja2.TemplateSyntaxError as error:
        raise DataError(
            f"{tokenizer.name_or_path}: line {error.lineno} of its chat template is not valid Jinja: {error.message}; "
            "correct chat_template.jinja, or chat_template in tokenizer_config.json, or copy the file again"
        ) from None
    return str(text)
