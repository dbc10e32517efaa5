"""Tell from the name of a GPT model's parameter how tensor parallelism cuts it and to which stage it belongs.

The rules are those of megatron.core.models.gpt and its layers (column-parallel: the output dimension 0 is cut;
row-parallel: the input dimension 1), with the names of both the Transformer Engine's and the local layers.
"""

import re
from dataclasses import dataclass
from typing import Literal

from mbridge_ckpt.manifest.placement import ParameterPlacement, Stage

EMBEDDING, OUTPUT_LAYER = "embedding.word_embeddings.weight", "output_layer.weight"

Cut = Literal["whole", "rows", "columns", "gated_rows", "buffer"]
"""The share of a tensor that a tensor rank holds: all of it, its rows, its columns, or, if the layer is gated, rows of
the gate and of the up projection; "buffer": all of it, but it is no parameter, so no optimizer knows it."""

_NORM = r"(?:[a-z_]*norm|ln_[a-z]+)\.(?:weight|bias)"
_LAYER_RULES: tuple[tuple[str, Cut], ...] = (
    (rf"(?:self_attention\.)?{_NORM}", "whole"),
    (r"(?:self_attention\.linear_[a-z_]+|mlp\.(?:shared_experts\.)?linear_fc1)\.layer_norm_(?:weight|bias)", "whole"),
    (r"self_attention\.(?:linear_qkv|linear_q_proj|linear_q_up_proj|linear_kv_up_proj)\.(?:weight|bias)", "rows"),
    (r"self_attention\.(?:linear_q_down_proj|linear_kv_down_proj)\.weight", "whole"),
    (r"self_attention\.linear_proj\.weight", "columns"),
    (r"self_attention\.linear_proj\.bias", "whole"),
    (r"mlp\.(?:shared_experts\.|experts\.local_experts\.[0-9]+\.)?linear_fc1\.(?:weight|bias)", "gated_rows"),
    (r"mlp\.(?:shared_experts\.|experts\.local_experts\.[0-9]+\.)?linear_fc2\.weight", "columns"),
    (r"mlp\.(?:shared_experts\.|experts\.local_experts\.[0-9]+\.)?linear_fc2\.bias", "whole"),
    (r"mlp\.experts\.linear_fc1\.(?:weight|bias)[0-9]+", "gated_rows"),
    (r"mlp\.experts\.linear_fc2\.weight[0-9]+", "columns"),
    (r"mlp\.experts\.linear_fc2\.bias[0-9]+", "whole"),
    (r"mlp\.(?:router\.(?:weight|bias)|shared_experts\.gate_weight)", "whole"),
    (r"mlp\.router\.(?:expert_bias|local_tokens_per_expert)", "buffer"),
)
_RULES: tuple[tuple[str, Cut, Stage], ...] = (
    (re.escape(EMBEDDING), "rows", "first"),
    (r"embedding\.position_embeddings\.weight", "whole", "first"),
    *((rf"decoder\.layers\.[0-9]+\.{rule}", cut, "layer") for rule, cut in _LAYER_RULES),
    (r"decoder\.final_(?:layer)?norm\.(?:weight|bias)", "whole", "last"),
    (r"output_layer\.(?:weight|bias)", "rows", "last"),
)
_COMPILED = tuple((re.compile(rule), cut, stage) for rule, cut, stage in _RULES)
_EXPERT = re.compile(
    r"(.*\.mlp\.experts\.)(?:(local_experts\.)([0-9]+)(\..*)|(linear_fc[12]\.(?:weight|bias))([0-9]+))"
)
_LAYER = re.compile(r"decoder\.layers\.([0-9]+)\..*")


@dataclass(frozen=True, slots=True)
class NamedParameter:
    """A parameter by its name in a rank's file. Layer and expert are numbered as in the file; None if it has none."""

    name: str
    cut: Cut
    stage: Stage
    layer: int | None
    expert: int | None

    def placement(self, *, layer_offset: int, expert_offset: int, stride: int) -> ParameterPlacement:
        """Return its placement in a file that holds the experts of all expert ranks, under their global numbers."""
        layer = None if self.layer is None else self.layer + layer_offset
        name, expert = self.name, None
        if self.expert is not None:
            expert = self.expert + expert_offset
            match = _EXPERT.fullmatch(name)
            assert match is not None
            name = f"{match[1]}{match[2]}{expert}{match[4]}" if match[2] else f"{match[1]}{match[5]}{expert}"
        return ParameterPlacement(
            name=name,
            global_name=re.sub(r"^(decoder\.layers\.)[0-9]+", rf"\g<1>{layer}", name),
            stage=self.stage,
            layer=layer,
            expert=expert,
            partition_dim={"rows": 0, "gated_rows": 0, "columns": 1}.get(self.cut, -1),
            partition_stride=stride,
        )


def parse_name(name: str) -> NamedParameter | None:
    """Look `name` up in the table; None if it is not there."""
    for rule, cut, stage in _COMPILED:
        if rule.fullmatch(name):
            layer, expert = _LAYER.fullmatch(name), _EXPERT.fullmatch(name)
            expert_number = int(expert[3] or expert[6]) if expert else None
            return NamedParameter(name, cut, stage, int(layer[1]) if layer else None, expert_number)
    return None
