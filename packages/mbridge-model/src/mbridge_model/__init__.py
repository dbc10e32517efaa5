"""HuggingFace checkpoints as Megatron-Core models, and back, with or without Transformer Engine or a GPU.

model, handle = load("Qwen2.5-1.5B", Parallel(tensor=2))
for name, tensor in export(model, handle): ...
save_hf(model, handle, "out")
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mbridge_model.errors import ModelError
    from mbridge_model.exporting import export, export_recipe, save_hf
    from mbridge_model.forward_pass import forward
    from mbridge_model.loading import ModelHandle, load
    from mbridge_model.parallel import Parallel
    from mbridge_model.patches.cpu import enable_cpu
    from mbridge_model.positions import MropeSettings, mrope_position_ids
    from mbridge_model.vision.family import Freeze
    from mbridge_model.vision.inputs import VisionInputs

__all__ = [
    "Freeze",
    "ModelError",
    "ModelHandle",
    "MropeSettings",
    "Parallel",
    "VisionInputs",
    "enable_cpu",
    "export",
    "export_recipe",
    "forward",
    "load",
    "mrope_position_ids",
    "save_hf",
]

# Importing Megatron takes seconds, so a name's module is imported when the name is first used. No module is called like
# a function of the API: importing it would replace the function in this namespace.
_NAMES = {
    "errors": ["ModelError"],
    "exporting": ["export", "export_recipe", "save_hf"],
    "forward_pass": ["forward"],
    "loading": ["ModelHandle", "load"],
    "parallel": ["Parallel"],
    "patches.cpu": ["enable_cpu"],
    "positions": ["MropeSettings", "mrope_position_ids"],
    "vision.family": ["Freeze"],
    "vision.inputs": ["VisionInputs"],
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
