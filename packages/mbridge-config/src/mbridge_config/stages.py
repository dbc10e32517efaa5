"""Which language layers each pipeline stage holds."""


def stage_sizes(layers: int, stages: int, deepstack: int = 0) -> tuple[int, ...] | None:
    """Layers of each stage, in order; None where they cannot be shared.

    Megatron-Core shares layers evenly or not at all. Where the first `deepstack` layers take features of the vision
    tower, the first stage gets at least these if each other stage still gets one, and the others share the rest as
    evenly as they can; otherwise the features travel along.
    """
    if stages > 1 and layers // stages < deepstack <= layers - (stages - 1):
        rest, more = divmod(layers - deepstack, stages - 1)
        return (deepstack, *([rest + 1] * more), *([rest] * (stages - 1 - more)))
    return None if layers % stages else (layers // stages,) * stages


def describe_stages(sizes: tuple[int, ...], deepstack_visual_indexes: tuple[int, ...]) -> list[str]:
    """What each stage of a vision-language model holds: its layers, and the deepstack features added after them."""
    lines, first = [], 0
    for stage, size in enumerate(sizes):
        end = first + size
        text = f"language {_span(first, end - 1)}"
        features = deepstack_visual_indexes[first:end]
        if features:
            after = _span(first, first + len(features) - 1)
            text += f"; after {after} the deepstack features {', '.join(map(str, features))}"
        lines.append(f"vision tower, {text}" if stage == 0 else text)
        first = end
    return lines


def _span(first: int, last: int) -> str:
    return f"layer {first}" if first == last else f"layers {first}-{last}"
