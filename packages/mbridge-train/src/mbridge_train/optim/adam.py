"""Adam for Megatron-Core where neither Transformer Engine nor Apex is installed, with the interface of their FusedAdam.

Megatron-Core falls back to torch's AdamW, which keeps a `step` tensor for every parameter. When `DistributedOptimizer`
loads a checkpoint, it makes all parameters share one such tensor, which each of them increments: the resumed run
silently uses wrong bias corrections. FusedAdam's step is an int of the parameter group, so the state is also that of a
run with Transformer Engine.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from mbridge_model.patches import Patch, PatchTable
from torch import Tensor


class Adam(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019, algorithm 2), or Adam with L2 regularization (Kingma and Ba 2015).

    Calls torch's fused kernel once for each device and dtype, on CPU and CUDA; equals `torch.optim.AdamW(fused=True)`
    bit for bit. State of a parameter: `exp_avg` and `exp_avg_sq`, of its shape and dtype. State of a group: `step`, an
    int.

    Args:
        adam_w_mode: decay weights directly; if False, add `weight_decay` times the weight to the gradient.
        capturable: must be False; capturing the step in a CUDA graph needs Transformer Engine.
        params, lr, betas, eps, weight_decay: as of `torch.optim.AdamW`.

    Raises:
        ValueError: a hyper-parameter is out of its range, or `capturable` is True.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
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
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override] # Megatron-Core passes no closure
        """Update every parameter that has a gradient."""
        update = torch._fused_adamw_ if self.adam_w_mode else torch._fused_adam_
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            beta1, beta2 = group["betas"]
            for parameters, gradients, exp_avgs, exp_avg_sqs in self._batches(group["params"]):
                step = torch.tensor(float(group["step"]), device=parameters[0].device)  # the kernels need float32
                update(
                    parameters,
                    gradients,
                    exp_avgs,
                    exp_avg_sqs,
                    [],
                    [step] * len(parameters),
                    amsgrad=False,
                    lr=group["lr"],
                    beta1=beta1,
                    beta2=beta2,
                    weight_decay=group["weight_decay"],
                    eps=group["eps"],
                    maximize=False,
                )

    def _batches(self, parameters: list[Tensor]) -> Iterable[tuple[list[Tensor], ...]]:
        """Return parameters with a gradient, gradients and moments as four lists for each device and dtype."""
        batches: defaultdict[Any, tuple[list[Tensor], ...]] = defaultdict(lambda: ([], [], [], []))
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
    Patch(target="megatron.core.optimizer:Adam", reason=_NO_ADAM, replacement=Adam),
    Patch(target="megatron.core.optimizer:USING_PYTORCH_OPTIMIZER", reason=_NO_STATE, replacement=False),
    Patch(target="megatron.core.optimizer.distrib_optimizer:Adam", reason=_NO_ADAM, replacement=Adam),
    Patch(target="megatron.core.optimizer.distrib_optimizer:HAVE_APEX_OR_TE", reason=_NO_STATE, replacement=True),
    # Of the two FusedAdams that keep the step in the group, Apex's has no features that this class lacks.
    Patch(target="megatron.core.optimizer.distrib_optimizer:USING_APEX_OPTIMIZER", reason=_NO_STATE, replacement=True),
)


def enable_adam() -> None:
    """Make Megatron-Core build this Adam if it found neither Transformer Engine's nor Apex's. Idempotent.

    Call it before an optimizer is built, on CPUs and GPUs alike. Raises `PatchError` if the installed megatron-core
    lacks a name to patch; then none is patched.
    """
    from megatron.core import optimizer

    if getattr(optimizer, "USING_PYTORCH_OPTIMIZER", True):
        ADAM.apply()
