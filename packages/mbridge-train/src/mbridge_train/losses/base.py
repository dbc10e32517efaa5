"""The arguments and results of a loss, a pure function of per-token tensors.

Every loss is ``sum(weights * token_loss)`` with the weights of :mod:`mbridge_train.engine.batch`, so losses and
gradients of micro-batches and data-parallel ranks add up to those of the global batch. Metrics are weighted sums, too,
except those named ``max_…``, which are combined by maximum (:mod:`mbridge_train.engine.results`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(kw_only=True, slots=True)
class LossInputs:
    """Per-token values on one device. Where the weight is 0, the other values may be NaN or infinite."""

    weights: Tensor
    """float32 [tokens]: loss weights over the global batch; 0 for padding and tokens that are not trained."""
    outputs: Mapping[str, Tensor]
    """float [tokens, ...] each, differentiable: outputs of the head, such as `logprobs` and `entropy`."""
    fields: Mapping[str, Tensor] = field(default_factory=dict)
    """float32 [tokens] each: `Sample.fields` by name."""

    def output(self, name: str) -> Tensor:
        """Return an output of the head, with zeros where the weight is 0. Raise `ValueError` if there is none."""
        return self._trained(self.outputs, name, "output of the head")

    def field(self, name: str) -> Tensor:
        """Return a field of the samples, with zeros where the weight is 0. Raise `ValueError` if there is none."""
        return self._trained(self.fields, name, "field of the samples")

    def _trained(self, values: Mapping[str, Tensor], name: str, kind: str) -> Tensor:
        if name not in values:
            raise ValueError(f"this loss needs the {kind} {name!r}; there are: {', '.join(sorted(values)) or 'none'}")
        value = values[name]
        trained = (self.weights > 0).view(-1, *[1] * (value.dim() - 1))
        return torch.where(trained, value, 0)  # because 0 * NaN is NaN


@dataclass(kw_only=True, slots=True)
class LossOutputs:
    """A differentiable scalar, and detached scalars to log: weighted sums, and maxima under names ``max_…``.

    The engine adds ``loss`` and ``weight``, the sum of weights, and divides the other sums by the latter.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
