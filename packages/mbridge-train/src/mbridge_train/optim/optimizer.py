"""Data-parallel wrapping and the optimizer: Megatron-Core's, configured in one place."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.utils import get_model_config
from torch import Tensor, nn

from mbridge_train.errors import TrainError
from mbridge_train.optim.adam import enable_adam
from mbridge_train.optim.multi_tensor import enable_multi_tensor
from mbridge_train.optim.schedule import Schedule


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerSettings:
    """AdamW (Loshchilov & Hutter 2019) over data-parallel ranks.

    Attributes:
        schedule: learning rate by step, and the weight decay, which is not applied to biases and norms.
        betas, epsilon: hyperparameters of Adam.
        clip_grad: largest global L2 norm, to which gradients are scaled down; 0: no clipping.
        use_distributed_optimizer: each data-parallel rank keeps a slice of the optimizer state (ZeRO stage 1).
        overlap_grad_reduce: reduce gradients during the backward pass.
        overlap_param_gather: gather updated weights during the next forward pass (distributed optimizer only).
        bucket_size: parameters in one gradient bucket; None leaves it to Megatron-Core.
        loss_scale: fixed loss scale for fp16; None: a dynamic scale.
        initial_loss_scale, min_loss_scale: first and smallest value of a dynamic scale.
        loss_scale_window: steps without an overflow after which a dynamic scale doubles.
    """

    schedule: Schedule
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    clip_grad: float = 1.0
    use_distributed_optimizer: bool = True
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    bucket_size: int | None = None
    loss_scale: float | None = None
    initial_loss_scale: float = 2.0**32
    min_loss_scale: float = 1.0
    loss_scale_window: float = 1000

    def __post_init__(self) -> None:
        if self.overlap_param_gather and not (self.use_distributed_optimizer and self.overlap_grad_reduce):
            raise TrainError(
                "overlap_param_gather needs use_distributed_optimizer and overlap_grad_reduce: "
                "set both, or leave it off"
            )
        if self.initial_loss_scale < self.min_loss_scale:
            raise TrainError(
                f"initial_loss_scale={self.initial_loss_scale:g} is below min_loss_scale={self.min_loss_scale:g}: "
                "raise the one or lower the other"
            )


def wrap_data_parallel(model: list[nn.Module], settings: OptimizerSettings) -> list[DistributedDataParallel]:
    """Wrap the model chunks with fp32 gradient buffers, which are reduced over data-parallel ranks.

    Gradients are summed, not averaged, because the loss is a sum over the global batch (see `batch`). Raises
    `TrainError` if the model adds router losses.
    """
    config = get_model_config(model[0])
    for name in ("moe_aux_loss_coeff", "moe_z_loss_coeff"):
        # Megatron-Core multiplies these losses by the tokens of a micro-batch, and divides by those of the step later.
        # Here the weights of the tokens already include that division, so router losses would outgrow the loss.
        value = getattr(config, name, None)
        if config.num_moe_experts and (any(value) if isinstance(value, list) else value):
            raise TrainError(f"the override {name}={value} cannot be trained with: leave it out, or set it to 0")
    assert config.calculate_per_token_loss, "the model must be built with calculate_per_token_loss, else DDP averages"
    data_parallel = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=settings.use_distributed_optimizer,
        overlap_grad_reduce=settings.overlap_grad_reduce,
        overlap_param_gather=settings.overlap_param_gather,
        bucket_size=settings.bucket_size,
        check_for_nan_in_grad=False,
    )
    # Buckets beyond the first chunk would interleave with another chunk's compute, which Megatron-Core does not do.
    return [
        DistributedDataParallel(config=config, ddp_config=data_parallel, module=chunk, disable_bucketing=number > 0)
        for number, chunk in enumerate(model)
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """The outcome of one optimizer step."""

    grad_norm: float
    """Global L2 norm before clipping; 0.0 if the update was skipped."""
    learning_rate: float
    applied: bool
    """False when an fp16 overflow made the optimizer skip the update."""


class Optimizer:
    """Megatron-Core's optimizer and the learning-rate schedule, with the arguments and result of `wrap_data_parallel`.

    Raises `TrainError` if every parameter of the model is frozen.
    """

    def __init__(self, model: list[DistributedDataParallel], settings: OptimizerSettings) -> None:
        enable_adam()
        enable_multi_tensor()
        config = get_model_config(model[0])
        self.settings = settings
        self.steps = 0
        """Steps taken so far, on which the schedule depends."""
        self.megatron: Any = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=settings.schedule.max_lr,
                weight_decay=settings.schedule.weight_decay,
                adam_beta1=settings.betas[0],
                adam_beta2=settings.betas[1],
                adam_eps=settings.epsilon,
                clip_grad=settings.clip_grad,
                bf16=config.bf16,
                fp16=config.fp16,
                params_dtype=config.params_dtype,
                use_distributed_optimizer=settings.use_distributed_optimizer,
                overlap_param_gather=settings.overlap_param_gather,
                loss_scale=settings.loss_scale,
                initial_loss_scale=settings.initial_loss_scale,
                min_loss_scale=settings.min_loss_scale,
                loss_scale_window=settings.loss_scale_window,
            ),
            model,
        )
        if not self.parts:
            raise TrainError(
                "every parameter of the model is frozen, so nothing is trained: train a part of it, or build the "
                "engine without an optimizer"
            )
        # Megatron-Core calls it between the reduction of the gradients and the update.
        self.megatron.get_grad_norm = partial(_finite_norm, self.megatron.get_grad_norm)

    @property
    def parts(self) -> list[Any]:
        """The optimizers of Megatron-Core's chain, usually one, without stubs for which no rank has a parameter."""
        chained = getattr(self.megatron, "chained_optimizers", [self.megatron])
        return [part for part in chained if part.optimizer is not None]

    def tensors(self) -> list[Tensor]:
        """Return the tensors that the update changes: fp32 master weights, or the weights themselves, and moments."""
        found: list[Tensor] = []
        for part in self.parts:
            found += [parameter for group in part.optimizer.param_groups for parameter in group["params"]]
            found += [v for state in part.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
        return found

    def step(self) -> StepResult:
        """Clip, update and advance the schedule. Collective over all ranks.

        A step that is skipped because of an fp16 overflow does not count in the schedule. Raises `TrainError` on every
        rank if the gradients are not finite; nothing was updated.
        """
        learning_rate = self.settings.schedule.learning_rate(self.steps)
        for group in self.megatron.param_groups:
            group["lr"] = learning_rate
            # Megatron-Core gives biases and norms a wd_mult of 0, which its own scheduler would apply.
            group["weight_decay"] = self.settings.schedule.weight_decay * group.get("wd_mult", 1.0)
        applied, grad_norm, _ = self.megatron.step()
        if applied:
            self.steps += 1
        return StepResult(grad_norm=float(grad_norm or 0.0), learning_rate=learning_rate, applied=bool(applied))


def _finite_norm(get_norm: Callable[[], float]) -> float:
    """Return the norm, which is the same on every rank. Clipping does not catch NaN, which exceeds no limit."""
    norm = get_norm()
    if not math.isfinite(norm):
        raise TrainError(
            f"the gradients are not finite (norm {norm}), so the weights stay as they are; continue from the last "
            "checkpoint with runner.resume_dir=auto and a lower learning rate (actor.optim.lr), or look for the batch "
            "that causes it"
        )
    return norm
