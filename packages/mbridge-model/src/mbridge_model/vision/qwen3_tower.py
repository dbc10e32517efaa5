"""Qwen3-VL's vision tower: Megatron-Bridge's module, split over tensor parallel.

Its layers and mergers are run here, in transformers' order and precision, with the index arithmetic on the host.
"""

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mbridge_model.bridge.bridge import qwen_vl_parts
from mbridge_model.errors import ModelError
from mbridge_model.patches import Patch, PatchTable
from mbridge_model.vision.packing import pack_frames

ACTIVATION = "gelu_pytorch_tanh"


def build_tower(provider: Any, backend: Literal["te", "torch"]) -> nn.Module:
    """Build the tower of `provider.vision_config` from the backend's modules.

    Raises:
        ModelError: the tower's activation differs from the one that Megatron-Bridge's module computes.
    """
    from megatron.core.transformer.enums import AttnMaskType

    from mbridge_model.torch_backend import TorchSpecProvider, layer_spec

    activation = provider.vision_config.hidden_act
    if activation != ACTIVATION:
        raise ModelError(f"vision_config.hidden_act is {activation!r}; Qwen3-VL's tower is built with {ACTIVATION!r}")
    parts = qwen_vl_parts()
    config = parts.vision_config(provider.vision_config, megatron_config=provider)
    config.params_dtype = provider.params_dtype
    config.perform_initialization = provider.perform_initialization
    modules: Any = TorchSpecProvider()
    if backend == "te":
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

        modules = TESpecProvider()
    tower: Any = parts.vision_model(
        config,
        layer_spec(modules, parts.attention, AttnMaskType.no_mask),
        parts.merger_submodules(
            patch_norm=modules.layer_norm(),
            linear_fc1=modules.column_parallel_linear(),
            linear_fc2=modules.row_parallel_linear(),
        ),
        pg_collection=provider._pg_collection,
    )
    for merger in (tower.merger, *tower.decoder.deepstack_merger_list):
        MERGER_ACTIVATION.on(merger).apply()
    recomputing(tower.decoder).apply()
    return tower


def encode(tower: Any, pixel_values: Tensor, grid_thw: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return the features [tokens, hidden], and [tokens, hidden] for each entry of `deepstack_visual_indexes`."""
    from transformers.vision_utils import get_vision_bilinear_indices_and_weights, get_vision_position_ids

    device, merge = pixel_values.device, tower.spatial_merge_size
    hidden = tower.patch_embed(pixel_values)
    # The table of learned positions is interpolated to the size of each image.
    corners, weights = get_vision_bilinear_indices_and_weights(grid_thw, tower.num_grid_per_side, merge)
    learned = (tower.pos_embed(corners.to(device)) * weights.to(device).unsqueeze(-1)).sum(0)
    hidden = hidden + learned.to(hidden.dtype)
    rotary = tower.rotary_pos_emb
    frequencies = 1.0 / rotary.theta ** (torch.arange(0, rotary.dim, 2) / rotary.dim)
    # [patches, row and column, frequencies], each angle for both halves of a head's channels
    angles = (get_vision_position_ids(grid_thw, merge).unsqueeze(-1) * frequencies).flatten(1).repeat(1, 2)
    hidden, features = tower.decoder(
        hidden_states=hidden.unsqueeze(1),
        attention_mask=None,
        rotary_pos_emb=angles[:, None, None].to(device),
        packed_seq_params=pack_frames(grid_thw, device),
    )
    return tower.merger(hidden), features


def build_rotary(provider: Any) -> nn.Module:
    """Build the language model's rotary embedding, which interleaves time, height and width along the frequencies."""
    return qwen_vl_parts().rotary(
        kv_channels=provider.kv_channels,
        rotary_percent=provider.rotary_percent,
        rotary_interleaved=provider.rotary_interleaved,
        rotary_base=provider.rotary_base,
        cp_group=provider._pg_collection.cp,
    )


def checkpoint_layers(
    block: Any, hidden_states: Tensor, rotary_pos_emb: Tensor, packed_seq_params: Any, **unused: Any
) -> tuple[Tensor, list[Tensor]]:
    """Checkpoint each layer and run the mergers outside, so that gradients flow through their features."""
    from megatron.core.tensor_parallel import checkpoint

    def run(layer: nn.Module, hidden: Tensor, angles: Tensor) -> Tensor:
        return layer(hidden, None, rotary_pos_emb=angles, packed_seq_params=packed_seq_params)[0]

    features = []
    for number, layer in enumerate(block.layers):
        hidden_states = checkpoint(partial(run, layer), False, hidden_states, rotary_pos_emb)
        if number in block.deepstack_visual_indexes:
            merger = block.deepstack_merger_list[block.deepstack_visual_indexes.index(number)]
            features.append(merger(hidden_states))
    return hidden_states, features


# On each merger.
MERGER_ACTIVATION = PatchTable(
    "compute the mergers of Qwen3-VL",
    Patch(
        target="activation_func",
        reason="transformers' mergers have the exact GELU, Megatron-Bridge's the tanh approximation of the layers",
        replacement=torch.nn.functional.gelu,
    ),
)


def recomputing(decoder: nn.Module) -> PatchTable:
    """The patch of a tower's decoder with which it recomputes activations."""
    return PatchTable(
        "recompute the activations of Qwen3-VL's tower",
        Patch(
            target="_checkpointed_forward",
            reason="it returns the deepstack features of the checkpointed function in a list, of which autograd "
            "knows nothing: neither the mergers nor the layers below would learn from them",
            replacement=partial(checkpoint_layers, decoder),
        ),
        owner=decoder,
    )
