"""Episodes of the policy, and the training samples that are made from them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from mbridge_train.engine.batch import Aggregation, Sample, aggregation_weights
from torch import Tensor

from mbridge_reasoning.data.prompts import Prompt
from mbridge_reasoning.rewards.base import Score
from mbridge_reasoning.rollout.base import Completion, EndReason


@dataclass(frozen=True, kw_only=True, slots=True)
class Episode:
    """One episode. The policy's tokens may be anywhere but at the start: between its turns, the environment may write.

    Attributes:
        tokens: int64 [length], everything that the policy read and wrote.
        policy_mask: bool [length], true where the policy wrote the token.
        rollout_logprobs: float32 [length], natural log probabilities that the rollout engine gave the tokens it drew;
            0 elsewhere.
        score: of the whole episode.
        end: why the policy's last answer ended.

    Raises:
        ValueError: lengths differ, or the mask says that the policy wrote the first token.
    """

    tokens: Tensor
    policy_mask: Tensor
    rollout_logprobs: Tensor
    score: Score
    end: EndReason

    def __post_init__(self) -> None:
        if not self.tokens.shape == self.policy_mask.shape == self.rollout_logprobs.shape:
            raise ValueError(
                f"an episode has {len(self.tokens)} tokens, {len(self.policy_mask)} entries of the mask and "
                f"{len(self.rollout_logprobs)} log probabilities: give one of each per token"
            )
        if self.policy_mask[0]:
            raise ValueError("the policy cannot have written the first token of an episode: nothing predicts it")


def single_turn(prompt: Prompt, completion: Completion, score: Score) -> Episode:
    """Make the simplest episode: a prompt and one answer."""
    read, wrote = len(prompt.tokens), len(completion.tokens)
    return Episode(
        tokens=torch.tensor([*prompt.tokens, *completion.tokens]),
        policy_mask=torch.arange(read + wrote) >= read,
        rollout_logprobs=torch.tensor([0.0] * read + completion.logprobs),
        score=score,
        end=completion.end,
    )


def make_samples(
    episodes: Sequence[Episode],
    advantages: Tensor,
    *,
    aggregation: Aggregation,
    old_logprobs: Sequence[Tensor],
    reference_logprobs: Sequence[Tensor] | None,
) -> list[Sample]:
    """Make the global batch of one optimizer step, whose loss is over the tokens that the policy wrote.

    `advantages`: float32 [len(episodes)]. `old_logprobs`: float32 [length] per episode, of the policy in the
    denominator of the ratio. `reference_logprobs`: the same of the reference policy; None without a KL penalty.
    """
    weights = aggregation_weights([episode.policy_mask for episode in episodes], aggregation)
    samples = []
    for index, episode in enumerate(episodes):
        advantage = torch.full((len(episode.tokens),), float(advantages[index]))
        fields = {"advantages": advantage, "old_logprobs": old_logprobs[index]}
        if reference_logprobs is not None:
            fields["reference_logprobs"] = reference_logprobs[index]
        samples.append(Sample(tokens=episode.tokens, weights=weights[index], fields=fields))
    return samples
