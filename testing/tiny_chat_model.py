"""A tiny random text model that can chat: weights, tokenizer and chat template."""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from testing.tiny_models import VOCAB_SIZE, make_model

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'][0] + ': ' + message['content'] + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a: ' }}{% endif %}"
)


def write_chat_model(directory: Path) -> None:
    """Write a Qwen2 with a tokenizer of the printable ASCII characters to `directory`."""
    make_model("qwen2", True, directory)
    vocabulary = {token: number for number, token in enumerate([*map(chr, range(33, 127)), "Ġ", "Ċ"])}
    assert len(vocabulary) < VOCAB_SIZE
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<end>", special=True)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(directory)
