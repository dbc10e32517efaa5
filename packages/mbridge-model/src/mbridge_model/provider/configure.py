"""Configure the provider that Megatron-Bridge returns.

A provider is a Megatron `TransformerConfig` filled from the HuggingFace config.json. Only fields are changed that the
layout, the precision, the backend, a family rule or the user decides; each change is logged with its reason.
"""

import logging
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal

import torch
from torch.nn.functional import silu

from mbridge_model.errors import ModelError
from mbridge_model.families import Family
from mbridge_model.parallel import Parallel
from mbridge_model.patches.compiled import run_uncompiled_without_compiler
from mbridge_model.patches.quiet import quiet
from mbridge_model.vision import Freeze
from mbridge_model.vision.stages import stage_fields

logger = logging.getLogger("mbridge_model")

Backend = Literal["auto", "te", "torch"]


def resolve_backend(backend: Backend, dtype: torch.dtype, *, has_torch_layers: bool = True) -> Literal["te", "torch"]:
    """Resolve `auto`: Transformer Engine in half precision, if it can be imported and there is a GPU, else plain torch.

    In fp32 Transformer Engine multiplies matrices in TF32 (logprobs of a tiny model differ by 2e-3 from HuggingFace's)
    and has no attention kernel for packed sequences; it is chosen there only for an architecture without plain torch
    layers (`has_torch_layers`).

    Raises:
        ModelError: an unknown name, or `te` where Transformer Engine or a GPU is missing.
    """
    if backend not in ("auto", "te", "torch"):
        raise ModelError(f"backend {backend!r} is unknown; use 'auto', 'te' or 'torch'")
    prefers_torch = not torch.cuda.is_available() or (dtype == torch.float32 and has_torch_layers)
    if backend == "torch" or (backend == "auto" and prefers_torch):
        return "torch"
    if not torch.cuda.is_available():
        raise ModelError("backend 'te' needs a GPU, and torch sees none; use backend 'auto' or 'torch'")
    from megatron.core.extensions.transformer_engine import HAVE_TE

    if HAVE_TE:
        return "te"
    if backend == "te":
        raise ModelError(
            "backend 'te' needs Transformer Engine, which does not import here; run: "
            "pip install 'transformer-engine[pytorch]', or use backend 'auto' or 'torch'"
        )
    return "torch"


def configure_provider(
    provider: Any,
    *,
    family: Family,
    parallel: Parallel,
    dtype: torch.dtype,
    backend: Literal["te", "torch"],
    overrides: Mapping[str, Any],
    config_fields: Mapping[str, Any],
    freeze: Freeze | None = None,
) -> None:
    """Change `provider` in place and finalize it.

    Provider field -> value: `config_fields` are those of config.json that Megatron-Bridge drops, and the user's
    `overrides` take precedence over everything but a family's forces. The other arguments are those of `load`.

    Raises:
        ModelError: an override names no field, or contradicts the family, or Megatron-Core refuses the combination.
    """
    changes = _Changes(provider)
    changes.update(_layout_fields(parallel), "the layout asked for")
    changes.update(_precision_fields(dtype), f"precision {str(dtype).removeprefix('torch.')}")
    changes.set("should_pad_vocab", True, "rows of the vocabulary are divided over the tensor-parallel ranks")
    changes.update(config_fields, "config.json says so")
    if backend == "torch":
        changes.update(_torch_backend_fields(), "the torch backend")
    elif family.vision is None and getattr(provider, "position_embedding_type", None) == "rope":
        from mbridge_model.kernels.self_attention import rotary_layers

        changes.set("apply_rope_fusion", True, "Transformer Engine's kernel")
        if hasattr(provider, "transformer_layer_spec"):  # not of hybrids with state-space layers
            layers = rotary_layers(provider.transformer_layer_spec)
            changes.set("transformer_layer_spec", layers, "queries, keys and values split and rotated by one kernel")
    # A weight outside Megatron's data-parallel wrapper has no buffer to add its gradient to: only training asks for it.
    changes.set("gradient_accumulation_fusion", False, "needs Megatron-Core's gradient buffers")
    if torch.cuda.is_available():
        run_uncompiled_without_compiler()
    if torch.cuda.is_available() and provider.activation_func is silu and provider.gated_linear_unit:
        plain = provider.activation_func_clamp_value is None and not provider.glu_linear_offset
        changes.set("bias_activation_fusion", plain, "one kernel of gate and product, which saves its input alone")
        if plain and not torch._dynamo.config.disable:
            from mbridge_model.patches.swiglu import SWIGLU

            SWIGLU.apply()
    if provider.num_moe_experts:
        changes.set("moe_aux_loss_coeff", 0.0, "the loss is the caller's, as in transformers without its router loss")
    if family.vision is not None:
        changes.update((freeze or Freeze()).fields(), "what `freeze` says")
    elif freeze not in (None, Freeze()):
        raise ModelError(f"{freeze} asks to freeze parts of a model of text alone (family {family.name})")
    _check_layout_overrides(overrides)
    for name, value in overrides.items():
        forced = next((force for force in family.forces if force.field == name), None)
        if forced is not None and forced.value != value:
            raise ModelError(f"override {name}={value!r} cannot be: {forced.reason}; leave it out")
        changes.set(name, value, "set by the user")
    for force in family.forces:
        changes.set(force.field, force.value, f"{force.reason} (family {family.name})")
    if family.vision is not None:
        from mbridge_model.vision.deepstack import language_layers

        features = len(getattr(provider.vision_config, "deepstack_visual_indexes", ()))
        reason = f"the first {features} layers take deepstack features, and stand on the first stage where they can"
        changes.update(stage_fields(provider.num_layers, parallel.pipeline, features, overrides), reason)
        layers = language_layers(provider.transformer_layer_spec)
        changes.set("transformer_layer_spec", layers, "deepstack, and an angle for each packed token")
    if provider.num_moe_experts and parallel.tensor > 1:
        changes.set("sequence_parallel", True, "Megatron-Core trains experts under tensor parallelism only with it")
    if provider.gradient_accumulation_fusion:
        from mbridge_model.patches.gradient_accumulation import enable_gradient_accumulation

        enable_gradient_accumulation()
    try:
        with quiet():
            provider.finalize()
    except (AssertionError, ValueError, RuntimeError) as error:
        raise ModelError(f"Megatron-Core refuses this combination of settings: {error}") from error


# Sizes of groups, which are made before the provider.
_GROUP_SIZES = {
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
}


def _check_layout_overrides(overrides: Mapping[str, Any]) -> None:
    """Raise `ModelError` if the overrides contradict the process groups that exist."""
    from megatron.core import parallel_state

    for name in _GROUP_SIZES & overrides.keys():
        size = getattr(parallel_state, f"get_{name.removesuffix('_size')}_world_size")()
        if overrides[name] != size:
            raise ModelError(
                f"override {name}={overrides[name]!r} contradicts the process groups, which have {size} rank(s) there; "
                "leave it out, and give the layout as Parallel(...) or make the groups before load"
            )


class _Changes:
    """Sets provider fields and logs each change of a value."""

    def __init__(self, provider: Any) -> None:
        self.provider = provider
        self.names = {field.name for field in fields(provider)}

    def set(self, name: str, value: Any, reason: str) -> None:
        if name not in self.names:
            from difflib import get_close_matches

            near = get_close_matches(name, self.names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ModelError(f"override {name!r} is no field of {type(self.provider).__name__}{hint}")
        old = getattr(self.provider, name)
        if old is value or (type(old) is type(value) and old == value):
            return
        setattr(self.provider, name, value)
        logger.info("provider.%s: %s -> %s (%s)", name, _brief(old), _brief(value), reason)

    def update(self, values: Mapping[str, Any], reason: str) -> None:
        for name, value in values.items():
            self.set(name, value, reason)


def _layout_fields(parallel: Parallel) -> dict[str, Any]:
    values: dict[str, Any] = {
        "tensor_model_parallel_size": parallel.tensor,
        "pipeline_model_parallel_size": parallel.pipeline,
        "sequence_parallel": parallel.sequence and parallel.tensor > 1,
    }
    if parallel.pipeline > 1:
        # Micro-batches have different lengths, so stages exchange shapes before activations; Megatron-Core then
        # accepts no other token dispatcher, in dense models neither.
        values |= {"variable_seq_lengths": True, "moe_token_dispatcher_type": "alltoall"}
    return values


def _precision_fields(dtype: torch.dtype) -> dict[str, Any]:
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ModelError(f"dtype {dtype} cannot be trained in; use float32, bfloat16 or float16")
    return {
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "autocast_dtype": dtype,
    }


def _torch_backend_fields() -> dict[str, Any]:
    from megatron.core.transformer.enums import AttnBackend

    from mbridge_model.torch_backend import torch_block_spec

    values: dict[str, Any] = {
        "transformer_layer_spec": torch_block_spec,
        "apply_rope_fusion": False,
        "persist_layer_norm": False,
        "masked_softmax_fusion": False,
        # Experts run one after another, and no kernel of Transformer Engine sorts their tokens.
        "moe_grouped_gemm": False,
        "moe_permute_fusion": False,
        "moe_router_fusion": False,
        # Chooses among Transformer Engine's kernels, and would refuse a second model of another family here.
        "attention_backend": AttnBackend.auto,
    }
    if not torch.cuda.is_available():
        # These are torch.compile'd functions. On a CPU they would need a C++ compiler and cost minutes.
        values |= {"bias_activation_fusion": False, "bias_dropout_fusion": False}
    return values


def _brief(value: Any) -> str:
    return getattr(value, "__name__", None) or repr(value)
