"""Reading chats from `.jsonl` files: one object per line, with `messages` as OpenAI and HuggingFace write them.

    {"messages": [{"role": "user", "content": [{"type": "image", "image": "cat.jpg"},
                                               {"type": "text", "text": "What is this?"}]},
                  {"role": "assistant", "content": "A cat."}]}

Images may also be listed beside the messages, whose text then has a mark for each image:

    {"messages": [{"role": "user", "content": "<image>What is this?"}, …], "images": ["cat.jpg"]}

An image is a path, a data: URL, or, if `data.allow_urls` is set, an http(s) URL. Paths are relative to
`data.image_root` (by default the directory of the file) and may not leave it, not even through a symbolic link; with
image_root=/ a row can name every file of the machine.
"""

import base64
import binascii
import json
import os.path
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

from mbridge_train.data.errors import RowError
from mbridge_train.data.examples import Example, ImageReference, Message, ReadSettings, Role, with_images
from mbridge_train.data.json_records import JsonRecords


class ChatFile:
    """A `.jsonl` file of chats, whose rows are the lines that are not blank; see `Examples`.

    Raises `DataError` if the file cannot be read, or has no rows.
    """

    def __init__(self, path: Path, settings: ReadSettings) -> None:
        self._records = JsonRecords(path)
        self._root = os.path.abspath(settings.image_root or path.parent)
        self._settings = settings

    def __len__(self) -> int:
        return len(self._records)

    def source(self, index: int) -> str:
        return self._records.source(index)

    def fingerprint(self) -> str:  # without the files of images
        return self._records.fingerprint

    def __getitem__(self, index: int) -> Example:
        source = self.source(index)
        row = self._records[index]
        if not isinstance(row.get("messages"), list):
            raise RowError(f'{source}: no list \'messages\'; write {{"messages": [{{"role": …, "content": …}}, …]}}')
        _refuse_unread(row, ("videos", "video", "tools", "functions"), source)
        listed = self._listed(row, source)
        messages = [
            self._message(message, listed, f"{source}, message {n}") for n, message in enumerate(row["messages"], 1)
        ]
        if left := len(list(listed)):
            raise RowError(
                f"{source}: {left} of the images beside 'messages' have no place; write <image> in the text, or "
                '{"type": "image"} in the content, where each of them belongs'
            )
        roles = [message.role for message in messages]
        if roles[-2:] != ["user", "assistant"]:
            raise RowError(
                f"{source}: the last two of the roles {', '.join(roles) or '(none)'} must be user and assistant: "
                "the assistant's last message is the answer to train on"
            )
        if not messages[-1].text.strip():
            raise RowError(f"{source}: the answer is empty, so the model would learn to say nothing; take the row out")
        if messages[-1].is_trained is False:
            raise RowError(
                f"{source}, message {len(messages)}: 'loss', 'train' or 'weight' says that the answer is not trained; "
                "take out the turns after the last one to train on, or the row"
            )
        return Example(messages=tuple(messages[:-1]), answer=messages[-1].text, source=source)

    def _listed(self, row: dict[str, Any], where: str) -> Iterator[ImageReference]:
        """Yield the images beside the messages, in their order."""
        images = row.get("images") or row.get("image") or []
        for image in images if isinstance(images, list) else [images]:
            value = image.get("path") or image.get("url") if isinstance(image, dict) else image
            if not isinstance(value, str) or not value:
                raise RowError(f"{where}: cannot use the image {json.dumps(image)[:80]}; write a path")
            yield self._image(value, where)

    def _message(self, message: Any, listed: Iterator[ImageReference], where: str) -> Message:
        if not isinstance(message, dict) or message.get("role") not in get_args(Role):
            role = message.get("role") if isinstance(message, dict) else message
            raise RowError(f"{where}: role {role!r} is none of {', '.join(get_args(Role))}")
        _refuse_unread(message, ("tool_calls", "function_call", "reasoning_content"), where)
        is_answer = message["role"] == "assistant"
        is_trained = _mark(message, where)
        content = message.get("content")
        if isinstance(content, str):
            parts = [content] if is_answer else with_images(content, listed, where)
        elif isinstance(content, list):
            parts = [piece for part in content for piece in self._part(part, listed, where)]
        else:
            raise RowError(f"{where}: 'content' is neither text nor a list of parts")
        if is_answer and not all(isinstance(part, str) for part in parts):
            raise RowError(f"{where}: an image in the assistant's turn; models here answer in text")
        return Message(role=message["role"], parts=tuple(parts), is_trained=is_trained)

    def _part(self, part: Any, listed: Iterator[ImageReference], where: str) -> list[str | ImageReference]:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            return with_images(part["text"], listed, where)
        if kind in ("image", "image_url"):
            if part.keys() == {"type"} and (image := next(listed, None)):
                return [image]
            for key in ("min_pixels", "max_pixels", "resized_height", "resized_width"):
                if part.get(key) is not None:
                    raise RowError(
                        f"{where}: {key!r} of an image is not read; set data.min_pixels and data.max_pixels, which "
                        "hold for all images"
                    )
            value = next((part[key] for key in ("image", "image_url", "url", "path", "base64") if key in part), None)
            if isinstance(value, dict):  # OpenAI: {"type": "image_url", "image_url": {"url": …}}
                value = value.get("url")
            if isinstance(value, str) and value:
                return [self._base64(value, where) if "base64" in part else self._image(value, where)]
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
            if not self._settings.allow_urls:
                raise RowError(
                    f"{where}: the image {value[:80]!r} is a URL; download it, or allow fetching with "
                    "data.allow_urls=true"
                )
            return ImageReference(location=value, networks=self._settings.private_networks)
        path = os.path.normpath(os.path.join(self._root, value.removeprefix("file://")))
        for inside, root in ((path, self._root), (os.path.realpath(path), os.path.realpath(self._root))):
            if os.path.commonpath([inside, root]) == root:
                continue
            raise RowError(
                f"{where}: the image {value[:80]!r} is outside {self._root}; set data.image_root to a directory "
                "that holds all images, and the files that symbolic links among them name"
            )
        return ImageReference(location=path)

    def _base64(self, text: str, where: str) -> ImageReference:
        try:
            return ImageReference(data=base64.b64decode(text, validate=True))
        except (binascii.Error, ValueError) as error:
            raise RowError(f"{where}: the image is not base64 ({error})") from None


def _mark(message: dict[str, Any], where: str) -> bool | None:
    """Return whether the row says that the turn is trained; None if it does not say."""
    marks = {key: message[key] for key in ("loss", "train", "weight") if message.get(key) is not None}
    for key, mark in marks.items():
        if mark not in (0, 1):
            raise RowError(f"{where}: {key!r} is {json.dumps(mark)[:40]}; write true or false, or 1 or 0")
        if mark and message["role"] != "assistant" and key != "weight":
            raise RowError(
                f"{where}: {key!r} is {json.dumps(mark)} for a turn of the {message['role']}; only turns of the "
                "assistant are trained"
            )
    if len(set(marks.values())) > 1:
        raise RowError(f"{where}: {json.dumps(marks)} contradict each other; keep one of them")
    return bool(next(iter(marks.values()))) if marks else None


def _refuse_unread(record: dict[str, Any], keys: Sequence[str], where: str) -> None:
    """Raise `RowError` for a key with a value: training on the rest of the row would teach something else."""
    for key in keys:
        if record.get(key):
            raise RowError(
                f"{where}: {key!r} is not read; write what the model should see and say as text of the messages"
            )
