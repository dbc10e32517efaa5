"""The run as a whole: data, reward, output, and what this version does not do."""

import re
from collections.abc import Iterable
from pathlib import Path

from mbridge_config.problems import Severity
from mbridge_config.rules.base import Context, Finding, rule

TYPE = "data.type"
TRAIN = "data.train_data_paths"
VALIDATION = "data.val_data_paths"
TASK = "data.reasoning_gym.task"
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*[KMGT]?i?B\s*", re.IGNORECASE)
_SUFFIXES = (".json", ".jsonl")


@rule("task-type", "runner.task_type")
def task_type(context: Context) -> Iterable[Finding]:
    """A config of another kind of run was given to the reasoning app."""
    if context.config.runner.task_type != "reasoning":
        yield Finding("runner.task_type", "this app trains reasoning runs", "set runner.task_type=reasoning")


@rule("no-steps", "runner.max_steps")
def no_steps(context: Context) -> Iterable[Finding]:
    """A run of no steps at all was asked for."""
    if context.config.runner.max_steps == 0:
        fix = "set runner.max_steps=-1 for all of runner.max_epochs, or to 1 or more"
        yield Finding("runner.max_steps", "a run of 0 steps trains nothing", fix)


@rule("critic-not-built", "critic")
def critic(context: Context) -> Iterable[Finding]:
    """A critic was asked for (PPO), which this version refuses."""
    if context.config.critic.get("use_critic_model"):
        fix = "set critic.use_critic_model=false and algorithm.adv_type=grpo"
        yield Finding("critic", "PPO with a critic is not built yet in this version of mbridge", fix)


@rule("rollout-backend", "rollout.rollout_backend")
def rollout_backend(context: Context) -> Iterable[Finding]:
    """A serving engine was asked for; this version generates with transformers."""
    if context.config.rollout.rollout_backend != "transformers":
        reason = "this version generates with transformers, which gives the same answers more slowly"
        yield Finding("rollout.rollout_backend", reason, "set rollout.rollout_backend=transformers", Severity.WARNING)


@rule("train-data-missing", TYPE, TRAIN)
def train_data(context: Context) -> Iterable[Finding]:
    """Files are to be trained on, and none is named."""
    data = context.config.data
    if data.type == "math" and not data.train_data_paths:
        yield Finding(TRAIN, "there is nothing to train on", f"set {TRAIN}=[FILE.jsonl], or {TYPE}=reasoning_gym")


@rule("data-path", TYPE, TRAIN, VALIDATION)
def data_paths(context: Context) -> Iterable[Finding]:
    """A data file is not there, or is not json or jsonl."""
    data = context.config.data
    if data.type != "math":
        return
    for key, paths in ((TRAIN, data.train_data_paths), (VALIDATION, data.val_data_paths)):
        for path in paths:
            file = Path(path).expanduser()
            if file.is_dir():
                yield Finding(key, f"{path} is a directory", "name the json or jsonl files in it")
            elif not file.is_file():
                yield Finding(key, f"there is no file {path}", "correct the path; it is relative to where you run")
            elif file.suffix not in _SUFFIXES:
                yield Finding(key, f"{path} is neither json nor jsonl", "write one JSON object a line into a .jsonl")


@rule("reasoning-gym-task", TYPE, TASK)
def task(context: Context) -> Iterable[Finding]:
    """Made problems are to be trained on, and no task is named."""
    data = context.config.data
    if data.type == "reasoning_gym" and not data.reasoning_gym.task:
        yield Finding(TASK, f"{TYPE} is reasoning_gym, which needs a task", f"set {TASK}=basic_arithmetic or another")


@rule("reward-type", TYPE, "reward.reward_type")
def reward_type(context: Context) -> Iterable[Finding]:
    """The scorer of reasoning-gym was asked for on data that it did not make."""
    config = context.config
    if config.reward.reward_type == "reasoning_gym" and config.data.type != "reasoning_gym":
        reason = f"{TYPE} is {config.data.type}, whose answers reasoning-gym cannot score"
        yield Finding("reward.reward_type", reason, "set reward.reward_type=math")


@rule("quickstart-width", "quickstart")
def quickstart_width(context: Context) -> Iterable[Finding]:
    """The model that the quickstart is to make would have heads of another width than 32, the least that serving
    engines' kernels take, or key-value heads that do not divide its query heads."""
    made = context.config.quickstart
    if not made.enabled:
        return
    if made.hidden_size != 32 * made.num_attention_heads:
        reason = f"{made.num_attention_heads} query heads of width 32 make {32 * made.num_attention_heads}"
        fix = f"set quickstart.hidden_size={32 * made.num_attention_heads}, or change quickstart.num_attention_heads"
        yield Finding("quickstart.hidden_size", reason, fix)
    if made.num_attention_heads % made.num_key_value_heads:
        reason = f"{made.num_attention_heads} query heads cannot be shared by {made.num_key_value_heads} groups"
        yield Finding("quickstart.num_key_value_heads", reason, f"use a divisor of {made.num_attention_heads}")


@rule("output-directory", "runner.output_dir")
def output(context: Context) -> Iterable[Finding]:
    """The output directory is a file, or lies below one."""
    path = Path(context.config.runner.output_dir).expanduser()
    existing = next((place for place in (path, *path.parents) if place.exists()), None)
    if existing is not None and not existing.is_dir():
        yield Finding("runner.output_dir", f"{existing} is a file", "give a directory, or one that can be made")


@rule("shard-size", "runner.checkpoint.max_shard_size")
def shard_size(context: Context) -> Iterable[Finding]:
    """The largest file of a HuggingFace copy is no size."""
    size = context.config.runner.checkpoint.max_shard_size
    match = _SIZE.fullmatch(size)
    if match is None or float(match[1]) == 0:
        key = "runner.checkpoint.max_shard_size"
        yield Finding(key, "it is not a size in bytes", "write for example 5GB or 512MiB")


@rule("async-torch-dist", "runner.checkpoint.async_save", "actor.megatron.ckpt_format", "actor.megatron.use_dist_ckpt")
def async_torch_dist(context: Context) -> Iterable[Finding]:
    """Distributed checkpoints are to be written in the background, which only the other format is."""
    config = context.config
    megatron = config.actor.megatron
    if config.runner.checkpoint.async_save and (megatron.use_dist_ckpt or megatron.ckpt_format == "torch_dist"):
        reason = "torch_dist checkpoints are written by Megatron-Core itself, while training waits"
        fix = "set actor.megatron.use_dist_ckpt=false and actor.megatron.ckpt_format=torch, or async_save=false"
        yield Finding("runner.checkpoint.async_save", reason, fix)


@rule("keep-best-metric", "runner.checkpoint.keep_best", "runner.checkpoint.keep_best_metric")
def keep_best(context: Context) -> Iterable[Finding]:
    """The best checkpoints by a validation metric are to be kept, and nothing is validated on the way."""
    runner = context.config.runner
    metric = runner.checkpoint.keep_best_metric
    if runner.checkpoint.keep_best and metric.startswith("validation/") and runner.val_check_interval < 1:
        reason = f"{metric} is measured with the last step only, so no other checkpoint could be the best"
        fix = "set runner.val_check_interval=1 or more, or runner.checkpoint.keep_best_metric to a metric of training"
        yield Finding("runner.checkpoint.keep_best", reason, fix)


RULES = (
    shard_size,
    async_torch_dist,
    keep_best,
    task_type,
    no_steps,
    critic,
    rollout_backend,
    train_data,
    data_paths,
    task,
    reward_type,
    quickstart_width,
    output,
)
