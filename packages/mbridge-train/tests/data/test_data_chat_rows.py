"""Chats in jsonl files: the forms that OpenAI and HuggingFace use, and where images may come from."""

import base64
import json

import pytest
from mbridge_train.data.errors import DataError, RowError
from mbridge_train.data.examples import ImageReference, Message
from mbridge_train.data.rows import ReadSettings, read_examples

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}


def chat(path, *rows, **settings):
    path.write_text("".join(f"{json.dumps(row) if not isinstance(row, str) else row}\n" for row in rows))
    return read_examples([path], ReadSettings(**settings))


def with_part(part):
    return {"messages": [{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}, ANSWER]}


def test_turns_and_blank_lines(tmp_path):
    system = {"role": "system", "content": "Be brief."}
    examples = chat(
        tmp_path / "a.jsonl",
        {"messages": [USER, ANSWER]},
        "",
        "  ",
        {"messages": [system, USER, ANSWER, USER, {"role": "assistant", "content": [{"type": "text", "text": ""}]}]},
    )
    assert len(examples) == 2
    assert examples[0].messages == (Message(role="user", parts=("Hi",)),)
    assert [message.role for message in examples[1].messages] == ["system", "user", "assistant", "user"]
    assert (examples[0].answer, examples[1].answer) == ("Hello", "")
    assert examples[1].source == f"{tmp_path}/a.jsonl:4"
    assert examples[1].choices is None


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": "sub/a.png"},
        {"type": "image", "path": "sub/a.png"},
        {"type": "image", "url": "sub/../sub/a.png"},
        {"type": "image_url", "image_url": {"url": "sub/a.png"}},
        {"type": "image_url", "image_url": "./sub/a.png"},
        {"type": "image", "image": "file://{root}/sub/a.png"},
        {"type": "image", "image": "{root}/sub/a.png"},
    ],
)
def test_image_paths_start_at_the_file(tmp_path, part):
    part = json.loads(json.dumps(part).replace("{root}", str(tmp_path)))
    example = chat(tmp_path / "a.jsonl", with_part(part))[0]
    assert example.messages[0].parts == (ImageReference(location=f"{tmp_path}/sub/a.png"), "What?")


def test_images_in_the_row_itself(tmp_path):
    text = base64.b64encode(b"bytes").decode()
    parts = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{text}"}}]
    parts += [{"type": "image", "base64": text}]
    for example in [chat(tmp_path / "a.jsonl", with_part(part))[0] for part in parts]:
        assert example.images == [ImageReference(data=b"bytes")]


@pytest.mark.parametrize(
    "path", ["../b.png", "sub/../../b.png", "/etc/passwd", "file:///etc/passwd", "../images2/b.png"]
)
def test_paths_stay_in_the_image_root(tmp_path, path):
    row = with_part({"type": "image", "image": path})
    root = tmp_path / "images"
    with pytest.raises(
        RowError, match=rf"a.jsonl:1, message 1: the image '{path}' is outside {root}; set data.image_root"
    ):
        chat(tmp_path / "a.jsonl", row, image_root=root)[0]
    everything = chat(tmp_path / "a.jsonl", row, image_root="/")[0]
    assert everything.images[0].location.startswith("/")


def test_urls_only_where_allowed(tmp_path):
    row = with_part({"type": "image_url", "image_url": {"url": "https://example.org/a.png"}})
    with pytest.raises(
        RowError, match=r"message 1: the image 'https://example.org/a.png' is a URL.*data.allow_urls=true"
    ):
        chat(tmp_path / "a.jsonl", row)[0]
    allowed = chat(tmp_path / "a.jsonl", row, allow_urls=True)[0]
    assert allowed.images == [ImageReference(location="https://example.org/a.png")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            "{",
            r"not JSON: Expecting property name .* column 2; each line .* one JSON object: .* starts '{'",
        ),
        ("[" * 100_000, r"JSON nested too deep to read"),
        ("[]", r"a JSON array, not an object"),
        ({"messages": {}}, r"no list 'messages'"),
        ({"messages": []}, r"the last two of the roles \(none\) must be user and assistant"),
        ({"messages": [USER]}, r"the last two of the roles user must be"),
        ({"messages": [ANSWER, ANSWER]}, r"the last two of the roles assistant, assistant must be"),
        ({"messages": [{"role": "robot", "content": ""}, ANSWER]}, r"message 1: role 'robot' is none of system, user"),
        ({"messages": ["Hi", ANSWER]}, r"message 1: role 'Hi' is none"),
        ({"messages": [{"role": "user", "content": None}, ANSWER]}, r"message 1: 'content' is neither text nor a list"),
        (with_part({"type": "video", "video": "a.mp4"}), r"message 1: cannot use the part {\"type\": \"video\""),
        (with_part({"type": "image"}), r"cannot use the part {\"type\": \"image\"}"),
        (with_part({"type": "image", "image": "data:image/png,abc"}), r"is not base64; write data:image"),
        (with_part({"type": "image", "image": "data:image/png;base64,?"}), r"the image is not base64"),
        (
            {"messages": [USER, {"role": "assistant", "content": [{"type": "image", "image": "a"}]}]},
            r"message 2: an image",
        ),
    ],
)
def test_bad_rows_are_named(tmp_path, row, message):
    with pytest.raises(RowError, match=rf"a\.jsonl:1.*{message}"):
        chat(tmp_path / "a.jsonl", row)[0]


def test_an_empty_file_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"a\.jsonl holds no examples"):
        chat(tmp_path / "a.jsonl", "", " ")


@pytest.mark.parametrize(
    ("row", "message", "key"),
    [
        ({"videos": ["a.mp4"]}, {}, "a.jsonl:1: 'videos' is not read"),
        ({"tools": [{"type": "function"}]}, {}, "a.jsonl:1: 'tools' is not read"),
        ({}, {"tool_calls": [{"id": "1"}]}, "a.jsonl:1, message 2: 'tool_calls' is not read"),
        ({}, {"reasoning_content": "So"}, "a.jsonl:1, message 2: 'reasoning_content' is not read"),
        ({}, {"weight": 0}, "a.jsonl:1, message 2: the weight 0 is not read"),
    ],
)
def test_what_would_be_lost_is_refused(tmp_path, row, message, key):
    nothing = {"videos": [], "tools": None}
    examples = chat(
        tmp_path / "a.jsonl",
        {"messages": [USER, ANSWER | message]} | row,
        {"messages": [USER, ANSWER | {"tool_calls": None, "weight": 1, "name": "me"}]} | nothing,
    )
    with pytest.raises(RowError, match=key):
        examples[0]
    assert examples[1].answer == "Hello"


def test_images_beside_the_messages_are_not_passed_over(tmp_path):
    examples = chat(
        tmp_path / "a.jsonl",
        {"messages": [{"role": "user", "content": "<image>What?"}, ANSWER], "images": ["a.png"]},
        {"messages": [USER, ANSWER], "images": []},
    )
    with pytest.raises(RowError, match=r"a.jsonl:1: images beside 'messages' are not read; name each in its place"):
        examples[0]
    assert examples[1].answer == "Hello"
