"""Chats in `.jsonl` files: one object a line, with `messages` as OpenAI and HuggingFace write them.

    {"messages": [{"role": "user", "content": [{"type": "image", "image": "cat.jpg"},
                                               {"type": "text", "text": "What is this?"}]},
                  {"role": "assistant", "content": "A cat."}]}

An image is a path, a data: URL, or, where `data.allow_urls` says so, an http(s) URL. Paths start at `data.image_root`
(by default the directory of the file) and stay in it: with image_root=/ every file of the machine can be named.
"""

import base64
import binascii
import json
import os.path
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from mbridge_train.data.errors import RowError
from mbridge_train.data.examples import Example, ImageReference, Message, Role
from mbridge_train.data.json_records import JsonRecords


class ChatFile:
    """A `.jsonl` file of chats. A row is a line that is not blank; messages name the line's number, from 1.

    Args:
        path: the file.
        image_root: directory that image paths start at and stay in; None: that of the file.
        allow_urls: images may be given as http(s) URLs.

    Raises:
        DataError: the file cannot be read, or has no rows.
    """

    def __init__(self, path: Path, *, image_root: Path | None, allow_urls: bool) -> None:
        self._records = JsonRecords(path)
        self._root = os.path.abspath(image_root or path.parent)
        self._allow_urls = allow_urls

    def __len__(self) -> int:
        return len(self._records)

    def source(self, index: int) -> str:
        """Return file and line, as `path:line`."""
        return self._records.source(index)

    def __getitem__(self, index: int) -> Example:
        source = self.source(index)
        row = self._records[index]
        if not isinstance(row.get("messages"), list):
            raise RowError(f'{source}: no list \'messages\'; write {{"messages": [{{"role": …, "content": …}}, …]}}')
        if row.get("images") or row.get("image"):
            raise RowError(
                f"{source}: images beside 'messages' are not read; name each in its place in the content, as "
                '{"type": "image", "image": "a path"}'
            )
        _refuse_unread(row, ("videos", "video", "tools", "functions"), source)
        messages = [self._message(message, f"{source}, message {n}") for n, message in enumerate(row["messages"], 1)]
        roles = [message.role for message in messages]
        if roles[-2:] != ["user", "assistant"]:
            raise RowError(
                f"{source}: the last two of the roles {', '.join(roles) or '(none)'} must be user and assistant: "
                "the assistant's last message is the answer to train on"
            )
        return Example(messages=tuple(messages[:-1]), answer=messages[-1].text, source=source)

    def _message(self, message: Any, where: str) -> Message:
        if not isinstance(message, dict) or message.get("role") not in get_args(Role):
            role = message.get("role") if isinstance(message, dict) else message
            raise RowError(f"{where}: role {role!r} is none of {', '.join(get_args(Role))}")
        _refuse_unread(message, ("tool_calls", "function_call", "reasoning_content"), where)
        if message.get("weight", 1) != 1:
            raise RowError(f"{where}: the weight {message['weight']!r} is not read; data.train_on says what is trained")
        content = message.get("content")
        if isinstance(content, str):
            parts: tuple[str | ImageReference, ...] = (content,)
        elif isinstance(content, list):
            parts = tuple(self._part(part, where) for part in content)
        else:
            raise RowError(f"{where}: 'content' is neither text nor a list of parts")
        if message["role"] == "assistant" and not all(isinstance(part, str) for part in parts):
            raise RowError(f"{where}: an image in the assistant's turn; models here answer in text")
        return Message(role=message["role"], parts=parts)

    def _part(self, part: Any, where: str) -> str | ImageReference:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            return str(part["text"])
        if kind in ("image", "image_url"):
            value = next((part[key] for key in ("image", "image_url", "url", "path", "base64") if key in part), None)
            if isinstance(value, dict):  # OpenAI: {"type": "image_url", "image_url": {"url": …}}
                value = value.get("url")
            if isinstance(value, str) and value:
                return self._base64(value, where) if "base64" in part else self._image(value, where)
        raise RowError(
            f"{where}: cannot use the part {json.dumps(part)[:80]}; write "
            '{"type": "text", "text": …} or {"type": "image", "image": "a path"}'
        )

    def _image(self, value: str, where: str) -> ImageReference:
        scheme = value.partition(":")[0].lower() if ":" in value[:8] else ""
        if scheme == "data":
            header, comma, body = value.partition(",")
            if not comma or not header.endswith(";base64"):
                raise RowError(f"{where}: the data: URL {value[:40]!r} is not base64; write data:image/png;base64,…")
            return self._base64(body, where)
        if scheme in ("http", "https"):
            if not self._allow_urls:
                raise RowError(
                    f"{where}: the image {value[:80]!r} is a URL; download it, or allow fetching with "
                    "data.allow_urls=true"
                )
            return ImageReference(location=value)
        path = os.path.normpath(os.path.join(self._root, value.removeprefix("file://")))
        if os.path.commonpath([path, self._root]) != self._root:
            raise RowError(
                f"{where}: the image {value[:80]!r} is outside {self._root}; set data.image_root to a directory "
                "that holds all images"
            )
        return ImageReference(location=path)

    def _base64(self, text: str, where: str) -> ImageReference:
        try:
            return ImageReference(data=base64.b64decode(text, validate=True))
        except (binascii.Error, ValueError) as error:
            raise RowError(f"{where}: the image is not base64 ({error})") from None


def _refuse_unread(record: dict[str, Any], keys: Sequence[str], where: str) -> None:
    """Training on what is left of a row without them would teach something else."""
    for key in keys:
        if record.get(key):
            raise RowError(
                f"{where}: {key!r} is not read; write what the model shall see and say as text of the messages"
            )
