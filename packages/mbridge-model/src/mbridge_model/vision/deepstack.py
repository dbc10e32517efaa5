"""Deepstack (arXiv 2406.04334): features of the vision tower's inner layers, added after the first language layers.

A later pipeline stage has no tower, but may hold some of those layers. So the features travel with the hidden states,
appended along the last dimension: [sequence, batch, hidden * (1 + remaining features)]. Each layer splits off its own
feature and adds it. Everything between two layers (the pipeline's transfer, which exchanges shapes first;
recomputation; the split over sequence-parallel ranks; and the gradients of all of them) still handles a single tensor.
Text positions carry zeros: for n features n (n + 1) / 2 hidden sizes of activation memory per token in total, for n = 3
a third of the 17 or so that each layer keeps (Korthikanti et al. 2022, section 4.1).
"""

from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor


class DeepstackLayer(TransformerLayer):
    """A transformer layer that adds the next feature, if there is one, to its output."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        """[sequence, batch, hidden * (1 + n)] in; [sequence, batch, hidden * n] out, or hidden where n is 0."""
        hidden = self.config.hidden_size
        if hidden_states.shape[-1] == hidden:
            return super().forward(hidden_states, *args, **kwargs)
        own, feature, rest = hidden_states.tensor_split((hidden, 2 * hidden), dim=-1)
        output, context = super().forward(own.contiguous(), *args, **kwargs)
        output = output + feature
        return torch.cat([output, rest], dim=-1) if rest.shape[-1] else output, context


def place_features(embeddings: Tensor, mask: Tensor, features: Tensor, deepstack: list[Tensor]) -> Tensor:
    """Replace the placeholders' embeddings by the tower's features, and append the deepstack features.

    Args:
        embeddings: [sequence, batch, hidden].
        mask: bool [batch, sequence], True at placeholders, which take the features in order, row by row.
        features: [tokens, hidden].
        deepstack: one [tokens, hidden] for each of the first language layers.

    Returns:
        [sequence, batch, hidden * (1 + len(deepstack))], with zeros appended to the embeddings of text.
    """
    wide = torch.cat([features, *deepstack], dim=-1).to(embeddings.dtype)
    base = torch.nn.functional.pad(embeddings, (0, wide.shape[-1] - embeddings.shape[-1]))
    return base.transpose(0, 1).masked_scatter(mask.unsqueeze(-1), wide).transpose(0, 1).contiguous()
