"""`actor.megatron.profiler`: traces of torch's profiler."""

import dataclasses
from typing import Literal

from mbridge_config.schema.keys import key


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
