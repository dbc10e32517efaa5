"""Generation of answers, and their reward."""

import dataclasses
from typing import Literal

from mbridge_config.schema.keys import key, section


@dataclasses.dataclass(kw_only=True, slots=True)
class RolloutModelConfig:
    """`rollout.model`: the model that generates; always the one that is trained."""

    model_path: str | None = key(
        None, "HuggingFace directory. If set, it must be actor.megatron.ckpt_convertor.hf_model_path."
    )


@dataclasses.dataclass(kw_only=True, slots=True)
class RolloutConfig:
    """`rollout`: generation of answers."""

    model: RolloutModelConfig = section(RolloutModelConfig, "The generating model.")
    rollout_backend: Literal["transformers", "vllm", "sglang"] = key(
        "transformers", "Engine that generates; in this version every value means transformers."
    )
    max_running_requests: int = key(64, "Sequences that one rank generates at once.", unit="sequences", minimum=1)
    print_outputs: bool = key(False, "Print each answer.")


@dataclasses.dataclass(kw_only=True, slots=True)
class RewardConfig:
    """`reward`: what an answer is worth."""

    reward_type: Literal["math", "reasoning_gym"] = key(
        "math", "math: math-verify. reasoning_gym: the scorer of the task."
    )
    function: str | None = key(
        None,
        "Your own function instead of reward_type: path/to/file.py:name or module:name, called with the text of the "
        "answer, the row of its problem as a dict, and why it ended (end_token, stop_string or length).",
    )
    reward_scale: float = key(1.0, "Reward of a right answer.", above=0.0)
    timeout: float = key(
        10.0,
        "Longest time one answer, or one call of a batched function, may take to score.",
        unit="seconds",
        above=0.0,
    )
    memory_limit: float = key(8.0, "Address space of a process that scores answers.", unit="GiB", minimum=1.0)
