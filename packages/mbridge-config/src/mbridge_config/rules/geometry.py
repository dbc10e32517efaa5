"""Facts of the model that the YAML repeats: accepted where they are right."""

import math
from collections.abc import Iterable

from mbridge_config.compat.keys import CHECKED
from mbridge_config.facts.model import QK_LAYERNORM_FAMILIES, QKV_BIAS_FAMILIES, HFFacts
from mbridge_config.problems import Severity
from mbridge_config.rules.base import Context, Finding, rule

_MODEL = "actor.model."
_FACTS = {f"{_MODEL}{name}": row for name, row in CHECKED.items() if row.fact is not None}
_ACTIVATIONS = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu"}
_FORCED = {f"{_MODEL}add_qkv_bias": QKV_BIAS_FAMILIES, f"{_MODEL}qk_layernorm": QK_LAYERNORM_FAMILIES}


@rule("geometry", *_FACTS)
def repeated(context: Context) -> Iterable[Finding]:
    """The YAML repeats a fact of the model, and wrongly. The model's config.json is the only source of geometry.

    Fix: remove the key.
    """
    facts = context.facts
    if facts is None:
        return
    for key, row in _FACTS.items():
        stated, fact = context.value(key), getattr(facts, row.fact or "")
        if stated is None or fact is None:
            continue
        if math.isclose(stated, fact, rel_tol=1e-9) if isinstance(fact, float) else stated == fact:
            continue
        forced_by = _forced(key, facts)
        reason = f"the model has {str(fact).lower()} ({forced_by or f'{row.field} in config.json'})"
        fix = "remove the key" if forced_by else "remove the key, config.json counts"
        yield Finding(key, reason, fix)


@rule("geometry-forced", *_FORCED)
def forced(context: Context) -> Iterable[Finding]:
    """The YAML repeats, rightly, what every model of the family has and its config.json does not say.

    Fix: nothing has to be done; the key can be removed.
    """
    facts = context.facts
    if facts is None:
        return
    for key in _FORCED:
        if (source := _forced(key, facts)) and context.value(key) is True:
            reason = f"{source}, whatever config.json says, so the key changes nothing"
            yield Finding(key, reason, "remove the key", Severity.NOTE)


def _forced(key: str, facts: HFFacts) -> str | None:
    return f"forced for every {facts.model_type} model" if facts.model_type in _FORCED.get(key, ()) else None


@rule("geometry-kind", "actor.model.activation", "actor.model.normalization", "actor.model.position_embedding_type")
def kind(context: Context) -> Iterable[Finding]:
    """The YAML names an activation, a norm or position embeddings that the model does not have.

    Fix: remove the key.
    """
    facts = context.facts
    if facts is None:
        return
    kinds = {
        "activation": _ACTIVATIONS.get(facts.activation or ""),
        "normalization": "rmsnorm" if facts.norm_epsilon is not None and facts.model_type != "gpt2" else None,
        "position_embedding_type": "rope" if facts.rope_theta is not None else None,
    }
    for name, fact in kinds.items():
        stated = context.value(f"{_MODEL}{name}")
        if stated is not None and fact is not None and stated.lower() != fact:
            reason = f"the model has {fact}, as its config.json says"
            yield Finding(f"{_MODEL}{name}", reason, "remove the key, config.json counts")
