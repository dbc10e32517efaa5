"""Encoding examples as tokens and patches, with the model's own tokenizer, chat template and image processor.

`Encoder.encode` tokenizes the text and measures the images, which is cheap and gives the length of the sequence;
`Encoder.decode` decodes the images, on the ranks that need them.
"""

from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
from mbridge_model.directory import open_directory
from mbridge_model.errors import ModelError
from mbridge_model.positions import MropeSettings, mrope_position_ids
from mbridge_model.vision.inputs import VisionInputs
from torch import Tensor
from transformers import AutoProcessor, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from mbridge_train.data.errors import DataError, LongRowError, RowError
from mbridge_train.data.examples import Example
from mbridge_train.data.hf_files import from_directory
from mbridge_train.data.images import LARGEST, PixelLimits, RowImages, decode, fetched, image_size
from mbridge_train.data.trained_text import ChatTemplate

_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """One sequence.

    Attributes:
        tokens: int64 [length], with one placeholder for each token of an image.
        trained: bool [length]: True for the tokens that are trained as targets: answers and their end tokens.
        images: the images in the order of their tokens, not decoded yet; None if there are none.
        position_ids: int64 [3, length], M-RoPE; None for a text model.
        source: file and row.
    """

    tokens: Tensor
    trained: Tensor
    images: RowImages | None
    position_ids: Tensor | None
    source: str


class Encoder:
    """Encodes examples for the model of a HuggingFace directory. Can be pickled; the copy reads the directory again.

    Args:
        model_directory: directory with tokenizer, chat template and, for a vision-language model, processor.
        max_length: most tokens of a sequence; None: no limit.
        train_on: train on the last answer, or on all of the assistant's turns.
        limits: limits on the size of images.
        trust_remote_code: let transformers run Python files in the directory.

    Raises:
        DataError: the directory's tokenizer or processor cannot be loaded or used, or there is no chat template.
        ModelError: the directory does not hold a model.
    """

    def __init__(
        self,
        model_directory: str | Path,
        *,
        max_length: int | None = None,
        train_on: Literal["last", "all"] = "last",
        limits: PixelLimits | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self._again = partial(
            Encoder,
            model_directory,
            max_length=max_length,
            train_on=train_on,
            limits=limits,
            trust_remote_code=trust_remote_code,
        )
        self._directory = Path(model_directory)
        self._trust_remote_code = trust_remote_code
        self._max_length = max_length
        self._train_on = train_on
        self._limits = limits or PixelLimits()
        self._image_processor: Any = None
        self._mrope: MropeSettings | None = None
        is_vision = "vision_config" in open_directory(self._directory, needs_weights=False).config
        if is_vision:
            processor = self._load(AutoProcessor)
            self.tokenizer = processor.tokenizer
            self._image_processor = processor.image_processor
            size = self._image_processor.size
            self._largest = self._limits.max_pixels or int(size["longest_edge"])
            self._smallest = min(self._limits.min_pixels or int(size["shortest_edge"]), self._largest)
            self._mrope = MropeSettings.from_directory(self._directory)
            template = processor.chat_template or self.tokenizer.chat_template
        else:
            self.tokenizer = self._load(AutoTokenizer)
            template = self.tokenizer.chat_template
        if not isinstance(template, str):
            raise DataError(
                f"{self._directory} has no chat template; put a chat_template.jinja beside the tokenizer's files"
            )
        self._ids_of = lru_cache(maxsize=16)(self._token_ids)  # the choices of a question differ only in the answer
        pieces = [token for text in ("a question", "an answer") for token in self._token_ids(text)]
        if self.tokenizer.decode(pieces) != self.tokenizer.decode(self._token_ids("a questionan answer")):
            raise DataError(
                f"the tokenizer of {self._directory} adds to each piece of a text, so that an answer cannot be told "
                "from its prompt; use a tokenizer of the byte-level kind"
            )
        self._template = ChatTemplate(self.tokenizer, template, str(self._directory))

    def _load(self, kind: Any) -> Any:
        # Without any of these files, transformers returns an empty tokenizer.
        if not any((self._directory / name).is_file() for name in _TOKENIZER_FILES):
            raise DataError(f"{self._directory} has none of {', '.join(_TOKENIZER_FILES)}; complete the download")
        name = "processor" if kind is AutoProcessor else "tokenizer"
        options = {"local_files_only": True, "trust_remote_code": self._trust_remote_code}
        return from_directory(kind, self._directory, name, **options)

    def __reduce__(self) -> Any:
        return self._again, ()

    def encode(self, example: Example) -> Encoded:
        """Return the example as one sequence.

        Raises:
            LongRowError: it is longer than `max_length`.
            RowError: an image cannot be used, as far as its header shows, or the text holds an image placeholder.
            DataError: the chat template does not show where the answer begins and ends.
        """
        return self._encode(example, self._measured(example), self._train_on)

    def encode_choices(self, example: Example) -> list[Encoded]:
        """Like `encode`, for each choice as the answer, with only the answer `trained`; they share their images."""
        images = self._measured(example)
        return [
            self._encode(replace(example, answer=choice), images, "last")
            for choice in example.choices or (example.answer,)
        ]

    def decode(self, images: RowImages) -> VisionInputs:
        """Decode the images of a row, resize them, and cut them into patches.

        Raises `RowError` if an image cannot be decoded, or does not have the size that its header states.
        """
        decoded = [decode(image, images.source, most_pixels=self._most_pixels) for image in images.references]
        patches = self._image_processor(
            images=decoded, size={"shortest_edge": self._smallest, "longest_edge": self._largest}, return_tensors="pt"
        )
        grid_thw: Tensor = patches["image_grid_thw"]
        if not torch.equal(grid_thw, images.grid_thw):
            raise RowError(
                f"{images.source}: the image processor made patches {grid_thw.tolist()} of images whose headers ask "
                f"for {images.grid_thw.tolist()}; the file of an image changed, or its header is wrong"
            )
        return VisionInputs(pixel_values=patches["pixel_values"], grid_thw=grid_thw)

    @property
    def _most_pixels(self) -> int:
        return self._largest if self._limits.oversized == "refuse" else LARGEST

    def _measured(self, example: Example) -> RowImages | None:
        images = example.images
        if not images:
            return None
        if self._image_processor is None:
            raise RowError(
                f"{example.source}: has an image, but {self._directory} is a text model; give a vision-language model, "
                "or leave out images: data.image_keys=[] does where they are columns"
            )
        references = tuple(fetched(image, example.source) for image in images)
        sizes = [image_size(image, example.source, most_pixels=self._most_pixels) for image in references]
        try:
            grids = [self._grid(width, height) for width, height in sizes]
        except ValueError as error:  # such as an aspect ratio over 200
            raise RowError(f"{example.source}: the model's image processor refuses the image: {error}") from None
        return RowImages(references=references, grid_thw=torch.tensor(grids), source=example.source)

    def _grid(self, width: int, height: int) -> tuple[int, int, int]:
        """Return the patches of an image along time, height and width, as the image processor cuts them."""
        patch, merge = self._image_processor.patch_size, self._image_processor.merge_size
        height, width = smart_resize(
            height, width, factor=patch * merge, min_pixels=self._smallest, max_pixels=self._largest
        )
        return 1, height // patch, width // patch

    def _encode(self, example: Example, images: RowImages | None, train_on: Literal["last", "all"]) -> Encoded:
        source = example.source
        segments = self._template.segments(example.messages, example.answer, train_on=train_on, source=source)
        # Piece by piece, as in generation, which tokenizes the prompt before there is an answer. Only an answer that
        # starts with white space can then have other tokens than in the text as a whole.
        pieces = [(self._ids_of(text), is_trained) for text, is_trained in segments]
        tokens = torch.tensor([token for ids, _ in pieces for token in ids])
        trained = torch.tensor([is_trained for ids, is_trained in pieces for _ in ids])
        if self._mrope is not None:
            tokens, trained = self._expand(tokens, trained, images, source)
        if self._max_length is not None and len(tokens) > self._max_length:
            raise LongRowError(
                f"{source}: {len(tokens)} tokens, {int((~trained).sum())} of them before or between answers, are more "
                f"than {self._max_length} (runner.seq_length); raise it, or lower data.max_pixels"
            )
        try:
            grid_thw = None if images is None else images.grid_thw
            position_ids = None if self._mrope is None else mrope_position_ids(tokens, grid_thw, self._mrope)
        except ModelError as error:
            raise RowError(f"{source}: {error}") from None
        return Encoded(tokens=tokens, trained=trained, images=images, position_ids=position_ids, source=source)

    def _token_ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _expand(self, tokens: Tensor, trained: Tensor, images: RowImages | None, source: str) -> tuple[Tensor, Tensor]:
        """Repeat the template's single placeholder of each image once per token of the image."""
        assert self._mrope is not None
        placeholders = tokens == self._mrope.image_token_id
        counts = torch.ones_like(tokens)
        patches = tokens.new_empty(0) if images is None else images.grid_thw.prod(-1)
        image_tokens = patches // self._mrope.spatial_merge_size**2
        if int(placeholders.sum()) != len(image_tokens) or bool((tokens == self._mrope.video_token_id).any()):
            raise RowError(
                f"{source}: the text holds {int(placeholders.sum())} placeholder(s) of images for {len(image_tokens)} "
                "image(s), or one of a video: take the placeholder tokens out of the text"
            )
        counts[placeholders] = image_tokens
        return tokens.repeat_interleave(counts), trained.repeat_interleave(counts)
