"""Makes the model of the quickstart: a tiny random one, taught by SFT to be right some of the time.

GRPO can only strengthen what is sampled now and then. The warm-up runs through the same engine as GRPO.
"""

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from mbridge_config import ReasoningConfig, hf_directory
from mbridge_config.schema.actor import ActorConfig
from mbridge_model import save_hf
from mbridge_train.build import build_engine
from mbridge_train.data.order import RowOrder
from mbridge_train.engine.batch import Sample, aggregation_weights
from mbridge_train.losses.policy import sft_loss
from mbridge_train.run.output import RunOutput
from mbridge_train.run.process_group import broadcast
from torch import distributed
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mbridge_reasoning.data.prompts import Prompt, tokenize_prompts
from mbridge_reasoning.quickstart.model import END_OF_TURN, write_tiny_model
from mbridge_reasoning.quickstart.warmup import warmup_answers


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


def _batch(prompts: Sequence[Prompt], answers: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
    """Return each prompt with the answer to teach; only the answer and its end token are trained."""
    taught = tokenizer([answer + END_OF_TURN for answer in answers], add_special_tokens=False)["input_ids"]
    tokens = [torch.tensor([*prompt.tokens, *answer]) for prompt, answer in zip(prompts, taught, strict=True)]
    masks = [torch.arange(len(row)) >= len(prompt.tokens) for prompt, row in zip(prompts, tokens, strict=True)]
    weights = aggregation_weights(masks, "token-mean")
    return [Sample(tokens=row, weights=weight) for row, weight in zip(tokens, weights, strict=True)]


def _text(content: str | list[dict[str, str]]) -> str:
    return content if isinstance(content, str) else "".join(message["content"] for message in content)
