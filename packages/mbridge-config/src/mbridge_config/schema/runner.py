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
    """`runner.logger`: where metrics go beside `metrics.jsonl`, which is always written."""

    log_path: str | None = key(None, "Directory of the backends' files. null: `<output_dir>/<experiment_name>`.")
    project_name: str = key("mbridge", "Project name that wandb and swanlab show.")
    experiment_name: str | None = key(None, "Run name in the backends. null: `runner.experiment_name`.")
    logger_backends: list[Literal["tensorboard", "wandb", "swanlab"]] = key(
        [], "Further backends; each is an optional extra."
    )


@dataclasses.dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """`runner.checkpoint`: what a checkpoint holds beside the training state, and which ones stay on the disk."""

    hf_export_every: int = key(
        1, "HuggingFace copy with every n-th checkpoint and with the last; 0: with none.", unit="checkpoints", minimum=0
    )
    max_shard_size: str = key("5GB", "Largest file of the HuggingFace copy.")
    async_save: bool = key(
        False, "Train on while a process beside each rank writes; takes host memory for a copy of what the rank saves."
    )
    when_busy: Literal["wait", "refuse"] = key(
        "wait", "A save that comes while the last one is being written: wait for it, or make none (but for the last)."
    )
    keep_last: int | None = key(
        None, "Newest checkpoints to keep. null, with the two below: all.", unit="checkpoints", minimum=1
    )
    keep_every: int | None = key(None, "Also keep those whose step is a multiple.", unit="steps", minimum=1)
    keep_best: int | None = key(
        None, "Also keep this many of the best by keep_best_metric.", unit="checkpoints", minimum=1
    )
    keep_best_metric: str = key(
        "validation/accuracy", "Metric of keep_best, a name in metrics.jsonl; SFT on free text has validation/loss."
    )
    keep_best_is: Literal["max", "min"] = key("max", "Whether its largest or smallest value is best.")


@dataclasses.dataclass(kw_only=True, slots=True)
class RunnerConfig:
    """`runner`: the loop around training steps."""

    task_type: Literal["reasoning", "sft"] = key(
        "reasoning", "What is trained: RL on verifiable answers, or SFT.", refused=OTHER_TASKS
    )
    max_epochs: int | None = key(
        None,
        "Passes over the training data; with max_steps the run ends with whichever is reached first. null: as many as "
        "max_steps takes, and 1 where that is -1.",
        unit="epochs",
        minimum=1,
    )
    max_steps: int = key(-1, "Training steps, or fewer by max_epochs; -1: max_epochs alone.", unit="steps", minimum=-1)
    save_interval: int = key(-1, "Steps between checkpoints; -1: only the last step.", unit="steps", minimum=-1)
    val_check_interval: int = key(-1, "Steps between validations; -1: none on the way.", unit="steps", minimum=-1)
    seq_length: int = key(2048, "Longest sequence, prompt and answer together.", unit="tokens", minimum=2)
    resume_dir: str | None = key(
        None, "A `global_step_<n>` directory to go on from; auto: the newest of this run that is whole."
    )
    experiment_name: str = key("default", "Name of the run; its files go to `<output_dir>/<experiment_name>`.")
    output_dir: str = key("results", "Directory that holds the runs.")
    enable_dynamic_batch_size: bool = key(
        False, "Fill micro-batches up to max_tokens_per_mbs tokens, not with micro_batch_size sequences."
    )
    max_tokens_per_mbs: int | None = key(
        None, "Most tokens in one micro-batch of a dynamic batch. null: seq_length.", unit="tokens", minimum=1
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
