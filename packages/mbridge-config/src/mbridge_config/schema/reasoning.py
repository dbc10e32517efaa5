"""The config of a reasoning run, all sections together."""

import dataclasses
from typing import Any

from mbridge_config.facts.model import MOST_LAYERS
from mbridge_config.load.origin import Origin
from mbridge_config.schema.actor import ActorConfig
from mbridge_config.schema.algorithm import AlgorithmConfig
from mbridge_config.schema.cluster import ClusterConfig, LauncherConfig
from mbridge_config.schema.data import DataConfig
from mbridge_config.schema.keys import key, no_effect, section
from mbridge_config.schema.rollout import RewardConfig, RolloutConfig
from mbridge_config.schema.runner import RunnerConfig


@dataclasses.dataclass(kw_only=True, slots=True)
class QuickstartConfig:
    """`quickstart`: the tiny model that is made where no model is given."""

    enabled: bool = key(False, "Make the model at ckpt_convertor.hf_model_path if it is not there.")
    num_hidden_layers: int = key(2, "Layers of the made model.", minimum=1, maximum=MOST_LAYERS)
    hidden_size: int = key(128, "Width of the made model; 32 for each query head.", minimum=1)
    intermediate_size: int = key(384, "Width of its MLP.", minimum=1)
    num_attention_heads: int = key(4, "Query heads of the made model.", minimum=1)
    num_key_value_heads: int = key(2, "Key and value heads of the made model.", minimum=1)
    max_position_embeddings: int = key(512, "Longest sequence of the made model.", unit="tokens", minimum=2)
    tie_word_embeddings: bool = key(False, "Input and output embeddings are one tensor.")
    vocab_size: int = key(384, "Largest vocabulary of the made tokenizer.", minimum=300)
    warmup_steps: int = key(400, "SFT steps before GRPO.", unit="optimizer steps", minimum=0)
    warmup_batch_size: int = key(32, "Sequences of one SFT step.", unit="sequences", minimum=1)
    warmup_lr: float = key(2e-3, "Highest learning rate of the SFT steps; it falls linearly to 0.", above=0.0)
    warmup_short_steps: int = key(
        100, "Last SFT steps, which also show answers without working.", unit="optimizer steps", minimum=0
    )
    warmup_short_share: float = key(0.7, "Share of answers without working in those.", minimum=0.0, maximum=1.0)


@dataclasses.dataclass(kw_only=True, slots=True)
class ReasoningConfig:
    """RL on answers that can be verified. `origin` remembers where each key was set."""

    runner: RunnerConfig = section(RunnerConfig, "The run.")
    algorithm: AlgorithmConfig = section(AlgorithmConfig, "The algorithm.")
    rollout: RolloutConfig = section(RolloutConfig, "Generation.")
    data: DataConfig = section(DataConfig, "Data.")
    actor: ActorConfig = section(ActorConfig, "The trained model.")
    reward: RewardConfig = section(RewardConfig, "Rewards.")
    cluster: ClusterConfig = section(ClusterConfig, "Hosts.")
    launcher: LauncherConfig = section(LauncherConfig, "Processes.")
    quickstart: QuickstartConfig = section(QuickstartConfig, "The made model.")
    critic: dict[str, Any] = key({}, "A critic (PPO); refused where critic.use_critic_model is true.")
    inference: dict[str, Any] = no_effect({}, "log-probabilities are computed by the training ranks")
    origin: Origin = dataclasses.field(default_factory=Origin, repr=False, compare=False)
