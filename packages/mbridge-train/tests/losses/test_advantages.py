import math

import pytest
import torch
from mbridge_train.errors import TrainError
from mbridge_train.losses.advantages import grpo_advantages


def test_by_hand() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [2.0, 4.0, 2.0, 4.0]])
    centred = [[0.75, -0.25, -0.25, -0.25], [-1.0, 1.0, -1.0, 1.0]]
    assert grpo_advantages(rewards, divide_by_std=False).tolist() == centred
    # Unbiased variances: (0.5625 + 3 * 0.0625) / 3 = 0.25 and 4 / 3.
    divided = grpo_advantages(rewards, epsilon=0.0)
    assert divided[0].tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5])
    assert divided[1].tolist() == pytest.approx([s * math.sqrt(0.75) for s in (-1, 1, -1, 1)])
    assert grpo_advantages(rewards, epsilon=0.5)[0].tolist() == pytest.approx([0.75, -0.25, -0.25, -0.25])
    assert divided.dtype == torch.float32


@pytest.mark.parametrize("divide_by_std", [True, False])
@pytest.mark.parametrize("reward", [0.1, 1 / 3, 1e8 + 0.1, 0.0, -0.7])
def test_equal_rewards_give_exactly_zero(divide_by_std: bool, reward: float) -> None:
    for group_size in (2, 3, 7, 10):
        rewards = torch.full((2, group_size), reward)
        assert not grpo_advantages(rewards, divide_by_std=divide_by_std, epsilon=0.0).any()


def test_against_plain_pytorch() -> None:
    rewards = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    for group, advantages in zip(rewards, grpo_advantages(rewards), strict=True):
        torch.testing.assert_close(advantages, (group - group.mean()) / (torch.std(group) + 1e-6))


def test_errors() -> None:
    with pytest.raises(TrainError, match="group_size is 1.*set group_size to 2 or more"):
        grpo_advantages(torch.zeros(4, 1))
    with pytest.raises(TrainError, match="answer 2 to prompt 1 is nan"):
        grpo_advantages(torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, math.nan]]))
    with pytest.raises(ValueError, match="rewards must be float"):
        grpo_advantages(torch.zeros(4))
    with pytest.raises(ValueError, match="rewards must be float"):
        grpo_advantages(torch.zeros(4, 2, dtype=torch.int64))
