"""Train Megatron-Core's own GPTModel on the torch backend, with deepstack: parts of mbridge-model in a foreign loop.

Neither Transformer Engine nor a GPU nor megatron-bridge is needed. The model must name the class of an "image" that
nothing but the deepstack features shows, so its loss falls only if they arrive.

    python megatron_loop.py
"""

from collections.abc import Callable
from typing import Any

import torch
from mbridge_model import enable_cpu
from torch import Tensor

enable_cpu()  # does nothing where there is a GPU

from mbridge_model.torch_backend import torch_block_spec  # noqa: E402
from mbridge_model.vision.deepstack import DeepstackLayer, place_features  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402

CLASSES, IMAGE, LENGTH, BATCH, HIDDEN = 5, 9, 4, 10, 32
backend = "nccl" if torch.cuda.is_available() else "gloo"
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
parallel_state.initialize_model_parallel()
model_parallel_cuda_manual_seed(1)
torch.manual_seed(1)

config = TransformerConfig(
    num_layers=3,
    hidden_size=HIDDEN,
    num_attention_heads=4,
    ffn_hidden_size=64,
    normalization="RMSNorm",
    gated_linear_unit=True,
    activation_func=torch.nn.functional.silu,
    add_bias_linear=False,
    hidden_dropout=0.0,
    attention_dropout=0.0,
    bias_dropout_fusion=False,
)
layers = torch_block_spec(config)
for layer in layers.layer_specs:
    layer.module = DeepstackLayer
model = GPTModel(config, layers, vocab_size=16, max_sequence_length=LENGTH, position_embedding_type="rope").to(device)
features = torch.randn(2, CLASSES, HIDDEN, device=device)  # of two inner layers of a vision tower, one token an image
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

labels = torch.arange(BATCH, device=device) % CLASSES
tokens = torch.tensor([7, IMAGE, 8, 8], device=device).expand(BATCH, LENGTH)
positions = torch.arange(LENGTH, device=device).expand(BATCH, LENGTH)


def forward_step(_batches: Any, model: Any) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]]:
    """One micro-batch: logits [batch, sequence, vocabulary], and the function that makes the loss of them."""
    nothing = torch.zeros(BATCH, HIDDEN, device=device)
    embeddings = model.embedding(input_ids=tokens, position_ids=None)
    hidden = place_features(embeddings, tokens == IMAGE, nothing, [layer[labels] for layer in features])
    logits = model(tokens, positions, None, decoder_input=hidden)

    def loss_of(logits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss = torch.nn.functional.cross_entropy(logits[:, -1], labels)
        return loss, {"loss": loss.detach().clone()}

    return logits, loss_of


losses = []
for _ in range(60):
    optimizer.zero_grad()
    reports = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=None,
        model=[model],
        num_microbatches=2,
        seq_length=LENGTH,
        micro_batch_size=BATCH,
        forward_only=False,
    )
    optimizer.step()
    losses.append(sum(report["loss"].item() for report in reports) / len(reports))
print(f"Megatron-Core's loop: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
assert losses[0] > 1.4 and losses[-1] < 0.2, losses
torch.distributed.destroy_process_group()
