"""`actor.model`: parallel layout, precision, recomputation."""

import dataclasses
from typing import Literal

from mbridge_config.schema.keys import Status, key

PRECISION_SPELLINGS = {
    **dict.fromkeys(("32", "32-true", "float32", "float"), "fp32"),
    **dict.fromkeys(("bf16-mixed", "bf16-true", "bfloat16"), "bf16"),
    **dict.fromkeys(("16", "16-mixed", "16-true", "float16", "half"), "fp16"),
}
MOST_LAYERS = 10_000
"""A larger number of layers is a mistake, which must cost neither minutes nor memory."""


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
    context_parallel_size: int = key(
        1, "Ranks that share each sequence.", unit="ranks", minimum=1, status=Status.REFUSED
    )
    expert_model_parallel_size: int = key(
        1, "Ranks that share the experts.", unit="ranks", minimum=1, status=Status.REFUSED
    )
    expert_tensor_parallel_size: int | None = key(
        None, "Ranks that share each expert.", unit="ranks", minimum=1, status=Status.REFUSED
    )
    virtual_pipeline_model_parallel_size: int | None = key(
        None, "Model chunks of each stage.", minimum=1, status=Status.REFUSED
    )
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
    sequence_parallel: bool = key(False, "Split norm and dropout activations over the tensor-parallel ranks.")
    seq_length: int | None = key(None, "Longest sequence. null: runner.seq_length.", unit="tokens", minimum=2)

    recompute_granularity: Literal["full", "selective"] | None = key(
        None, "Recompute activations in the backward pass: whole layers, or attention alone. null: none."
    )
    recompute_method: Literal["uniform", "block"] | None = key(
        None, "full: which layers. uniform: groups of all layers; block: the first ones of each stage."
    )
    recompute_num_layers: int | None = key(None, "full: layers in a group, or in the block.", unit="layers", minimum=1)

    attention_dropout: float = key(0.0, "Dropout in attention.", minimum=0.0, maximum=1.0)
    hidden_dropout: float = key(0.0, "Dropout after each block.", minimum=0.0, maximum=1.0)
