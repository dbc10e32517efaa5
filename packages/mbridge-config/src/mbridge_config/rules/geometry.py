"""Facts of the model that the YAML repeats: accepted where they are right."""

import math
from collections.abc import Iterable
from typing import Any

from mbridge_config.facts.model import QK_LAYERNORM_FAMILIES, QKV_BIAS_FAMILIES, HFFacts
from mbridge_config.problems import Severity
from mbridge_config.rules.base import Context, Finding, rule

# key of actor.model -> fact, and the field of config.json it comes from
REPEATED = {
    "num_layers": ("num_layers", "num_hidden_layers"),
    "hidden_size": ("hidden_size", "hidden_size"),
    "ffn_hidden_size": ("ffn_hidden_size", "intermediate_size"),
    "num_attention_heads": ("num_attention_heads", "num_attention_heads"),
    "num_query_groups": ("num_query_groups", "num_key_value_heads"),
    "kv_channels": ("head_dim", "head_dim"),
    "vocab_size": ("vocab_size", "vocab_size"),
    "max_position_embeddings": ("max_position_embeddings", "max_position_embeddings"),
    "rotary_base": ("rope_theta", "rope_theta"),
    "rotary_percentage": ("rotary_fraction", "partial_rotary_factor"),
    "layernorm_epsilon": ("norm_epsilon", "rms_norm_eps"),
    "add_qkv_bias": ("qkv_bias", "attention_bias"),
    "add_bias_linear": ("linear_bias", "mlp_bias"),
    "qk_layernorm": ("qk_layernorm", "use_qk_norm"),
    "multi_latent_attention": ("multi_latent_attention", "kv_lora_rank"),
    "share_embeddings_and_output_weights": ("tied_embeddings", "tie_word_embeddings"),
    "num_moe_experts": ("num_experts", "num_experts"),
    "moe_router_topk": ("experts_per_token", "num_experts_per_tok"),
}
_ACTIVATIONS = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu"}
_FORCED = {"add_qkv_bias": QKV_BIAS_FAMILIES, "qk_layernorm": QK_LAYERNORM_FAMILIES}


def _same(stated: Any, fact: Any) -> bool:
    if isinstance(fact, float):
        return math.isclose(stated, fact, rel_tol=1e-9)
    return bool(stated == fact)


@rule("geometry", *(f"actor.model.{name}" for name in REPEATED))
def repeated(context: Context) -> Iterable[Finding]:
    """The YAML repeats a fact of the model, and wrongly. The model's config.json is the only source of geometry.

    Fix: remove the key.
    """
    facts, model = context.facts, context.config.actor.model
    if facts is None:
        return
    for name, (fact_name, field) in REPEATED.items():
        stated, fact = getattr(model, name), getattr(facts, fact_name)
        if stated is None or fact is None or _same(stated, fact):
            continue
        forced_by = _forced(name, facts)
        reason = f"the model has {str(fact).lower()} ({forced_by or f'{field} in config.json'})"
        fix = "remove the key" if forced_by else "remove the key, config.json counts"
        yield Finding(f"actor.model.{name}", reason, fix)


@rule("geometry-forced", *(f"actor.model.{name}" for name in _FORCED))
def forced(context: Context) -> Iterable[Finding]:
    """The YAML repeats, rightly, what every model of the family has and its config.json does not say.

    Fix: nothing has to be done; the key can be removed.
    """
    facts, model = context.facts, context.config.actor.model
    if facts is None:
        return
    for name in _FORCED:
        if (source := _forced(name, facts)) and getattr(model, name) is True:
            reason = f"{source}, whatever config.json says, so the key changes nothing"
            yield Finding(f"actor.model.{name}", reason, "remove the key", Severity.NOTE)


def _forced(name: str, facts: HFFacts) -> str | None:
    return f"forced for every {facts.model_type} model" if facts.model_type in _FORCED.get(name, ()) else None


@rule("geometry-kind", "actor.model.activation", "actor.model.normalization", "actor.model.position_embedding_type")
def kinds(context: Context) -> Iterable[Finding]:
    """The YAML names an activation, a norm or position embeddings that the model does not have.

    Fix: remove the key.
    """
    facts, model = context.facts, context.config.actor.model
    if facts is None:
        return
    for name, fact in _kinds(facts).items():
        stated = getattr(model, name)
        if stated is not None and fact is not None and stated.lower() != fact:
            reason = f"the model has {fact}, as its config.json says"
            yield Finding(f"actor.model.{name}", reason, "remove the key, config.json counts")


def _kinds(facts: HFFacts) -> dict[str, str | None]:
    return {
        "activation": _ACTIVATIONS.get(facts.activation or ""),
        "normalization": "rmsnorm" if facts.norm_epsilon is not None and facts.model_type != "gpt2" else None,
        "position_embedding_type": "rope" if facts.rope_theta is not None else None,
    }


RULES = (repeated, forced, kinds)
