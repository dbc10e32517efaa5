"""Examples as tokens and patches, by the model's own tokenizer, chat template and image processor."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
from mbridge_model.directory import open_directory
from mbridge_model.errors import ModelError
from mbridge_model.vision.inputs import VisionInputs
from mbridge_model.vision.positions import MropeSettings, mrope_position_ids
from torch import Tensor
from transformers import AutoProcessor, AutoTokenizer

from mbridge_train.data.errors import DataError, LongRowError, RowError
from mbridge_train.data.examples import Example, ImageReference
from mbridge_train.data.images import LARGEST, PixelLimits, decode
from mbridge_train.data.template import ChatTemplate
from mbridge_train.errors import TrainError
from mbridge_train.run.hf_files import from_directory

_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """One sequence.

    Attributes:
        tokens: int64 [length]; an image as as many placeholders as it has tokens.
        trained: bool [length]: True on the assistant's answer and its end token, as targets.
        vision: the images in the order of their tokens; None where there are none, or none are kept.
        position_ids: int64 [3, length], M-RoPE; None for a text model.
        source: file and row.
    """

    tokens: Tensor
    trained: Tensor
    vision: VisionInputs | None
    position_ids: Tensor | None
    source: str


class Encoder:
    """Encodes examples for the model of a HuggingFace directory. Can be pickled; the copy reads the directory again.

    Args:
        model_directory: with tokenizer, chat template and, for a vision-language model, processor.
        max_length: most tokens of a sequence; None: no limit.
        train_on: the last answer, or all of the assistant's turns.
        limits: on the size of images.
        keep_images: False leaves `vision` out of what is returned, for ranks whose pipeline stage reads no pixels.
            Images are decoded all the same, so that all ranks find the same bad rows.
        trust_remote_code: let transformers run Python files that lie in the directory.

    Raises:
        DataError: the directory's tokenizer or processor cannot be loaded or used, or there is no chat template.
        ModelError: the directory is not a model's.
    """

    def __init__(
        self,
        model_directory: str | Path,
        *,
        max_length: int | None = None,
        train_on: Literal["last", "all"] = "last",
        limits: PixelLimits | None = None,
        keep_images: bool = True,
        trust_remote_code: bool = False,
    ) -> None:
        self._again = partial(
            Encoder,
            model_directory,
            max_length=max_length,
            train_on=train_on,
            limits=limits,
            keep_images=keep_images,
            trust_remote_code=trust_remote_code,
        )
        self._directory = Path(model_directory)
        self._trust_remote_code = trust_remote_code
        self._max_length = max_length
        self._train_on = train_on
        self._limits = limits or PixelLimits()
        self._keep_images = keep_images
        self._image_processor: Any = None
        self._mrope: MropeSettings | None = None
        is_vision = "vision_config" in open_directory(self._directory, needs_weights=False).config
        if is_vision:
            processor = self._load(AutoProcessor)
            self.tokenizer = processor.tokenizer
            self._image_processor = processor.image_processor
            self._mrope = MropeSettings.from_directory(self._directory)
            template = processor.chat_template or self.tokenizer.chat_template
        else:
            self.tokenizer = self._load(AutoTokenizer)
            template = self.tokenizer.chat_template
        if not isinstance(template, str):
            raise DataError(
                f"{self._directory} has no chat template; put a chat_template.jinja beside the tokenizer's files"
            )
        self._ids_of = lru_cache(maxsize=16)(self._token_ids)  # the choices of a question share all but the answer
        self._check_tokenizer()
        self._template = ChatTemplate(self.tokenizer, template, str(self._directory))

    def _load(self, kind: Any) -> Any:
        # transformers makes an empty tokenizer where it finds none of the files.
        if not any((self._directory / name).is_file() for name in _TOKENIZER_FILES):
            raise DataError(f"{self._directory} has none of {', '.join(_TOKENIZER_FILES)}; complete the download")
        try:
            return from_directory(
                kind,
                self._directory,
                "processor" if kind is AutoProcessor else "tokenizer",
                local_files_only=True,
                trust_remote_code=self._trust_remote_code,
            )
        except TrainError as error:
            raise DataError(str(error)) from error

    def __reduce__(self) -> Any:
        return self._again, ()

    def encode(self, example: Example) -> Encoded:
        """The example as one sequence.

        Raises:
            LongRowError: it is longer than `max_length`.
            RowError: an image cannot be used, or the text holds a placeholder of images itself.
            DataError: the chat template does not tell the answer from the rest.
        """
        return self._encode(example, self._vision(example), self._train_on)

    def encode_choices(self, example: Example) -> list[Encoded]:
        """For each choice the sequence in which it is the answer, and in which only that is `trained`.

        They share the tensors of the images. Raises what `encode` does.
        """
        vision = self._vision(example)
        return [
            self._encode(replace(example, answer=choice), vision, "last")
            for choice in example.choices or (example.answer,)
        ]

    def _vision(self, example: Example) -> VisionInputs | None:
        images = example.images
        if not images:
            return None
        if self._image_processor is None:
            raise RowError(
                f"{example.source}: has an image, but {self._directory} is a text model; give a vision-language model, "
                "or leave out images: data.image_keys=[] does where they are columns"
            )
        return self._patches(images, example.source)

    def _patches(self, images: Sequence[ImageReference], source: str) -> VisionInputs:
        size = self._image_processor.size
        largest = self._limits.max_pixels or int(size["longest_edge"])
        smallest = min(self._limits.min_pixels or int(size["shortest_edge"]), largest)
        most = largest if self._limits.oversized == "refuse" else LARGEST
        decoded = [decode(image, source, most_pixels=most) for image in images]
        try:
            patches = self._image_processor(
                images=decoded, size={"shortest_edge": smallest, "longest_edge": largest}, return_tensors="pt"
            )
        except ValueError as error:  # such as an aspect ratio over 200
            raise RowError(f"{source}: the model's image processor refuses the image: {error}") from None
        return VisionInputs(pixel_values=patches["pixel_values"], grid_thw=patches["image_grid_thw"])

    def _encode(self, example: Example, vision: VisionInputs | None, train_on: Literal["last", "all"]) -> Encoded:
        source = example.source
        segments = self._template.segments(example.messages, example.answer, train_on=train_on, source=source)
        # Piece by piece, as in generation, where the prompt is tokenized before there is an answer. Only an answer that
        # starts with white space can give other tokens than the text as a whole does.
        pieces = [(self._ids_of(text), is_trained) for text, is_trained in segments]
        tokens = torch.tensor([token for ids, _ in pieces for token in ids])
        trained = torch.tensor([is_trained for ids, is_trained in pieces for _ in ids])
        if self._mrope is not None:
            tokens, trained = self._expand(tokens, trained, vision, source)
        if self._max_length is not None and len(tokens) > self._max_length:
            raise LongRowError(
                f"{source}: {len(tokens)} tokens, {int((~trained).sum())} of them before or between answers, are more "
                f"than {self._max_length} (runner.seq_length); raise it, or lower data.max_pixels"
            )
        position_ids = None
        if self._mrope is not None:
            try:
                position_ids = mrope_position_ids(tokens, None if vision is None else vision.grid_thw, self._mrope)
            except ModelError as error:
                raise RowError(f"{source}: {error}") from None
        kept = vision if self._keep_images else None
        return Encoded(tokens=tokens, trained=trained, vision=kept, position_ids=position_ids, source=source)

    def _check_tokenizer(self) -> None:
        pieces = [token for text in ("a question", "an answer") for token in self._token_ids(text)]
        if self.tokenizer.decode(pieces) != self.tokenizer.decode(self._token_ids("a questionan answer")):
            raise DataError(
                f"the tokenizer of {self._directory} adds to each piece of a text, so that an answer cannot be told "
                "from its prompt; use a tokenizer of the byte-level kind"
            )

    def _token_ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _expand(
        self, tokens: Tensor, trained: Tensor, vision: VisionInputs | None, source: str
    ) -> tuple[Tensor, Tensor]:
        """Each image's one placeholder, as the template writes it, repeated for each of its tokens."""
        assert self._mrope is not None
        placeholders = tokens == self._mrope.image_token_id
        counts = torch.ones_like(tokens)
        image_tokens = (
            tokens.new_empty(0) if vision is None else vision.grid_thw.prod(-1) // self._mrope.spatial_merge_size**2
        )
        if int(placeholders.sum()) != len(image_tokens) or bool((tokens == self._mrope.video_token_id).any()):
            raise RowError(
                f"{source}: the text holds {int(placeholders.sum())} placeholder(s) of images for {len(image_tokens)} "
                "image(s), or one of a video: take the placeholder tokens out of the text"
            )
        counts[placeholders] = image_tokens
        return tokens.repeat_interleave(counts), trained.repeat_interleave(counts)
