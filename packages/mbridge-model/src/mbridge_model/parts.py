"""HuggingFace tensors as parts of whole Megatron parameters."""

from collections.abc import Iterator, Mapping

from torch import Tensor


def take_parts(
    parameter: Tensor, parts: Mapping[str, str], *, heads: int, groups: int, rows: int | None
) -> Iterator[tuple[str, Tensor]]:
    """Yield (HuggingFace name, tensor), without a copy but for the heads of a fused attention.

    Args:
        parameter: not cut by any parallelism.
        parts: name of each part, as `export_recipe` calls them, and of its HuggingFace tensor.
        heads, groups: of the attention that the parameter belongs to.
        rows: how many rows of "whole" are kept: the real tokens of a padded vocabulary. None: all.
    """
    if "whole" in parts:
        yield parts["whole"], parameter if rows is None else parameter[:rows]
    elif "gate" in parts:
        half = len(parameter) // 2
        yield parts["gate"], parameter[:half]
        yield parts["up"], parameter[half:]
    else:
        # Megatron-Core keeps the queries of a group, its key and its value next to each other.
        queries = heads // groups
        grouped = parameter.unflatten(0, (groups, queries + 2, -1))
        yield parts["query"], grouped[:, :queries].flatten(0, 2)
        yield parts["key"], grouped[:, queries].flatten(0, 1)
        yield parts["value"], grouped[:, queries + 1].flatten(0, 1)
