"""The answers that the quickstart's SFT warm-up teaches.

Most of the warm-up shows sums worked out step by step. Its last steps mix in answers without any working, so that the
model that GRPO starts from mostly guesses, is right when it happens to work a sum out, and has something to discover:
working it out pays. Every answer shown is right.
"""

from collections.abc import Sequence

import numpy as np
from mbridge_train.data.errors import DataError

from mbridge_reasoning.data.prompts import Prompt


def worked_answer(prompt: Prompt) -> str:
    """Work out a sum of a reasoning-gym arithmetic task from left to right: `3+4=7 +5=12 <answer>12</answer>`.

    Raises:
        DataError: the prompt's row holds no chain of additions and subtractions.
    """
    expression = str(prompt.row.get("metadata", {}).get("expression", ""))
    words = expression.split()
    valid = len(words) >= 3 and len(words) % 2 == 1 and all(word.isdecimal() for word in words[::2])
    if not valid or not set(words[1::2]) <= {"+", "-"}:
        raise DataError(
            f"{prompt.source}: the warm-up can work out sums such as '3 + 4 - 5', not {expression!r}; use "
            "data.reasoning_gym.task=basic_arithmetic with allow_parentheses=false and operators=[+,-], or chain_sum"
        )
    total = int(words[0])
    steps: list[str] = []
    for operator, word in zip(words[1::2], words[2::2], strict=True):
        left = "" if steps else str(total)
        total += int(word) if operator == "+" else -int(word)
        steps.append(f"{left}{operator}{word}={total}")
    return f"{' '.join(steps)} {short_answer(prompt)}"


def short_answer(prompt: Prompt) -> str:
    """Return the right answer alone, between answer tags."""
    return f"<answer>{prompt.solutions[0]}</answer>"


def warmup_answers(
    prompts: Sequence[Prompt], *, step: int, steps: int, short_steps: int, short_share: float, seed: int
) -> list[str]:
    """Return the answers to teach for the prompts of warm-up step `step` (1 … `steps`).

    In the last `short_steps` steps each answer is a short one with probability `short_share`, drawn from
    `(seed, step)` alone.
    """
    if step <= steps - short_steps:
        return [worked_answer(prompt) for prompt in prompts]
    key = np.array([seed, step], dtype=np.uint64)
    draws = np.random.Generator(np.random.Philox(key=key)).random(len(prompts))
    return [
        short_answer(prompt) if draw < short_share else worked_answer(prompt)
        for prompt, draw in zip(prompts, draws, strict=True)
    ]
