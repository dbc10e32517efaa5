"""The language model's layers: the backend's, with deepstack and with ready-made rotary angles."""

from collections.abc import Callable
from typing import Any

from megatron.core.transformer.transformer_layer import TransformerLayer

from mbridge_model.bridge.bridge import qwen_vl_parts
from mbridge_model.kernels.self_attention import layer_specs
from mbridge_model.vision.deepstack import DeepstackLayer


def language_layers(backend_spec: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a provider's `transformer_layer_spec`.

    The attention is Megatron-Bridge's for Qwen3-VL. It takes one angle for each token of a packed batch, where
    Megatron-Core's own looks at the sequences' lengths on the host, for queries and keys of each layer.
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
