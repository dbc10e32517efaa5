"""Training on Megatron-Core: global batches, losses, engine, optimizer, checkpoints, launching, metrics.

engine = Engine(model, handle, micro_batching=MicroBatching(micro_batch_size=4), optimizer=settings)
metrics = engine.forward_backward(batch, sft_loss)
engine.step()
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mbridge_train.build import build_engine
    from mbridge_train.checkpoint.load import load_checkpoint, load_model
    from mbridge_train.checkpoint.save import save_checkpoint
    from mbridge_train.engine.batch import Sample, aggregation_weights
    from mbridge_train.engine.engine import Engine, MicroBatching
    from mbridge_train.engine.weight_snapshot import Snapshot
    from mbridge_train.errors import TrainError
    from mbridge_train.losses.advantages import grpo_advantages
    from mbridge_train.losses.base import LossInputs, LossOutputs
    from mbridge_train.losses.policy import policy_loss
    from mbridge_train.losses.sft import sft_loss
    from mbridge_train.optim.optimizer import OptimizerSettings, StepResult
    from mbridge_train.optim.schedule import Schedule
    from mbridge_train.run.metrics import MetricsWriter

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
    "save_checkpoint",
    "sft_loss",
]

# Importing Megatron takes seconds, so a name's module is imported when the name is first used.
_NAMES = {
    "build": ["build_engine"],
    "checkpoint.load": ["load_checkpoint", "load_model"],
    "checkpoint.save": ["save_checkpoint"],
    "engine.batch": ["Sample", "aggregation_weights"],
    "engine.engine": ["Engine", "MicroBatching"],
    "engine.weight_snapshot": ["Snapshot"],
    "errors": ["TrainError"],
    "losses.advantages": ["grpo_advantages"],
    "losses.base": ["LossInputs", "LossOutputs"],
    "losses.policy": ["policy_loss"],
    "losses.sft": ["sft_loss"],
    "optim.optimizer": ["OptimizerSettings", "StepResult"],
    "optim.schedule": ["Schedule"],
    "run.metrics": ["MetricsWriter"],
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
