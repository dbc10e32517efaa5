"""Vision-language models: the inputs, the vision towers and the model that joins them with a language model.

In: a provider and `VisionInputs`. Out: the pipeline stages of a `VisionLanguageModel`.

Uses: `bridge`, `errors`, `kernels`, `patches`, `torch_backend`.
"""

from mbridge_model.vision.family import Freeze, Vision
from mbridge_model.vision.inputs import VisionInputs

__all__ = ["Freeze", "Vision", "VisionInputs"]
