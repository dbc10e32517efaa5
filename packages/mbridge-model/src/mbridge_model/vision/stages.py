"""Assign language layers to pipeline stages so that the first stage uses the deepstack features."""

from collections.abc import Mapping
from typing import Any

from mbridge_model.errors import ModelError


def deepstack_stage_sizes(layers: int, stages: int, features: int) -> list[int] | None:
    """Return the number of layers of each stage such that the first holds the layers that take deepstack features.

    Features that a later stage needs travel to it, which costs transfers of up to 1 + features times the size. So the
    first stage gets `features` layers where each other stage still gets one, and the rest is spread evenly. None where
    Megatron-Core's even split already fits, or no split would help.
    """
    if stages == 1 or features == 0 or layers // stages >= features or layers - features < stages - 1:
        return None
    rest, more = divmod(layers - features, stages - 1)
    return [features] + [rest + 1] * more + [rest] * (stages - 1 - more)


# With any of these set, the user divides the layers.
_SPLIT_FIELDS = (
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "pipeline_model_parallel_layout",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "virtual_pipeline_model_parallel_size",
)


def stage_fields(layers: int, stages: int, features: int, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the provider field that sets these sizes; nothing where `overrides`, the user's fields, decide the split.

    Raises:
        ModelError: there are fewer language layers than features. Megatron-Bridge compares their number with the layers
            of the first stage instead, and so refuses layouts that work and reports the wrong number.
    """
    if layers < features:
        raise ModelError(
            f"config.json has {features} deepstack_visual_indexes in vision_config, but only {layers} language "
            "layers (num_hidden_layers) to add their features after; correct one of the two"
        )
    sizes = deepstack_stage_sizes(layers, stages, features)
    if sizes is None or any(overrides.get(name) for name in _SPLIT_FIELDS):
        return {}
    layout = [["decoder"] * size for size in sizes]
    layout[0].insert(0, "embedding")
    layout[-1].append("loss")
    return {"pipeline_model_parallel_layout": layout}
