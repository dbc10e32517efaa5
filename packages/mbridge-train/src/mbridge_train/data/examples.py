"""What is trained and evaluated on: a conversation, its answer, and images that nobody has decoded yet."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

from mbridge_train.data.errors import RowError

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageReference:
    """An image as its row gives it: `data`, the bytes of a file, or `location`, a path or an http(s) URL."""

    data: bytes | None = None
    location: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One turn. `parts`: text and images in their order; an assistant's are text only."""

    role: Role
    parts: tuple[str | ImageReference, ...]

    @property
    def text(self) -> str:
        """Its text parts joined."""
        return "".join(part for part in self.parts if isinstance(part, str))


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One example.

    `messages`: what comes before the answer; the last is the user's, and earlier turns of the assistant are among
    them. `answer`: the assistant's last turn. `choices`: on multiple-choice data all possible answers, of which
    `answer` is one; None elsewhere. `source`: file and row, for messages.
    """

    messages: tuple[Message, ...]
    answer: str
    choices: tuple[str, ...] | None = None
    source: str

    @property
    def images(self) -> list[ImageReference]:
        """Of all turns, in order."""
        return [part for message in self.messages for part in message.parts if isinstance(part, ImageReference)]


class Examples(Protocol):
    """Rows that are read when they are asked for. Can be pickled, to be read in other processes as well."""

    def __len__(self) -> int:
        """Rows, bad ones included."""
        ...

    def __getitem__(self, index: int) -> Example:
        """Row `index`, from 0. Raises `RowError` where it is unusable, `DataError` where its file is."""
        ...

    def source(self, index: int) -> str:
        """File and row, without reading the row."""
        ...


def readable(examples: Examples) -> Iterator[Example]:
    """All rows in their order, without the bad ones."""
    for index in range(len(examples)):
        try:
            yield examples[index]
        except RowError:
            continue
