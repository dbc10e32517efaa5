"""From sampled and scored answers to training samples, and what is worth knowing about them. Pure functions."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from mbridge_train.engine.batch import Aggregation, Sample, aggregation_weights
from torch import Tensor

from mbridge_reasoning.data.problems import Problem
from mbridge_reasoning.rewards.pool import Score
from mbridge_reasoning.rollout.transformers import Completion


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One answer to one problem, as it was sampled and scored."""

    problem: Problem
    completion: Completion
    score: Score

    @property
    def tokens(self) -> list[int]:
        """Prompt and answer."""
        return [*self.problem.prompt_tokens, *self.completion.tokens]

    @property
    def rollout_logprobs(self) -> Tensor:
        """float32 [length], 0 on the prompt: what the rollout engine said of the tokens it drew."""
        return torch.tensor([0.0] * len(self.problem.prompt_tokens) + self.completion.logprobs)

    @property
    def mask(self) -> Tensor:
        """bool [length]: the tokens of the answer, its end token included."""
        return torch.arange(len(self.tokens)) >= len(self.problem.prompt_tokens)


def make_samples(
    answers: Sequence[Answer],
    advantages: Tensor,
    *,
    aggregation: Aggregation,
    old_logprobs: Sequence[Tensor],
    reference_logprobs: Sequence[Tensor] | None,
) -> list[Sample]:
    """The global batch of one optimizer step.

    Args:
        answers: of this optimizer step; the loss is aggregated over them.
        advantages: float32 [len(answers)], one for all tokens of an answer.
        aggregation: of the token losses.
        old_logprobs: float32 [length] an answer, of the policy that the ratio is taken to.
        reference_logprobs: likewise of the reference policy; None without a KL penalty.
    """
    weights = aggregation_weights([answer.mask for answer in answers], aggregation)
    return [
        Sample(
            tokens=torch.tensor(answer.tokens),
            weights=weights[index],
            fields={
                "advantages": torch.full((len(answer.tokens),), float(advantages[index])),
                "old_logprobs": old_logprobs[index],
            }
            | ({} if reference_logprobs is None else {"reference_logprobs": reference_logprobs[index]}),
        )
        for index, answer in enumerate(answers)
    ]


def answer_metrics(answers: Sequence[Answer], prefix: str) -> dict[str, float]:
    """Rewards and lengths of a set of answers.

    `accuracy`, `cut_off` (no end token within the allowed length), `verifier_timeouts` and `verifier_failures` are
    shares of the answers; lengths are in tokens, the end token included.
    """
    rewards = torch.tensor([answer.score.value for answer in answers])
    lengths = torch.tensor([float(len(answer.completion.tokens)) for answer in answers])
    count = len(answers)
    return {
        f"{prefix}/reward": rewards.mean().item(),
        f"{prefix}/accuracy": sum(answer.score.right for answer in answers) / count,
        f"{prefix}/response_length": lengths.mean().item(),
        f"{prefix}/response_length_max": lengths.max().item(),
        f"{prefix}/cut_off": sum(not answer.completion.finished for answer in answers) / count,
        f"{prefix}/verifier_timeouts": sum(answer.score.status == "timeout" for answer in answers) / count,
        f"{prefix}/verifier_failures": sum(answer.score.status == "failed" for answer in answers) / count,
    }


def mismatch_metrics(answers: Sequence[Answer], trainer_logprobs: Sequence[Tensor]) -> dict[str, float]:
    """How far the log probabilities of the rollout engine are from the trainer's for the same weights and tokens.

    Both are meant to be of the same distribution, so this measures differences of kernels and precision, and shows a
    weight stream that went wrong at once. The KL estimate is k3 (Schulman 2020) of rollout from trainer.
    """
    differences = torch.cat(
        [(ours - answer.rollout_logprobs)[answer.mask] for answer, ours in zip(answers, trainer_logprobs, strict=True)]
    )
    if not differences.numel():
        return {}
    return {
        "mismatch/logprob_mean_abs": differences.abs().mean().item(),
        "mismatch/logprob_max_abs": differences.abs().max().item(),
        "mismatch/kl": (torch.expm1(differences) - differences).mean().item(),
    }
