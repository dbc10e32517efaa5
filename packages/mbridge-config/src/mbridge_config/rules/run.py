"""The run as a whole: its kind, its length, what it writes, and what the profiler records."""

import re
from collections.abc import Iterable
from pathlib import PurePath

from mbridge_config.paths import fault, is_directory, is_there, user_path
from mbridge_config.rules.base import Context, Finding, rule
from mbridge_config.run.steps import LENGTH_KEYS, longest_run
from mbridge_config.schema.sft import SFTConfig

TRAIN = "data.train_data_paths"
VALIDATION = "data.val_data_paths"
PROFILER = "actor.megatron.profiler."
USED = "actor.megatron.use_profiler"
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


@rule(
    "profiler-steps",
    USED,
    *(f"{PROFILER}{name}" for name in ("steps", "schedule_wait", "schedule_warmup", "schedule_active")),
    *LENGTH_KEYS,
)
def steps(context: Context) -> Iterable[Finding]:
    """The profiler is on, but would record no step, or names a step that does not exist.

    Fix: name steps that the run has in `actor.megatron.profiler.steps`, or set `actor.megatron.use_profiler=false`.
    """
    megatron, length = context.config.actor.megatron, longest_run(context.config)
    if not megatron.use_profiler:
        return
    named = megatron.profiler.steps
    if named is not None and any(step < 1 for step in named):
        yield Finding(f"{PROFILER}steps", "steps are counted from 1", "name steps from 1 on")
    elif named is not None and not named:
        yield Finding(f"{PROFILER}steps", f"no step is named, and {USED} is true", "name steps, or turn it off")
    elif length is None:
        return
    elif named is not None and length.steps < min(named):
        reason = f"the run ends with step {length.steps}: {length.reason}"
        yield Finding(f"{PROFILER}steps", reason, f"name steps up to {length.steps}")
    elif named is None and length.steps < (
        first := megatron.profiler.schedule_wait + megatron.profiler.schedule_warmup + 1
    ):
        reason = f"the first recorded step is {first}, and the run ends with step {length.steps}: {length.reason}"
        yield Finding(f"{PROFILER}schedule_wait", reason, f"lower it, or name steps in {PROFILER}steps")


@rule("profiler-activities", USED, f"{PROFILER}activities")
def activities(context: Context) -> Iterable[Finding]:
    """The profiler is on, but set to record nothing.

    Fix: set `actor.megatron.profiler.activities=[cpu, cuda]`, or one of the two.
    """
    megatron = context.config.actor.megatron
    if megatron.use_profiler and not megatron.profiler.activities:
        yield Finding(f"{PROFILER}activities", "nothing would be recorded", "use [cpu, cuda], [cpu] or [cuda]")


@rule("profiler-files", USED, *(f"{PROFILER}{name}" for name in ("export_tensorboard", "export_chrome_trace")))
def files(context: Context) -> Iterable[Finding]:
    """The profiler is on, but set to write nothing.

    Fix: set `actor.megatron.profiler.export_chrome_trace=true`, or `actor.megatron.use_profiler=false`.
    """
    megatron = context.config.actor.megatron
    settings = megatron.profiler
    if megatron.use_profiler and not (settings.export_tensorboard or settings.export_chrome_trace):
        fix = f"set {PROFILER}export_chrome_trace=true, or {USED}=false"
        yield Finding(f"{PROFILER}export_chrome_trace", "no trace would be written, as export_tensorboard=false", fix)


@rule("profiler-prefix", USED, f"{PROFILER}chrome_filename_prefix")
def prefix(context: Context) -> Iterable[Finding]:
    """The prefix of the trace files would lead out of their directory.

    Fix: use a plain name such as `chrome_trace`; `actor.megatron.profiler.output_dir` is the directory.
    """
    megatron = context.config.actor.megatron
    name = megatron.profiler.chrome_filename_prefix
    if megatron.use_profiler and PurePath(name).name != name:
        fix = f"use a plain name such as chrome_trace; {PROFILER}output_dir is the directory"
        yield Finding(f"{PROFILER}chrome_filename_prefix", "it is not the beginning of a file's name", fix)
