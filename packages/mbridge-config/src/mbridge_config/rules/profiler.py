"""What the profiler records."""

from collections.abc import Iterable
from pathlib import PurePath

from mbridge_config.rules.base import Context, Finding, rule
from mbridge_config.run.steps import LENGTH_KEYS, longest_run

PROFILER = "actor.megatron.profiler."
USED = "actor.megatron.use_profiler"


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
