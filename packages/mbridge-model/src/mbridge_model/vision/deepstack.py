"""Deepstack (arXiv 2406.04334): features of the vision tower's inner layers, added after the first language layers.

A later pipeline stage has no tower, but may hold some of those layers. So the features travel with the hidden states,
appended along the last dimension: [sequence, batch, hidden * (1 + remaining features)]. Each layer splits off its own
feature and adds it. The pipeline's transfers, recomputation and sequence parallelism still handle a single tensor.
Text positions carry zeros: n (n + 1) / 2 hidden sizes of activation memory per token for n features.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from mbridge_model.bridge.bridge import qwen_vl_parts
from mbridge_model.kernels.self_attention import layer_specs


class DeepstackLayer(TransformerLayer):
    """A transformer layer that adds the next feature, if there is one, to its output."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        """[sequence, batch, hidden * (1 + n)] in; [sequence, batch, hidden * n] out, or hidden where n is 0."""
        hidden = self.config.hidden_size
        if hidden_states.shape[-1] == hidden:
            return super().forward(hidden_states, *args, **kwargs)
        own, feature, rest = hidden_states.tensor_split((hidden, 2 * hidden), dim=-1)
        output, context = super().forward(own.contiguous(), *args, **kwargs)
        output = output + feature
        return torch.cat([output, rest], dim=-1) if rest.shape[-1] else output, context


def language_layers(backend_spec: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a provider's `transformer_layer_spec`: layers with deepstack and with ready-made rotary angles.

    The attention is Megatron-Bridge's for Qwen3-VL, which takes an angle for each token of a packed batch.
    """

    def vision_language_layers(config: Any, vp_stage: int | None = None) -> Any:
        spec, layers = layer_specs(backend_spec, config, vp_stage)
        for layer in layers:
            if layer.module is not TransformerLayer:
                raise ValueError(f"a layer of class {layer.module.__name__} cannot carry deepstack features")
            layer.module = DeepstackLayer
            layer.submodules.self_attention.module = qwen_vl_parts().attention
        if not hasattr(config, "apply_rotary_pos_emb_in_fp32"):
            config.apply_rotary_pos_emb_in_fp32 = False  # that attention reads it; only Qwen3-VL's provider has it
        return spec

    return vision_language_layers


def place_features(embeddings: Tensor, mask: Tensor, features: Tensor, deepstack: list[Tensor]) -> Tensor:
    """Replace the placeholders' embeddings by the tower's features, and append the deepstack features.

    Args:
        embeddings: [sequence, batch, hidden].
        mask: bool [batch, sequence], True at placeholders, which take the features in order, row by row.
        features: [tokens, hidden].
        deepstack: one [tokens, hidden] for each of the first language layers.

    Returns:
        [sequence, batch, hidden * (1 + len(deepstack))], with zeros appended to the embeddings of text.
    """
    wide = torch.cat([features, *deepstack], dim=-1).to(embeddings.dtype)
    base = torch.nn.functional.pad(embeddings, (0, wide.shape[-1] - embeddings.shape[-1]))
    return base.transpose(0, 1).masked_scatter(mask.unsqueeze(-1), wide).transpose(0, 1).contiguous()
