"""RMSNorm and LayerNorm with sequence-parallel marks, alone and fused into a linear layer.

Megatron-Core's own torch fallback refuses sequence parallelism, under which each rank normalizes its slice of the
sequence, and `finalize_model_grads` sums the gradients of parameters marked `sequence_parallel` over the ranks.

Transformer Engine fuses the input norms of attention and MLP into the linear layers that follow them. The fused layer
here has the same names of parameters, such as `linear_qkv.layer_norm_weight`, and is Megatron-Core's otherwise.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from mbridge_model.kernels import runs_kernels


def rms_norm(hidden: Tensor, weight: Tensor, epsilon: float, zero_centered: bool) -> Tensor:
    """Root mean square normalization over the last dimension (Zhang & Sennrich 2019, eq. 4).

    As in the HuggingFace models, so that fp32 logits agree exactly: normalize in fp32, cast back, then multiply by the
    weight. With `zero_centered` weights (Gemma) the scale 1 + weight is applied in fp32, before the cast.
    """
    dtype = hidden.dtype
    if hidden.is_cuda and not zero_centered:
        # One kernel each way, which multiplies by the weight before it casts.
        if not runs_kernels(hidden):
            return nn.functional.rms_norm(hidden, weight.shape, weight, epsilon)
        from mbridge_model.kernels.rms_norm import RMSNorm

        return RMSNorm.apply(hidden, weight, epsilon)
    normalized = hidden.float()
    normalized = normalized * torch.rsqrt(normalized.square().mean(-1, keepdim=True) + epsilon)
    if zero_centered:
        return (normalized * (1.0 + weight.float())).to(dtype)
    return weight * normalized.to(dtype)


def normalize(config: TransformerConfig, hidden: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
    """Apply the norm that `config.normalization` names; LayerNorm (Ba et al. 2016) alone has a bias."""
    zero_centered = config.layernorm_zero_centered_gamma
    if bias is None:
        return rms_norm(hidden, weight, epsilon, zero_centered)
    return nn.functional.layer_norm(hidden, weight.shape, weight + 1.0 if zero_centered else weight, bias, epsilon)


def norm_parameters(config: TransformerConfig, size: int) -> tuple[nn.Parameter, nn.Parameter | None]:
    """Return a norm's weight [size] and bias [size], None for RMSNorm, marked for sequence parallelism.

    Raises:
        ValueError: `config.normalization` is neither "RMSNorm" nor "LayerNorm".
    """
    if config.normalization not in ("RMSNorm", "LayerNorm"):
        raise ValueError(
            f"normalization {config.normalization!r} is not built in the torch backend, which has RMSNorm and LayerNorm"
        )
    device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()

    def parameter(value: float) -> nn.Parameter:
        made = nn.Parameter(torch.full((size,), value, dtype=config.params_dtype, device=device))
        setattr(made, "sequence_parallel", config.sequence_parallel)  # noqa: B010 - it is no attribute of the class
        return made

    weight = parameter(0.0 if config.layernorm_zero_centered_gamma else 1.0)
    return weight, parameter(0.0) if config.normalization == "LayerNorm" else None


class TorchNorm(nn.Module):
    """RMSNorm or LayerNorm, as `config.normalization` says; parameters `weight` and, for LayerNorm, `bias`.

    `eps` is added to the mean square (RMSNorm) or to the variance (LayerNorm).
    """

    # "Norm" in the class name is how Megatron-Bridge knows that these parameters are replicated over tensor parallel.
    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.config = config
        self.epsilon = eps
        self.weight, self.bias = norm_parameters(config, hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., hidden_size] in, the same shape and dtype out."""
        return normalize(self.config, hidden, self.weight, self.bias, self.epsilon)


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
