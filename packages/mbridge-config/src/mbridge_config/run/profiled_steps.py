"""Which steps of a run the profiler records."""

from mbridge_config.schema.profiler import ProfilerConfig


def is_recorded(settings: ProfilerConfig, step: int) -> bool:
    """Whether the step, counted from 1, leaves a trace."""
    if settings.steps is not None:
        return step in settings.steps
    idle = settings.schedule_wait + settings.schedule_warmup
    cycle, place = divmod(step - 1, idle + settings.schedule_active)
    return place >= idle and (not settings.schedule_repeat or cycle < settings.schedule_repeat)


def is_warmup(settings: ProfilerConfig, step: int) -> bool:
    """Whether the profiler runs in the step although it leaves no trace."""
    ahead = range(step + 1, step + 1 + settings.schedule_warmup)
    return not is_recorded(settings, step) and any(is_recorded(settings, later) for later in ahead)
