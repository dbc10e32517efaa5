"""The vision-language model: a tower on the first pipeline stage, and Megatron-Core's GPT model.

It replaces Megatron-Bridge's model class of each family, whose parameters' names it has. It takes positions instead of
deriving them, so that batches can be packed, and lets deepstack features cross pipeline stages.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from mbridge_model.errors import ModelError
from mbridge_model.vision.deepstack import place_features
from mbridge_model.vision.family import Vision
from mbridge_model.vision.inputs import VisionInputs


class VisionLanguageModel(MegatronModule):
    """A causal language model that reads images and videos.

    Args:
        config: the Megatron provider.
        vision: the family's description.
        language_model: this stage's part of the language model, whose embedding does not split the sequence.
        tower: the vision tower on the first pipeline stage, None on the others.
    """

    def __init__(self, config: Any, vision: Vision, *, language_model: GPTModel, tower: nn.Module | None) -> None:
        super().__init__(config=config)
        self.vision = vision
        if tower is not None:
            self.add_module(vision.tower, tower)
        self.language_model = language_model
        self.pre_process: bool = language_model.pre_process
        self.post_process: bool = language_model.post_process
        self.vp_stage = language_model.vp_stage
        self.pg_collection = language_model.pg_collection
        # Megatron-Core sums the gradients of tied embeddings over the first and the last stage by these two.
        self.share_embeddings_and_output_weights = language_model.share_embeddings_and_output_weights
        self.shared_embedding_or_output_weight = language_model.shared_embedding_or_output_weight

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Set the tensor that the previous pipeline stage sent."""
        self.language_model.set_input_tensor(input_tensor)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params: Any = None,
        vision: VisionInputs | None = None,
        output_processor: Callable[..., Any] | None = None,
    ) -> Any:
        """Compute the logits of the next token, or the tensor that the next stage needs.

        The arguments are those of `mbridge_model.forward` and of Megatron-Core's GPT model, whose `output_processor`
        replaces the output layer. Of text only, positions [batch, sequence] are accepted too.

        Returns:
            [batch, sequence, vocabulary / TP] on the last stage, or the result of `output_processor`.

        Raises:
            ModelError: the number of placeholders differs from the number of the tower's features.
        """
        if position_ids.dim() == 2:
            position_ids = position_ids.expand(3, -1, -1)
        return self.language_model(
            input_ids,
            position_ids,
            attention_mask,
            decoder_input=self._embed(input_ids, vision) if self.pre_process else None,
            packed_seq_params=packed_seq_params,
            output_processor=output_processor,
        )

    def _embed(self, input_ids: Tensor, vision: VisionInputs | None) -> Tensor:
        """[sequence (/ TP), batch, hidden * (1 + deepstack features)]."""
        hidden = self.language_model.embedding(input_ids=input_ids, position_ids=None)
        mask = (input_ids == self.config.image_token_id) | (input_ids == self.config.video_token_id)
        placeholders = int(mask.sum())
        tower = self.get_submodule(self.vision.tower)
        shown = vision
        if vision is None and any(parameter.requires_grad for parameter in tower.parameters()):
            shown = blank_image(self.config, input_ids.device)
        count = 0
        if shown is not None:
            features, deepstack = self.vision.encode(tower, shown.pixel_values, shown.grid_thw)
            count = len(features) if vision is not None else 0  # nothing of a blank image is placed
            if count == placeholders:
                hidden = place_features(hidden, mask, features, deepstack)
        if placeholders != count:
            raise ModelError(
                f"the tokens hold {placeholders} placeholders of images and videos, but pixel_values give {count} "
                "features; put each sample's images in the batch, in order"
            )
        if self.config.sequence_parallel:
            # The backward pass gathers, so the tower gets the gradients of all positions on each rank.
            hidden = scatter_to_sequence_parallel_region(hidden, group=self.pg_collection.tp).contiguous()
        return hidden


def blank_image(config: Any, device: torch.device) -> VisionInputs:
    """Return the smallest image, for a micro-batch of text whose tower is trained, with gradients of zero.

    Data-parallel ranks reduce gradients bucket by bucket, in the order of their own passes, so all run their towers.
    """
    settings = config.vision_config
    side = settings.spatial_merge_size
    features = settings.in_channels * settings.temporal_patch_size * settings.patch_size**2
    return VisionInputs(
        pixel_values=torch.zeros(side**2, features, device=device), grid_thw=torch.tensor([[1, side, side]])
    )


def provide(
    provider: Any,
    vision: Vision,
    backend: Literal["te", "torch"],
    pre_process: bool | None = None,
    post_process: bool | None = None,
    vp_stage: int | None = None,
) -> VisionLanguageModel:
    """Build one pipeline stage; `load` replaces the provider's own `provide` by it."""
    language_model = provider.provide_language_model(pre_process, post_process, vp_stage)
    if vision.build_rotary is not None:
        language_model.rotary_pos_emb = vision.build_rotary(provider)
    tower = None
    if language_model.pre_process:
        tower = vision.build_tower(provider, backend)
        average_over_tensor_parallel(tower, provider)
    model = VisionLanguageModel(provider, vision, language_model=language_model, tower=tower)
    freeze(model, provider)
    return model


def average_over_tensor_parallel(tower: nn.Module, provider: Any) -> None:
    """Mark the tower's parameters that each tensor-parallel rank holds whole, so that their gradients stay the same.

    GPU kernels that add in no fixed order would make the copies drift apart. Gloo cannot average, and need not.
    """
    group = provider._pg_collection.tp
    if group.size() > 1 and torch.distributed.get_backend(group) == "nccl":
        for parameter in tower.parameters():
            if not getattr(parameter, "tensor_model_parallel", False):
                setattr(parameter, "average_gradients_across_tp_domain", True)  # noqa: B010 - no attribute of the class


def freeze(model: VisionLanguageModel, provider: Any) -> None:
    """Freeze the parts that the provider's freeze fields name."""
    if provider.freeze_language_model:
        model.language_model.requires_grad_(False)
    if not model.pre_process:
        return
    tower = model.get_submodule(model.vision.tower)
    if provider.freeze_vision_model:
        tower.requires_grad_(False)
    for name in model.vision.projections:
        tower.get_submodule(name).requires_grad_(not provider.freeze_vision_projection)
