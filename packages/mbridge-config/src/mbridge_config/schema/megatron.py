"""`actor.megatron`: Megatron-Core's processes and checkpoints, and the profiler."""

import dataclasses
from typing import Literal

from mbridge_config.schema.keys import key, section


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
