"""Build an engine from the `actor` and `runner` sections of a config."""

from pathlib import Path
from typing import Any

import torch
from mbridge_ckpt import Retention
from mbridge_config.run.steps import decay_steps, warmup_steps
from mbridge_config.schema.actor import ActorConfig
from mbridge_config.schema.keys import filled
from mbridge_config.schema.runner import RunnerConfig
from mbridge_model import Freeze, Parallel, load

from mbridge_train.checkpoint.load import load_start
from mbridge_train.checkpoint.run_saver import SaveSettings
from mbridge_train.engine.engine import Engine, MicroBatching
from mbridge_train.engine.micro_batches import round_up
from mbridge_train.optim.optimizer import OptimizerSettings
from mbridge_train.optim.schedule import Schedule

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_engine(
    actor: ActorConfig,
    runner: RunnerConfig,
    model_directory: Path,
    *,
    optimizer_steps: int | None,
    freeze: Freeze | None = None,
) -> Engine:
    """Load the model under the layout of `actor.model` and build its optimizer. Collective over all ranks.

    The weights come from the HuggingFace `model_directory` with `actor.megatron.use_hf_ckpt`, else from
    `actor.model.megatron_checkpoint`. Without either they are random, for a run that is resumed.

    Args:
        optimizer_steps: length of the run, for a learning-rate schedule without a length. None: an engine that only
            evaluates.
        freeze: parts of a vision-language model that are not trained.
    """
    model, handle = load(
        model_directory,
        Parallel(
            tensor=actor.model.tensor_model_parallel_size,
            pipeline=actor.model.pipeline_model_parallel_size,
            sequence=actor.model.sequence_parallel,
        ),
        _overrides(actor),
        actor.model.backend,
        dtype=DTYPES[actor.model.precision],
        weights=actor.megatron.use_hf_ckpt,
        seed=actor.seed,
        trust_remote_code=actor.tokenizer.trust_remote_code,
        freeze=freeze,
    )
    engine = Engine(
        model,
        handle,
        micro_batching=_micro_batching(actor, runner, splits_sequences=handle.config.sequence_parallel),
        optimizer=None if optimizer_steps is None else optimizer_settings(actor, optimizer_steps=optimizer_steps),
    )
    if not actor.megatron.use_hf_ckpt and actor.model.megatron_checkpoint:
        load_start(engine, Path(actor.model.megatron_checkpoint).expanduser())
    return engine


def optimizer_settings(actor: ActorConfig, *, optimizer_steps: int) -> OptimizerSettings:
    """Return the settings of `actor.optim` and `actor.lr_sched`."""
    return OptimizerSettings(
        schedule=_schedule(actor, optimizer_steps),
        betas=(actor.optim.adam_beta1, actor.optim.adam_beta2),
        epsilon=actor.optim.adam_eps,
        clip_grad=actor.optim.clip_grad,
        use_distributed_optimizer=actor.optim.use_distributed_optimizer,
        overlap_grad_reduce=actor.optim.overlap_grad_reduce,
        overlap_param_gather=actor.optim.overlap_param_gather,
        bucket_size=actor.megatron.ddp_bucket_size,
        loss_scale=actor.optim.loss_scale,
        initial_loss_scale=actor.optim.initial_loss_scale,
        min_loss_scale=actor.optim.min_loss_scale,
        loss_scale_window=actor.optim.loss_scale_window,
    )


def save_settings(actor: ActorConfig, runner: RunnerConfig) -> SaveSettings:
    """Return the settings of `runner.save_interval`, `runner.checkpoint` and `actor.megatron`."""
    settings = runner.checkpoint
    is_distributed = actor.megatron.use_dist_ckpt or actor.megatron.ckpt_format == "torch_dist"
    return SaveSettings(
        interval=runner.save_interval,
        hf_export_every=settings.hf_export_every,
        max_shard_size=settings.max_shard_size,
        file_format="torch_dist" if is_distributed else "torch",
        retention=Retention(
            last=settings.keep_last,
            every=settings.keep_every,
            best=settings.keep_best,
            metric=settings.keep_best_metric if settings.keep_best else None,
            best_is=settings.keep_best_is,
        ),
        in_background=settings.async_save,
        when_busy=settings.when_busy,
    )


def _schedule(actor: ActorConfig, optimizer_steps: int) -> Schedule:
    settings = actor.lr_sched
    total = decay_steps(settings, optimizer_steps)
    return Schedule(
        max_lr=filled(settings.max_lr),
        min_lr=filled(settings.min_lr),
        init_lr=settings.lr_warmup_init,
        warmup_steps=warmup_steps(settings, total),
        decay_steps=total,
        decay_style=settings.lr_decay_style,
        wsd_decay_steps=settings.lr_wsd_decay_iters or 0,
        wsd_decay_style=settings.lr_wsd_decay_style,
        # A rule requires the end value to be equal, so the weight decay is constant.
        weight_decay=filled(settings.start_weight_decay),
    )


def _micro_batching(actor: ActorConfig, runner: RunnerConfig, *, splits_sequences: bool) -> MicroBatching:
    """Return the settings; the model decides on `splits_sequences`, because experts force sequence parallelism."""
    if runner.enable_dynamic_batch_size:
        # Sequence parallelism pads each sequence, and the longest one must fit with its padding.
        multiple = actor.model.tensor_model_parallel_size if splits_sequences else 1
        return MicroBatching(token_budget=round_up(filled(runner.max_tokens_per_mbs), multiple))
    return MicroBatching(micro_batch_size=actor.micro_batch_size)


def _overrides(actor: ActorConfig) -> dict[str, Any]:
    """Return the fields of the provider that the user sets; fields left at null keep the model's values."""
    model = actor.model
    values: dict[str, Any] = {
        # The loss weights include the normalization over the global batch, so gradients are summed.
        "calculate_per_token_loss": True,
        "gradient_accumulation_fusion": True,
        "attention_dropout": model.attention_dropout,
        "hidden_dropout": model.hidden_dropout,
    }
    names = ["num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"]
    if model.recompute_granularity is not None:
        names += ["recompute_granularity", "recompute_method", "recompute_num_layers"]
    return values | {name: value for name in names if (value := getattr(model, name)) is not None}
