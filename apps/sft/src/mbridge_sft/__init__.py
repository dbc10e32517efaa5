"""Supervised fine-tuning of vision-language and text models with Megatron-Core."""
