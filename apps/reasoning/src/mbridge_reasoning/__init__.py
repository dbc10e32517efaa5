"""RL of language models on problems whose answers can be verified: GRPO on Megatron-Core."""
