"""Prompts and their right answers."""

import dataclasses
from typing import Any, Literal

from mbridge_config.schema.keys import key, no_effect, section


@dataclasses.dataclass(kw_only=True, slots=True)
class ReasoningGymConfig:
    """`data.reasoning_gym`: problems made by a reasoning-gym task, where `data.type` is reasoning_gym."""

    task: str | None = key(None, "Name of the task, such as basic_arithmetic.")
    parameters: dict[str, Any] = key({}, "Parameters of the task, as reasoning-gym names them.")
    train_size: int = key(1000, "Problems to train on.", unit="problems", minimum=1)
    validation_size: int = key(100, "Problems held out of training.", unit="problems", minimum=1)


@dataclasses.dataclass(kw_only=True, slots=True)
class DataConfig:
    """`data`: what is trained and validated on."""

    type: Literal["math", "reasoning_gym"] = key("math", "math: json or jsonl files. reasoning_gym: made problems.")
    train_data_paths: list[str] = key([], "json or jsonl files to train on.")
    val_data_paths: list[str] = key([], "json or jsonl files to validate on.")
    prompt_key: str = key("prompt", "Field of a record that holds the prompt.")
    answer_key: str = key("solutions", "Field of a record that holds the right answer or answers.")
    max_prompt_length: int = key(512, "Longest prompt.", unit="tokens", minimum=1)
    filter_prompt_by_length: bool = key(False, "Leave out longer prompts; if false they are an error.")
    apply_chat_template: bool = key(False, "Wrap the prompt in the tokenizer's chat template.")
    rollout_batch_size: int = key(32, "Prompts of one training step.", unit="prompts", minimum=1)
    val_rollout_batch_size: int | None = key(
        None, "Prompts validated at once. null: all of them.", unit="prompts", minimum=1
    )
    num_workers: int = no_effect(0, "all data is read before the first step, by the training process")
    shuffle: bool = key(True, "Shuffle the training data at each epoch.")
    validation_shuffle: bool = no_effect(False, "every validation uses all problems, so their order is of no matter")
    seed: int = key(1234, "Seed of the data order and of made problems.", minimum=0)
    reasoning_gym: ReasoningGymConfig = section(ReasoningGymConfig, "The reasoning-gym task.")

    dataset_name: str | None = no_effect(None, "data.type and the data paths say what is read")
