"""Megatron-Core without a GPU: the table of everything that `enable_cpu` changes, each entry with its reason.

Found by reading megatron-core 0.19.2 for every use of CUDA in training and checkpoints. `torch.device("cuda")` that
stays in other places (CUDA graphs, FP8, Megatron-FSDP, inference) raises torch's own error when it is reached.
"""

import functools
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from mbridge_model.patches.cpu import torch_equivalents as equivalents
from mbridge_model.patches.patch import Patch, PatchTable
from mbridge_model.patches.quiet import quiet


def _send_contiguous(communicate: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `P2PCommunicator._communicate` to send contiguous tensors."""

    @functools.wraps(communicate)
    def communicate_contiguous(self: Any, **kwargs: Any) -> Any:
        for name in ("tensor_send_next", "tensor_send_prev"):
            if kwargs[name] is not None:
                kwargs[name] = kwargs[name].contiguous()
        return communicate(self, **kwargs)

    return communicate_contiguous


_RAISES = "it raises where there is no GPU"
_STREAMS = "it accepts CUDA streams only"
_SEEDS = "it waits for a GPU whose generator it would set"
_NVTX = "it raises in builds of torch without CUDA"

# What becomes of functions and classes, and the reason. Dynamo wants another object for each function that it knows.
_REPLACED: tuple[tuple[str, Any, str], ...] = (
    # On a GPU the device is an int; Megatron passes either straight to `device=`.
    ("torch.cuda:current_device", lambda: torch.device("cpu"), _RAISES),
    ("torch.cuda:set_device", lambda device: None, _RAISES),
    ("torch.cuda:synchronize", lambda device=None: None, _RAISES),
    ("torch.cuda:Stream", equivalents.Stream, _RAISES),
    ("torch.cuda:Event", equivalents.Event, "recording it raises"),
    ("torch.cuda:current_stream", equivalents.current_stream, _RAISES),
    ("torch.cuda:default_stream", equivalents.default_stream, _RAISES),
    ("torch.cuda:set_stream", equivalents.set_stream, _STREAMS),
    ("torch.cuda:stream", equivalents.stream, _STREAMS),
    ("torch.cuda:is_current_stream_capturing", lambda: False, "it raises, and transformers calls it for masks"),
    ("torch.cuda:manual_seed", equivalents.manual_seed, _SEEDS),
    ("torch.cuda:get_rng_state", equivalents.get_rng_state, _RAISES),
    ("torch.cuda:set_rng_state", equivalents.set_rng_state, _SEEDS),
    ("torch.cuda:initial_seed", lambda: torch.initial_seed(), _RAISES),
    ("torch.cuda:memory_stats", lambda device=None: defaultdict(int), "it has no keys where there is no GPU"),
    ("torch.cuda:mem_get_info", lambda device=None: (0, 0), _RAISES),
    ("torch.cuda:reset_peak_memory_stats", equivalents.nothing, _RAISES),
    ("torch.cuda.nvtx:range_push", equivalents.nothing, _NVTX),
    ("torch.cuda.nvtx:range_pop", equivalents.nothing, _NVTX),
    ("torch:Tensor.cuda", equivalents.stay, _RAISES),
    ("torch:Tensor.pin_memory", equivalents.stay, _RAISES),
    ("torch:Tensor.record_stream", equivalents.nothing, _STREAMS),
    ("torch.nn:Module.cuda", equivalents.stay, _RAISES),
    ("megatron.core.tensor_parallel.random:_get_cuda_rng_state", equivalents.get_rng_state, _RAISES),
    ("megatron.core.tensor_parallel.random:_set_cuda_rng_state", equivalents.set_rng_state, _RAISES),
)

_DEVICE = {"cuda": "cpu"}
_FLOAT = {"torch.cuda.FloatTensor": "torch.FloatTensor"}
_HALVES = {"torch.cuda.HalfTensor": "torch.HalfTensor", "torch.cuda.BFloat16Tensor": "torch.BFloat16Tensor"}
_COUNTS = "it counts tokens on a GPU"
_MASKS = "it makes the mask on a GPU"
_TYPES = "it tells parameters apart by the type names of CUDA tensors"

# Functions of megatron.core with constants that name a GPU, what these become, and the reason.
_CONSTANTS: tuple[tuple[str, dict[Any, Any], str], ...] = (
    # Forward and backward
    ("transformer.utils:get_default_causal_mask", _DEVICE, _MASKS),
    ("transformer.utils:get_sliding_window_causal_mask", _DEVICE, _MASKS),
    ("models.common.embeddings.rope_utils:get_pos_emb_on_this_cp_rank", {True: False}, "it pins memory"),
    ("tensor_parallel.data:_build_key_size_numel_dictionaries", _DEVICE, "it broadcasts sizes from a GPU"),
    ("pipeline_parallel.schedules:forward_step", _DEVICE, "it autocasts for a GPU"),
    ("pipeline_parallel.schedules:forward_backward_no_pipelining", _DEVICE, _COUNTS),
    ("pipeline_parallel.schedules:forward_backward_pipelining_without_interleaving", _DEVICE, _COUNTS),
    ("pipeline_parallel.schedules:forward_backward_pipelining_with_interleaving", _DEVICE, _COUNTS),
    # Gradients
    ("utils:local_multi_tensor_l2_norm", _DEVICE, "it returns a GPU tensor"),
    ("optimizer.clip_grads:get_grad_norm_fp32", _DEVICE, "it reduces the norm on a GPU"),
    ("optimizer.clip_grads:clip_grad_by_total_norm_fp32", _DEVICE | _FLOAT, "it asserts that gradients are on a GPU"),
    ("optimizer.clip_grads:count_zeros_fp32", _DEVICE, "it counts zeros on a GPU"),
    # Optimizer
    ("optimizer.grad_scaler:MegatronGradScaler.__init__", _DEVICE, "it keeps the loss scale on a GPU"),
    ("optimizer.grad_scaler:DynamicGradScaler.__init__", _DEVICE, "it keeps growth and backoff factors on a GPU"),
    ("optimizer.optimizer:MegatronOptimizer.has_grad_norm_group", _DEVICE, "it reduces a flag on a GPU"),
    ("optimizer.optimizer:MixedPrecisionOptimizer.__init__", _DEVICE, "it keeps the overflow flag on a GPU"),
    ("optimizer.optimizer:Float16OptimizerWithFloat16Params.__init__", _HALVES | _FLOAT, _TYPES),
    ("optimizer.optimizer:FP32Optimizer.__init__", _DEVICE, "it keeps the loss scale on a GPU"),
    ("optimizer.distrib_optimizer:DistributedOptimizer.__init__", _HALVES, _TYPES),
    ("optimizer.distrib_optimizer:DistributedOptimizer._build_model_and_main_param_groups", _HALVES | _FLOAT, _TYPES),
    # Checkpoints
    ("dist_checkpointing.exchange_utils:_get_empty_tensor_for_exchange", _DEVICE, "GPUs exchange loaded tensors"),
    ("dist_checkpointing.strategies.state_dict_saver:verify_global_md_reuse", _DEVICE, "it reduces a flag on a GPU"),
)

CPU = PatchTable(
    "run without a GPU",
    *(Patch(target=target, replacement=replacement, reason=reason) for target, replacement, reason in _REPLACED),
    *(
        Patch(target=f"megatron.core.{target}", reason=reason, constants=constants)
        for target, constants, reason in _CONSTANTS
    ),
    Patch(
        target="torch._dynamo.eval_frame:_stance",
        reason="compiling needs a C++ compiler and takes longer than small models take to train on a CPU",
        wrapper=lambda stance: type(stance)("force_eager"),
    ),
    Patch(
        target="megatron.core.tensor_parallel.random:CudaRNGStatesTracker.fork",
        reason="it warns whenever the CPU's generator advances in the block, which is the block's purpose here",
        names={"warning": "debug"},
    ),
    Patch(
        target="megatron.core.pipeline_parallel.p2p_communication:P2PCommunicator._communicate",
        reason="gloo sends contiguous tensors only",
        wrapper=_send_contiguous,
    ),
    Patch(
        target="megatron.core.transformer.moe.moe_utils:maybe_move_tensor_to_cpu",
        reason="it gives the all-to-all its split sizes as numbers only if they come from a GPU",
        names={"is_cuda": "is_cpu"},
    ),
)


def enable_cpu() -> None:
    """Make Megatron-Core run on the CPU of this process; a no-op where `torch.cuda.is_available()`.

    Call it before a model or an optimizer is built. It imports megatron.core. A second call is a no-op; `CPU.undo()`
    puts everything back. Process groups must be gloo's. Functions handed to `torch.compile` run eagerly.

    Raises:
        PatchError: this version of torch or megatron-core is not supported; see `PatchTable.apply`.
    """
    if CPU.is_applied or torch.cuda.is_available():
        return
    with quiet():
        import megatron.core  # noqa: F401

        CPU.apply()
