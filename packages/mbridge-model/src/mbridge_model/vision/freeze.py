"""Freeze parts of a vision-language model."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Freeze:
    """The parts whose weights are not trained. Nothing is frozen by default.

    Attributes:
        language_model: embeddings, layers and output layer.
        vision_model: the vision tower without its projection.
        vision_projection: the modules that map the tower's features into the language model (Qwen's mergers).
    """

    language_model: bool = False
    vision_model: bool = False
    vision_projection: bool = False

    def fields(self) -> dict[str, bool]:
        """Return the fields of a Megatron-Bridge provider. By default Qwen3-VL-MoE's freezes two of three."""
        return {
            "freeze_language_model": self.language_model,
            "freeze_vision_model": self.vision_model,
            "freeze_vision_projection": self.vision_projection,
        }
