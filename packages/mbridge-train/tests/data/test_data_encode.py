"""Encoding equals the HuggingFace processor on the same text and images, and trains what it should."""

import contextlib
import io
import json
import pickle
import re
import shutil
from dataclasses import replace

import pytest
import torch
from mbridge_train.data.encode import Encoder
from mbridge_train.data.errors import DataError, LongRowError, RowError
from mbridge_train.data.examples import Example, ImageReference, Message
from mbridge_train.data.images import PixelLimits
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen2_5_VLProcessor

SIZES = [(32, 32), (17, 55), (70, 33)]


def picture(width, height):
    return Image.effect_noise((width, height), 60).convert("RGB")


def reference(image):
    file = io.BytesIO()
    image.save(file, format="PNG")
    return ImageReference(data=file.getvalue())


def example(*parts, answer="7", choices=None, earlier=()):
    return Example(
        messages=(*earlier, Message(role="user", parts=parts)), answer=answer, choices=choices, source="a.parquet row 3"
    )


@pytest.fixture(scope="module")
def encoder(tiny_vision_model):
    return Encoder(tiny_vision_model)


@pytest.fixture(scope="module")
def text_model(tiny_vision_model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("text")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (directory / name).write_bytes((tiny_vision_model / name).read_bytes())
    config = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 384}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("limits", [None, PixelLimits(min_pixels=48 * 48), PixelLimits(max_pixels=1024)])
def test_equal_to_the_processor_on_several_images(tiny_vision_model, limits):
    images = [picture(*size) for size in SIZES]
    first, second, third = map(reference, images)
    encoder = Encoder(tiny_vision_model, limits=limits)
    encoded = encoder.encode(
        example("Is é", first, "like", second, "?\n", answer="No 𝄞", earlier=(Message(role="user", parts=(third,)),))
    )
    processor = AutoProcessor.from_pretrained(tiny_vision_model)
    content = [{"type": "text", "text": "Is é"}, {"type": "image"}, {"type": "text", "text": "like"}]
    content += [{"type": "image"}, {"type": "text", "text": "?\n"}]
    conversation = [
        {"role": "user", "content": [{"type": "image"}]},
        {"role": "user", "content": content},
        {"role": "assistant", "content": "No 𝄞"},
    ]
    size = dict(processor.image_processor.size)
    if limits is not None:
        size |= {"shortest_edge": limits.min_pixels or size["shortest_edge"]}
        size |= {"longest_edge": limits.max_pixels or size["longest_edge"]}
    expected = processor(
        text=[processor.apply_chat_template(conversation, tokenize=False)],
        images=[images[2], images[0], images[1]],
        images_kwargs={"size": size},
        return_tensors="pt",
    )
    vision = encoder.decode(encoded.images)
    assert encoded.tokens.tolist() == expected["input_ids"][0].tolist()
    assert torch.equal(encoded.images.grid_thw, expected["image_grid_thw"])
    assert torch.equal(vision.grid_thw, expected["image_grid_thw"])
    assert torch.equal(vision.pixel_values, expected["pixel_values"])
    model = AutoModelForImageTextToText.from_pretrained(tiny_vision_model).model
    positions, _ = model.get_rope_index(
        expected["input_ids"],
        mm_token_type_ids=expected["mm_token_type_ids"],
        image_grid_thw=expected["image_grid_thw"],
    )
    assert torch.equal(encoded.position_ids, positions[:, 0])
    assert encoded.source == "a.parquet row 3"
    trained = processor.tokenizer.decode(encoded.tokens[encoded.trained])
    assert trained == "No 𝄞<|im_end|>"
    if limits is None:  # heights and widths to the nearest 16 pixels, two patches
        assert vision.grid_thw.tolist() == [[1, 4, 8], [1, 4, 4], [1, 6, 2]]


def test_equal_to_the_processor_of_qwen2_5_vl(tiny_vision_model, tmp_path):
    processor = AutoProcessor.from_pretrained(tiny_vision_model)
    parts = {name: getattr(processor, name) for name in ("image_processor", "tokenizer", "video_processor")}
    processor = Qwen2_5_VLProcessor(**parts, chat_template=processor.chat_template)
    processor.save_pretrained(tmp_path)
    config = json.loads((tiny_vision_model / "config.json").read_text())
    config |= {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl"}
    config["vision_config"] |= {"tokens_per_second": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    images = [picture(*size) for size in SIZES[:2]]
    encoder = Encoder(tmp_path)
    encoded = encoder.encode(example(*map(reference, images), "Which?"))
    text = re.sub(r"(<\|image_pad\|>)+", "<|image_pad|>", processor.tokenizer.decode(encoded.tokens))
    expected = processor(text=[text], images=images, return_tensors="pt")
    assert encoded.tokens.tolist() == expected["input_ids"][0].tolist()
    assert torch.equal(encoder.decode(encoded.images).pixel_values, expected["pixel_values"])
    assert encoded.position_ids.shape == (3, len(encoded.tokens))


@pytest.mark.parametrize(
    ("answer", "trained"),
    [
        ("7", ["7", "<|im_end|>"]),
        ("", ["<|im_end|>"]),
        ("12", ["1", "2", "<|im_end|>"]),
        ("\n1", ["\n", "1", "<|im_end|>"]),
        ("1<|im_end|>2", ["1", "<|im_end|>", "2", "<|im_end|>"]),
        ("\n\n", ["\n", "\n", "<|im_end|>"]),
    ],
)
def test_exactly_the_answer_is_trained(encoder, answer, trained):
    encoded = encoder.encode(example("0", reference(picture(32, 32)), answer=answer))
    pieces = [encoder.tokenizer.decode(token) for token in encoded.tokens]
    image = ["<|vision_start|>", *["<|image_pad|>"] * 4, "<|vision_end|>"]
    prompt = ["<|im_start|>", "user", "\n", "0", *image, "<|im_end|>", "\n", "<|im_start|>", "assistant", "\n"]
    assert pieces == [*prompt, *trained, "\n"]
    assert encoded.trained.tolist() == [False] * len(prompt) + [True] * len(trained) + [False]


def test_all_answers_of_a_text_model(text_model):
    earlier = (Message(role="user", parts=("0",)), Message(role="assistant", parts=("1",)))
    encoder = Encoder(text_model, train_on="all")
    encoded = encoder.encode(example("2", answer="34", earlier=earlier))
    assert encoded.images is None
    assert encoded.position_ids is None
    assert encoder.tokenizer.decode(encoded.tokens[encoded.trained]) == "1<|im_end|>34<|im_end|>"
    assert not encoded.trained[0]
    again = pickle.loads(pickle.dumps(encoder)).encode(example("2", answer="34", earlier=earlier))
    assert torch.equal(again.tokens, encoded.tokens)
    assert torch.equal(again.trained, encoded.trained)


def test_text_alone_has_positions_in_a_vision_language_model(encoder):
    encoded = encoder.encode(example("0"))
    assert encoded.images is None
    assert torch.equal(encoded.position_ids, torch.arange(len(encoded.tokens)).expand(3, -1))


def test_each_choice_as_the_answer(tiny_vision_model):
    earlier = (Message(role="user", parts=("0",)), Message(role="assistant", parts=("1",)))
    choices = Encoder(tiny_vision_model, train_on="all").encode_choices(
        example(reference(picture(32, 32)), "Which?", answer="2", choices=("1", "2", "34"), earlier=earlier)
    )
    decode = AutoProcessor.from_pretrained(tiny_vision_model).tokenizer.decode
    assert [decode(choice.tokens[choice.trained]) for choice in choices] == [
        f"{text}<|im_end|>" for text in ("1", "2", "34")
    ]
    assert len({id(choice.images) for choice in choices}) == 1
    length = int(choices[0].trained.long().argmax())
    assert all(torch.equal(choice.tokens[:length], choices[0].tokens[:length]) for choice in choices)


def test_text_is_encoded_without_decoding_an_image(encoder):
    """Half of a file is enough for its size; what else is wrong with it is found when it is decoded."""
    whole = reference(Image.effect_noise((70, 33), 60).convert("RGB"))
    half = ImageReference(data=whole.data[: len(whole.data) // 2])
    one, other = (encoder.encode(example(image, "Which?")) for image in (whole, half))
    for name in ("tokens", "trained", "position_ids"):
        assert torch.equal(getattr(one, name), getattr(other, name))
    with pytest.raises(RowError, match=r"a.parquet row 3: the image of \d+ bytes cannot be decoded: .*truncated"):
        encoder.decode(other.images)


def test_an_image_of_another_size_than_its_header_says(encoder):
    images = encoder.encode(example(reference(picture(70, 33)), "Which?")).images
    changed = replace(images, references=(reference(picture(33, 70)),))
    with pytest.raises(RowError, match=r"row 3: .*\[\[1, 8, 4\]\] of images whose headers ask for \[\[1, 4, 8\]\]"):
        encoder.decode(changed)


@pytest.mark.parametrize(
    ("parts", "limits", "message"),
    [
        (("<|image_pad|>",), None, r"holds 1 placeholder\(s\) of images for 0 image\(s\)"),
        (("<|video_pad|>",), None, r"or one of a video: take the placeholder tokens out"),
        ((reference(picture(8, 8)), "<|image_pad|>"), None, r"holds 2 placeholder\(s\) of images for 1 image"),
        ((ImageReference(data=b"?"),), None, r"the image of 1 bytes cannot be decoded"),
        ((reference(picture(500, 2)),), None, r"image processor refuses the image: absolute aspect ratio"),
        (
            (reference(picture(64, 64)),),
            PixelLimits(max_pixels=4000, oversized="refuse"),
            r"64 x 64 pixels, more than 4000",
        ),
        ((reference(picture(600, 600)),), PixelLimits(oversized="refuse"), r"600 x 600 pixels, more than 262144"),
    ],
)
def test_bad_rows_are_named(tiny_vision_model, parts, limits, message):
    with pytest.raises(RowError, match=f"a.parquet row 3: .*{message}"):
        Encoder(tiny_vision_model, limits=limits).encode(example(*parts))


def test_too_long_is_never_cut(tiny_vision_model, encoder):
    row = example(reference(picture(320, 320)), "What?")
    length = len(encoder.encode(row).tokens)
    assert len(Encoder(tiny_vision_model, max_length=length).encode(row).tokens) == length
    with pytest.raises(LongRowError, match=rf"row 3: {length} tokens, .* more than {length - 1} \(runner.seq_length\)"):
        Encoder(tiny_vision_model, max_length=length - 1).encode(row)


def test_images_need_a_vision_language_model(text_model):
    with pytest.raises(RowError, match=r"row 3: has an image, but .* is a text model"):
        Encoder(text_model).encode(example(reference(picture(8, 8))))


def test_directories_that_cannot_encode(text_model, tmp_path):
    directory = shutil.copytree(text_model, tmp_path / "model")
    (directory / "chat_template.jinja").unlink()
    with pytest.raises(DataError, match=rf"{directory} has no chat template; put a chat_template.jinja beside"):
        Encoder(directory)
    for content, reason in (
        ("{", ""),
        ('{"a": 1}', "KeyError: 'added_tokens'"),
        ('{"added_tokens": []}', "Exception: "),
    ):
        (directory / "tokenizer.json").write_text(content)
        with pytest.raises(DataError, match=rf"{directory}: its tokenizer cannot be loaded: {reason}"):
            Encoder(directory)
    (directory / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=rf"{directory} has none of tokenizer.json, .*; complete the download"):
        Encoder(directory)


def test_a_chat_template_that_is_not_jinja(text_model, tmp_path):
    directory = shutil.copytree(text_model, tmp_path / "model")
    (directory / "chat_template.jinja").write_text("{% for m in messages %}\n{{ m['content' }}{% endfor %}")
    with pytest.raises(
        DataError, match=rf"{directory}: line 2 of its chat template is not valid Jinja: unexp"
    ) as raised:
        Encoder(directory).encode(example())
    assert not isinstance(raised.value, RowError)  # which would be left out


def test_a_tokenizer_that_adds_to_each_piece_is_refused(text_model, tmp_path):
    directory = shutil.copytree(text_model, tmp_path / "model")
    content = json.loads((directory / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Prepend", "prepend": " "}
    (directory / "tokenizer.json").write_text(json.dumps(content))
    (directory / "config.json").write_text(
        json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 384})
    )
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(DataError, match=rf"the tokenizer of {directory} adds to each piece of a text"):
        Encoder(directory)


def test_code_of_the_directory_runs_only_where_it_is_trusted(text_model, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    directory = shutil.copytree(text_model, tmp_path / "model")
    ran = tmp_path / "ran"
    (directory / "tokenization_own.py").write_text(
        f"from pathlib import Path\nfrom transformers import PreTrainedTokenizerFast\nPath({str(ran)!r}).touch()\n"
        "class OwnTokenizer(PreTrainedTokenizerFast): pass\n"
    )
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    settings |= {
        "tokenizer_class": "OwnTokenizer",
        "auto_map": {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]},
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    with contextlib.suppress(DataError):  # transformers refuses, or takes the plain class
        Encoder(directory)
    assert not ran.exists()
    encoder = pickle.loads(pickle.dumps(Encoder(directory, trust_remote_code=True)))
    assert ran.exists() and type(encoder.tokenizer).__name__ == "OwnTokenizer"
