"""The description of a model family."""

from dataclasses import dataclass
from typing import Any

from mbridge_model.vision.family import Vision


@dataclass(frozen=True, kw_only=True, slots=True)
class Force:
    """A provider field whose value the family's weights determine.

    Attributes:
        field: name of a field of the Megatron provider.
        value: what it must be.
        reason: one clause for the log and for the error on a user's override that contradicts it.
    """

    field: str
    value: Any
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """A group of HuggingFace architectures with the same rules.

    Attributes:
        name: for logs.
        architectures: HuggingFace model class names.
        forces: provider fields fixed by the family.
        vision: how it processes images; None for text models.
    """

    name: str
    architectures: tuple[str, ...]
    forces: tuple[Force, ...]
    vision: Vision | None = None
