"""Count the floating-point operations of a batch from the model's geometry and the real lengths. No torch.

Counted are matrix products, 2 operations a multiplication and addition: each weight of a matrix is used once for each
of its rows, and attention multiplies queries by keys and probabilities by values, 2 * 2 * length**2 * width, of which a
causal mask leaves half. Rows are tokens in the language model and its output layer (of an expert, those tokens that are
sent to it), patches in the vision tower, and tokens of images in its mergers. The backward pass costs the same once for
the gradients of the inputs and once for those of the weights (Narayanan et al. 2021, "Efficient Large-Scale Language
Model Training on GPU Clusters Using Megatron-LM", appendix), but nothing for what is frozen with nothing trained
before it. Padding, recomputation, embeddings, norms and activations count nothing: this is what the model needs,
whatever a program spends.
"""

import dataclasses
from collections.abc import Collection, Iterable, Sequence

from mbridge_config.facts.model import HFFacts
from mbridge_config.facts.vision import VisionFacts
from mbridge_config.plan.parameters import (
    attention_matrices,
    can_count,
    embedding,
    expert_matrices,
    has_experts,
    merger_matrices,
    mlp_matrices,
    patch_matrix,
    router_matrix,
    tower_layer_matrices,
)

Grid = Sequence[int]
"""Patches of an image or video along time, height and width."""


PARTS = ("vision_model", "vision_projection", "language_model")
"""In the order in which a batch goes through them."""


@dataclasses.dataclass(slots=True, frozen=True)
class Part:
    """Operations of the forward pass of a part of the model: of its matrices, and of attention between activations."""

    matrices: int
    attention: int = 0

    @property
    def forward(self) -> int:
        """Return the sum."""
        return self.matrices + self.attention


@dataclasses.dataclass(slots=True, frozen=True)
class ForwardFlops:
    """Operations of a batch's forward pass, by the part of the model."""

    language_model: Part
    vision_model: Part
    vision_projection: Part

    @property
    def total(self) -> int:
        """Return the operations of the forward pass."""
        return self.language_model.forward + self.vision_model.forward + self.vision_projection.forward

    def training(self, frozen: Collection[str] = ()) -> int:
        """Of forward and backward pass, where those of `PARTS` that are `frozen` get no gradients of their weights."""
        total, has_gradients = self.total, False
        for name in PARTS:
            part: Part = getattr(self, name)
            is_trained = name not in frozen
            has_gradients = has_gradients or is_trained
            if has_gradients:
                # Both factors of a product in attention are activations.
                total += part.matrices * (1 + is_trained) + part.attention * 2
        return total


def forward_flops(facts: HFFacts, lengths: Iterable[int], images: Iterable[Grid] = ()) -> ForwardFlops | None:
    """Return the operations of the forward pass over a batch; None for an architecture that `can_count` does not know.

    Args:
        facts: the model's geometry.
        lengths: tokens of each sequence, those of images included. Sequences that are packed together do not attend
            to each other, so each is given by itself.
        images: the grids of all images and videos in the batch.
    """
    if not can_count(facts):
        return None
    tower, projection = _vision(facts.vision, images) if facts.vision is not None else (Part(0), Part(0))
    lengths = list(lengths)
    width = facts.num_attention_heads * facts.head_dim
    return ForwardFlops(
        language_model=Part(
            matrices=2 * sum(lengths) * _language_matrices(facts),
            attention=2 * facts.num_layers * width * sum(length**2 for length in lengths),
        ),
        vision_model=tower,
        vision_projection=projection,
    )


def _language_matrices(facts: HFFacts) -> int:
    """Weights that one token is multiplied by: those of the experts that it is sent to, and the output layer's."""
    active = (facts.experts_per_token or 0) * expert_matrices(facts) + router_matrix(facts)
    layers = sum(
        attention_matrices(facts) + (active if has_experts(facts, number) else mlp_matrices(facts))
        for number in range(facts.num_layers)
    )
    return layers + embedding(facts).total


def _vision(vision: VisionFacts, images: Iterable[Grid]) -> tuple[Part, Part]:
    """The tower and its mergers."""
    patches = whole = windows = 0
    for frames, height, width in images:
        patches += frames * height * width
        whole += frames * (height * width) ** 2
        if vision.window_size:
            windows += frames * _squares(height, vision) * _squares(width, vision)
    full = vision.full_attention_layers if vision.window_size else vision.depth
    squares = full * whole + (vision.depth - full) * windows
    tower = Part(
        matrices=2 * patches * (patch_matrix(vision) + vision.depth * tower_layer_matrices(vision)),
        attention=2 * 2 * vision.hidden_size * squares,
    )
    mergers = (1 + vision.deepstack_features) * merger_matrices(vision)
    return tower, Part(matrices=2 * (patches // vision.patches_per_token) * mergers)


def _squares(patches: int, vision: VisionFacts) -> int:
    """Sum of length**2 over the pieces that windows cut a side of so many patches into.

    A window's patches are a product of its sides, and so are the sums of their squares over all windows.
    """
    merge = vision.spatial_merge_size
    side = max(1, vision.window_size // vision.patch_size // merge) * merge
    return patches // side * side**2 + (patches % side) ** 2
