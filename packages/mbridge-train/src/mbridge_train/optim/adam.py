"""Adam for Megatron-Core where neither Transformer Engine nor Apex is installed, with the interface of their FusedAdam.

Megatron-Core falls back to torch's AdamW, which keeps a `step` tensor for every parameter. `DistributedOptimizer` then
makes all of them share one tensor when it loads a checkpoint, each parameter increments it, and the resumed run
silently takes steps with wrong bias corrections. With FusedAdam's interface the step is an int of the parameter group,
and the state looks like that of a run on a GPU with Transformer Engine.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from mbridge_model.patches import Patch, PatchTable
from torch import Tensor

# Bias corrections 1 - beta**step are exactly 1 from here on, in float64 and so in the fused kernels.
_NO_BIAS_CORRECTION_STEP = 1e9


class Adam(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019, algorithm 2), or Adam with L2 regularization (Kingma and Ba 2015).

    One call of torch's fused kernel for each device and dtype, on CPU and CUDA; equals `torch.optim.AdamW(fused=True)`
    bit for bit.
    State of a parameter: `exp_avg` and `exp_avg_sq`, of its shape and dtype. State of a group: `step`, an int.

    Args:
        params: parameters or groups of them, of a floating dtype.
        lr: learning rate, a float.
        bias_correction: divide the moments by 1 - beta**step.
        betas: decay rates of the first and second moment.
        eps: added to the root of the second moment.
        adam_w_mode: decay weights directly; if False, add `weight_decay` times the weight to the gradient.
        weight_decay: coefficient of the decay.
        capturable: must be False; capturing the step in a CUDA graph needs Transformer Engine.

    Raises:
        ValueError: a hyper-parameter is out of its range, or `capturable` is True.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        capturable: bool = False,
    ) -> None:
        if capturable:
            raise ValueError(
                "capturable is True: an optimizer step in a CUDA graph needs Transformer Engine's FusedAdam"
            )
        if not (0.0 <= betas[0] < 1.0 and 0.0 <= betas[1] < 1.0):
            raise ValueError(f"betas are {betas}: both must be at least 0 and less than 1")
        for name, value in {"lr": lr, "eps": eps, "weight_decay": weight_decay}.items():
            if value < 0.0:
                raise ValueError(f"{name} is {value}: it must not be negative")
        self.adam_w_mode = adam_w_mode
        defaults = {
            "lr": lr,
            "bias_correction": bias_correction,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient, and return what `closure`, if given, returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        update = torch._fused_adamw_ if self.adam_w_mode else torch._fused_adam_
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            beta1, beta2 = group["betas"]
            for batch in self._batches(group["params"]):
                parameters, gradients, exp_avgs, exp_avg_sqs = batch
                step = group["step"] if group["bias_correction"] else _NO_BIAS_CORRECTION_STEP
                step_tensor = torch.tensor(float(step), device=parameters[0].device)  # float32, as the kernels want it
                update(
                    parameters,
                    gradients,
                    exp_avgs,
                    exp_avg_sqs,
                    [],
                    [step_tensor] * len(parameters),
                    amsgrad=False,
                    lr=group["lr"],
                    beta1=beta1,
                    beta2=beta2,
                    weight_decay=group["weight_decay"],
                    eps=group["eps"],
                    maximize=False,
                )
        return loss

    def _batches(self, parameters: list[Tensor]) -> Iterable[tuple[list[Tensor], ...]]:
        """Return parameters with a gradient, gradients and moments as four lists for each device and dtype."""
        batches: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], ...]] = defaultdict(
            lambda: ([], [], [], [])
        )
        for parameter in parameters:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            row = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
            for tensors, tensor in zip(batches[parameter.device, parameter.dtype], row, strict=True):
                tensors.append(tensor)
        return batches.values()


_NO_ADAM = "it holds torch's AdamW where neither Transformer Engine nor Apex is installed"
_NO_STATE = "it takes the state of this Adam for that of torch's AdamW"
ADAM = PatchTable(
    "train with Adam that resumes",
    (
        Patch(target="megatron.core.optimizer:Adam", reason=_NO_ADAM, replacement=Adam),
        Patch(target="megatron.core.optimizer:USING_PYTORCH_OPTIMIZER", reason=_NO_STATE, replacement=False),
        Patch(target="megatron.core.optimizer.distrib_optimizer:Adam", reason=_NO_ADAM, replacement=Adam),
        Patch(target="megatron.core.optimizer.distrib_optimizer:HAVE_APEX_OR_TE", reason=_NO_STATE, replacement=True),
        # Of the two kinds of FusedAdam that keep the step in the group, Apex's has no other abilities than this one.
        Patch(
            target="megatron.core.optimizer.distrib_optimizer:USING_APEX_OPTIMIZER", reason=_NO_STATE, replacement=True
        ),
    ),
)


def enable_adam() -> None:
    """Make Megatron-Core build this Adam where it found neither Transformer Engine's nor Apex's. Idempotent.

    Call it before an optimizer is built, on CPUs and GPUs alike.

    Raises:
        PatchError: a name that must be set is not in the installed megatron-core; nothing has been set then.
    """
    from megatron.core import optimizer

    if getattr(optimizer, "USING_PYTORCH_OPTIMIZER", True):
        ADAM.apply()
