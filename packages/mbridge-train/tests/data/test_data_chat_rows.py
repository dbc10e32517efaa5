"""Chats in jsonl files: the forms that OpenAI and HuggingFace use, and where images may come from."""

import base64
import json

import pytest
from mbridge_train.data.errors import DataError, RowError
from mbridge_train.data.examples import ImageReference, Message, ReadSettings
from mbridge_train.data.rows import read_examples

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
        {"messages": [system, USER, ANSWER, USER, {"role": "assistant", "content": [{"type": "text", "text": "Bye"}]}]},
    )
    assert len(examples) == 2
    assert examples[0].messages == (Message(role="user", parts=("Hi",)),)
    assert [message.role for message in examples[1].messages] == ["system", "user", "assistant", "user"]
    assert (examples[0].answer, examples[1].answer) == ("Hello", "Bye")
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
    inside = chat(tmp_path / "a.jsonl", row, allow_urls=True, private_networks=("10.0.0.0/8",))[0]
    assert inside.images[0].networks == ("10.0.0.0/8",)
    with pytest.raises(DataError, match=r"data\.private_networks: '10\.0\.0/8' .*; write addresses such as"):
        chat(tmp_path / "a.jsonl", row, private_networks=("10.0.0/8",))


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
        ({}, {"weight": 0.5}, "a.jsonl:1, message 2: 'weight' is 0.5; write true or false, or 1 or 0"),
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


USER_WITH_MARK = {"role": "user", "content": "<image>What?"}


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ({"messages": [USER_WITH_MARK, ANSWER], "images": ["a.png"]}, ("a.png", "What?")),
        ({"messages": [USER_WITH_MARK, ANSWER], "image": "a.png"}, ("a.png", "What?")),
        ({"messages": [USER_WITH_MARK, ANSWER], "images": [{"path": "a.png", "bytes": None}]}, ("a.png", "What?")),
        (with_part({"type": "image"}) | {"images": ["a.png"]}, ("a.png", "What?")),
        (with_part({"type": "text", "text": "Is<image>like<image>?"}) | {"images": ["a", "b"]}, "Is a like b ? What?"),
    ],
)
def test_images_beside_the_messages_go_where_the_text_has_a_mark(tmp_path, row, parts):
    found = chat(tmp_path / "a.jsonl", row)[0].messages[0].parts
    names = [part.location.removeprefix(f"{tmp_path}/") if isinstance(part, ImageReference) else part for part in found]
    assert names == list(parts) if isinstance(parts, tuple) else names == parts.split(" ")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [USER_WITH_MARK, ANSWER]}, r"message 1: the text holds <image> where there is no image for it"),
        (with_part({"type": "text", "text": "<image>"}), r"the text holds <image> where there is no image"),
        ({"messages": [USER, ANSWER], "images": ["a.png"]}, r"1 of the images beside 'messages' have no place; write"),
        ({"messages": [USER, ANSWER], "images": [7]}, r"cannot use the image 7; write a path"),
        ({"messages": [USER, ANSWER | {"loss": False}]}, r"message 2: 'loss', .* says that the answer is not trained"),
        ({"messages": [USER, ANSWER | {"weight": 0}]}, r"message 2: .* 'weight' says that the answer is not trained"),
        ({"messages": [USER, ANSWER | {"loss": False, "weight": 1}]}, r"message 2: {\"loss\": false, .* contradict"),
        ({"messages": [USER | {"train": True}, ANSWER]}, r"message 1: 'train' is true for a turn of the user"),
        (
            with_part({"type": "image", "image": "a.png", "max_pixels": 50176}),
            r"message 1: 'max_pixels' of an image is not read; set data.min_pixels and data.max_pixels",
        ),
        ({"messages": [USER, ANSWER | {"content": " \n"}]}, r"the answer is empty"),
    ],
)
def test_what_would_be_trained_otherwise_than_it_says_is_refused(tmp_path, row, message):
    with pytest.raises(RowError, match=rf"a\.jsonl:1.*{message}"):
        chat(tmp_path / "a.jsonl", row)[0]


def test_marks_of_what_is_trained_anyway(tmp_path):
    row = {"messages": [USER | {"loss": False}, ANSWER | {"train": True}]}
    assert chat(tmp_path / "a.jsonl", row)[0].answer == "Hello"


def test_marks_of_earlier_turns(tmp_path):
    marks = ({"loss": False}, {"weight": 0}, {"train": True}, {"loss": 1, "weight": 1}, {})
    turns = [turn for mark in marks for turn in (USER, ANSWER | mark)]
    example = chat(tmp_path / "a.jsonl", {"messages": [*turns, USER, ANSWER]})[0]
    assert [one.is_trained for one in example.messages if one.role == "assistant"] == [False, False, True, True, None]


def test_a_symbolic_link_may_not_lead_out_of_the_image_root(tmp_path):
    (tmp_path / "secret.png").write_bytes(b"")
    root = tmp_path / "images"
    root.mkdir()
    (root / "a.png").symlink_to(tmp_path / "secret.png")
    (root / "b.png").symlink_to("c.png")
    row = with_part({"type": "image", "image": "a.png"})
    with pytest.raises(RowError, match=rf"the image 'a.png' is outside {root}; .* symbolic links"):
        chat(tmp_path / "a.jsonl", row, image_root=root)[0]
    inside = chat(tmp_path / "b.jsonl", with_part({"type": "image", "image": "b.png"}), image_root=root)[0]
    assert inside.images == [ImageReference(location=f"{root}/b.png")]
