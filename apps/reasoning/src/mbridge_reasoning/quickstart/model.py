"""A tiny random Qwen2 and its tokenizer, written as an ordinary HuggingFace directory.

Everything after it reads the directory as it would read a downloaded model.
"""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

END_OF_TURN = "<|end|>"
PADDING = "<|pad|>"
USER = "<|user|>"
ASSISTANT = "<|assistant|>"
# The answer tags are whole tokens, and not special ones: decoding keeps them for the scorer to find.
ANSWER_TAGS = ("<answer>", "</answer>")

QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TinyGeometry:
    """Sizes of the tiny model. `hidden_size` must be `num_attention_heads` times a `head_dim` of 32."""

    hidden_size: int = 128
    intermediate_size: int = 384
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 512
    vocab_size: int = 384

    def __post_init__(self) -> None:
        if self.hidden_size != 32 * self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} with num_attention_heads={self.num_attention_heads} gives a head_dim "
                f"other than 32, which CPU attention kernels of inference engines refuse; "
                f"set hidden_size to {32 * self.num_attention_heads}"
            )


def build_tokenizer(corpus: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on `corpus`.

    As in the Qwen tokenizers every digit is one token, and any text round-trips because all 256 bytes are in the
    vocabulary. The result has fewer than `vocab_size` entries where the corpus has no further pairs to merge.
    """
    tokenizer = Tokenizer(models.BPE())
    # Normalization and splitting are those of Qwen2, because transformers gives them to any tokenizer beside a Qwen2
    # config; with the same ones here it makes no difference which class reads the files.
    tokenizer.normalizer = normalizers.NFC()
    words = Regex(QWEN2_WORDS)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special_tokens = [PADDING, END_OF_TURN, USER, ASSISTANT]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(ANSWER_TAGS),
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in ANSWER_TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TURN,
        pad_token=PADDING,
        extra_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def write_tiny_model(
    directory: str | Path, corpus: Iterable[str], *, seed: int, geometry: TinyGeometry | None = None
) -> Path:
    """Write `config.json`, `generation_config.json`, fp32 `model.safetensors` and the tokenizer files to `directory`.

    The same `corpus`, `seed` and `geometry` give the same bytes. The caller's random state is left as it was.
    """
    geometry = geometry or TinyGeometry()
    directory = Path(directory)
    tokenizer = build_tokenizer(corpus, geometry.vocab_size)
    config = Qwen2Config(
        # vocab_size is the requested one, not the tokenizer's, so that a tensor-parallel split stays even.
        **dataclasses.asdict(geometry),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    directory.mkdir(parents=True, exist_ok=True)
    config.architectures = ["Qwen2ForCausalLM"]
    config.save_pretrained(directory)
    model.generation_config.save_pretrained(directory)
    tensors = model.state_dict()
    if geometry.tie_word_embeddings:
        del tensors["lm_head.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(directory)
    return directory
