"""mbridge's engine as a side of a benchmark."""

from typing import Any

from mbridge_model import load
from mbridge_train import Engine, MicroBatching, OptimizerSettings, Sample, Schedule, sft_loss
from one_side import BETAS, CLIP_GRAD, EPSILON, LEARNING_RATE, WEIGHT_DECAY, Step


def build_engine(settings: dict[str, Any], *, trains: bool = True) -> Engine:
    """Return the model of `settings["directory"]` on the backend of the case."""
    overrides: dict[str, Any] = {"calculate_per_token_loss": True, "gradient_accumulation_fusion": True}
    if settings["recompute"]:
        overrides |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    model, handle = load(
        settings["directory"],
        None,
        overrides,
        settings["case"].removeprefix("ours-"),
        dtype=settings["dtype"],
        weights=settings["same_weights"],
    )
    optimizer = OptimizerSettings(
        schedule=Schedule(max_lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY),
        betas=BETAS,
        epsilon=EPSILON,
        clip_grad=CLIP_GRAD,
    )
    return Engine(
        model,
        handle,
        micro_batching=MicroBatching(micro_batch_size=1),
        optimizer=optimizer if trains else None,
    )


def training_step(engine: Engine, micro_batching: MicroBatching) -> Step:
    """Return an optimizer step over a list of samples."""

    def step(batch: list[Sample]) -> tuple[float, float]:
        engine.micro_batching = micro_batching
        metrics = engine.forward_backward(batch, sft_loss)
        grad_norm = engine.step().grad_norm
        return metrics["loss"], grad_norm

    return step


def logprob_step(engine: Engine, micro_batching: MicroBatching) -> Step:
    """Return a step that computes the log probabilities of a list of samples, with the loss made from them."""

    def step(batch: list[Sample]) -> tuple[float, None]:
        engine.micro_batching = micro_batching
        logprobs = engine.logprobs(batch)
        total = sum((sample.weights * one).sum() for sample, one in zip(batch, logprobs, strict=True))
        return -float(total), None

    return step
