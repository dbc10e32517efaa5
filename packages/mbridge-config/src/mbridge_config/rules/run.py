"""The run as a whole: its kind, its length, what it writes."""

import re
from collections.abc import Iterable

from mbridge_config.paths import fault, is_directory, is_there, user_path
from mbridge_config.rules.base import Context, Finding, rule
from mbridge_config.schema.sft import SFTConfig

TRAIN = "data.train_data_paths"
VALIDATION = "data.val_data_paths"
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*[KMGT]?i?B\s*", re.IGNORECASE)


@rule("shard-size", "runner.checkpoint.max_shard_size")
def shard_size(context: Context) -> Iterable[Finding]:
    """The largest file size of a HuggingFace copy is not a size.

    Fix: write a size such as `5GB` or `512MiB`.
    """
    size = context.config.runner.checkpoint.max_shard_size
    match = _SIZE.fullmatch(size)
    if match is None or float(match[1]) == 0:
        key = "runner.checkpoint.max_shard_size"
        yield Finding(key, "it is not a size in bytes", "write for example 5GB or 512MiB")


@rule("async-torch-dist", "runner.checkpoint.async_save", "actor.megatron.ckpt_format", "actor.megatron.use_dist_ckpt")
def async_torch_dist(context: Context) -> Iterable[Finding]:
    """Distributed checkpoints are to be written in the background, which only the other format supports.

    Fix: use `actor.megatron.ckpt_format=torch`, or save while training waits.
    """
    config = context.config
    megatron = config.actor.megatron
    if config.runner.checkpoint.async_save and (megatron.use_dist_ckpt or megatron.ckpt_format == "torch_dist"):
        reason = "torch_dist checkpoints are written by Megatron-Core itself, while training waits"
        fix = "set actor.megatron.use_dist_ckpt=false and actor.megatron.ckpt_format=torch, or async_save=false"
        yield Finding("runner.checkpoint.async_save", reason, fix)


@rule("keep-best-metric", "runner.checkpoint.keep_best", "runner.checkpoint.keep_best_metric")
def keep_best(context: Context) -> Iterable[Finding]:
    """The best checkpoints by a validation metric are to be kept, but nothing is validated before the last step.

    Fix: validate every n steps, or choose a metric of training.
    """
    runner = context.config.runner
    metric = runner.checkpoint.keep_best_metric
    if runner.checkpoint.keep_best and metric.startswith("validation/") and runner.val_check_interval < 1:
        reason = f"{metric} is measured with the last step only, so no other checkpoint could be the best"
        fix = "set runner.val_check_interval=1 or more, or runner.checkpoint.keep_best_metric to a metric of training"
        yield Finding("runner.checkpoint.keep_best", reason, fix)


@rule("task-type", "runner.task_type")
def task_type(context: Context) -> Iterable[Finding]:
    """A config of another kind of run was given to an app.

    Fix: set `runner.task_type`, or start the other app.
    """
    kind, name = ("sft", "SFT") if isinstance(context.config, SFTConfig) else ("reasoning", "reasoning")
    if context.config.runner.task_type != kind:
        yield Finding("runner.task_type", f"this app trains {name} runs", f"set runner.task_type={kind}")


@rule("no-steps", "runner.max_steps")
def no_steps(context: Context) -> Iterable[Finding]:
    """A run of 0 steps was requested.

    Fix: set `runner.max_steps` to -1 for all of `runner.max_epochs`, or to 1 or more.
    """
    if context.config.runner.max_steps == 0:
        fix = "set runner.max_steps=-1 for all of runner.max_epochs, or to 1 or more"
        yield Finding("runner.max_steps", "a run of 0 steps trains nothing", fix)


@rule("output-directory", "runner.output_dir")
def output(context: Context) -> Iterable[Finding]:
    """The output directory is a file, lies below one, or may not be written to.

    Fix: give a directory that exists or can be made, and that you may write to.
    """
    path = user_path(context.config.runner.output_dir)
    if found := fault(path):
        yield Finding("runner.output_dir", f"it cannot be used: {found}", "give a directory that can be made")
        return
    existing = next((place for place in (path, *path.parents) if is_there(place)), None)
    if existing is not None and not is_directory(existing):
        yield Finding("runner.output_dir", f"{existing} is a file", "give a directory, or one that can be made")
