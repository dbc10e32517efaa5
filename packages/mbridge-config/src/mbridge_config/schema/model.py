"""`actor.model`: parallel layout, precision, recomputation; geometry is only checked against the model."""

import dataclasses
from typing import Any, Literal

from mbridge_config.schema.keys import Status, alias, key, no_effect

PRECISION_SPELLINGS = {
    "32": "fp32",
    "32-true": "fp32",
    "float32": "fp32",
    "float": "fp32",
    "bf16-mixed": "bf16",
    "bf16-true": "bf16",
    "bfloat16": "bf16",
    "16": "fp16",
    "16-mixed": "fp16",
    "16-true": "fp16",
    "float16": "fp16",
    "half": "fp16",
}
MOST_LAYERS = 10_000
"""A larger number of layers is a mistake, which must cost neither minutes nor memory."""

_FUSED = "fusions are chosen by the layer backend"
_ROUTER = "routers are as the model's config.json has them"
_ROTARY = "position embeddings are as the model's config.json has them"
_VOCABULARY = "rows are added where the tensor-parallel ranks need it, and left out of HuggingFace copies"
_SEQUENCES = "sequences always have their own lengths"


def geometry(doc: str) -> Any:
    """A key that repeats a fact of config.json; null: not repeated."""
    return key(None, doc, status=Status.CHECKED)


@dataclasses.dataclass(kw_only=True, slots=True)
class ModelConfig:
    """`actor.model`: how the model is built."""

    backend: Literal["auto", "te", "torch"] = key(
        "auto",
        "Layers: te (Transformer Engine), torch (plain PyTorch), auto: te where it works.",
        spellings={"transformer_engine": "te", "local": "torch"},
    )
    precision: Literal["fp32", "bf16", "fp16"] = key(
        "bf16", "Number format of weights and activations.", spellings=PRECISION_SPELLINGS
    )
    megatron_checkpoint: str | None = key(None, "Megatron checkpoint to start from, where use_hf_ckpt is false.")
    model_path: str | None = key(None, "HuggingFace directory for SFT; reasoning reads ckpt_convertor.hf_model_path.")

    tensor_model_parallel_size: int = key(1, "Ranks that share each layer.", unit="ranks", minimum=1)
    pipeline_model_parallel_size: int = key(1, "Stages that share the layers.", unit="ranks", minimum=1)
    context_parallel_size: int = key(1, "Ranks that share each sequence.", unit="ranks", minimum=1)
    expert_model_parallel_size: int = key(1, "Ranks that share the experts.", unit="ranks", minimum=1)
    expert_tensor_parallel_size: int | None = key(None, "Ranks that share each expert.", unit="ranks", minimum=1)
    virtual_pipeline_model_parallel_size: int | None = key(None, "Model chunks of each stage.", minimum=1)
    num_layers_in_first_pipeline_stage: int | None = key(
        None,
        "Layers of the first stage; the others share the rest evenly. null: its even share.",
        unit="layers",
        minimum=1,
    )
    num_layers_in_last_pipeline_stage: int | None = key(
        None,
        "Layers of the last stage; the others share the rest evenly. null: its even share.",
        unit="layers",
        minimum=1,
    )
    decoder_first_pipeline_num_layers: int | None = alias("actor.model.num_layers_in_first_pipeline_stage")
    decoder_last_pipeline_num_layers: int | None = alias("actor.model.num_layers_in_last_pipeline_stage")
    pipeline_model_parallel_split_rank: int | None = no_effect(None, "there is no encoder")
    sequence_parallel: bool = key(False, "Split norm and dropout activations over the tensor-parallel ranks.")
    variable_seq_lengths: bool = no_effect(True, _SEQUENCES)
    seq_length: int | None = key(None, "Longest sequence. null: runner.seq_length.", unit="tokens", minimum=2)
    encoder_seq_length: int | None = no_effect(None, "there is no encoder")

    recompute_granularity: Literal["full", "selective"] | None = key(
        None, "Recompute activations in the backward pass: whole layers, or attention alone. null: none."
    )
    recompute_method: Literal["uniform", "block"] | None = key(
        None, "full: which layers. uniform: groups of all layers; block: the first ones of each stage."
    )
    recompute_num_layers: int | None = key(None, "full: layers in a group, or in the block.", unit="layers", minimum=1)

    apply_rope_fusion: bool = no_effect(False, _FUSED)
    gradient_accumulation_fusion: bool = no_effect(False, _FUSED)
    bias_activation_fusion: bool = no_effect(False, _FUSED)
    bias_dropout_fusion: bool = no_effect(False, _FUSED)
    masked_softmax_fusion: bool = no_effect(False, _FUSED)
    persist_layer_norm: bool = no_effect(False, _FUSED)
    attention_softmax_in_fp32: bool = no_effect(True, "the attention kernels keep the softmax in fp32")
    attention_dropout: float = key(0.0, "Dropout in attention.", minimum=0.0, maximum=1.0)
    hidden_dropout: float = key(0.0, "Dropout after each block.", minimum=0.0, maximum=1.0)
    batch_p2p_comm: bool | None = no_effect(None, "pipeline communication is set by the schedule")
    use_cpu_initialization: bool | None = no_effect(None, "weights come from a checkpoint")
    init_method_std: float | None = no_effect(None, "weights come from a checkpoint")
    make_vocab_size_divisible_by: int | None = no_effect(None, _VOCABULARY)
    padded_vocab_size: int | None = no_effect(None, _VOCABULARY)
    is_lora: bool = key(False, "Train low-rank adapters.", refused={"True": "LoRA is not in this version"})
    model_type: str | None = no_effect(None, "the architecture is read from the model's config.json")

    num_layers: int | None = geometry("Transformer layers.")
    hidden_size: int | None = geometry("Width of the residual stream.")
    ffn_hidden_size: int | None = geometry("Width of the MLP.")
    num_attention_heads: int | None = geometry("Query heads.")
    num_query_groups: int | None = geometry("Key and value heads.")
    kv_channels: int | None = geometry("Width of one head.")
    vocab_size: int | None = geometry("Rows of the embedding.")
    max_position_embeddings: int | None = geometry("Longest sequence the model was made for.")
    rotary_base: float | None = geometry("Base of the rotary frequencies.")
    rotary_percentage: float | None = geometry("Share of each head's width that is rotated.")
    seq_len_interpolation_factor: float | None = no_effect(None, _ROTARY)
    add_position_embedding: bool | None = no_effect(None, _ROTARY)
    layernorm_epsilon: float | None = geometry("Epsilon of the norms.")
    add_qkv_bias: bool | None = geometry("Bias in the query, key and value projections.")
    add_bias_linear: bool | None = geometry("Bias in the other linear layers.")
    qk_layernorm: bool | None = geometry("Norms on queries and keys.")
    multi_latent_attention: bool | None = geometry("Keys and values from a compressed latent (DeepSeek-V2).")
    share_embeddings_and_output_weights: bool | None = geometry("Input and output embeddings are one tensor.")
    untie_embeddings_and_output_weights: bool | None = alias(
        "actor.model.share_embeddings_and_output_weights", inverted=True
    )
    num_moe_experts: int | None = geometry("Experts of each MoE layer.")
    activation: str | None = geometry("swiglu, geglu or gelu.")
    normalization: str | None = geometry("rmsnorm or layernorm.")
    position_embedding_type: str | None = geometry("rope.")

    moe_router_topk: int | None = geometry("Experts that each token uses.")
    moe_token_dispatcher_type: str | None = no_effect(None, "mixture-of-experts layers use the backend's dispatcher")
    moe_grouped_gemm: str | bool | None = no_effect(None, "mixture-of-experts layers use the backend's kernels")
    moe_router_load_balancing_type: str | None = no_effect(None, _ROUTER)
    moe_router_pre_softmax: bool | None = no_effect(None, _ROUTER)
    moe_router_bias_update_rate: float | None = no_effect(None, _ROUTER)
    moe_permute_fusion: bool | None = no_effect(None, _FUSED)
    moe_aux_loss_coeff: float | None = no_effect(None, "no auxiliary loss is added")
