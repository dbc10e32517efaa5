"""The config of a reasoning run, all sections together."""

import dataclasses
from typing import Any, Literal

from mbridge_config.schema.actor import MOST_LAYERS, ActorConfig, TokenizerConfig
from mbridge_config.schema.algorithm import AlgorithmConfig
from mbridge_config.schema.keys import Status, key, section
from mbridge_config.schema.provenance import Provenance
from mbridge_config.schema.rollout import RewardConfig, RolloutConfig
from mbridge_config.schema.runner import ClusterConfig, LauncherConfig, RunnerConfig


@dataclasses.dataclass(kw_only=True, slots=True)
class ReasoningGymConfig:
    """`data.reasoning_gym`: problems that a reasoning-gym task generates, if `data.type` is reasoning_gym."""

    task: str | None = key(None, "Name of the task, such as basic_arithmetic.")
    parameters: dict[str, Any] = key({}, "Parameters of the task, as reasoning-gym names them.")
    train_size: int = key(1000, "Problems to train on.", unit="problems", minimum=1)
    validation_size: int = key(100, "Problems held out of training.", unit="problems", minimum=1)


@dataclasses.dataclass(kw_only=True, slots=True)
class DataConfig:
    """`data`: what is trained and validated on."""

    type: Literal["math", "reasoning_gym"] = key(
        "math", "math: json or jsonl files. reasoning_gym: generated problems."
    )
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
    shuffle: bool = key(True, "Shuffle the training data at each epoch.")
    seed: int = key(1234, "Seed of the data order and of generated problems.", minimum=0)
    reasoning_gym: ReasoningGymConfig = section(ReasoningGymConfig, "The reasoning-gym task.")


@dataclasses.dataclass(kw_only=True, slots=True)
class ReasoningTokenizerConfig(TokenizerConfig):
    """`actor.tokenizer` of a reasoning run."""

    use_fast: bool = key(True, "Use the tokenizer's Rust implementation.")


@dataclasses.dataclass(kw_only=True, slots=True)
class ReasoningActorConfig(ActorConfig):
    """`actor` of a reasoning run."""

    tokenizer: ReasoningTokenizerConfig = section(ReasoningTokenizerConfig, "The tokenizer.")


@dataclasses.dataclass(kw_only=True, slots=True)
class QuickstartConfig:
    """`quickstart`: the tiny model that is created if no model is given."""

    enabled: bool = key(False, "Create the model at ckpt_convertor.hf_model_path if it does not exist.")
    num_hidden_layers: int = key(2, "Layers of the created model.", minimum=1, maximum=MOST_LAYERS)
    hidden_size: int = key(128, "Width of the created model; 32 for each query head.", minimum=1)
    intermediate_size: int = key(384, "Width of its MLPs.", minimum=1)
    num_attention_heads: int = key(4, "Query heads of the created model.", minimum=1)
    num_key_value_heads: int = key(2, "Key and value heads of the created model.", minimum=1)
    max_position_embeddings: int = key(512, "Longest sequence of the created model.", unit="tokens", minimum=2)
    tie_word_embeddings: bool = key(False, "Input and output embeddings are one tensor.")
    vocab_size: int = key(384, "Largest vocabulary of the created tokenizer.", minimum=300)
    warmup_steps: int = key(400, "SFT steps before GRPO.", unit="optimizer steps", minimum=0)
    warmup_batch_size: int = key(32, "Sequences of one SFT step.", unit="sequences", minimum=1)
    warmup_lr: float = key(2e-3, "Highest learning rate of the SFT steps; it falls linearly to 0.", above=0.0)
    warmup_short_steps: int = key(
        100, "Last SFT steps, which also show answers without working.", unit="optimizer steps", minimum=0
    )
    warmup_short_share: float = key(0.7, "Share of answers without working in those.", minimum=0.0, maximum=1.0)


@dataclasses.dataclass(kw_only=True, slots=True)
class ReasoningConfig:
    """RL on answers that can be verified. `provenance` records where each key was set."""

    runner: RunnerConfig = section(RunnerConfig, "The run.")
    algorithm: AlgorithmConfig = section(AlgorithmConfig, "The algorithm.")
    rollout: RolloutConfig = section(RolloutConfig, "Generation.")
    data: DataConfig = section(DataConfig, "Data.")
    actor: ReasoningActorConfig = section(ReasoningActorConfig, "The trained model.")
    reward: RewardConfig = section(RewardConfig, "Rewards.")
    cluster: ClusterConfig = section(ClusterConfig, "Hosts.")
    launcher: LauncherConfig = section(LauncherConfig, "Processes.")
    quickstart: QuickstartConfig = section(QuickstartConfig, "The created model.")
    critic: dict[str, Any] = key(
        {}, "A critic (PPO); refused where critic.use_critic_model is true.", status=Status.REFUSED
    )
    provenance: Provenance = dataclasses.field(default_factory=Provenance, repr=False, compare=False)
