"""Derive from a config what its memory estimate depends on."""

from typing import Any

from mbridge_config.facts.model import HFFacts
from mbridge_config.plan.activations import Kernels
from mbridge_config.plan.memory import Generation, MicroBatch, Recompute, Training
from mbridge_config.schema.sft import SFTConfig


def training_setup(
    config: Any, facts: HFFacts, stage_sizes: tuple[int, ...], data_parallel: int, world_size: int, micro_batches: int
) -> Training:
    """Return the setup with the largest micro-batch that `config` allows.

    In SFT of a vision-language model every token is assumed to belong to an image, which is the upper bound. With
    `backend: auto` the layers are assumed to be plain torch's, which keep more than Transformer Engine's.
    """
    model, is_sft = config.actor.model, isinstance(config, SFTConfig)
    dynamic, tensor = config.runner.enable_dynamic_batch_size, model.tensor_model_parallel_size
    # Megatron-Core trains experts under tensor parallelism only with sequence parallelism, so it is switched on.
    sequence_parallel = tensor > 1 and (model.sequence_parallel or bool(facts.num_experts))
    sequences = -(-config.actor.global_batch_size // data_parallel) if dynamic else config.actor.micro_batch_size
    tokens = sequences * config.runner.seq_length
    if dynamic:
        tokens = min(tokens, config.runner.max_tokens_per_mbs)
    patches = tokens * facts.vision.patches_per_token if is_sft and facts.vision is not None else 0
    return Training(
        facts=facts,
        stage_sizes=stage_sizes,
        kernels=Kernels(
            backend="te" if model.backend == "te" else "torch",
            number_bytes=4 if model.precision == "fp32" else 2,
            packed=dynamic,
            tensor_parallel=tensor,
            sequence_parallel=sequence_parallel,
        ),
        micro_batch=MicroBatch(tokens=tokens, patches=patches),
        micro_batches=micro_batches,
        data_parallel=data_parallel,
        distributed_optimizer=config.actor.optim.use_distributed_optimizer,
        recompute=_recompute(model),
        trains_language=not (is_sft and model.freeze_language_model),
        trains_tower=not (is_sft and model.freeze_vision_model),
        trains_projection=not (is_sft and model.freeze_vision_projection),
        generation=None if is_sft else _generation(config, world_size),
        keeps_reference=not is_sft and config.algorithm.kl_beta > 0,
        offloads=() if is_sft else _offloads(config.actor),
    )


def _offloads(actor: Any) -> tuple[str, ...]:
    chosen = {"weights": actor.offload_weight, "gradients": actor.offload_grad, "optimizer": actor.offload_optimizer}
    return tuple(part for part, is_offloaded in chosen.items() if is_offloaded)


def _recompute(model: Any) -> Recompute | None:
    """Recomputing attention alone saves next to nothing: flash attention keeps no scores to begin with."""
    if model.recompute_granularity != "full":
        return None
    number = model.recompute_num_layers or 1
    return Recompute(layers=number) if model.recompute_method == "block" else Recompute(group=number)


def _generation(config: Any, world_size: int) -> Generation:
    """Every rank generates an equal share of the answers, on a copy of the whole model."""
    answers = -(-config.data.rollout_batch_size * config.algorithm.group_size // world_size)
    prompt = config.data.max_prompt_length
    return Generation(
        sequences=min(config.rollout.max_running_requests, answers),
        prompt_tokens=prompt,
        tokens=prompt + config.algorithm.sampling_params.max_new_tokens,
    )
