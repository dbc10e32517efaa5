"""Write two tiny random HuggingFace models.

python tiny_models.py DIRECTORY    # makes DIRECTORY/qwen2 and DIRECTORY/qwen3_vl
"""

import sys
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, Qwen2Config, Qwen3VLConfig
from transformers.utils import logging

text: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
rotary = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
vision = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 4,
    "num_position_embeddings": 36,
    "out_hidden_size": 64,
    "deepstack_visual_indexes": [0, 1],
}
tokens: dict[str, Any] = {
    "image_token_id": 120,
    "video_token_id": 121,
    "vision_start_token_id": 122,
    "vision_end_token_id": 123,
}

logging.disable_progress_bar()
directory = Path(sys.argv[1])
AutoModelForCausalLM.from_config(Qwen2Config(**text)).save_pretrained(directory / "qwen2")
vision_config = Qwen3VLConfig(
    text_config=text | {"head_dim": 32, "rope_parameters": rotary}, vision_config=vision, **tokens
)
AutoModelForImageTextToText.from_config(vision_config).save_pretrained(directory / "qwen3_vl")
