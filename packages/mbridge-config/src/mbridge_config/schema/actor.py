"""`actor`: the model that is trained."""

import dataclasses
from typing import Literal

from mbridge_config.keys import alias, key, no_effect, section
from mbridge_config.schema.model import ModelConfig
from mbridge_config.schema.optimizer import LrScheduleConfig, OptimizerConfig
from mbridge_config.schema.profiler import ProfilerConfig

_NO_CONVERSION = "nothing is converted beforehand; the HuggingFace weights are loaded straight into the model"
_OVERLAP = "tensor-parallel overlap is chosen by the layer backend"
_STAYS = "weights, gradients and optimizer state stay where they are in this version"
_ONE_MODEL = "the model is built from its config.json"


@dataclasses.dataclass(kw_only=True, slots=True)
class TokenizerConfig:
    """`actor.tokenizer`."""

    tokenizer_model: str | None = key(None, "Directory of the tokenizer's files.")
    use_fast: bool = key(True, "The tokenizer's Rust implementation.")
    trust_remote_code: bool = key(False, "Run Python code that lies in the model directory.")
    padding_side: Literal["left", "right"] = no_effect("right", "training pads right and generation left")


@dataclasses.dataclass(kw_only=True, slots=True)
class CheckpointConvertorConfig:
    """`actor.megatron.ckpt_convertor`: holds the directory that the weights come from."""

    hf_model_path: str | None = key(None, "HuggingFace directory: config.json, weights. The model of a reasoning run.")
    model: str | None = no_effect(None, _NO_CONVERSION)
    model_type: str | None = no_effect(None, _NO_CONVERSION)
    save_path: str | None = no_effect(None, _NO_CONVERSION)
    use_gpu_num: int | None = no_effect(None, _NO_CONVERSION)
    use_gpu_index: int | list[int] | None = no_effect(None, _NO_CONVERSION)
    process_num: int | None = no_effect(None, _NO_CONVERSION)
    tensor_model_parallel_size: int | None = no_effect(None, _NO_CONVERSION)
    pipeline_model_parallel_size: int | None = no_effect(None, _NO_CONVERSION)
    expert_model_parallel_size: int | None = no_effect(None, _NO_CONVERSION)
    expert_tensor_parallel_size: int | None = no_effect(None, _NO_CONVERSION)
    grouped_gemm: str | bool | None = no_effect(None, _NO_CONVERSION)
    te_ln_linear_qkv: bool | None = no_effect(None, _NO_CONVERSION)
    te_ln_linear_mlp_fc1: bool | None = no_effect(None, _NO_CONVERSION)
    te_ln_add_extra_state: str | None = no_effect(None, _NO_CONVERSION)


@dataclasses.dataclass(kw_only=True, slots=True)
class MegatronConfig:
    """`actor.megatron`: Megatron-Core's processes and checkpoints."""

    mbridge: bool = key(True, "Load HuggingFace weights through Megatron-Bridge.")
    use_hf_ckpt: bool = key(True, "Start from HuggingFace weights; false: from model.megatron_checkpoint.")
    use_dist_ckpt: bool = key(False, "Write Megatron-Core's distributed checkpoints, like ckpt_format=torch_dist.")
    ckpt_format: Literal["torch", "torch_dist"] = key(
        "torch",
        "Megatron files: torch, a directory a model-parallel rank; torch_dist, Megatron-Core's distributed ones.",
    )
    distributed_backend: Literal["nccl", "gloo"] | None = no_effect(
        None, "ranks communicate with nccl where there is a GPU, else with gloo"
    )
    distributed_timeout_minutes: float = key(30, "Longest wait for another rank.", unit="minutes", above=0.0)
    ddp_bucket_size: int | None = key(
        None, "Gradients reduced at once. null: Megatron's default.", unit="parameters", minimum=1
    )
    use_profiler: bool = key(False, "Record traces of the steps that `profiler` names, with torch's profiler.")
    ckpt_convertor: CheckpointConvertorConfig = section(CheckpointConvertorConfig, "Where weights come from.")
    profiler: ProfilerConfig = section(ProfilerConfig, "Which steps are recorded, of what, and in which files.")
    tp_comm_bootstrap_backend: str | None = no_effect(None, _OVERLAP)
    tp_comm_overlap_cfg: str | None = no_effect(None, _OVERLAP)


@dataclasses.dataclass(kw_only=True, slots=True)
class ActorConfig:
    """`actor`: the trained model, its optimizer and its memory."""

    training_backend: Literal["megatron"] = key(
        "megatron", "Training engine.", refused={"fsdp": "mbridge trains with Megatron-Core"}
    )
    micro_batch_size: int = key(1, "Sequences of one forward and backward pass.", unit="sequences", minimum=1)
    global_batch_size: int | None = key(
        None,
        "Sequences of one optimizer step over all ranks. "
        "null: data.rollout_batch_size * algorithm.group_size / algorithm.n_minibatches.",
        unit="sequences",
        minimum=1,
    )
    seed: int = key(1234, "Seed of weights, dropout and sampling.", minimum=0)
    offload_optimizer: bool = no_effect(False, _STAYS)
    offload_weight: bool = no_effect(False, _STAYS)
    offload_grad: bool = no_effect(False, _STAYS)
    model: ModelConfig = section(ModelConfig, "The model.")
    optim: OptimizerConfig = section(OptimizerConfig, "The optimizer.")
    lr_sched: LrScheduleConfig = section(LrScheduleConfig, "The learning rate.")
    tokenizer: TokenizerConfig = section(TokenizerConfig, "The tokenizer.")
    megatron: MegatronConfig = section(MegatronConfig, "Megatron-Core.")

    checkpoint_load_path: str | None = alias("actor.model.megatron_checkpoint")
    group_name: str | None = no_effect(None, "ranks are not split into named groups")
    mcore_gpt: bool | None = no_effect(None, _ONE_MODEL)
    spec_name: str | None = no_effect(None, _ONE_MODEL)
    enable_dp_load_balance: bool | None = no_effect(None, "sequences are always balanced over ranks by tokens")
    calculate_flops: bool | None = no_effect(None, "operations are always counted")
    eval_batch_size: int | None = no_effect(None, "validation uses micro_batch_size")
