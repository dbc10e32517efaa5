"""Megatron-Core without a GPU: the table of everything that `enable_cpu` changes, each entry with its reason.

Found by reading megatron-core 0.19.2 for every use of CUDA on the paths of a model's life: build, forward and backward
(tensor, sequence, pipeline and expert parallel), DDP and the distributed optimizer, clipping, loss scaling,
recomputation, checkpoints. `torch.device("cuda")` that stays in other places (CUDA graphs, FP8, Megatron-FSDP,
inference) raises torch's own error when it is reached.
"""

import torch

from mbridge_model.patches.cpu import megatron_equivalents, torch_equivalents
from mbridge_model.patches.patch import Patch, PatchTable
from mbridge_model.patches.quiet import quiet

_RAISES = "it raises where there is no GPU"
_DEVICE = {"cuda": "cpu"}
_FLOAT = {"torch.cuda.FloatTensor": "torch.FloatTensor"}
_HALVES = {"torch.cuda.HalfTensor": "torch.HalfTensor", "torch.cuda.BFloat16Tensor": "torch.BFloat16Tensor"}
_TYPE_NAMES = "it tells parameters apart by the type name of CUDA tensors"

TORCH_PATCHES: tuple[Patch, ...] = (
    Patch(target="torch.cuda:current_device", reason=_RAISES, replacement=torch_equivalents.current_device),
    Patch(target="torch.cuda:set_device", reason=_RAISES, replacement=torch_equivalents.set_device),
    Patch(target="torch.cuda:synchronize", reason=_RAISES, replacement=torch_equivalents.synchronize),
    Patch(target="torch.cuda:Stream", reason=_RAISES, replacement=torch_equivalents.Stream),
    Patch(target="torch.cuda:Event", reason="recording it raises", replacement=torch_equivalents.Event),
    Patch(target="torch.cuda:current_stream", reason=_RAISES, replacement=torch_equivalents.current_stream),
    Patch(target="torch.cuda:default_stream", reason=_RAISES, replacement=torch_equivalents.default_stream),
    Patch(
        target="torch.cuda:set_stream",
        reason="it takes the streams of CUDA only",
        replacement=torch_equivalents.set_stream,
    ),
    Patch(target="torch.cuda:stream", reason="it takes the streams of CUDA only", replacement=torch_equivalents.stream),
    Patch(
        target="torch.cuda:is_current_stream_capturing",
        reason="it raises where there is no GPU, and transformers asks for it when it makes attention masks",
        replacement=torch_equivalents.is_current_stream_capturing,
    ),
    Patch(
        target="torch.cuda:manual_seed",
        reason="it waits for a GPU to seed, so a state read after it would be another",
        replacement=torch_equivalents.manual_seed,
    ),
    Patch(target="torch.cuda:get_rng_state", reason=_RAISES, replacement=torch_equivalents.get_rng_state),
    Patch(
        target="torch.cuda:set_rng_state",
        reason="it waits for a GPU whose state it would set",
        replacement=torch_equivalents.set_rng_state,
    ),
    Patch(target="torch.cuda:initial_seed", reason=_RAISES, replacement=torch_equivalents.initial_seed),
    Patch(
        target="torch.cuda:memory_stats",
        reason="it has no keys where there is no GPU",
        replacement=torch_equivalents.memory_stats,
    ),
    Patch(target="torch.cuda:mem_get_info", reason=_RAISES, replacement=torch_equivalents.mem_get_info),
    Patch(target="torch.cuda:reset_peak_memory_stats", reason=_RAISES, replacement=torch_equivalents.nothing),
    Patch(
        target="torch.cuda.nvtx:range_push",
        reason="it raises in builds of torch without CUDA",
        replacement=torch_equivalents.nothing,
    ),
    Patch(
        target="torch.cuda.nvtx:range_pop",
        reason="it raises in builds of torch without CUDA",
        replacement=torch_equivalents.nothing,
    ),
    Patch(target="torch:Tensor.cuda", reason=_RAISES, replacement=torch_equivalents.stay),
    Patch(target="torch:Tensor.pin_memory", reason=_RAISES, replacement=torch_equivalents.stay),
    Patch(
        target="torch:Tensor.record_stream",
        reason="it takes the streams of CUDA only",
        replacement=torch_equivalents.nothing,
    ),
    Patch(target="torch.nn:Module.cuda", reason=_RAISES, replacement=torch_equivalents.stay),
    Patch(
        target="torch._dynamo.eval_frame:_stance",
        reason="compiling needs a C++ compiler and takes longer than the small models that one trains on a CPU",
        wrapper=lambda stance: type(stance)("force_eager"),
    ),
)

MEGATRON_PATCHES: tuple[Patch, ...] = (
    # Random numbers
    Patch(
        target="megatron.core.tensor_parallel.random:_get_cuda_rng_state",
        reason="it reads a GPU's generator",
        replacement=megatron_equivalents.get_rng_state,
    ),
    Patch(
        target="megatron.core.tensor_parallel.random:_set_cuda_rng_state",
        reason="it writes a GPU's generator",
        replacement=megatron_equivalents.set_rng_state,
    ),
    Patch(
        target="megatron.core.tensor_parallel.random:CudaRNGStatesTracker.fork",
        reason="it warns whenever the CPU's generator advances in the block, which here is what the block is for",
        names={"warning": "debug"},
    ),
    # Forward and backward
    Patch(
        target="megatron.core.transformer.utils:get_default_causal_mask",
        reason="it makes the mask on a GPU",
        constants=_DEVICE,
    ),
    Patch(
        target="megatron.core.transformer.utils:get_sliding_window_causal_mask",
        reason="it makes the mask on a GPU",
        constants=_DEVICE,
    ),
    Patch(
        target="megatron.core.models.common.embeddings.rope_utils:get_pos_emb_on_this_cp_rank",
        reason="it pins memory, which raises where there is no GPU",
        constants={True: False},
    ),
    Patch(
        target="megatron.core.tensor_parallel.data:_build_key_size_numel_dictionaries",
        reason="it broadcasts the sizes of a batch from a GPU",
        constants=_DEVICE,
    ),
    Patch(
        target="megatron.core.pipeline_parallel.schedules:forward_step",
        reason="it autocasts for a GPU",
        constants=_DEVICE,
    ),
    Patch(
        target="megatron.core.pipeline_parallel.schedules:forward_backward_no_pipelining",
        reason="it counts tokens on a GPU",
        constants=_DEVICE,
    ),
    Patch(
        target="megatron.core.pipeline_parallel.schedules:forward_backward_pipelining_without_interleaving",
        reason="it counts tokens on a GPU",
        constants=_DEVICE,
    ),
    Patch(
        target="megatron.core.pipeline_parallel.schedules:forward_backward_pipelining_with_interleaving",
        reason="it counts tokens on a GPU",
        constants=_DEVICE,
    ),
    Patch(
        target="megatron.core.pipeline_parallel.p2p_communication:P2PCommunicator._communicate",
        reason="gloo sends contiguous tensors only",
        wrapper=megatron_equivalents.send_contiguous,
    ),
    Patch(
        target="megatron.core.transformer.moe.moe_utils:maybe_move_tensor_to_cpu",
        reason="it gives the all-to-all its split sizes as numbers only if they come from a GPU",
        names={"is_cuda": "is_cpu"},
    ),
    # Gradients
    Patch(target="megatron.core.utils:local_multi_tensor_l2_norm", reason="it returns a GPU tensor", constants=_DEVICE),
    Patch(
        target="megatron.core.optimizer.clip_grads:get_grad_norm_fp32",
        reason="it reduces the norm on a GPU",
        constants=_DEVICE,
    ),
    Patch(
        target="megatron.core.optimizer.clip_grads:clip_grad_by_total_norm_fp32",
        reason="it asserts that gradients are CUDA tensors and makes a buffer on a GPU",
        constants=_DEVICE | _FLOAT,
    ),
    Patch(
        target="megatron.core.optimizer.clip_grads:count_zeros_fp32",
        reason="it counts zeros on a GPU",
        constants=_DEVICE,
    ),
    # Optimizer
    Patch(
        target="megatron.core.optimizer.grad_scaler:MegatronGradScaler.__init__",
        reason="it keeps the loss scale on a GPU",
        constants=_DEVICE,
    ),
    Patch(
        target="megatron.core.optimizer.grad_scaler:DynamicGradScaler.__init__",
        reason="it keeps growth and backoff factors on a GPU",
        constants=_DEVICE,
    ),
    Patch(
        target="megatron.core.optimizer.optimizer:MegatronOptimizer.has_grad_norm_group",
        reason="it reduces a flag on a GPU",
        constants=_DEVICE,
    ),
    Patch(
        target="megatron.core.optimizer.optimizer:MixedPrecisionOptimizer.__init__",
        reason="it keeps the unit scale and the overflow flag on a GPU",
        constants=_DEVICE,
    ),
    Patch(
        target="megatron.core.optimizer.optimizer:Float16OptimizerWithFloat16Params.__init__",
        reason=_TYPE_NAMES,
        constants=_HALVES | _FLOAT,
    ),
    Patch(
        target="megatron.core.optimizer.optimizer:FP32Optimizer.__init__",
        reason="it keeps the loss scale on a GPU",
        constants=_DEVICE,
    ),
    Patch(
        target="megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.__init__",
        reason=_TYPE_NAMES,
        constants=_HALVES,
    ),
    Patch(
        target="megatron.core.optimizer.distrib_optimizer:DistributedOptimizer._build_model_and_main_param_groups",
        reason=_TYPE_NAMES,
        constants=_HALVES | _FLOAT,
    ),
    # Checkpoints
    Patch(
        target="megatron.core.dist_checkpointing.exchange_utils:_get_empty_tensor_for_exchange",
        reason="ranks exchange what they loaded between GPUs",
        constants=_DEVICE,
    ),
    Patch(
        target="megatron.core.dist_checkpointing.strategies.state_dict_saver:verify_global_md_reuse",
        reason="it reduces a flag on a GPU",
        constants=_DEVICE,
    ),
)

CPU = PatchTable("run without a GPU", TORCH_PATCHES + MEGATRON_PATCHES)


def enable_cpu() -> None:
    """Make Megatron-Core run on the CPU of this process; a no-op where `torch.cuda.is_available()`.

    Call it before or after megatron is imported, but before a model or an optimizer is built. It imports
    megatron.core, since what it changes lies there. A second call is a no-op; `CPU.undo()` puts everything back.
    Process groups must be gloo's.

    Functions handed to `torch.compile` run eagerly, Megatron-Core's and all others of this process.

    Raises:
        PatchError: something that must be changed is no longer there, so this version of torch or megatron-core is
            not supported; nothing has been changed then. The message names every such target and the versions.
    """
    if CPU.is_applied or torch.cuda.is_available():
        return
    with quiet():
        import megatron.core  # noqa: F401

        CPU.apply()
