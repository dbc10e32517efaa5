"""`actor`: the model that is trained: how it is built, its optimizer, Megatron-Core's processes, the profiler."""

import dataclasses
from typing import Literal

from mbridge_config.schema.keys import Status, key, section

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


@dataclasses.dataclass(kw_only=True, slots=True)
class OptimizerConfig:
    """`actor.optim`: AdamW (Loshchilov and Hutter, Decoupled Weight Decay Regularization)."""

    optimizer: Literal["adam"] = key(
        "adam",
        "adam: AdamW, with decoupled weight decay.",
        spellings={"adamw": "adam"},
        status=Status.REFUSED,
        refused={"sgd": "SGD is not in this version"},
    )
    lr: float = key(1e-6, "Learning rate if lr_sched.max_lr is null.", minimum=0.0)
    min_lr: float = key(0.0, "Lowest learning rate if lr_sched.min_lr is null.", minimum=0.0)
    # Adam divides by 1 - beta^t, which is 0 where beta is 1.
    adam_beta1: float = key(0.9, "Decay of the first moment.", minimum=0.0, below=1.0)
    adam_beta2: float = key(0.999, "Decay of the second moment.", minimum=0.0, below=1.0)
    adam_eps: float = key(1e-8, "Added to the root of the second moment.", above=0.0)
    weight_decay: float = key(0.01, "Decay of matrices; norms and biases have none.", minimum=0.0)
    clip_grad: float = key(1.0, "Largest norm of the whole gradient; 0: no clipping.", minimum=0.0)
    bf16: bool | None = key(None, "Must agree with actor.model.precision. null: it does.")
    fp16: bool | None = key(None, "Must agree with actor.model.precision. null: it does.")
    use_distributed_optimizer: bool = key(True, "Split optimizer state over the data-parallel ranks.")
    overlap_grad_reduce: bool = key(False, "Reduce gradients while the backward pass runs.")
    overlap_param_gather: bool = key(False, "Gather weights while the forward pass runs.")
    loss_scale: float | None = key(None, "Fixed loss scale of fp16. null: a dynamic one.", above=0.0)
    initial_loss_scale: float = key(2.0**32, "Initial value of the dynamic loss scale.", above=0.0)
    min_loss_scale: float = key(1.0, "Lowest value of the dynamic loss scale.", above=0.0)
    loss_scale_window: float = key(1000, "Steps without overflow after which the scale doubles.", unit="steps", above=0)


@dataclasses.dataclass(kw_only=True, slots=True)
class LrScheduleConfig:
    """`actor.lr_sched`: the learning rate over optimizer steps."""

    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = key(
        "constant",
        "Shape of the decay after the warm-up.",
        spellings={"inverse_square_root": "inverse-square-root"},
    )
    max_lr: float | None = key(None, "Learning rate after the warm-up. null: optim.lr.", minimum=0.0)
    min_lr: float | None = key(None, "Learning rate at the end of the decay. null: optim.min_lr.", minimum=0.0)
    lr_warmup_init: float = key(0.0, "Learning rate at step 0 of the warm-up.", minimum=0.0)
    lr_warmup_iters: int = key(0, "Length of the warm-up.", unit="optimizer steps", minimum=0)
    lr_warmup_fraction: float | None = key(
        None,
        "Length of the warm-up as a share of lr_decay_iters, below 1 if the rate decays; overrides lr_warmup_iters.",
        minimum=0.0,
        maximum=1.0,
    )
    lr_decay_iters: int | None = key(
        None, "Step at which min_lr is reached. null: the whole run.", unit="optimizer steps", minimum=1
    )
    lr_wsd_decay_iters: int | None = key(None, "WSD: length of the last decay.", unit="optimizer steps", minimum=1)
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = key(
        "exponential", "WSD: shape of the last decay."
    )
    start_weight_decay: float | None = key(
        None, "Weight decay; overrides optim.weight_decay. null: optim.weight_decay.", minimum=0.0
    )
    end_weight_decay: float | None = key(
        None, "Must equal start_weight_decay, since weight decay is constant. null: it does.", minimum=0.0
    )
    weight_decay_incr_style: Literal["constant"] = key(
        "constant",
        "Schedule of the weight decay.",
        status=Status.REFUSED,
        refused=dict.fromkeys(("linear", "cosine"), "weight decay is constant in this version"),
    )


@dataclasses.dataclass(kw_only=True, slots=True)
class CheckpointConvertorConfig:
    """`actor.megatron.ckpt_convertor`: holds the directory that the weights come from."""

    hf_model_path: str | None = key(None, "HuggingFace directory: config.json, weights. The model of a reasoning run.")


@dataclasses.dataclass(kw_only=True, slots=True)
class ProfilerConfig:
    """Which steps are recorded, of what, and in which files. Used if `actor.megatron.use_profiler` is true.

    Steps are counted as in metrics.jsonl, from 1. Either `steps` names them, or a cycle of `schedule_wait` steps
    without the profiler, `schedule_warmup` steps and `schedule_active` recorded steps runs `schedule_repeat` times.
    """

    steps: list[int] | None = key(None, "Steps to record. null: those of the schedule.")
    schedule_wait: int = key(5, "Steps at the start of a cycle without the profiler.", unit="steps", minimum=0)
    schedule_warmup: int = key(
        1,
        "Steps before the recorded ones in which the profiler runs but keeps nothing, since starting it takes time.",
        unit="steps",
        minimum=0,
    )
    schedule_active: int = key(3, "Steps of a cycle that are recorded.", unit="steps", minimum=1)
    schedule_repeat: int = key(2, "Cycles. 0: to the end of the run.", minimum=0)
    output_dir: str | None = key(None, "Directory of the traces. null: `profiler` in the run's directory.")
    activities: list[Literal["cpu", "cuda"]] = key(
        ["cpu", "cuda"], "What to record: calls of Python and torch, and kernels if there is a GPU."
    )
    record_shapes: bool = key(False, "Record the shapes of operators' inputs.")
    profile_memory: bool = key(False, "Record allocations.")
    with_stack: bool = key(False, "Record the Python lines that called an operator.")
    with_flops: bool = key(False, "Let torch estimate the operations of some operators.")
    with_modules: bool = key(False, "Record module names, which torch does for TorchScript alone.")
    export_tensorboard: bool = key(True, "Write tensorboard/rank<rank>.<step>.pt.trace.json.gz for its plugin.")
    export_chrome_trace: bool = key(True, "Write <prefix>_rank<rank>_step<step>.json.gz for Perfetto and Chrome.")
    chrome_filename_prefix: str = key("chrome_trace", "Prefix of the names of Chrome's traces.")


@dataclasses.dataclass(kw_only=True, slots=True)
class MegatronConfig:
    """`actor.megatron`: Megatron-Core's processes and checkpoints."""

    mbridge: bool = key(True, "Load HuggingFace weights through Megatron-Bridge.")
    use_hf_ckpt: bool = key(True, "Start from HuggingFace weights; false: from model.megatron_checkpoint.")
    use_dist_ckpt: bool = key(False, "Write Megatron-Core's distributed checkpoints, like ckpt_format=torch_dist.")
    ckpt_format: Literal["torch", "torch_dist"] = key(
        "torch",
        "Format of Megatron checkpoints. torch: a directory per model-parallel rank; torch_dist: Megatron-Core's own.",
    )
    distributed_timeout_minutes: float = key(30, "Longest wait for another rank.", unit="minutes", above=0.0)
    ddp_bucket_size: int | None = key(
        None, "Gradients reduced together. null: Megatron-Core's default.", unit="parameters", minimum=1
    )
    use_profiler: bool = key(False, "Record traces of the steps that `profiler` names, with torch's profiler.")
    ckpt_convertor: CheckpointConvertorConfig = section(CheckpointConvertorConfig, "Where weights come from.")
    profiler: ProfilerConfig = section(ProfilerConfig, "Which steps are recorded, of what, and in which files.")


@dataclasses.dataclass(kw_only=True, slots=True)
class TokenizerConfig:
    """`actor.tokenizer`."""

    tokenizer_model: str | None = key(None, "Directory of the tokenizer's files.")
    trust_remote_code: bool = key(False, "Run Python code that lies in the model directory.")


@dataclasses.dataclass(kw_only=True, slots=True)
class ActorConfig:
    """`actor`: the trained model, its optimizer and its memory."""

    training_backend: Literal["megatron"] = key(
        "megatron",
        "Training engine.",
        status=Status.REFUSED,
        refused={"fsdp": "mbridge trains with Megatron-Core"},
    )
    micro_batch_size: int = key(1, "Sequences per forward and backward pass.", unit="sequences", minimum=1)
    global_batch_size: int | None = key(
        None,
        "Sequences per optimizer step, over all ranks. "
        "null: data.rollout_batch_size * algorithm.group_size / algorithm.n_minibatches.",
        unit="sequences",
        minimum=1,
    )
    seed: int = key(1234, "Seed of weights, dropout and sampling.", minimum=0)
    offload_optimizer: bool = key(False, "Keep master weights and moments in host memory between updates.")
    offload_weight: bool = key(
        False,
        "Keep the policy's weights in host memory during generation, and the generating model's during training.",
    )
    offload_grad: bool = key(False, "Free the memory of gradients during generation.")
    model: ModelConfig = section(ModelConfig, "The model.")
    optim: OptimizerConfig = section(OptimizerConfig, "The optimizer.")
    lr_sched: LrScheduleConfig = section(LrScheduleConfig, "The learning rate.")
    tokenizer: TokenizerConfig = section(TokenizerConfig, "The tokenizer.")
    megatron: MegatronConfig = section(MegatronConfig, "Megatron-Core.")
