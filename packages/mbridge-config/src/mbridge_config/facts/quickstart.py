"""State the facts of the tiny models that quickstarts create, before their config.json exists.

A quickstart is checked like any other run, which needs the geometry before the app writes the model.
"""

from pathlib import Path

from mbridge_config.facts.model import HFFacts
from mbridge_config.facts.vision import VisionFacts
from mbridge_config.schema.reasoning import ReasoningConfig
from mbridge_config.schema.run_kinds import RunConfig
from mbridge_config.schema.sft import SFTConfig


def made_model_facts(config: RunConfig, directory: Path) -> HFFacts:
    """Return the facts of the model that the quickstart is going to create in `directory`."""
    if isinstance(config, SFTConfig):
        return _vision_language(config, directory)
    return _text(config, directory)


def _text(config: ReasoningConfig, directory: Path) -> HFFacts:
    made = config.quickstart
    return HFFacts(
        directory=directory,
        architectures=("Qwen2ForCausalLM",),
        model_type="qwen2",
        num_layers=made.num_hidden_layers,
        hidden_size=made.hidden_size,
        num_attention_heads=made.num_attention_heads,
        num_query_groups=made.num_key_value_heads,
        head_dim=max(1, made.hidden_size // made.num_attention_heads),
        ffn_hidden_size=made.intermediate_size,
        vocab_size=made.vocab_size,
        max_position_embeddings=made.max_position_embeddings,
        tied_embeddings=made.tie_word_embeddings,
        qkv_bias=True,
        activation="silu",
    )


def _vision_language(config: SFTConfig, directory: Path) -> HFFacts:
    made = config.quickstart
    return HFFacts(
        directory=directory,
        architectures=("Qwen3VLForConditionalGeneration",),
        model_type="qwen3_vl_text",
        num_layers=made.num_hidden_layers,
        hidden_size=made.hidden_size,
        num_attention_heads=made.num_attention_heads,
        num_query_groups=made.num_key_value_heads,
        head_dim=32,
        ffn_hidden_size=made.intermediate_size,
        vocab_size=made.vocab_size,
        max_position_embeddings=made.max_position_embeddings,
        tied_embeddings=made.tie_word_embeddings,
        qk_layernorm=True,
        activation="silu",
        has_vision=True,
        vision_heads=made.vision_num_heads,
        vision_ffn_hidden_size=made.vision_intermediate_size,
        deepstack_visual_indexes=tuple(made.deepstack_visual_indexes),
        vision=VisionFacts(
            kind="qwen3_vl",
            depth=made.vision_depth,
            hidden_size=made.vision_hidden_size,
            intermediate_size=made.vision_intermediate_size,
            num_heads=made.vision_num_heads,
            out_hidden_size=made.hidden_size,
            patch_size=8,
            num_position_embeddings=16,
            deepstack_features=len(made.deepstack_visual_indexes),
        ),
    )
