"""Throughput of a training step: operations per second of a GPU, and their share of its peak.

Only operations that the model needs count (`mbridge_config.plan.flops`), so recomputation and padding lower the
figures, as defined for model FLOPs utilization (MFU; Chowdhery et al. 2022, "PaLM", appendix B).
"""

from collections.abc import Sequence

import torch
from mbridge_config import HFFacts
from mbridge_config.plan.flops import PARTS, forward_flops
from mbridge_config.schema.actor import ModelConfig
from torch import distributed

from mbridge_train.engine.batch import Sample

# Part of the name from `torch.cuda.get_device_name`, and TFLOP/s of dense bf16 or fp16 matrix products with fp32
# accumulation from the manufacturer's data sheet. The first match counts.
_PEAKS = (
    ("B200", 2250.0),
    ("H200 NVL", 835.0),
    ("H200", 989.0),
    ("GH200", 989.0),
    ("H100 NVL", 835.0),
    ("H100 PCIe", 756.0),
    ("H100", 989.0),
    ("H800 PCIe", 756.0),
    ("H800", 989.0),
    ("H20", 148.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("A30", 165.0),
    ("A40", 149.7),
    ("A10", 125.0),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("L4", 121.0),
)


def peak_tflops(device_name: str) -> float | None:
    """Return the dense bf16 TFLOP/s of a GPU by its name; None if it is unknown or a part of a GPU (MIG)."""
    words = f" {device_name} ".replace("-", " ")
    if " MIG " in words:
        return None
    return next((peak for name, peak in _PEAKS if f" {name} " in words), None)


class Throughput:
    """Metrics of steps from their samples and durations. `model` tells the precision and the frozen parts."""

    def __init__(self, facts: HFFacts, model: ModelConfig) -> None:
        self.facts = facts
        self.frozen = [part for part in PARTS if getattr(model, f"freeze_{part}", False)]
        self.peak = None
        if torch.cuda.is_available() and model.precision != "fp32":
            self.peak = peak_tflops(torch.cuda.get_device_name())

    def metrics(self, batch: Sequence[Sample], seconds: float) -> dict[str, float]:
        """Return metrics of forward and backward passes over a global batch that took `seconds`.

        They are `tflops_per_second` per GPU, and `mfu`, its share of the peak, if that is known; none for a model whose
        operations cannot be counted. Only lengths on the host are read, so nothing waits for a GPU.
        """
        images = [grid for sample in batch if sample.vision is not None for grid in sample.vision.grid_thw.tolist()]
        work = forward_flops(self.facts, [sample.length for sample in batch], images)
        if work is None:
            return {}
        rate = work.training(self.frozen) / seconds / distributed.get_world_size() / 1e12
        return {"tflops_per_second": rate} | ({} if self.peak is None else {"mfu": rate / self.peak})
