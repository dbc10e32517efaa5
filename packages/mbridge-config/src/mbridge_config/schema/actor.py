"""`actor`: the model that is trained."""

import dataclasses
from typing import Literal

from mbridge_config.schema.keys import Status, key, section
from mbridge_config.schema.megatron import MegatronConfig
from mbridge_config.schema.model import ModelConfig
from mbridge_config.schema.optimizer import LrScheduleConfig, OptimizerConfig


@dataclasses.dataclass(kw_only=True, slots=True)
class TokenizerConfig:
    """`actor.tokenizer`."""

    tokenizer_model: str | None = key(None, "Directory of the tokenizer's files.")
    trust_remote_code: bool = key(False, "Run Python code that lies in the model directory.")


@dataclasses.dataclass(kw_only=True, slots=True)
class ActorConfig:
    """`actor`: the trained model, its optimizer and its memory."""

    training_backend: Literal["megatron"] = key(
        "megatron",
        "Training engine.",
        status=Status.REFUSED,
        refused={"fsdp": "mbridge trains with Megatron-Core"},
    )
    micro_batch_size: int = key(1, "Sequences per forward and backward pass.", unit="sequences", minimum=1)
    global_batch_size: int | None = key(
        None,
        "Sequences per optimizer step, over all ranks. "
        "null: data.rollout_batch_size * algorithm.group_size / algorithm.n_minibatches.",
        unit="sequences",
        minimum=1,
    )
    seed: int = key(1234, "Seed of weights, dropout and sampling.", minimum=0)
    offload_optimizer: bool = key(False, "Keep master weights and moments in host memory between updates.")
    offload_weight: bool = key(
        False,
        "Keep the policy's weights in host memory during generation, and the generating model's during training.",
    )
    offload_grad: bool = key(False, "Free the memory of gradients during generation.")
    model: ModelConfig = section(ModelConfig, "The model.")
    optim: OptimizerConfig = section(OptimizerConfig, "The optimizer.")
    lr_sched: LrScheduleConfig = section(LrScheduleConfig, "The learning rate.")
    tokenizer: TokenizerConfig = section(TokenizerConfig, "The tokenizer.")
    megatron: MegatronConfig = section(MegatronConfig, "Megatron-Core.")
