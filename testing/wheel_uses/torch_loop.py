"""Train a plain PyTorch module with the losses of mbridge-train: supervised, then GRPO. No engine, no Megatron model.

python torch_loop.py
"""

import torch
from mbridge_train import LossInputs, aggregation_weights, grpo_advantages, policy_loss, sft_loss

VOCABULARY, PROMPTS, GROUP, LENGTH = 8, 4, 8, 5
torch.manual_seed(0)


def make_policy() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Logits of the next token from the last one."""
    policy = torch.nn.Sequential(torch.nn.Embedding(VOCABULARY, 32), torch.nn.Linear(32, VOCABULARY))
    return policy, torch.optim.Adam(policy.parameters(), lr=3e-2)


def logprobs_of(policy: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Log probability of each token but the first of a row; [rows, length - 1]."""
    return policy(tokens[:, :-1]).log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)


def weights_of(tokens: torch.Tensor, mode: str) -> torch.Tensor:
    """Weights of the loss, fixed over the whole batch; [rows, length - 1]."""
    mask = torch.ones_like(tokens)
    mask[:, 0] = 0  # nothing predicts the first token
    return torch.stack(aggregation_weights(list(mask), mode))[:, 1:]  # type: ignore[arg-type]


# Supervised: count upwards.
rows = (torch.arange(VOCABULARY)[:, None] + torch.arange(LENGTH)) % VOCABULARY
policy, optimizer = make_policy()
losses = []
for _ in range(20):
    logprobs = logprobs_of(policy, rows).flatten()
    weights = weights_of(rows, "token-mean").flatten()
    outputs = sft_loss(LossInputs(weights=weights, outputs={"logprobs": logprobs}))
    optimizer.zero_grad()
    outputs.loss.backward()
    optimizer.step()
    losses.append(outputs.loss.item())
print(f"supervised: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
assert losses[0] > 1.5 and losses[-1] < 0.5, losses

# GRPO: odd numbers are rewarded.
policy, optimizer = make_policy()
scores = []
for _ in range(40):
    tokens = torch.arange(PROMPTS).repeat_interleave(GROUP)[:, None]
    with torch.no_grad():
        for _ in range(LENGTH - 1):
            tokens = torch.cat([tokens, torch.multinomial(policy(tokens[:, -1]).softmax(-1), 1)], dim=1)
        old = logprobs_of(policy, tokens)
    rewards = (tokens[:, 1:] % 2).float().mean(-1)
    advantages = grpo_advantages(rewards.view(PROMPTS, GROUP)).view(-1, 1).expand_as(old)
    for _ in range(2):
        inputs = LossInputs(
            weights=weights_of(tokens, "seq-mean-token-mean").flatten(),
            outputs={"logprobs": logprobs_of(policy, tokens).flatten()},
            fields={"old_logprobs": old.flatten(), "advantages": advantages.flatten()},
        )
        outputs = policy_loss(inputs, clip_ratio_low=0.2, clip_ratio_high=0.28)
        optimizer.zero_grad()
        outputs.loss.backward()
        optimizer.step()
    scores.append(rewards.mean().item())
print(f"GRPO: reward {scores[0]:.3f} -> {scores[-1]:.3f}")
assert scores[0] < 0.7 and scores[-1] > 0.9, scores
