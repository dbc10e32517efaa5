"""Assign language layers, embedding, output layer, vision tower and deepstack features to pipeline stages."""

import dataclasses

from mbridge_config.facts.model import HFFacts
from mbridge_config.schema.actor import ModelConfig


def planned_sizes(model: ModelConfig, facts: HFFacts) -> tuple[int, ...] | None:
    """Return `stage_sizes` of the layout that `actor.model` asks for."""
    return stage_sizes(
        facts.num_layers,
        model.pipeline_model_parallel_size,
        len(facts.deepstack_visual_indexes),
        first=model.num_layers_in_first_pipeline_stage,
        last=model.num_layers_in_last_pipeline_stage,
    )


def stage_sizes(
    layers: int, stages: int, deepstack: int = 0, *, first: int | None = None, last: int | None = None
) -> tuple[int, ...] | None:
    """Return the layers of each stage, in order; None if they cannot be shared.

    Megatron-Core shares layers evenly or not at all. `first` and `last` take the layers of the first and of the last
    stage out of that: the stages between them, or all but the one that is given, share the rest evenly, at least one
    each. Without the two, where the first `deepstack` layers take features of the vision tower, the first stage gets
    at least these if each other stage still gets one, and the others share the rest as evenly as they can; otherwise
    the features travel along.
    """
    if first is not None or last is not None:
        before, after = ((first,) if first is not None else ()), ((last,) if last is not None else ())
        rest, others = layers - sum(before + after), stages - len(before + after)
        if stages == 1 or (rest if others == 0 else rest < others or rest % others):
            return None
        return (*before, *((rest // others,) * others if others else ()), *after)
    if stages > 1 and layers // stages < deepstack <= layers - (stages - 1):
        rest, more = divmod(layers - deepstack, stages - 1)
        return (deepstack, *([rest + 1] * more), *([rest] * (stages - 1 - more)))
    return None if layers % stages else (layers // stages,) * stages


@dataclasses.dataclass(kw_only=True, slots=True, frozen=True)
class Stage:
    """One pipeline stage. `output`: the output layer, "own" or "embedding" where that is tied to it.

    `deepstack`: the vision tower's layers whose features are added here, one after each layer from `first_layer` on.
    """

    first_layer: int
    layers: int
    embedding: bool
    output: str | None
    vision_tower: bool
    deepstack: tuple[int, ...]

    def __str__(self) -> str:
        parts = ["vision tower"] if self.vision_tower else []
        parts += ["embedding"] if self.embedding else []
        parts.append(_span(self.first_layer, self.layers))
        if self.output is not None:
            parts.append("norm")
            tied = "the embedding's weights" if self.embedding else "a copy of the embedding's weights"
            parts.append("output layer" if self.output == "own" else f"output layer ({tied})")
        text = ", ".join(parts)
        if self.deepstack:
            after = _span(self.first_layer, len(self.deepstack))
            text += f"; after {after} the deepstack features {', '.join(map(str, self.deepstack))}"
        return text


def make_stages(sizes: tuple[int, ...], facts: HFFacts) -> tuple[Stage, ...]:
    """Return the stages that hold `sizes` layers."""
    stages, first = [], 0
    for number, size in enumerate(sizes):
        is_last = number == len(sizes) - 1
        stages.append(
            Stage(
                first_layer=first,
                layers=size,
                embedding=number == 0,
                output=("embedding" if facts.tied_embeddings else "own") if is_last else None,
                vision_tower=number == 0 and facts.has_vision,
                deepstack=facts.deepstack_visual_indexes[first : first + size],
            )
        )
        first += size
    return tuple(stages)


def _span(first: int, layers: int) -> str:
    return f"layer {first}" if layers == 1 else f"layers {first}-{first + layers - 1}"
