"""`actor.megatron`: Megatron-Core's processes and checkpoints, and what Megatron-LM's own training loop reads."""

import dataclasses
from typing import Literal

from mbridge_config.schema.keys import alias, key, no_effect, section

_NO_CONVERSION = "nothing is converted beforehand; the HuggingFace weights are loaded straight into the model"
_OVERLAP = "tensor-parallel overlap is chosen by the layer backend"
_LOOP = "belongs to Megatron-LM's own training loop, which is not used"
_BUCKETS = "gradients are summed in fp32 buckets; only ddp_bucket_size is open to choice"
_GROUPS = "ranks are numbered and grouped as Megatron-Core does by default"
_FILES = "a checkpoint always holds the whole state; runner.checkpoint says how it is written"
_WHOLE = {"True": "a checkpoint holds the whole state, and a resumed run goes on with all of it"}
_DDP = {"True": "mbridge trains with Megatron-Core's distributed optimizer"}
_WEIGHTS = "weights come from a checkpoint"
_NO_ENCODER = "there is no encoder"


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
class ProfilerConfig:
    """Which steps are recorded, of what, and in which files. Read where `actor.megatron.use_profiler` is true.

    Steps are counted as in metrics.jsonl, from 1. Either `steps` names them, or a cycle of `schedule_wait` steps that
    are left alone, `schedule_warmup` ones and `schedule_active` recorded ones runs `schedule_repeat` times.
    """

    steps: list[int] | None = key(None, "Steps to record. null: those of the schedule.")
    schedule_wait: int = key(5, "Steps of a cycle that are left alone.", unit="steps", minimum=0)
    schedule_warmup: int = key(
        1,
        "Steps before recorded ones in which the profiler runs and nothing is kept, since its start takes time.",
        unit="steps",
        minimum=0,
    )
    schedule_active: int = key(3, "Steps of a cycle that are recorded.", unit="steps", minimum=1)
    schedule_repeat: int = key(2, "Cycles. 0: to the end of the run.", minimum=0)
    output_dir: str | None = key(None, "Where the traces go. null: `profiler` in the run's directory.")
    activities: list[Literal["cpu", "cuda"]] = key(
        ["cpu", "cuda"], "What is recorded: Python's and torch's calls, and kernels where there is a GPU."
    )
    record_shapes: bool = key(False, "Record the shapes of operators' inputs.")
    profile_memory: bool = key(False, "Record allocations.")
    with_stack: bool = key(False, "Record the Python lines that called an operator.")
    with_flops: bool = key(False, "Let torch estimate the operations of some operators.")
    with_modules: bool = key(False, "Record module names, which torch does for TorchScript alone.")
    export_tensorboard: bool = key(True, "Write tensorboard/rank<rank>.<step>.pt.trace.json.gz for its plugin.")
    export_chrome_trace: bool = key(True, "Write <prefix>_rank<rank>_step<step>.json.gz for Perfetto and Chrome.")
    chrome_filename_prefix: str = key("chrome_trace", "How the names of Chrome's traces begin.")


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

    transformer_impl: str | None = alias("actor.model.backend")
    async_save: bool | None = alias("runner.checkpoint.async_save")

    use_torch_fsdp2: bool = key(False, "Split weights with PyTorch's FSDP2.", refused=_DDP)
    use_custom_fsdp: bool = key(False, "Split weights with Megatron's FSDP.", refused=_DDP)
    skip_train: bool = key(
        False, "Train nothing.", refused={"True": "a run trains; only SFT can evaluate alone, with runner.only_eval"}
    )
    moe_use_upcycling: bool = key(
        False, "Make experts of a dense model.", refused={"True": "upcycling is not in this version"}
    )
    finetune: bool = key(False, "Load weights of a checkpoint and nothing else.", refused=_WHOLE)
    no_load_optim: bool = key(False, "Resume without optimizer state.", refused=_WHOLE)
    no_load_rng: bool = key(False, "Resume without the random number generators' state.", refused=_WHOLE)
    no_save_optim: bool = key(False, "Save no optimizer state.", refused=_WHOLE)
    no_save_rng: bool = key(False, "Save no state of the random number generators.", refused=_WHOLE)

    tp_comm_bootstrap_backend: str | None = no_effect(None, _OVERLAP)
    tp_comm_overlap_cfg: str | None = no_effect(None, _OVERLAP)
    decoder_tp_comm_overlap: bool | None = no_effect(None, _OVERLAP)
    accumulate_allreduce_grads_in_fp32: bool | None = no_effect(None, _BUCKETS)
    ddp_num_buckets: int | None = no_effect(None, _BUCKETS)
    ddp_pad_buckets_for_high_nccl_busbw: bool | None = no_effect(None, _BUCKETS)
    ddp_average_in_collective: bool | None = no_effect(None, _BUCKETS)
    use_tp_pp_dp_mapping: bool | None = no_effect(None, _GROUPS)
    num_distributed_optimizer_instances: int | None = no_effect(None, _GROUPS)
    nccl_communicator_config_path: str | None = no_effect(None, _GROUPS)
    enable_gloo_process_groups: bool | None = no_effect(None, _GROUPS)
    encoder_tensor_model_parallel_size: int | None = no_effect(None, _NO_ENCODER)
    encoder_pipeline_model_parallel_size: int | None = no_effect(None, _NO_ENCODER)
    init_model_with_meta_device: bool | None = no_effect(None, _WEIGHTS)
    data_parallel_random_init: bool | None = no_effect(None, _WEIGHTS)
    timing_log_level: int | None = no_effect(None, _LOOP)
    timing_log_option: str | None = no_effect(None, _LOOP)
    log_progress: bool | None = no_effect(None, _LOOP)
    check_for_large_grads: bool | None = no_effect(None, _LOOP)
    check_for_nan_in_loss_and_grad: bool | None = no_effect(None, _LOOP)
    rerun_mode: str | None = no_effect(None, _LOOP)
    error_injection_rate: float | None = no_effect(None, _LOOP)
    error_injection_type: str | None = no_effect(None, _LOOP)
    ckpt_fully_parallel_save: bool | None = no_effect(None, _FILES)
    ckpt_convert_format: str | None = no_effect(None, _FILES)
    ckpt_convert_update_legacy_dist_opt_format: bool | None = no_effect(None, _FILES)
    ckpt_assume_constant_structure: bool | None = no_effect(None, _FILES)
    auto_detect_ckpt_format: bool | None = no_effect(None, _FILES)
    exit_on_missing_checkpoint: bool | None = no_effect(None, _FILES)
    use_tokenizer_model_from_checkpoint_args: bool | None = no_effect(None, _FILES)
    non_persistent_save_interval: int | None = no_effect(None, _FILES)
    non_persistent_ckpt_type: str | None = no_effect(None, _FILES)
    non_persistent_local_ckpt_dir: str | None = no_effect(None, _FILES)
    non_persistent_global_ckpt_dir: str | None = no_effect(None, _FILES)
    non_persistent_local_ckpt_algo: str | None = no_effect(None, _FILES)
