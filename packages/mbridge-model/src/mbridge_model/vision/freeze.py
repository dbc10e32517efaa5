"""Freeze parts of a vision-language model."""

from dataclasses import asdict, dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Freeze:
    """The parts whose weights are not trained. By default Megatron-Bridge's Qwen3-VL-MoE would freeze two of them.

    Attributes:
        language_model: embeddings, layers and output layer.
        vision_model: the vision tower without its projection.
        vision_projection: the modules that map the tower's features into the language model (Qwen's mergers).
    """

    language_model: bool = False
    vision_model: bool = False
    vision_projection: bool = False

    def fields(self) -> dict[str, bool]:
        """Return the fields of a Megatron-Bridge provider."""
        return {f"freeze_{part}": is_frozen for part, is_frozen in asdict(self).items()}
