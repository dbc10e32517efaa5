"""Which parts of a vision-language model are not trained."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Freeze:
    """Parts whose weights stay as they are. Nothing is frozen by default.

    Attributes:
        language_model: embeddings, layers and output layer.
        vision_model: the vision tower but for its projection.
        vision_projection: what maps the tower's features into the language model (Qwen's mergers).
    """

    language_model: bool = False
    vision_model: bool = False
    vision_projection: bool = False

    def fields(self) -> dict[str, bool]:
        """As fields of a Megatron-Bridge provider, which freezes two of the three in a Qwen3-VL-MoE by default."""
        return {
            "freeze_language_model": self.language_model,
            "freeze_vision_model": self.vision_model,
            "freeze_vision_projection": self.vision_projection,
        }
