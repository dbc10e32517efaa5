"""A tiny random Qwen2 and its tokenizer, written as an ordinary HuggingFace directory.

Everything after it reads the directory as it would read a downloaded model.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from mbridge_config.schema.reasoning import QuickstartConfig
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
from transformers.utils import logging

END_OF_TURN = "<|end|>"
PADDING = "<|pad|>"
USER = "<|user|>"
ASSISTANT = "<|assistant|>"
# The answer tags are whole tokens, and not special ones: decoding keeps them for the scorer to find.
ANSWER_TAGS = ("<answer>", "</answer>")

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def build_tokenizer(corpus: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE tokenizer on `corpus`.

    As in the Qwen tokenizers every digit is one token, and any text round-trips because all 256 bytes are in the
    vocabulary. The result has fewer than `vocab_size` entries where the corpus has no further pairs to merge.
    """
    untrained = Qwen2Tokenizer(eos_token=PADDING, pad_token=PADDING, unk_token=PADDING)
    tokenizer: PreTrainedTokenizerBase = untrained.train_new_from_iterator(
        corpus,
        vocab_size - len(ANSWER_TAGS),
        new_special_tokens=[PADDING, END_OF_TURN, USER, ASSISTANT],
        show_progress=False,
    )
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in ANSWER_TAGS])
    tokenizer.eos_token = END_OF_TURN
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def write_tiny_model(
    directory: str | Path, corpus: Iterable[str], *, seed: int, geometry: QuickstartConfig | None = None
) -> Path:
    """Write `config.json`, `generation_config.json`, fp32 `model.safetensors` and the tokenizer files to `directory`.

    The same `corpus`, `seed` and `geometry` give the same bytes. The caller's random state is left as it was.
    """
    made = geometry or QuickstartConfig()
    if made.hidden_size != 32 * made.num_attention_heads:
        # CPU attention kernels of inference engines refuse other widths of a head.
        raise ValueError(f"heads must be 32 wide: set hidden_size to {32 * made.num_attention_heads}")
    tokenizer = build_tokenizer(corpus, made.vocab_size)
    config = Qwen2Config(
        vocab_size=made.vocab_size,  # not the tokenizer's, so that a tensor-parallel split stays even
        hidden_size=made.hidden_size,
        intermediate_size=made.intermediate_size,
        num_hidden_layers=made.num_hidden_layers,
        num_attention_heads=made.num_attention_heads,
        num_key_value_heads=made.num_key_value_heads,
        max_position_embeddings=made.max_position_embeddings,
        tie_word_embeddings=made.tie_word_embeddings,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
    logging.disable_progress_bar()  # of a single file
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return Path(directory)
