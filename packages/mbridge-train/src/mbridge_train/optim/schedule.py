"""Learning rate and weight decay as functions of the step number alone.

The schedule has no state, so a resumed run follows the curve of an uninterrupted one, and the curve can be plotted
before training. The values are those of Megatron-LM's ``OptimizerParamScheduler`` at the same step count.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from mbridge_train.errors import TrainError

DecayStyle = Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"]
WSDDecayStyle = Literal["linear", "cosine", "exponential", "minus_sqrt"]


@dataclass(kw_only=True, slots=True, frozen=True)
class Schedule:
    """Linear warm-up from ``init_lr`` to ``max_lr``, then decay to ``min_lr``. Lengths are in optimizer steps.

    Raises `TrainError` if a value is out of its range.
    """

    max_lr: float
    min_lr: float = 0.0
    init_lr: float = 0.0
    """Learning rate at the start of the warm-up; unused without a warm-up."""
    warmup_steps: int = 0
    decay_steps: int = 1
    """Step, counted from the start of training, at which ``min_lr`` is reached; unused by ``constant``."""
    decay_style: DecayStyle = "constant"
    wsd_decay_steps: int = 0
    """WSD (warm-up, stable, decay; arXiv 2404.06395): length of the decay that ends at ``decay_steps``."""
    wsd_decay_style: WSDDecayStyle = "exponential"
    weight_decay: float = 0.0
    """Constant over the run. The optimizer applies the multipliers of parameters."""

    def __post_init__(self) -> None:
        for name, styles in (("decay_style", get_args(DecayStyle)), ("wsd_decay_style", get_args(WSDDecayStyle))):
            style = getattr(self, name)
            _check(style in styles, f"unknown {name} {style!r}: use one of {', '.join(styles)}")
        rates = (self.max_lr, self.min_lr, self.init_lr, self.weight_decay)
        _check(all(math.isfinite(rate) for rate in rates), "learning rates and weight_decay must be finite numbers")
        _check(self.min_lr >= 0, f"min_lr={self.min_lr} must not be negative")
        _check(self.min_lr <= self.max_lr, f"min_lr={self.min_lr} must not exceed the learning rate {self.max_lr}")
        _check(
            0 <= self.init_lr <= self.max_lr,
            f"init_lr={self.init_lr} must be between 0 and the learning rate {self.max_lr}",
        )
        _check(self.weight_decay >= 0, f"weight_decay={self.weight_decay} must not be negative")
        _check(self.warmup_steps >= 0, f"warmup_steps={self.warmup_steps} must not be negative")
        if self.decay_style == "constant":
            return
        _check(
            self.warmup_steps < self.decay_steps,
            f"warmup_steps={self.warmup_steps} must be less than decay_steps={self.decay_steps}: shorten the warm-up "
            "or lengthen the decay",
        )
        if self.decay_style == "WSD":
            longest = self.decay_steps - self.warmup_steps
            _check(
                1 <= self.wsd_decay_steps <= longest,
                f"wsd_decay_steps={self.wsd_decay_steps} must be between 1 and decay_steps - warmup_steps = {longest}",
            )

    def learning_rate(self, step: int) -> float:
        """Return the learning rate at ``step``, the number of optimizer steps taken before it.

        With a warm-up, step 0 therefore has ``init_lr`` and step ``warmup_steps`` has ``max_lr``; from ``decay_steps``
        on the rate is ``min_lr``. inverse-square-root is max_lr * sqrt(warmup_steps / step) (Vaswani et al. 2017, 5.3),
        and drops to ``min_lr`` after ``decay_steps``. Raises `ValueError` if ``step`` is negative.
        """
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}")
        if self.warmup_steps > 0 and step <= self.warmup_steps:
            return self.init_lr + (self.max_lr - self.init_lr) * step / self.warmup_steps
        if self.decay_style == "constant":
            return self.max_lr
        if step > self.decay_steps:
            return self.min_lr
        if self.decay_style == "inverse-square-root":
            return max(self.min_lr, self.max_lr * math.sqrt(max(self.warmup_steps, 1) / max(step, 1)))
        return self.min_lr + (self.max_lr - self.min_lr) * self._coefficient(step)

    def _coefficient(self, step: int) -> float:
        """Return the position of a decay step between ``min_lr`` (0) and ``max_lr`` (1)."""
        if self.decay_style != "WSD":
            progress = (step - self.warmup_steps) / (self.decay_steps - self.warmup_steps)
            return 1 - progress if self.decay_style == "linear" else _cosine(progress)
        progress = (step - (self.decay_steps - self.wsd_decay_steps)) / self.wsd_decay_steps
        if progress <= 0:
            return 1.0
        match self.wsd_decay_style:
            case "linear":
                return 1 - progress
            case "cosine":
                return _cosine(progress)
            case "exponential":
                return 2 * math.pow(0.5, progress) - 1
            case "minus_sqrt":
                return 1 - math.sqrt(progress)


def _cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise TrainError(f"schedule: {message}")
