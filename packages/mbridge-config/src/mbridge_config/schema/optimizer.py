"""`actor.optim` and `actor.lr_sched`."""

import dataclasses
from typing import Literal

from mbridge_config.schema.keys import Status, key


@dataclasses.dataclass(kw_only=True, slots=True)
class OptimizerConfig:
    """`actor.optim`: AdamW (Loshchilov and Hutter, Decoupled Weight Decay Regularization)."""

    optimizer: Literal["adam"] = key(
        "adam",
        "adam: AdamW, with decoupled weight decay.",
        spellings={"adamw": "adam"},
        status=Status.REFUSED,
        refused={"sgd": "SGD is not in this version"},
    )
    lr: float = key(1e-6, "Learning rate if lr_sched.max_lr is null.", minimum=0.0)
    min_lr: float = key(0.0, "Lowest learning rate if lr_sched.min_lr is null.", minimum=0.0)
    # Adam divides by 1 - beta^t, which is 0 where beta is 1.
    adam_beta1: float = key(0.9, "Decay of the first moment.", minimum=0.0, below=1.0)
    adam_beta2: float = key(0.999, "Decay of the second moment.", minimum=0.0, below=1.0)
    adam_eps: float = key(1e-8, "Added to the root of the second moment.", above=0.0)
    weight_decay: float = key(0.01, "Decay of matrices; norms and biases have none.", minimum=0.0)
    clip_grad: float = key(1.0, "Largest norm of the whole gradient; 0: no clipping.", minimum=0.0)
    bf16: bool | None = key(None, "Must agree with actor.model.precision. null: it does.")
    fp16: bool | None = key(None, "Must agree with actor.model.precision. null: it does.")
    use_distributed_optimizer: bool = key(True, "Split optimizer state over the data-parallel ranks.")
    overlap_grad_reduce: bool = key(False, "Reduce gradients while the backward pass runs.")
    overlap_param_gather: bool = key(False, "Gather weights while the forward pass runs.")
    loss_scale: float | None = key(None, "Fixed loss scale of fp16. null: a dynamic one.", above=0.0)
    initial_loss_scale: float = key(2.0**32, "Initial value of the dynamic loss scale.", above=0.0)
    min_loss_scale: float = key(1.0, "Lowest value of the dynamic loss scale.", above=0.0)
    loss_scale_window: float = key(1000, "Steps without overflow after which the scale doubles.", unit="steps", above=0)


@dataclasses.dataclass(kw_only=True, slots=True)
class LrScheduleConfig:
    """`actor.lr_sched`: the learning rate over optimizer steps."""

    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = key(
        "constant",
        "Shape of the decay after the warm-up.",
        spellings={"inverse_square_root": "inverse-square-root"},
    )
    max_lr: float | None = key(None, "Learning rate after the warm-up. null: optim.lr.", minimum=0.0)
    min_lr: float | None = key(None, "Learning rate at the end of the decay. null: optim.min_lr.", minimum=0.0)
    lr_warmup_init: float = key(0.0, "Learning rate at step 0 of the warm-up.", minimum=0.0)
    lr_warmup_iters: int = key(0, "Length of the warm-up.", unit="optimizer steps", minimum=0)
    lr_warmup_fraction: float | None = key(
        None,
        "Length of the warm-up as a share of lr_decay_iters, below 1 if the rate decays; overrides lr_warmup_iters.",
        minimum=0.0,
        maximum=1.0,
    )
    lr_decay_iters: int | None = key(
        None, "Step at which min_lr is reached. null: the whole run.", unit="optimizer steps", minimum=1
    )
    lr_wsd_decay_iters: int | None = key(None, "WSD: length of the last decay.", unit="optimizer steps", minimum=1)
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = key(
        "exponential", "WSD: shape of the last decay."
    )
    start_weight_decay: float | None = key(
        None, "Weight decay; overrides optim.weight_decay. null: optim.weight_decay.", minimum=0.0
    )
    end_weight_decay: float | None = key(
        None, "Must equal start_weight_decay, since weight decay is constant. null: it does.", minimum=0.0
    )
    weight_decay_incr_style: Literal["constant"] = key(
        "constant",
        "Schedule of the weight decay.",
        status=Status.REFUSED,
        refused=dict.fromkeys(("linear", "cosine"), "weight decay is constant in this version"),
    )
