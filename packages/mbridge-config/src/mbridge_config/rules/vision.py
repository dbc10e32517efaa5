"""What vision-language models ask for."""

from collections.abc import Iterable

from mbridge_config.facts.directories import SFT_KEY, hf_key
from mbridge_config.rules.base import Context, Finding, rule
from mbridge_config.rules.parallel import QWEN3_VL, TP, tensor_sizes, tower_sizes

ROPE_FUSION = "actor.model.apply_rope_fusion"
FREEZE = tuple(f"actor.model.freeze_{part}" for part in ("language_model", "vision_model", "vision_projection"))


@rule("rope-fusion", ROPE_FUSION)
def rope_fusion(context: Context) -> Iterable[Finding]:
    """The fused rotary kernel was asked for with a Qwen3-VL, whose angles it cannot take.

    Fix: remove the key.
    """
    facts = context.facts
    if facts is not None and facts.model_type in QWEN3_VL and context.config.actor.model.apply_rope_fusion:
        reason = "the fused kernel cannot take the angles of Qwen3-VL, which interleave time, height and width"
        yield Finding(ROPE_FUSION, reason, f"set {ROPE_FUSION}=false, or remove it")


@rule("tensor-parallel-vision", TP)
def vision_heads(context: Context) -> Iterable[Finding]:
    """The heads or the MLP of the vision tower cannot be shared evenly by the tensor-parallel ranks.

    Fix: use a divisor of the tower's heads and of its MLP's width.
    """
    facts, tensor = context.facts, context.config.actor.model.tensor_model_parallel_size
    if facts is None:
        return
    for number, what in tower_sizes(facts):
        if number % tensor:
            reason = f"the vision tower's {number} {what} cannot be shared by {tensor} ranks"
            yield Finding(TP, reason, f"use one of {tensor_sizes(facts)}")


@rule("deepstack-layers", SFT_KEY)
def deepstack(context: Context) -> Iterable[Finding]:
    """The model has fewer language layers than deepstack features to add after them.

    Fix: correct the model's config.json.
    """
    facts = context.facts
    if facts is not None and facts.num_layers < len(facts.deepstack_visual_indexes):
        reason = (
            f"config.json has {len(facts.deepstack_visual_indexes)} deepstack_visual_indexes in vision_config, but "
            f"only {facts.num_layers} language layers (num_hidden_layers) to add their features after"
        )
        yield Finding(hf_key(context.config), reason, "correct one of the two in config.json")


@rule("freeze-without-vision", *FREEZE)
def freeze(context: Context) -> Iterable[Finding]:
    """A part of a vision-language model is to be frozen, and the model has no vision; or nothing is left to train.

    Fix: remove the keys, or train one of the parts.
    """
    facts, model = context.facts, context.config.actor.model
    chosen = [key for key in FREEZE if getattr(model, key.rpartition(".")[2])]
    if facts is not None and not facts.has_vision:
        for key in chosen:
            yield Finding(key, f"the model has no vision tower ({facts.architectures[0]})", "remove the key")
    elif len(chosen) == len(FREEZE):
        yield Finding(FREEZE[0], "all parts of the model are frozen, so nothing is trained", "train one of them")


RULES = (rope_fusion, vision_heads, deepstack, freeze)
