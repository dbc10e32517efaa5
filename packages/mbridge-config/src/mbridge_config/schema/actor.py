"""`actor`: the model that is trained."""

import dataclasses
from typing import Literal

from mbridge_config.schema.keys import alias, key, no_effect, section
from mbridge_config.schema.megatron import MegatronConfig
from mbridge_config.schema.model import ModelConfig
from mbridge_config.schema.optimizer import LrScheduleConfig, OptimizerConfig

_ONE_MODEL = "the model is built from its config.json"


@dataclasses.dataclass(kw_only=True, slots=True)
class TokenizerConfig:
    """`actor.tokenizer`."""

    tokenizer_model: str | None = key(None, "Directory of the tokenizer's files.")
    use_fast: bool = key(True, "The tokenizer's Rust implementation.")
    trust_remote_code: bool = key(False, "Run Python code that lies in the model directory.")
    padding_side: Literal["left", "right"] = no_effect("right", "training pads right and generation left")


@dataclasses.dataclass(kw_only=True, slots=True)
class ActorConfig:
    """`actor`: the trained model, its optimizer and its memory."""

    training_backend: Literal["megatron"] = key(
        "megatron", "Training engine.", refused={"fsdp": "mbridge trains with Megatron-Core"}
    )
    micro_batch_size: int = key(1, "Sequences of one forward and backward pass.", unit="sequences", minimum=1)
    global_batch_size: int | None = key(
        None,
        "Sequences of one optimizer step over all ranks. "
        "null: data.rollout_batch_size * algorithm.group_size / algorithm.n_minibatches.",
        unit="sequences",
        minimum=1,
    )
    seed: int = key(1234, "Seed of weights, dropout and sampling.", minimum=0)
    offload_optimizer: bool = key(False, "Keep master weights and moments in host memory but for updates.")
    offload_weight: bool = key(
        False, "Keep the policy's weights in host memory during sampling, and the sampler's off the GPU in training."
    )
    offload_grad: bool = key(False, "Free the memory of gradients during sampling.")
    model: ModelConfig = section(ModelConfig, "The model.")
    optim: OptimizerConfig = section(OptimizerConfig, "The optimizer.")
    lr_sched: LrScheduleConfig = section(LrScheduleConfig, "The learning rate.")
    tokenizer: TokenizerConfig = section(TokenizerConfig, "The tokenizer.")
    megatron: MegatronConfig = section(MegatronConfig, "Megatron-Core.")

    checkpoint_load_path: str | None = alias("actor.model.megatron_checkpoint")
    group_name: str | None = no_effect(None, "ranks are not split into named groups")
    mcore_gpt: bool | None = no_effect(None, _ONE_MODEL)
    spec_name: str | None = no_effect(None, _ONE_MODEL)
    enable_dp_load_balance: bool | None = no_effect(None, "sequences are always balanced over ranks by tokens")
    calculate_flops: bool | None = no_effect(None, "operations are always counted")
    eval_batch_size: int | None = no_effect(None, "validation uses micro_batch_size")
    combine_reference_model: bool | None = no_effect(None, "the app decides how the reference policy is kept")
