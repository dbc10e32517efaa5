"""HuggingFace tensors as parts of Megatron parameters."""

from collections.abc import Iterable, Iterator, Mapping

import torch
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


def join_blocks(blocks: list[Tensor]) -> Tensor:
    """The tensor whose rows they are, without a copy if there is one alone."""
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


class Parts:
    """The HuggingFace tensors that one Megatron parameter consists of, as views of it that are made once.

    Making a view takes longer than copying a small tensor. The views hold the parameter's memory.

    Args:
        parameter: not cut by any parallelism.
        parts: name of each part and of its HuggingFace tensor.
        heads, groups: of the attention that the parameter belongs to.
        rows: how many rows of "whole" are kept: the real tokens of a padded vocabulary. None: all.
    """

    def __init__(
        self, parameter: Tensor, parts: Mapping[str, str], *, heads: int, groups: int, rows: int | None
    ) -> None:
        self._data = parameter.detach()
        views = part_views(self._data, parts, queries=heads // groups, groups=groups)
        if rows is not None:
            views["whole"] = views["whole"][:rows]
        is_grouped = "query" in parts
        self._named = [(parts[part], list(view) if is_grouped else [view]) for part, view in views.items()]

    def are_of(self, parameter: Tensor) -> bool:
        """Whether the parameter still is where it was: data parallelism, say, moves it into a buffer."""
        return parameter.data_ptr() == self._data.data_ptr()

    def __iter__(self) -> Iterator[tuple[str, list[Tensor]]]:
        """(HuggingFace name, blocks of rows): one for each group of a fused attention, else one alone."""
        return iter(self._named)
