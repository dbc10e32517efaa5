"""Advantages of sampled answers relative to the other answers to the same prompt."""

import torch
from torch import Tensor

from mbridge_train.errors import TrainError


def grpo_advantages(rewards: Tensor, *, divide_by_std: bool = True, epsilon: float = 1e-6) -> Tensor:
    """Return group-relative advantages: each reward minus the mean of its group.

    The advantages of a group whose rewards are all equal are exactly 0.

    Args:
        rewards: float [groups, group_size], a row per prompt.
        divide_by_std: whether to divide by the standard deviation of the group (GRPO, arXiv 2402.03300, section 4.1.2),
            the unbiased one of ``torch.std``. Without this division, prompts with nearly all or nearly no answers right
            do not get larger updates than others (Dr. GRPO, arXiv 2503.20783).
        epsilon: added to the standard deviation.

    Returns:
        float32 [groups, group_size]: the advantage of all tokens of an answer.

    Raises:
        TrainError: a group has only one answer, or a reward is not finite.
        ValueError: the rewards do not have two dimensions, or have an integer dtype.
    """
    if rewards.dim() != 2 or not rewards.is_floating_point():
        raise ValueError(f"rewards must be float [groups, group_size], got {rewards.dtype} {list(rewards.shape)}")
    if rewards.shape[1] < 2:
        raise TrainError(
            f"group_size is {rewards.shape[1]}, but an answer is judged against the others of its group: "
            "set group_size to 2 or more"
        )
    finite = rewards.isfinite()
    if not bool(finite.all()):
        group, answer = (~finite).nonzero()[0].tolist()
        raise TrainError(
            f"the reward of answer {answer} to prompt {group} is {rewards[group, answer].item()}: "
            "the reward function must return finite numbers"
        )
    exact = rewards.double()
    advantages = exact - exact.mean(dim=1, keepdim=True)
    if divide_by_std:
        advantages = advantages / (exact.std(dim=1, keepdim=True) + epsilon)
    all_equal = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)
    return torch.where(all_equal, 0, advantages).float()
