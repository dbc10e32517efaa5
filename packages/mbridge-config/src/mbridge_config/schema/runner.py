"""What a run does over its whole length: steps, saving, logging, resuming."""

import dataclasses
from typing import Literal

from mbridge_config.schema.keys import key, section

OTHER_TASKS = {
    "embodied": "embodied agents are not trained by mbridge",
    "embodied_eval": "embodied agents are not trained by mbridge",
    "reasoning_eval": "evaluation alone is not in this version of reasoning runs",
    "coding_online_rl": "online RL on code is not in this version",
    "offline": "offline RL is not in this version",
}


@dataclasses.dataclass(kw_only=True, slots=True)
class LoggerConfig:
    """`runner.logger`: where metrics go besides `metrics.jsonl`, which is always written."""

    log_path: str | None = key(None, "Directory of the backends' files. null: `<output_dir>/<experiment_name>`.")
    project_name: str = key("mbridge", "Project name that wandb and swanlab show.")
    experiment_name: str | None = key(None, "Run name in the backends. null: `runner.experiment_name`.")
    logger_backends: list[Literal["tensorboard", "wandb", "swanlab"]] = key(
        [], "Tracking services to report to; each is an optional extra."
    )


@dataclasses.dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """`runner.checkpoint`: what a checkpoint holds besides the training state, and which checkpoints are kept."""

    hf_export_every: int = key(
        1,
        "Write a HuggingFace copy with every n-th checkpoint and with the last; 0: never.",
        unit="checkpoints",
        minimum=0,
    )
    max_shard_size: str = key("5GB", "Largest file of the HuggingFace copy.")
    async_save: bool = key(
        False, "Continue training while a process per rank writes; needs host memory for a copy of the rank's state."
    )
    when_busy: Literal["wait", "refuse"] = key(
        "wait",
        "If the previous checkpoint is still being written when one is due: wait, or skip this one (never the last).",
    )
    keep_last: int | None = key(
        None,
        "Newest checkpoints to keep. All are kept if this, keep_every and keep_best are null.",
        unit="checkpoints",
        minimum=1,
    )
    keep_every: int | None = key(
        None, "Also keep checkpoints whose step is a multiple of this.", unit="steps", minimum=1
    )
    keep_best: int | None = key(
        None, "Also keep this many checkpoints, the best by keep_best_metric.", unit="checkpoints", minimum=1
    )
    keep_best_metric: str = key(
        "validation/accuracy", "Metric of keep_best, a name in metrics.jsonl; SFT on free text has validation/loss."
    )
    keep_best_is: Literal["max", "min"] = key("max", "Whether the largest or the smallest value is the best.")


@dataclasses.dataclass(kw_only=True, slots=True)
class RunnerConfig:
    """`runner`: the loop around training steps."""

    task_type: Literal["reasoning", "sft"] = key(
        "reasoning", "What is trained: RL on verifiable answers, or SFT.", refused=OTHER_TASKS
    )
    max_epochs: int | None = key(
        None,
        "Passes over the training data; the run ends with this or max_steps, whichever is reached first. null: as many "
        "as max_steps needs, or 1 if that is -1.",
        unit="epochs",
        minimum=1,
    )
    max_steps: int = key(
        -1, "Training steps, unless max_epochs ends the run earlier; -1: max_epochs alone.", unit="steps", minimum=-1
    )
    save_interval: int = key(-1, "Steps between checkpoints; -1: only after the last step.", unit="steps", minimum=-1)
    val_check_interval: int = key(
        -1, "Steps between validations; -1: only after the last step.", unit="steps", minimum=-1
    )
    seq_length: int = key(2048, "Longest sequence, prompt and answer together.", unit="tokens", minimum=2)
    resume_dir: str | None = key(
        None, "`global_step_<n>` directory to resume from; auto: the newest complete one of this run."
    )
    preemption_seconds: float = key(
        600.0,
        "Time after SIGTERM to finish the step, save and write the report; then the run ends unsaved. 0: end at once.",
        unit="seconds",
        minimum=0,
    )
    experiment_name: str = key("default", "Name of the run; its files go to `<output_dir>/<experiment_name>`.")
    output_dir: str = key("results", "Directory that holds the runs.")
    enable_dynamic_batch_size: bool = key(
        False, "Fill micro-batches up to max_tokens_per_mbs tokens instead of with micro_batch_size sequences."
    )
    max_tokens_per_mbs: int | None = key(
        None,
        "Token budget of a micro-batch under enable_dynamic_batch_size. null: seq_length.",
        unit="tokens",
        minimum=1,
    )
    checkpoint: CheckpointConfig = section(CheckpointConfig, "Contents and number of checkpoints.")
    logger: LoggerConfig = section(LoggerConfig, "Logging.")


@dataclasses.dataclass(kw_only=True, slots=True)
class ClusterConfig:
    """`cluster`: the hosts."""

    num_nodes: int = key(
        1, "Hosts of the run; more than one uses the elastic launcher's rendezvous.", unit="hosts", minimum=1
    )


@dataclasses.dataclass(kw_only=True, slots=True)
class LauncherConfig:
    """`launcher`: how the processes of one host are started."""

    nproc_per_node: int | None = key(
        None,
        "Processes on this host. null: one for each GPU, one on a host without GPUs. "
        "Ignored where torchrun or SLURM already started the ranks.",
        unit="processes",
        minimum=1,
    )
