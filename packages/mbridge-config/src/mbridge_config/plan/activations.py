"""Count what the layers keep for the backward pass, in bytes for each token or patch.

The method is that of Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", section
4: go through the operations of a layer and add up the inputs that each one's gradient needs, once each. The layers
here are others than the paper's: RMSNorm, grouped queries, rotary positions, SwiGLU, no dropout, and flash attention,
which keeps its inputs, its output and one number a head and token, but no scores. With e bytes a number, hidden size h,
q and k the widths of all query and of all key heads, f that of the MLP:

    operation       Transformer Engine    plain torch
    norm, each      2eh                   the same: its input, and its output, which the next linear needs
    norms of q, k   e(q + k)              the same: copies out of the fused projection
    attention       e(2q + 2k)            packed: 4eq, k and v being repeated for each query head; without groups, and
                                          where sequences are padded, the same as Transformer Engine's if one kernel
                                          splits the fused projection, else 3e(q + k), as v is a view of it
    its statistics  4 a head              the same
    SwiGLU          3ef                   the same: its input, and its output, which the next linear needs

Rotary kernels keep nothing, and norms a number a token, which is left out. An expert gets a copy of each token sent to
it, e(h + 3f) with f the expert's width. Norms and their inputs are split over tensor-parallel ranks by sequence
parallelism alone, all else by tensor parallelism.
"""

import dataclasses
from typing import Literal

from mbridge_config.facts.model import QK_LAYERNORM_FAMILIES, HFFacts
from mbridge_config.facts.vision import VisionFacts
from mbridge_config.plan.parameters import has_experts


@dataclasses.dataclass(kw_only=True, slots=True, frozen=True)
class Kernels:
    """What runs the layers, as far as it changes what they keep.

    `number_bytes` is the size of an activation: 2 in half precision, 4 in fp32. `packed`: sequences are laid end to
    end, not padded to the longest.
    """

    backend: Literal["te", "torch"]
    number_bytes: int
    packed: bool
    tensor_parallel: int = 1
    sequence_parallel: bool = False

    @property
    def norm_share(self) -> int:
        """Ranks that share what norms keep."""
        return self.tensor_parallel if self.sequence_parallel else 1


def language_layer_bytes(facts: HFFacts, number: int, kernels: Kernels) -> float:
    """Bytes a token that the layer `number`, from 0, keeps on one rank."""
    tensor, e, hidden = kernels.tensor_parallel, kernels.number_bytes, facts.hidden_size
    kept = 2 * 2 * e * hidden / kernels.norm_share + _attention(facts, kernels) / tensor
    if not has_experts(facts, number):
        return kept + 3 * e * (facts.ffn_hidden_size or 0) / tensor
    # Each tensor-parallel rank has a part of each expert, and so all tokens of the group.
    expert = e * hidden + 3 * e * (facts.expert_ffn_hidden_size or 0) / tensor
    router = 12 * (facts.num_experts or 0) / kernels.norm_share  # logits, probabilities and choices
    return kept + router + (facts.experts_per_token or 0) * expert


def layer_input_bytes(facts: HFFacts, kernels: Kernels) -> float:
    """Bytes a token of the input of a layer, all that a recomputed layer keeps."""
    return kernels.number_bytes * facts.hidden_size / kernels.norm_share


def final_norm_bytes(facts: HFFacts, kernels: Kernels) -> float:
    """Bytes a token that the norm before the output layer keeps."""
    return 2 * kernels.number_bytes * facts.hidden_size / kernels.norm_share


def deepstack_bytes(facts: HFFacts, kernels: Kernels) -> float:
    """Bytes a token of the n deepstack features on their way to the first n layers: n, n - 1, ... hidden sizes."""
    features = len(facts.deepstack_visual_indexes)
    return features * (features + 1) / 2 * layer_input_bytes(facts, kernels)


def vision_layer_bytes(vision: VisionFacts, kernels: Kernels) -> float:
    """Bytes a patch that a layer of the vision tower keeps on one rank.

    Qwen2.5-VL's tower is transformers' own module, whole on each rank, with an unfused SwiGLU. Qwen3-VL's is made of
    the backend's modules, has LayerNorm and a plain MLP, and turns queries and keys in fp32.
    """
    e, hidden, ffn = kernels.number_bytes, vision.hidden_size, vision.intermediate_size
    statistics = 4 * vision.num_heads
    if vision.kind == "qwen2_5_vl":
        return 2 * (4 + 2 * e) * hidden + 6 * e * hidden + statistics + 4 * e * ffn
    attention = (4 if kernels.backend == "te" else 6) * e * hidden + statistics
    rotary = 16 * hidden / vision.num_heads
    return 4 * e * hidden + rotary + (attention + 2 * e * ffn) / kernels.tensor_parallel


def vision_layer_input_bytes(vision: VisionFacts, kernels: Kernels) -> float:
    """Bytes a patch of the input of a layer of the tower."""
    return float(kernels.number_bytes * vision.hidden_size)


def vision_ends_bytes(vision: VisionFacts, kernels: Kernels) -> float:
    """Bytes a patch that is kept before and after the tower's layers: pixels in fp32 and as numbers, and mergers.

    A merger keeps the input of its norm, the patches of a token beside each other, and both sides of its GELU.
    """
    e = kernels.number_bytes
    mergers = 1 + vision.deepstack_features
    inputs = (4 + 2 * e) if vision.kind == "qwen2_5_vl" else 2 * e
    merger = inputs * vision.hidden_size + 2 * e * vision.merged_size / vision.patches_per_token
    return (4 + e) * vision.patch_features + mergers * merger


def _attention(facts: HFFacts, kernels: Kernels) -> float:
    e = kernels.number_bytes
    query, key = facts.num_attention_heads * facts.head_dim, facts.num_query_groups * facts.head_dim
    statistics = 4.0 * facts.num_attention_heads
    has_norms = facts.qk_layernorm or facts.model_type in QK_LAYERNORM_FAMILIES
    norms = e * (query + key) if has_norms else 0
    if kernels.backend == "torch" and kernels.packed and key != query:
        return statistics + norms + 4 * e * query
    if kernels.backend == "torch" and (has_norms or not _has_split_kernel(facts, kernels)):
        return statistics + norms + 3 * e * (query + key)
    return statistics + norms + e * (2 * query + 2 * key)


def _has_split_kernel(facts: HFFacts, kernels: Kernels) -> bool:
    """Whether one kernel splits and rotates queries, keys and values (`RotarySelfAttention` of mbridge-model)."""
    rotates_all = facts.rotary_fraction in (None, 1.0)
    return facts.vision is None and rotates_all and kernels.tensor_parallel <= facts.num_query_groups
