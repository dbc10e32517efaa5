"""Writing a tiny random Qwen3-VL and its processor as an ordinary HuggingFace directory.

The run then reads the directory as it would read a downloaded model.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from mbridge_config.schema.sft import SFTQuickstartConfig
from transformers import (
    GenerationConfig,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)
from transformers.utils import logging

END_OF_TURN = "<|im_end|>"
PADDING = "<|endoftext|>"
IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
PATCH_SIZE, MERGE_SIZE = 8, 2
_SPECIAL = [PADDING, "<|im_start|>", END_OF_TURN, VISION_START, VISION_END, IMAGE, VIDEO]

CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.type == 'image' %}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' }}
            {%- elif part.type == 'video' %}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' }}
            {%- elif part.type == 'text' %}
                {{- part.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def build_processor(corpus: Iterable[str], vocab_size: int) -> Qwen3VLProcessor:
    """Return a processor like that of Qwen3-VL: byte-level BPE trained on `corpus`, and patches of 8 x 8 pixels.

    Text is split as Qwen splits it: every digit is one token, and any text round-trips because all 256 bytes are in the
    vocabulary. The vocabulary has fewer than `vocab_size` entries if the corpus has no further pairs to merge.
    """
    texts = [*corpus, "system\n", "user\n", "assistant\n"] * 2  # a pair that occurs once is not merged
    tokenizer = Qwen2Tokenizer(eos_token=END_OF_TURN, pad_token=PADDING, unk_token=PADDING).train_new_from_iterator(
        texts, vocab_size, new_special_tokens=_SPECIAL, show_progress=False
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    patches = {"patch_size": PATCH_SIZE, "temporal_patch_size": 2, "merge_size": MERGE_SIZE}
    normalization = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    size = {"shortest_edge": (PATCH_SIZE * MERGE_SIZE) ** 2, "longest_edge": 512 * 512}
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size, **patches, **normalization),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(size=dict(size), **patches, **normalization),
        chat_template=CHAT_TEMPLATE,
    )


def write_tiny_vision_model(
    directory: str | Path, corpus: Iterable[str], *, seed: int, geometry: SFTQuickstartConfig | None = None
) -> Path:
    """Write configs, fp32 `model.safetensors`, and the files of tokenizer and processor to `directory`, and return it.

    The same `corpus`, `seed` and `geometry` give the same bytes. The caller's random state is restored.

    Heads have 32 channels, the fewest that all attention kernels support. An image token covers 16 x 16 pixels: 2 x 2
    patches of 8 x 8. So a 32 x 32 image has 16 patches and 4 tokens.
    """
    made = geometry or SFTQuickstartConfig()
    processor = build_processor(corpus, made.vocab_size)
    ends = {"eos_token_id": processor.tokenizer.eos_token_id, "pad_token_id": processor.tokenizer.pad_token_id}
    config = Qwen3VLConfig(
        text_config={
            # All requested rows, used or not, so that tensor-parallel ranks get equal shares of the embedding.
            "vocab_size": made.vocab_size,
            "hidden_size": made.hidden_size,
            "intermediate_size": made.intermediate_size,
            "num_hidden_layers": made.num_hidden_layers,
            "num_attention_heads": made.num_attention_heads,
            "num_key_value_heads": made.num_key_value_heads,
            "head_dim": 32,
            "max_position_embeddings": made.max_position_embeddings,
            "initializer_range": made.initializer_range,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
            "tie_word_embeddings": made.tie_word_embeddings,
            **ends,
        },
        vision_config={
            "depth": made.vision_depth,
            "hidden_size": made.vision_hidden_size,
            "intermediate_size": made.vision_intermediate_size,
            "num_heads": made.vision_num_heads,
            "patch_size": PATCH_SIZE,
            "spatial_merge_size": MERGE_SIZE,
            "temporal_patch_size": 2,
            "out_hidden_size": made.hidden_size,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": list(made.deepstack_visual_indexes),
            "initializer_range": made.initializer_range,
        },
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
        vision_start_token_id=processor.vision_start_token_id,
        vision_end_token_id=processor.vision_end_token_id,
        tie_word_embeddings=made.tie_word_embeddings,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(**ends, do_sample=False)
    logging.disable_progress_bar()  # of a single file
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return Path(directory)
