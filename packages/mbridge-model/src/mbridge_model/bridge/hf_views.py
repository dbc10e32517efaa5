"""HuggingFace tensors as views of Megatron parameters."""

from collections.abc import Iterable

from torch import Tensor


def part_views(parameter: Tensor, parts: Iterable[str], *, queries: int, groups: int) -> dict[str, Tensor]:
    """Return views of the parts of a parameter, or of a tensor-parallel rank's shard of it.

    Args:
        parameter: the whole parameter or a shard.
        parts: as `export_recipe` names them: "whole" alone; "query", "key" and "value"; or "gate" and "up".
        queries: query heads in a group of a fused attention.
        groups: number of such groups in `parameter`.

    Returns:
        A view for each part: rows as in the HuggingFace tensor; for an attention [groups, rows of a group, ...].
    """
    names = set(parts)
    if names == {"whole"}:
        return {"whole": parameter}
    if names == {"gate", "up"}:
        gate, up = parameter.chunk(2)
        return {"gate": gate, "up": up}
    # Megatron-Core keeps the queries of a group, its key and its value next to each other.
    grouped = parameter.unflatten(0, (groups, queries + 2, -1))
    return {"query": grouped[:, :queries].flatten(1, 2), "key": grouped[:, queries], "value": grouped[:, queries + 1]}
