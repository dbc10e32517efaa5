"""Megatron-Core with Transformer Engine in a minimal loop as a side of a benchmark; its steps use no mbridge code."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel, gpt_layer_specs
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig
from one_side import BETAS, CLIP_GRAD, EPSILON, LEARNING_RATE, WEIGHT_DECAY, Example
from torch import Tensor

# Tokens and labels [batch, sequence], and the weight of each token in the loss of the global batch.
MicroBatch = tuple[Tensor, Tensor, Tensor]


def build_model(settings: dict[str, Any], geometry: dict[str, Any], device: torch.device) -> Any:
    """Return a GPTModel of Qwen2's architecture with the weights in `settings["directory"]`."""
    fields: dict[str, Any] = {}
    if settings["recompute"]:
        fields = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    dtype = settings["dtype"]
    weights = _weights(settings)  # for process groups and seeds, which Megatron-Core leaves to its user
    config = TransformerConfig(
        num_layers=geometry["num_hidden_layers"],
        hidden_size=geometry["hidden_size"],
        ffn_hidden_size=geometry["intermediate_size"],
        num_attention_heads=geometry["num_attention_heads"],
        num_query_groups=geometry["num_key_value_heads"],
        layernorm_epsilon=geometry["rms_norm_eps"],
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        calculate_per_token_loss=True,
        # All fusions of TE and Megatron-Core except gradient accumulation, which requires Apex.
        gradient_accumulation_fusion=False,
        bias_activation_fusion=True,
        bias_dropout_fusion=True,
        apply_rope_fusion=device.type == "cuda",
        cross_entropy_loss_fusion=device.type == "cuda",
        cross_entropy_fusion_impl="te",
        **fields,
    )
    model = GPTModel(
        config=config,
        transformer_layer_spec=gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(),
        vocab_size=geometry["vocab_size"],
        max_sequence_length=settings["sequence"],
        share_embeddings_and_output_weights=geometry["tie_word_embeddings"],
        position_embedding_type="rope",
        rotary_base=int(geometry["rope_theta"]),
    )
    model = model.to(device=device, dtype=dtype)
    model.load_state_dict(weights)
    return model


def _weights(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the weights under Megatron-Core's names, on the host."""
    from mbridge_model import load

    ((model,), _) = load(settings["directory"], None, None, "te", dtype=settings["dtype"])
    return {name: value.cpu() if isinstance(value, Tensor) else value for name, value in model.state_dict().items()}


class MegatronTrainer:
    """Wrap the model in Megatron-Core's DDP, distributed optimizer and schedule."""

    def __init__(self, model: Any, settings: dict[str, Any], device: torch.device) -> None:
        self.device = device
        self.model = DistributedDataParallel(
            config=model.config,
            ddp_config=DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True),
            module=model,
        )
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=LEARNING_RATE,
                weight_decay=WEIGHT_DECAY,
                adam_beta1=BETAS[0],
                adam_beta2=BETAS[1],
                adam_eps=EPSILON,
                clip_grad=CLIP_GRAD,
                bf16=settings["dtype"] == torch.bfloat16,
                params_dtype=settings["dtype"],
                use_distributed_optimizer=True,
            ),
            [self.model],
        )
        for group in self.optimizer.param_groups:
            # Megatron-Core marks biases and norms, and leaves it to the scheduler to apply weight decay.
            group["weight_decay"] = WEIGHT_DECAY * group.get("wd_mult", 1.0)
        model.config.grad_scale_func = self.optimizer.scale_loss
        model.config.finalize_model_grads_func = _finalize

    def step(self, micro_batches: list[MicroBatch]) -> tuple[float, float]:
        """Run an optimizer step over the mean of all trained tokens, and return its loss and gradient norm."""
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        loss = run(self.model, micro_batches, self.device, forward_only=False)
        _, grad_norm, _ = self.optimizer.step()
        return loss, float(grad_norm)


def run(model: Any, micro_batches: list[MicroBatch], device: torch.device, *, forward_only: bool) -> float:
    """Return the loss of the global batch, computed by Megatron-Core's schedule."""

    def forward_step(iterator: Iterator[MicroBatch], model: Any) -> tuple[Tensor, Callable[..., Any]]:
        tokens, labels, weights = (value.to(device, non_blocking=True) for value in next(iterator))
        positions = torch.arange(tokens.shape[1], device=device).expand_as(tokens)
        losses = model(tokens, positions, None, labels=labels)

        def reduce(losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            loss = (losses.float() * weights).sum()
            return loss, torch.zeros((), dtype=torch.int, device=device), {"loss": loss.detach()}

        return losses, reduce

    rows, length = micro_batches[0][0].shape
    with torch.set_grad_enabled(not forward_only):
        results = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(micro_batches),
            model=model,
            num_microbatches=len(micro_batches),
            seq_length=length,
            micro_batch_size=rows,
            forward_only=forward_only,
        )
    return float(torch.stack([result["loss"] for result in results]).sum())


def make_micro_batches(size: int, device: torch.device, batch: list[Example]) -> list[MicroBatch]:
    """Collate examples of equal length: labels are the next tokens, weights their shares in the mean."""
    trained = sum(int(example.trained.sum()) for example in batch)
    result = []
    for start in range(0, len(batch), size):
        tokens = torch.stack([example.tokens for example in batch[start : start + size]])
        weights = torch.stack([example.trained for example in batch[start : start + size]]).float() / trained
        moved = (tokens, tokens.roll(-1, 1), weights.roll(-1, 1))
        result.append(tuple(value.pin_memory() if device.type == "cuda" else value for value in moved))
    return result


def _finalize(model: list[Any], num_tokens: Tensor | None, **arguments: Any) -> None:
    """Leave gradients unscaled, because the weights of the tokens contain the normalization."""
    finalize_model_grads(model, None, **arguments)
