"""Training on Megatron-Core: global batches, losses, engine, optimizer, checkpoints, launching, metrics.

engine = Engine(model, handle, micro_batching=MicroBatching(micro_batch_size=4), optimizer=settings)
metrics = engine.forward_backward(batch, sft_loss)
engine.step()
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mbridge_train.advantages import grpo_advantages
    from mbridge_train.batch import Sample, aggregation_weights
    from mbridge_train.checkpoint import load_checkpoint, load_model, save_checkpoint
    from mbridge_train.engine import Engine, MicroBatching
    from mbridge_train.errors import TrainError
    from mbridge_train.from_config import build_engine
    from mbridge_train.losses import LossInputs, LossOutputs, policy_loss, sft_loss
    from mbridge_train.metrics import MetricsWriter
    from mbridge_train.optimizer import OptimizerSettings, StepResult
    from mbridge_train.reference import Snapshot
    from mbridge_train.schedule import Schedule
    from mbridge_train.weight_stream import receive_weights, stream_weights

__all__ = [
    "Engine",
    "LossInputs",
    "LossOutputs",
    "MetricsWriter",
    "MicroBatching",
    "OptimizerSettings",
    "Sample",
    "Schedule",
    "Snapshot",
    "StepResult",
    "TrainError",
    "aggregation_weights",
    "build_engine",
    "grpo_advantages",
    "load_checkpoint",
    "load_model",
    "policy_loss",
    "receive_weights",
    "save_checkpoint",
    "sft_loss",
    "stream_weights",
]

# Importing Megatron takes seconds, so a name's module is imported when the name is first used.
_HOME = {
    "Engine": "engine",
    "LossInputs": "losses",
    "LossOutputs": "losses",
    "MetricsWriter": "metrics",
    "MicroBatching": "engine",
    "OptimizerSettings": "optimizer",
    "Sample": "batch",
    "Schedule": "schedule",
    "Snapshot": "reference",
    "StepResult": "optimizer",
    "TrainError": "errors",
    "aggregation_weights": "batch",
    "build_engine": "from_config",
    "grpo_advantages": "advantages",
    "load_checkpoint": "checkpoint",
    "load_model": "checkpoint",
    "policy_loss": "losses",
    "receive_weights": "weight_stream",
    "save_checkpoint": "checkpoint",
    "sft_loss": "losses",
    "stream_weights": "weight_stream",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
