"""The torch backend as one of Megatron-Core's providers of modules, and the block specification built from it."""

from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from mbridge_model.kernels.self_attention import RotarySelfAttention
from mbridge_model.torch_backend.attention import TorchDotProductAttention
from mbridge_model.torch_backend.norms import TorchLayerNormColumnParallelLinear, TorchNorm


class TorchSpecProvider(LocalSpecProvider):
    """The modules of each part of a layer: Megatron-Core's own, but with our norms and attention.

    Experts run one after another: grouped matrix products belong to the Transformer Engine backend for now.
    """

    def fuse_layernorm_and_linear(self) -> bool:
        return True

    def column_parallel_layer_norm_linear(self) -> type:
        return TorchLayerNormColumnParallelLinear

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False) -> Any:
        return TorchNorm

    def core_attention(self) -> type:
        return TorchDotProductAttention


def layer_spec(
    backend: Any, attention: type, mask: AttnMaskType, *, qk_norm: Any = None, num_experts: int | None = None
) -> ModuleSpec:
    """Specify one transformer layer with the modules of `backend`, in which linear layers have fused input norms.

    Args:
        backend: a `BackendSpecProvider`.
        attention: the class of the self-attention.
        mask: what the attention masks.
        qk_norm: the norm of queries and keys; None for none, or for the L2 norm where the configuration asks for it.
        num_experts: number of experts; None for a dense MLP.
    """
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=ModuleSpec(
                module=attention,
                params={"attn_mask_type": mask},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=backend.column_parallel_layer_norm_linear(),
                    core_attention=backend.core_attention(),
                    linear_proj=backend.row_parallel_linear(),
                    q_layernorm=qk_norm,
                    k_layernorm=qk_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            # A dense MLP has its norm fused into linear_fc1; a router needs the normalized input itself.
            pre_mlp_layernorm=backend.layer_norm() if num_experts else IdentityOp,
            mlp=get_mlp_module_spec_for_backend(backend=backend, num_experts=num_experts),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def torch_block_spec(config: TransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Specify the layers of this pipeline stage and the final norm.

    Megatron-Core's own choice of the final norm, its torch fallback, refuses sequence parallelism.

    Raises:
        ValueError: multi-latent attention, which this backend does not have.
    """
    if config.multi_latent_attention:
        raise ValueError("multi-latent attention is not built in the torch backend; use backend 'te' on a GPU")
    qk_norm = TorchNorm if config.qk_layernorm and not config.qk_l2_norm else None
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    layers = []
    for number in range(first, first + get_num_layers_to_build(config, vp_stage=vp_stage)):
        frequency = config.moe_layer_freq
        has_experts = number % frequency == 0 if isinstance(frequency, int) else frequency[number]
        layers.append(
            layer_spec(
                TorchSpecProvider(),
                RotarySelfAttention,
                AttnMaskType.causal,
                qk_norm=qk_norm,
                num_experts=config.num_moe_experts if has_experts else None,
            )
        )
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=TorchNorm)
