"""The one linear layer that Megatron-Core lacks: a norm and a column-parallel linear layer in one module.

Transformer Engine fuses the input norms of attention and MLP into the linear layers that follow them. This layer has
the same names of parameters, such as `linear_qkv.layer_norm_weight`, and is Megatron-Core's otherwise.
"""

from typing import Any

from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mbridge_model.torch_backend.norms import norm_parameters, normalize


class TorchLayerNormColumnParallelLinear(ColumnParallelLinear):
    """Norm over the last dimension, then a linear layer whose output features are split over tensor parallel.

    Parameters: `layer_norm_weight` [input_size] (and `layer_norm_bias` for LayerNorm), replicated; `weight`
    [output_size / TP, input_size] and `bias` [output_size / TP], split.

    With sequence parallelism the norm runs on this rank's slice of the sequence, before the all-gather.
    """

    skip_bias_add: bool

    # The class name ends as Megatron-Bridge expects of a fused layer: the norm replicated, the rest column-parallel.
    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **arguments: Any) -> None:
        super().__init__(input_size, output_size, config=config, **arguments)
        self.layer_norm_weight, self.layer_norm_bias = norm_parameters(config, input_size)

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """[sequence, batch, input_size] in; [sequence, batch, output_size / TP] and the bias, if skipped, out."""
        normalized = normalize(
            self.config, input_, self.layer_norm_weight, self.layer_norm_bias, self.config.layernorm_epsilon
        )
        output: tuple[Tensor, Tensor | None] = super().forward(normalized, weight, runtime_gather_output)
        return output

    def without_bias(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the output without the bias, and the bias, for a kernel that adds it."""
        skips, self.skip_bias_add = self.skip_bias_add, True
        try:
            output: tuple[Tensor, Tensor | None] = self(input_)
        finally:
            self.skip_bias_add = skips
        return output
