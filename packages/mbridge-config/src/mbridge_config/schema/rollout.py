"""Generation of answers, and their reward."""

import dataclasses
from typing import Any, Literal

from mbridge_config.schema.keys import alias, key, no_effect, section

_ENGINE = "belongs to a serving engine; answers are generated with transformers"
_GROUPS = "ranks are not split into named groups"
_WEIGHTS = "weights are streamed tensor by tensor and compared in tests"


@dataclasses.dataclass(kw_only=True, slots=True)
class RolloutModelConfig:
    """`rollout.model`: the model that generates; always the one that is trained."""

    model_path: str | None = key(
        None, "HuggingFace directory. If set, it must be actor.megatron.ckpt_convertor.hf_model_path."
    )
    model_type: str | None = no_effect(None, "the architecture is read from the model's config.json")
    precision: str | None = no_effect(None, "generation uses actor.model.precision")


@dataclasses.dataclass(kw_only=True, slots=True)
class RolloutConfig:
    """`rollout`: generation of answers."""

    model: RolloutModelConfig = section(RolloutModelConfig, "The generating model.")
    rollout_backend: Literal["transformers", "vllm", "sglang"] = key(
        "transformers", "Engine that generates; in this version all of them mean transformers."
    )
    max_running_requests: int = key(64, "Sequences that one rank generates at once.", unit="sequences", minimum=1)
    print_outputs: bool = key(False, "Print each answer.")
    return_logprobs: bool = no_effect(True, "log-probabilities of generation are always kept, to measure the mismatch")

    model_dir: str | None = alias("rollout.model.model_path")
    model_arch: str | None = no_effect(None, "the architecture is read from the model's config.json")
    precision: str | None = no_effect(None, "generation uses actor.model.precision")
    group_name: str | None = no_effect(None, _GROUPS)
    gpu_memory_utilization: float | None = no_effect(None, _ENGINE)
    enforce_eager: bool | None = no_effect(None, _ENGINE)
    distributed_executor_backend: str | None = no_effect(None, _ENGINE)
    disable_log_stats: bool | None = no_effect(None, _ENGINE)
    detokenize: bool | None = no_effect(None, _ENGINE)
    padding: int | None = no_effect(None, "the tokenizer's padding token is used")
    eos: int | None = no_effect(None, "the tokenizer's end token is used")
    sglang: dict[str, Any] = no_effect({}, _ENGINE)
    vllm: dict[str, Any] = no_effect({}, _ENGINE)
    sglang_decode_log_interval: int | None = no_effect(None, _ENGINE)
    use_torch_compile: bool | None = no_effect(None, _ENGINE)
    torch_compile_max_bs: int | None = no_effect(None, _ENGINE)
    tensor_parallel_size: int | None = no_effect(None, _ENGINE)
    pipeline_parallel_size: int | None = no_effect(None, _ENGINE)
    cuda_graph_max_bs: int | None = no_effect(None, _ENGINE)
    weight_reload: str | None = no_effect(None, _WEIGHTS)
    validate_weight: bool | None = no_effect(None, _WEIGHTS)
    validate_weight_first_sync: bool | None = no_effect(None, _WEIGHTS)
    validate_save_dir: str | None = no_effect(None, _WEIGHTS)


@dataclasses.dataclass(kw_only=True, slots=True)
class RewardConfig:
    """`reward`: what an answer is worth."""

    reward_type: Literal["math", "reasoning_gym"] = key(
        "math", "math: math-verify. reasoning_gym: the scorer of the task."
    )
    reward_scale: float = key(1.0, "Reward of a right answer.", above=0.0)
    timeout: float = key(10.0, "Longest time one answer may take to verify.", unit="seconds", above=0.0)
    use_reward_model: bool = key(
        False, "Score with a trained model.", refused={"True": "reward models are not in this version"}
    )
    reward_weights: dict[str, Any] = no_effect({}, "an answer is right or wrong; its reward has no parts")
    tokenizer: dict[str, Any] = no_effect({}, "rewards are computed from text")
    group_name: str | None = no_effect(None, _GROUPS)
