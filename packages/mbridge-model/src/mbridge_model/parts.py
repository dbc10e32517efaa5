"""HuggingFace tensors as parts of Megatron parameters."""

from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor


def part_views(parameter: Tensor, parts: Iterable[str], *, queries: int, groups: int) -> dict[str, Tensor]:
    """Views of the parts of a parameter, or of a tensor-parallel rank's share of it.

    Args:
        parameter: whole or a share.
        parts: what it is made of, as `export_recipe` calls it: "whole" alone; "query", "key" and "value"; or "gate" and
            "up".
        queries: query heads in a group of a fused attention.
        groups: such groups in `parameter`.

    Returns:
        By name of the part: rows as in the HuggingFace tensor; of an attention [groups, rows of a group, ...].
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


def take_parts(
    parameter: Tensor, parts: Mapping[str, str], *, heads: int, groups: int, rows: int | None
) -> Iterator[tuple[str, Tensor]]:
    """Yield (HuggingFace name, tensor), without a copy but for a fused attention of several groups.

    Args:
        parameter: not cut by any parallelism.
        parts: name of each part and of its HuggingFace tensor.
        heads, groups: of the attention that the parameter belongs to.
        rows: how many rows of "whole" are kept: the real tokens of a padded vocabulary. None: all.
    """
    for part, view in part_views(parameter, parts, queries=heads // groups, groups=groups).items():
        yield parts[part], view[:rows] if part == "whole" else view.flatten(0, 1) if part in _ATTENTION else view


_ATTENTION = ("query", "key", "value")
