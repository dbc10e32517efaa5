"""State the facts of the tiny models that quickstarts create, before their config.json exists.

A quickstart is checked like any other run, which needs the geometry before the app writes the model.
"""

from pathlib import Path
from typing import Any

from mbridge_config.facts.model import HFFacts
from mbridge_config.facts.vision import VisionFacts
from mbridge_config.schema.run_kinds import RunConfig
from mbridge_config.schema.sft import SFTQuickstartConfig


def made_model_facts(config: RunConfig, directory: Path) -> HFFacts:
    """Return the facts of the model that the quickstart is going to create in `directory`."""
    made = config.quickstart
    if isinstance(made, SFTQuickstartConfig):
        family = _vision_language(made)
    else:
        head_dim = max(1, made.hidden_size // made.num_attention_heads)
        family = {"architectures": ("Qwen2ForCausalLM",), "model_type": "qwen2", "head_dim": head_dim, "qkv_bias": True}
    return HFFacts(
        directory=directory,
        num_layers=made.num_hidden_layers,
        hidden_size=made.hidden_size,
        num_attention_heads=made.num_attention_heads,
        num_query_groups=made.num_key_value_heads,
        ffn_hidden_size=made.intermediate_size,
        vocab_size=made.vocab_size,
        max_position_embeddings=made.max_position_embeddings,
        tied_embeddings=made.tie_word_embeddings,
        activation="silu",
        **family,
    )


def _vision_language(made: SFTQuickstartConfig) -> dict[str, Any]:
    tower = VisionFacts(
        kind="qwen3_vl",
        depth=made.vision_depth,
        hidden_size=made.vision_hidden_size,
        intermediate_size=made.vision_intermediate_size,
        num_heads=made.vision_num_heads,
        out_hidden_size=made.hidden_size,
        patch_size=8,
        num_position_embeddings=16,
        deepstack_features=len(made.deepstack_visual_indexes),
    )
    return {
        "architectures": ("Qwen3VLForConditionalGeneration",),
        "model_type": "qwen3_vl_text",
        "head_dim": 32,
        "qk_layernorm": True,
        "has_vision": True,
        "vision_heads": tower.num_heads,
        "vision_ffn_hidden_size": tower.intermediate_size,
        "deepstack_visual_indexes": tuple(made.deepstack_visual_indexes),
        "vision": tower,
    }
