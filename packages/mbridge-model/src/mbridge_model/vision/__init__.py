"""Vision-language models: inputs, positions, and how the model is put together."""

from mbridge_model.vision.family import Vision
from mbridge_model.vision.freeze import Freeze
from mbridge_model.vision.inputs import VisionInputs

__all__ = ["Freeze", "Vision", "VisionInputs"]
