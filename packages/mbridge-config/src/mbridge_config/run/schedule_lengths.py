"""How long the learning rate warms up and decays. Rules and the engine count here, so that they agree."""

from mbridge_config.schema.optimizer import LrScheduleConfig


def decay_steps(schedule: LrScheduleConfig, optimizer_steps: int) -> int:
    """The optimizer step at which the lowest rate is reached, in a run of `optimizer_steps`."""
    return schedule.lr_decay_iters or max(1, optimizer_steps)


def warmup_steps(schedule: LrScheduleConfig, decay_steps: int) -> int:
    """Optimizer steps of the warm-up, of a schedule that ends after `decay_steps`."""
    if schedule.lr_warmup_fraction is None:
        return schedule.lr_warmup_iters
    return int(schedule.lr_warmup_fraction * decay_steps)
