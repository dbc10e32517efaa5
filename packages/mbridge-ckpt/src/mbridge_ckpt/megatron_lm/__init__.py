"""megatron_lm."""
