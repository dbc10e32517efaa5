"""Makes the model of the quickstart: a tiny random one, taught by SFT to be right some of the time.

GRPO can only strengthen what is sampled now and then. The warm-up runs through the same engine as GRPO. Most of it
shows sums worked out step by step. Its last steps mix in answers without any working, so that the model that GRPO
starts from mostly guesses, is right when it happens to work a sum out, and has something to discover: working it out
pays. Every answer shown is right.
"""

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from mbridge_config import ReasoningConfig, hf_directory
from mbridge_config.schema.actor import ActorConfig
from mbridge_model import save_hf
from mbridge_train.build import build_engine
from mbridge_train.data.errors import DataError
from mbridge_train.data.order import RowOrder
from mbridge_train.engine.batch import Sample, aggregation_weights
from mbridge_train.losses.sft import sft_loss
from mbridge_train.run.output import RunOutput
from mbridge_train.run.process_group import broadcast
from torch import distributed
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mbridge_reasoning.data.prompts import Prompt, tokenize_prompts
from mbridge_reasoning.quickstart.model import END_OF_TURN, write_tiny_model


def prepare_quickstart(config: ReasoningConfig, prompts: Sequence[Prompt], output: RunOutput) -> None:
    """Make the model directory unless it exists. Collective over all ranks. The warm-up sees the prompts' solutions."""
    target = hf_directory(config)
    if broadcast((target / "config.json").is_file()):
        output.message(f"using the tiny model that an earlier run made in {target}")
        return
    made = config.quickstart
    output.message(
        f"making a tiny model and teaching it {config.data.reasoning_gym.task}: {made.warmup_steps} SFT steps"
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".untrained-", dir=target.parent) as directory:
        untrained = Path(broadcast(directory))  # every rank reads rank 0's
        if distributed.get_rank() == 0:
            texts = [_text(prompt.content) for prompt in prompts]
            write_tiny_model(untrained, texts, seed=config.actor.seed, geometry=made)
        distributed.barrier()
        engine = build_engine(warmup_actor(config), config.runner, untrained, optimizer_steps=made.warmup_steps)
        tokenizer = AutoTokenizer.from_pretrained(untrained)
        tokenized = tokenize_prompts(
            prompts,
            tokenizer,
            max_prompt_length=config.data.max_prompt_length,
            apply_chat_template=config.data.apply_chat_template,
            filter_long=config.data.filter_prompt_by_length,
        )
        order = RowOrder(size=len(tokenized), batch_size=made.warmup_batch_size, seed=config.data.seed)
        for step in range(1, made.warmup_steps + 1):
            chosen = [tokenized[index] for index in order.rows(step - 1)]
            answers = warmup_answers(
                chosen,
                step=step,
                steps=made.warmup_steps,
                short_steps=made.warmup_short_steps,
                short_share=made.warmup_short_share,
                seed=config.actor.seed,
            )
            metrics = engine.forward_backward(_batch(chosen, answers, tokenizer), sft_loss)
            engine.step()
            if step % 50 == 0 or step == made.warmup_steps:
                output.message(f"warm-up step {step}/{made.warmup_steps}  loss {metrics['loss']:.4f}")
        engine.synchronize_weights()
        save_hf(engine.model, engine.handle, target)
        engine.close()


def warmup_actor(config: ReasoningConfig) -> ActorConfig:
    """Return `config.actor` with the schedule of the warm-up, which is shorter than the run."""
    made, schedule = config.quickstart, config.actor.lr_sched
    return dataclasses.replace(
        config.actor,
        optim=dataclasses.replace(config.actor.optim, lr=made.warmup_lr),
        lr_sched=dataclasses.replace(
            schedule,
            max_lr=made.warmup_lr,
            min_lr=0.0,
            lr_decay_style="linear",
            lr_decay_iters=None,
            lr_warmup_init=min(schedule.lr_warmup_init, made.warmup_lr),
            lr_warmup_iters=min(20, made.warmup_steps // 2),
            lr_warmup_fraction=None,
        ),
    )


def worked_answer(prompt: Prompt) -> str:
    """Work out a sum of a reasoning-gym arithmetic task from left to right: `3+4=7 +5=12 <answer>12</answer>`.

    Raises `DataError` if the prompt's row holds no chain of additions and subtractions.
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


def _batch(prompts: Sequence[Prompt], answers: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
    """Return each prompt with the answer to teach; only the answer and its end token are trained."""
    taught = tokenizer([answer + END_OF_TURN for answer in answers], add_special_tokens=False)["input_ids"]
    tokens = [torch.tensor([*prompt.tokens, *answer]) for prompt, answer in zip(prompts, taught, strict=True)]
    masks = [torch.arange(len(row)) >= len(prompt.tokens) for prompt, row in zip(prompts, tokens, strict=True)]
    weights = aggregation_weights(masks, "token-mean")
    return [Sample(tokens=row, weights=weight) for row, weight in zip(tokens, weights, strict=True)]


def _text(content: str | list[dict[str, str]]) -> str:
    return content if isinstance(content, str) else "".join(message["content"] for message in content)
