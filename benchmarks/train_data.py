"""Geometry and synthetic global batches for `train_speed.py`."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_QWEN2_5 = {"max_position_embeddings": 131072, "rope_theta": 1e6, "rms_norm_eps": 1e-6}
# From config.json of Qwen/Qwen2.5-1.5B and Qwen/Qwen2.5-7B on the HuggingFace hub.
GEOMETRIES: dict[str, dict[str, Any]] = {
    "1.5b": _QWEN2_5
    | {
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "7b": _QWEN2_5
    | {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
    # To try the benchmark on a CPU.
    "tiny": _QWEN2_5
    | {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
}

LENGTHS = ("fixed", "mixed", "grpo")
GROUP_SIZE = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One sequence.

    Attributes:
        tokens: int64 [length].
        trained: bool [length].
    """

    tokens: Tensor
    trained: Tensor


def write_config(name: str, directory: Path) -> None:
    """Write the model's config.json."""
    import transformers

    config = transformers.Qwen2Config(architectures=["Qwen2ForCausalLM"], **GEOMETRIES[name])
    config.save_pretrained(directory)


def make_batches(name: str, lengths: str, longest: int, samples: int, batches: int) -> list[list[Example]]:
    """Return global batches of random tokens, the same for the same arguments.

    Args:
        lengths: "fixed": every sequence has the length `longest`, and all tokens but the first are trained. "mixed":
            lengths are log-uniform from 1/64 of `longest` to `longest`, and the last half to nine tenths of each
            sequence is trained. "grpo": groups of `GROUP_SIZE` answers to one question. Questions have 1/64 to 1/8 of
            `longest`; answers, which are trained, are log-normal with a median of 1/6 of `longest`, cut at `longest`.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = GEOMETRIES[name]["vocab_size"]

    def uniform(least: float, most: float) -> float:
        return least + (most - least) * float(torch.rand((), generator=generator))

    def log_uniform(least: float, most: float) -> int:
        return round(math.exp(uniform(math.log(least), math.log(most))))

    def random_tokens(count: int) -> Tensor:
        return torch.randint(vocabulary, (count,), generator=generator)

    def example() -> Example:
        if lengths == "fixed":
            return trained_from(random_tokens(longest), 1)
        length = log_uniform(max(4, longest // 64), longest)
        return trained_from(random_tokens(length), max(1, length - round(uniform(0.5, 0.9) * length)))

    def group() -> list[Example]:
        question = random_tokens(log_uniform(max(2, longest // 64), max(2, longest // 8)))
        answers = [math.exp(float(torch.randn((), generator=generator))) * longest / 6 for _ in range(GROUP_SIZE)]
        lengths = [min(max(1, round(answer)), longest - len(question)) for answer in answers]
        return [trained_from(torch.cat((question, random_tokens(length))), len(question)) for length in lengths]

    def batch() -> list[Example]:
        if lengths != "grpo":
            return [example() for _ in range(samples)]
        return [answer for _ in range(-(-samples // GROUP_SIZE)) for answer in group()][:samples]

    return [batch() for _ in range(batches)]


def trained_from(tokens: Tensor, first: int) -> Example:
    return Example(tokens=tokens, trained=torch.arange(len(tokens)) >= first)
