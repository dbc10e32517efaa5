"""Count the parameters of a model from its config.json, and how tensor parallelism shares them.

The layers are those of the HuggingFace classes: Llama's (grouped queries: Ainslie et al. 2023; SwiGLU: Shazeer 2020),
with biases or norms in attention where the family has them, and the two vision towers of `vision_facts`.
"""

import dataclasses

from mbridge_config.facts.model import QK_LAYERNORM_FAMILIES, QKV_BIAS_FAMILIES, HFFacts
from mbridge_config.facts.vision import VisionFacts

FAMILIES = (
    *("llama", "mistral", "qwen2", "qwen3", "qwen3_moe"),
    *("qwen2_5_vl", "qwen2_5_vl_text", "qwen3_vl", "qwen3_vl_text", "qwen3_vl_moe", "qwen3_vl_moe_text"),
)
"""Values of model_type whose parameters are counted."""

VOCABULARY_MULTIPLE = 128
"""Megatron-Core pads the vocabulary to a multiple of this for each tensor-parallel rank."""


@dataclasses.dataclass(slots=True, frozen=True)
class Size:
    """Parameters that tensor-parallel ranks share, and those of which each has a copy."""

    split: int = 0
    whole: int = 0

    def __add__(self, other: "Size") -> "Size":
        return Size(self.split + other.split, self.whole + other.whole)

    def __mul__(self, count: int) -> "Size":
        return Size(self.split * count, self.whole * count)

    @property
    def total(self) -> int:
        """Of the model, each parameter counted once."""
        return self.split + self.whole

    def on_rank(self, tensor_parallel: int) -> int:
        """On one of so many tensor-parallel ranks."""
        return -(-self.split // tensor_parallel) + self.whole


_LARGEST = 2**32


def can_count(facts: HFFacts) -> bool:
    """Whether the architecture is known, and config.json has all sizes, of which none is beyond all reason."""
    has_mlp = facts.ffn_hidden_size is not None or not facts.dense_layers
    experts = (facts.num_experts, facts.experts_per_token, facts.expert_ffn_hidden_size)
    sizes = (facts.hidden_size, facts.num_attention_heads, facts.head_dim, facts.ffn_hidden_size, facts.vocab_size)
    sizes += (*experts, *(dataclasses.astuple(facts.vision)[1:] if facts.vision is not None else ()))
    return (
        facts.model_type in FAMILIES
        and all(size <= _LARGEST for size in sizes if size is not None)
        and facts.vocab_size is not None
        and (has_mlp if facts.num_experts else facts.ffn_hidden_size is not None)
        and (not facts.num_experts or None not in experts)
        and (not facts.has_vision or facts.vision is not None)
    )


def count_parameters(facts: HFFacts) -> int | None:
    """Parameters of the whole model, tied embeddings once; None where `can_count` is false."""
    if not can_count(facts):
        return None
    size = embedding(facts) + final_norm(facts)
    for number in range(facts.num_layers):
        size += language_layer(facts, number)
    if not facts.tied_embeddings:
        size += embedding(facts)
    if facts.vision is not None:
        size += vision_tower(facts.vision) + vision_projection(facts.vision)
    return size.total


def count_vision_parameters(facts: HFFacts) -> int:
    """Those of them in the vision tower and its projection."""
    return (vision_tower(facts.vision) + vision_projection(facts.vision)).total if facts.vision is not None else 0


def count_active_parameters(facts: HFFacts) -> int | None:
    """All but those of the experts that one token is not sent to; None where `can_count` is false."""
    total = count_parameters(facts)
    if total is None or not facts.num_experts or not facts.experts_per_token:
        return total
    layers = facts.num_layers - len(facts.dense_layers)
    return total - layers * (facts.num_experts - facts.experts_per_token) * expert_matrices(facts)


def embedding(facts: HFFacts, *, padded_for: int | None = None) -> Size:
    """The embedding, or an output layer of its own; its rows padded as for so many tensor-parallel ranks."""
    rows = facts.vocab_size or 0
    if padded_for is not None:
        multiple = VOCABULARY_MULTIPLE * padded_for
        rows = -(-rows // multiple) * multiple
    return Size(split=rows * facts.hidden_size)


def final_norm(facts: HFFacts) -> Size:
    """The norm before the output layer."""
    return Size(whole=facts.hidden_size)


def has_experts(facts: HFFacts, number: int) -> bool:
    """Whether the layer `number`, from 0, has experts."""
    return bool(facts.num_experts) and number not in facts.dense_layers


def language_layer(facts: HFFacts, number: int) -> Size:
    """The layer `number`, from 0."""
    hidden, ffn = facts.hidden_size, facts.ffn_hidden_size or 0
    query, key = facts.num_attention_heads * facts.head_dim, facts.num_query_groups * facts.head_dim
    size = Size(split=attention_matrices(facts), whole=2 * hidden)  # and both norms
    if facts.qkv_bias:
        # The output projection of Qwen2 has no bias; in the other families one flag stands for all four.
        size += Size(split=query + 2 * key, whole=0 if facts.model_type in QKV_BIAS_FAMILIES else hidden)
    if facts.qk_layernorm or facts.model_type in QK_LAYERNORM_FAMILIES:
        size += Size(whole=2 * facts.head_dim)
    if has_experts(facts, number):
        return size + Size(split=(facts.num_experts or 0) * expert_matrices(facts), whole=router_matrix(facts))
    size += Size(split=mlp_matrices(facts))
    return size + Size(split=2 * ffn, whole=hidden) if facts.linear_bias else size


def attention_matrices(facts: HFFacts) -> int:
    """Weights of the projections of a layer's attention: queries, keys and values, output."""
    query, key = facts.num_attention_heads * facts.head_dim, facts.num_query_groups * facts.head_dim
    return facts.hidden_size * (2 * query + 2 * key)


def mlp_matrices(facts: HFFacts) -> int:
    """Those of the MLP of a layer without experts."""
    return 3 * facts.hidden_size * (facts.ffn_hidden_size or 0)


def expert_matrices(facts: HFFacts) -> int:
    """Those of one expert."""
    return 3 * facts.hidden_size * (facts.expert_ffn_hidden_size or 0)


def router_matrix(facts: HFFacts) -> int:
    """That which chooses among a layer's experts."""
    return facts.hidden_size * (facts.num_experts or 0)


def vision_tower(vision: VisionFacts) -> Size:
    """Patch embedding, positions and layers.

    Qwen3-VL's is split over the tensor-parallel ranks; of Qwen2.5-VL's each rank has a whole copy.
    """
    hidden, ffn = vision.hidden_size, vision.intermediate_size
    patch, matrices = patch_matrix(vision), tower_layer_matrices(vision)
    if vision.kind == "qwen2_5_vl":
        biases = 3 * hidden + hidden + 2 * ffn + hidden
        return Size(whole=patch + vision.depth * (2 * hidden + matrices + biases))
    layer = Size(split=matrices + 3 * hidden + ffn, whole=2 * hidden + 2 * 2 * hidden)
    return Size(whole=patch + hidden + vision.num_position_embeddings * hidden) + layer * vision.depth


def patch_matrix(vision: VisionFacts) -> int:
    """Weights of the patch embedding."""
    return vision.patch_features * vision.hidden_size


def tower_layer_matrices(vision: VisionFacts) -> int:
    """Those of the matrices of a tower's layer: queries, keys and values, projection, MLP."""
    hidden = vision.hidden_size
    return 4 * hidden * hidden + (3 if vision.kind == "qwen2_5_vl" else 2) * hidden * vision.intermediate_size


def merger_matrices(vision: VisionFacts) -> int:
    """Those of one merger."""
    return vision.merged_size * vision.merged_size + vision.merged_size * vision.out_hidden_size


def vision_projection(vision: VisionFacts) -> Size:
    """What maps the tower's features into the language model: the merger, and one more for each deepstack feature."""
    merged, out = vision.merged_size, vision.out_hidden_size
    if vision.kind == "qwen2_5_vl":
        return Size(whole=vision.hidden_size + merger_matrices(vision) + merged + out)
    linears = Size(split=merger_matrices(vision) + merged, whole=out)
    merger = linears + Size(whole=2 * vision.hidden_size)
    deepstack = linears + Size(whole=2 * merged)
    return merger + deepstack * vision.deepstack_features
