"""The architectures that mbridge-model loads, by the names of HuggingFace's model classes.

mbridge-model has its own tables, and neither package imports the other: `testing/test_architectures.py` compares them.
"""

_TORCH = """
GemmaForCausalLM LlamaForCausalLM MistralForCausalLM NemotronForCausalLM Qwen2ForCausalLM
Qwen2_5_VLForConditionalGeneration Qwen3ForCausalLM Qwen3MoeForCausalLM Qwen3VLForConditionalGeneration
Qwen3VLMoeForConditionalGeneration
"""
TORCH = frozenset(_TORCH.split())
"""Built with plain torch layers, and with Transformer Engine's."""

_TRANSFORMER_ENGINE = """
BailingMoeV2ForCausalLM DeciLMForCausalLM DeepseekV2ForCausalLM DeepseekV3ForCausalLM DeepseekV4ForCausalLM
Ernie4_5_MoeForCausalLM Ernie4_5_VLMoeForConditionalGeneration Exaone4ForCausalLM Exaone4_5_ForConditionalGeneration
ExaoneMoEForCausalLM ExaoneMoeForCausalLM FalconH1ForCausalLM Gemma2ForCausalLM Gemma3ForCausalLM
Gemma3ForConditionalGeneration Gemma4ForCausalLM Gemma4ForConditionalGeneration Glm4MoeForCausalLM
Glm4MoeLiteForCausalLM Glm4vMoeForConditionalGeneration GlmMoeDsaForCausalLM GptOssForCausalLM HYV3ForCausalLM
KimiK25ForConditionalGeneration KimiK2ForCausalLM MiMoForCausalLM MiMoV2FlashForCausalLM MiniMaxM2ForCausalLM
MiniMaxM3SparseForConditionalGeneration Mistral3ForConditionalGeneration NemotronHForCausalLM
NemotronH_Nano_Omni_Reasoning_V3 NemotronH_Nano_VL_V2 NemotronLabsDiffusionModel OlmoeForCausalLM
Qwen2AudioForConditionalGeneration Qwen2_5OmniForConditionalGeneration Qwen2_5OmniModel
Qwen3ASRForConditionalGeneration Qwen3NextForCausalLM Qwen3OmniMoeForConditionalGeneration Qwen3_5ForCausalLM
Qwen3_5ForConditionalGeneration Qwen3_5MoeForCausalLM Qwen3_5MoeForConditionalGeneration SarvamMLAForCausalLM
SarvamMoEForCausalLM Step3p5ForCausalLM Step3p7ForConditionalGeneration
"""
TRANSFORMER_ENGINE = frozenset(_TRANSFORMER_ENGINE.split())
"""Known to Megatron-Bridge 0.6.2, and built with Transformer Engine's layers at most."""

ALL_LAYERS_HAVE_EXPERTS = ("Qwen3MoeForCausalLM", "Qwen3VLMoeForConditionalGeneration")
"""Mixtures of experts in which layers without experts are not supported."""
