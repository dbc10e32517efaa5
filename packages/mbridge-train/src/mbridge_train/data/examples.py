"""The examples that training and evaluation read: conversations with an answer, and with images not decoded yet."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from mbridge_train.data.errors import RowError

IMAGE_MARK = "<image>"
"""Marks the place, in a text, of an image that the row lists elsewhere. Not a token of the model."""

CHOICES = "choices"
"""The default column of choices, which a file may lack."""

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageReference:
    """An image as its row gives it, not decoded.

    Attributes:
        data: the bytes of an image file.
        location: a path or an http(s) URL. A fetched image has both `data` and `location`.
        networks: addresses that a URL may lead to although they are not public, such as "10.0.0.0/8".
    """

    data: bytes | None = None
    location: str | None = None
    networks: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One turn.

    Attributes:
        parts: text and images in their order; those of an assistant are text only.
        is_trained: whether a turn of the assistant is trained; None: as `data.train_on` says.
    """

    role: Role
    parts: tuple[str | ImageReference, ...]
    is_trained: bool | None = None

    @property
    def text(self) -> str:
        """The text parts, joined."""
        return "".join(part for part in self.parts if isinstance(part, str))


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One example.

    Attributes:
        messages: the turns before the answer, earlier ones of the assistant included; the last is the user's.
        answer: the assistant's last turn.
        choices: all possible answers of a multiple-choice question, `answer` among them; None for a free answer.
        source: file and row, for error messages.
    """

    messages: tuple[Message, ...]
    answer: str
    choices: tuple[str, ...] | None = None
    source: str

    @property
    def images(self) -> list[ImageReference]:
        """The images of all turns, in order."""
        return [part for message in self.messages for part in message.parts if isinstance(part, ImageReference)]


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadSettings:
    """How rows become examples.

    Attributes:
        prompt_key, choice_key, answer_key: parquet columns of the question, the choices and the right choice.
        image_keys: parquet columns of images, in the order in which the model sees them. None: all columns named
            "image", or "image" and a number, such as image_0; an empty tuple: no images.
        answer_format: whether the model answers with the "text" of the right choice or with its "letter".
        image_root: the directory that image paths of a jsonl file are relative to and must stay in; None: the file's.
        allow_urls: images of a jsonl file may be fetched over http and https, from public addresses.
        private_networks: other addresses that may be fetched from, such as "10.0.0.0/8".
    """

    prompt_key: str = "question"
    choice_key: str = CHOICES
    answer_key: str = "correct_answer"
    image_keys: tuple[str, ...] | None = None
    answer_format: Literal["text", "letter"] = "text"
    image_root: Path | None = None
    allow_urls: bool = False
    private_networks: tuple[str, ...] = ()


class Examples(Protocol):
    """Rows that are read on demand, bad ones included. Can be pickled, to be read in other processes."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example:
        """Return row `index`, from 0. Raise `RowError` if the row cannot be used, `DataError` if its file cannot."""
        ...

    def source(self, index: int) -> str:
        """Return file and row, without reading the row."""
        ...

    def fingerprint(self) -> str:
        """Return text that other rows, or the same rows in another order, do not have, without reading them all."""
        ...


def with_images(text: str, images: Iterator[ImageReference], where: str) -> list[str | ImageReference]:
    """Return the parts of `text`, with the next of `images` in place of each "<image>"; `RowError` if there is none."""
    first, *others = text.split(IMAGE_MARK)
    parts: list[str | ImageReference] = [first]
    for part in others:
        image = next(images, None)
        if image is None:
            raise RowError(
                f"{where}: the text holds {IMAGE_MARK} where there is no image for it; take the mark out of the text, "
                "or list as many images as there are marks"
            )
        parts += [image, part]
    return [part for part in parts if part != ""] or [""]


def readable(examples: Examples) -> Iterator[Example]:
    """Yield the good rows in their order."""
    for index in range(len(examples)):
        try:
            yield examples[index]
        except RowError:
            continue
