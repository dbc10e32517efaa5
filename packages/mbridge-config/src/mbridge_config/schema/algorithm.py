"""The RL algorithm: sampling, advantages, policy loss."""

import dataclasses
from typing import Literal

from mbridge_config.schema.keys import key, section

PENALTY_SPELLINGS = {"kl": "k1", "mse": "k2", "low_var_kl": "k3"}


@dataclasses.dataclass(kw_only=True, slots=True)
class SamplingConfig:
    """`algorithm.sampling_params`: how answers are sampled."""

    use_greedy: bool = key(False, "Take the most likely token each time.")
    temperature: float = key(1.0, "Divisor of the logits, in generation and in training.", above=0.0)
    top_k: int = key(-1, "Sample from the k most likely tokens; -1 or more than the vocabulary: all.", minimum=-1)
    top_p: float = key(1.0, "Sample from the smallest set of tokens with this probability.", above=0.0, maximum=1.0)
    repetition_penalty: float = key(1.0, "Penalty on tokens that occurred before; 1: none.", above=0.0)
    max_new_tokens: int | None = key(
        None,
        "Longest answer. null: runner.seq_length - data.max_prompt_length.",
        unit="tokens",
        minimum=1,
    )
    min_new_tokens: int = key(1, "Shortest answer.", unit="tokens", minimum=0)


@dataclasses.dataclass(kw_only=True, slots=True)
class AlgorithmConfig:
    """`algorithm`: GRPO (DeepSeekMath, section 4.1) with a clipped policy loss."""

    group_size: int = key(8, "Answers sampled for each prompt.", unit="answers", minimum=1)
    n_minibatches: int = key(1, "Optimizer steps on the answers of one rollout.", unit="optimizer steps", minimum=1)
    adv_type: Literal["grpo", "math_grpo"] = key(
        "grpo",
        "Advantages: reward less the mean of its group. Both names mean the same.",
        refused={
            "gae": "PPO with a critic is not in this version",
            "reinpp": "REINFORCE++ is not in this version",
            "raw": "advantages without a group baseline are not in this version",
        },
    )
    normalize_advantages: bool = key(True, "Divide advantages by the standard deviation of their group.")
    kl_beta: float = key(0.0, "Weight of the KL penalty against the reference model; 0: no reference.", minimum=0.0)
    kl_penalty_type: Literal["k1", "abs", "k2", "k3"] = key(
        "k3",
        "Estimator of the KL divergence (Schulman, Approximating KL Divergence).",
        spellings=PENALTY_SPELLINGS,
    )
    ratio_clip_eps: float = key(
        0.2, "Clip range of the probability ratio, for a side that has none of its own.", minimum=0.0
    )
    clip_ratio_low: float | None = key(None, "Lower clip range. null: ratio_clip_eps.", minimum=0.0, maximum=1.0)
    clip_ratio_high: float | None = key(None, "Upper clip range. null: ratio_clip_eps.", minimum=0.0)
    clip_ratio_c: float | None = key(None, "Dual clip: bound of the loss for negative advantages.", above=1.0)
    clip_log_ratio_min: float | None = key(
        None,
        "Clamp the logarithm of the probability ratio from below. Clamped tokens have no gradient. null: -20.",
        unit="nats",
        minimum=-20.0,
        below=0.0,
    )
    clip_log_ratio_max: float | None = key(
        None, "Clamp it from above, likewise. null: 20.", unit="nats", above=0.0, maximum=20.0
    )
    entropy_bonus: float = key(0.0, "Weight of the entropy bonus.", minimum=0.0)
    calculate_entropy: bool = key(True, "Measure the entropy even if its bonus is 0.")
    loss_agg_func: Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"] = key(
        "token-mean", "How token losses become one loss, over the whole global batch."
    )
    recompute_logprobs: bool = key(
        True, "Compute old log probabilities with the trained model before the update, instead of taking generation's."
    )
    shuffle_rollout: bool = key(True, "Shuffle answers before they are cut into minibatches.")
    early_stop_imp_ratio: float | None = key(
        None, "Skip a minibatch whose mean probability ratio is above this. null: never.", above=0.0
    )
    sampling_params: SamplingConfig = section(SamplingConfig, "Sampling of answers.")
