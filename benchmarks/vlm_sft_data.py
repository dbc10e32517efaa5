"""Geometry and synthetic global batches for `vlm_sft_speed.py`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

IMAGES = (1, 3)  # minimum and maximum per sample

_VISION = {"spatial_merge_size": 2, "temporal_patch_size": 2, "num_heads": 16, "in_channels": 3}
_QWEN3_VISION = _VISION | {"hidden_act": "gelu_pytorch_tanh", "patch_size": 16}
_TINY_TEXT = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 4096,
}
_TINY_VISION = {"depth": 3, "hidden_size": 32, "intermediate_size": 40, "num_heads": 2, "out_hidden_size": 32}
_TINY_VISION |= {"patch_size": 4}


@dataclass(frozen=True, kw_only=True, slots=True)
class Geometry:
    """The sizes of a model and of its samples.

    Attributes:
        architecture: class of transformers.
        config: name of the configuration class of transformers.
        text, vision: the two parts of the configuration.
        sides: shortest and longest side of an image, in pixels.
        text_tokens: minimum and maximum number of text tokens in a sample, question and answer together.
        special_tokens: the first of five ids, for the start and end of an image, padding, an image, a video. Ids of
            text are smaller.
    """

    architecture: str
    config: str
    text: dict[str, Any]
    vision: dict[str, Any]
    sides: tuple[int, int] = (224, 896)
    text_tokens: tuple[int, int] = (30, 400)
    special_tokens: int = 151652

    @property
    def image_token(self) -> int:
        """The id of the placeholder for image features."""
        return self.special_tokens + 3

    def make_config(self) -> Any:
        """Return the configuration object of transformers."""
        import transformers

        return getattr(transformers, self.config)(
            architectures=[self.architecture],
            text_config=dict(self.text),
            vision_config=dict(self.vision),
            vision_start_token_id=self.special_tokens,
            vision_end_token_id=self.special_tokens + 1,
            image_token_id=self.image_token,
            video_token_id=self.special_tokens + 4,
            tie_word_embeddings=True,
        )


# From config.json of Qwen/Qwen2.5-VL-3B-Instruct and Qwen/Qwen3-VL-4B-Instruct on the HuggingFace hub; fields that are
# not listed have transformers' defaults there. The vision tower has the same sizes in all Qwen2.5-VL models except
# out_hidden_size (arXiv 2502.13923, table 1).
GEOMETRIES = {
    "2.5-3b": Geometry(
        architecture="Qwen2_5_VLForConditionalGeneration",
        config="Qwen2_5_VLConfig",
        text={
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 128000,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        vision=_VISION
        | {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "out_hidden_size": 2048,
            "patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "tokens_per_second": 2,
        },
    ),
    "3-4b": Geometry(
        architecture="Qwen3VLForConditionalGeneration",
        config="Qwen3VLConfig",
        text={
            "vocab_size": 151936,
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 262144,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e6,
                "mrope_section": [24, 20, 20],
                "mrope_interleaved": True,
            },
        },
        vision=_QWEN3_VISION
        | {
            "depth": 24,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "out_hidden_size": 2560,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [5, 11, 17],
        },
    ),
    # To try the benchmark on a CPU.
    "tiny-2.5": Geometry(
        architecture="Qwen2_5_VLForConditionalGeneration",
        config="Qwen2_5_VLConfig",
        text=_TINY_TEXT
        | {
            "hidden_size": 64,
            "head_dim": 32,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
        },
        vision=_VISION | _TINY_VISION | {"out_hidden_size": 64, "window_size": 16, "fullatt_block_indexes": [2]},
        sides=(16, 48),
        text_tokens=(6, 20),
        special_tokens=500,
    ),
    "tiny": Geometry(
        architecture="Qwen3VLForConditionalGeneration",
        config="Qwen3VLConfig",
        text=_TINY_TEXT
        | {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            }
        },
        vision=_QWEN3_VISION | _TINY_VISION | {"num_position_embeddings": 36, "deepstack_visual_indexes": [0, 1]},
        sides=(16, 48),
        text_tokens=(6, 20),
        special_tokens=500,
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One conversation: images, then a question, then the answer that is trained.

    Attributes:
        tokens: int64 [length].
        trained: bool [length]: the answer.
        pixel_values: float32 [patches, features].
        grid_thw: int64 [images, 3].
    """

    tokens: Tensor
    trained: Tensor
    pixel_values: Tensor
    grid_thw: Tensor


def write_config(name: str, directory: Path) -> None:
    """Write config.json only, since the models get random weights."""
    GEOMETRIES[name].make_config().save_pretrained(directory)


def make_batches(name: str, samples: int, batches: int) -> list[list[Example]]:
    """Return global batches, the same for the same arguments; sides and lengths are uniform between their bounds."""
    geometry = GEOMETRIES[name]
    generator = torch.Generator().manual_seed(0)
    merge, patch = geometry.vision["spatial_merge_size"], geometry.vision["patch_size"]
    sides = tuple(side // (merge * patch) for side in geometry.sides)
    features = 3 * geometry.vision["temporal_patch_size"] * patch**2
    start, end = geometry.special_tokens, geometry.special_tokens + 1
    # All images are windows of one noise, because fresh noise for all would take longer than the training.
    noise = torch.randn(4 * IMAGES[1] * (sides[1] * merge) ** 2 // 3, features, generator=generator)

    def draw(least: int, most: int) -> int:
        return int(torch.randint(least, most + 1, (), generator=generator))

    def example() -> Example:
        grids = [(1, merge * draw(*sides), merge * draw(*sides)) for _ in range(draw(*IMAGES))]
        text = draw(*geometry.text_tokens)
        words = torch.randint(geometry.special_tokens, (text,), generator=generator).tolist()
        tokens: list[int] = []
        for _, rows, columns in grids:
            tokens += [start, *[geometry.image_token] * (rows * columns // merge**2), end]
        tokens += words
        patches = sum(rows * columns for _, rows, columns in grids)
        first = draw(0, len(noise) - patches)
        return Example(
            tokens=torch.tensor(tokens),
            trained=torch.arange(len(tokens)) >= len(tokens) - draw(text // 4, text // 2),
            pixel_values=noise[first : first + patches],
            grid_thw=torch.tensor(grids),
        )

    return [[example() for _ in range(samples)] for _ in range(batches)]
