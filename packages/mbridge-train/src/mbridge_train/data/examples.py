"""Conversations with an answer and with images that are not decoded yet: what training and evaluation read."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

from mbridge_train.data.errors import RowError

IMAGE_MARK = "<image>"
"""Stands in a text for an image that the row lists elsewhere; models have tokens of their own for it."""

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageReference:
    """An image as its row gives it: `data`, the bytes of a file, or `location`, a path or an http(s) URL.

    An image that was fetched has both.

    Attributes:
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
        messages: the turns before the answer, of which the last is the user's. Earlier turns of the assistant are
            among them.
        answer: the assistant's last turn.
        choices: all possible answers of a multiple-choice question, `answer` among them; None for a free answer.
        source: file and row, for messages.
    """

    messages: tuple[Message, ...]
    answer: str
    choices: tuple[str, ...] | None = None
    source: str

    @property
    def images(self) -> list[ImageReference]:
        """The images of all turns, in order."""
        return [part for message in self.messages for part in message.parts if isinstance(part, ImageReference)]


class Examples(Protocol):
    """Rows that are read when they are asked for. Can be pickled, to be read in other processes as well."""

    def __len__(self) -> int:
        """Return the number of rows, bad ones included."""
        ...

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
    """Return the parts of `text` with the next of `images` in the place of each "<image>".

    Raises:
        RowError: there are not so many images.
    """
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
    """Yield all rows in their order, without the bad ones."""
    for index in range(len(examples)):
        try:
            yield examples[index]
        except RowError:
            continue
