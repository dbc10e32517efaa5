"""Training runs of tiny models that the tests of checkpoints stop, resume and compare."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from mbridge_model import Freeze, Parallel
from mbridge_train.engine.batch import Sample, aggregation_weights

from testing.tiny_models import VOCAB_SIZE

LENGTHS = (17, 2, 9, 30, 5)
LEARNING_RATE, WEIGHT_DECAY, BETAS = 3e-3, 0.1, (0.9, 0.95)

PLAIN = {"use_distributed_optimizer": False}
SHARDED = {"use_distributed_optimizer": True}
OVERLAPPED = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}


def make_batch(step: int) -> list[Sample]:
    """Return a global batch to memorize, a function of the step alone."""
    generator = torch.Generator().manual_seed(step)
    weights = aggregation_weights([torch.arange(length) > 0 for length in LENGTHS], "token-mean")
    return [
        Sample(tokens=torch.randint(VOCAB_SIZE, (length,), generator=generator), weights=weight)
        for length, weight in zip(LENGTHS, weights, strict=True)
    ]


def policy_samples(
    masks: list[torch.Tensor], generator: torch.Generator, aggregation: Any = "token-mean", *, spread: float = 1.0
) -> list[Sample]:
    """Return samples with all fields of a policy loss: random tokens, advantages, and log probabilities around -5.

    Args:
        masks: bool [length] for each sample: True for trained tokens.
        spread: standard deviation of the log probabilities.
    """

    def noise(length: int) -> torch.Tensor:
        return torch.randn(length, generator=generator)

    return [
        Sample(
            tokens=torch.randint(VOCAB_SIZE, (len(mask),), generator=generator),
            weights=weight,
            fields={
                "advantages": noise(len(mask)),
                "old_logprobs": noise(len(mask)) * spread - 5.0,
                "reference_logprobs": noise(len(mask)) * spread - 5.0,
            },
        )
        for mask, weight in zip(masks, aggregation_weights(masks, aggregation), strict=True)
    ]


def build(
    directory: Path,
    parallel: Parallel,
    optimizer: dict[str, Any],
    *,
    overrides: dict[str, float] | None = None,
    dtype: str = "float32",
    seed: int = 1234,
    weights: bool = True,
    batching: dict[str, Any] | None = None,
    frozen: str | None = None,
    freeze: Freeze | None = None,
    backend: Any = "auto",
) -> Any:
    """Return a new engine, independent of earlier ones; parameters with `frozen` in their name are not trained."""
    from mbridge_model import load
    from mbridge_train.engine.engine import Engine, MicroBatching
    from mbridge_train.optim.optimizer import OptimizerSettings
    from mbridge_train.optim.schedule import Schedule
    from mbridge_train.run.process_group import seed_all
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    seed_all(seed)
    settings = OptimizerSettings(
        schedule=Schedule(
            max_lr=LEARNING_RATE,
            warmup_steps=4,
            decay_steps=8,
            min_lr=1e-4,
            decay_style="cosine",
            weight_decay=WEIGHT_DECAY,
        ),
        betas=BETAS,
        **optimizer,
    )
    model, handle = load(
        directory,
        parallel,
        {"calculate_per_token_loss": True, "gradient_accumulation_fusion": True} | (overrides or {}),
        backend,
        dtype=getattr(torch, dtype),
        seed=seed,
        weights=weights,
        freeze=freeze,
    )
    for name, parameter in model[0].named_parameters():
        if frozen is not None and frozen in name:
            parameter.requires_grad_(False)
    return Engine(
        model,
        handle,
        micro_batching=MicroBatching(**(batching or {"micro_batch_size": 2, "packed": True})),
        optimizer=settings,
    )


def leave() -> None:
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()


def train(engine: Any, first: int, last: int) -> list[tuple[float, float, float, bool]]:
    """Return loss, gradient norm, learning rate, and whether it was applied, for steps `first` to `last` - 1."""
    from mbridge_train.losses.sft import sft_loss

    record = []
    for step in range(first, last):
        loss = engine.forward_backward(make_batch(step), sft_loss)["loss"]
        result = engine.step()
        record.append((loss, result.grad_norm, result.learning_rate, result.applied))
    return record


def digests(engine: Any) -> dict[str, str]:
    """Return a hash of each weight, and of each tensor and number of the optimizer state."""
    from mbridge_train.checkpoint import optimizer_state
    from mbridge_train.checkpoint.placement import model_state, parameter_names

    engine.synchronize_weights()
    found: dict[str, Any] = {f"model/{name}": value for name, value in model_state(engine).items()}
    state = optimizer_state.collect(engine.optimizer, parameter_names(engine), engine.layout) or {}
    for key, value in state.items():
        found |= {f"{key}/{name}": item for name, item in value.items()} if isinstance(value, dict) else {key: value}
    return {name: _digest(value) for name, value in found.items()}


def _digest(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        # A copy, because numpy would keep the memory of a live tensor from being freed.
        return hashlib.sha256(value.detach().cpu().clone().view(-1).view(torch.uint8).numpy()).hexdigest()
    return str(value)
