"""HuggingFace tensors as views of Megatron parameters."""

from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor


def part_views(parameter: Tensor, parts: Iterable[str], *, queries: int, groups: int) -> dict[str, Tensor]:
    """Return views of the parts of a parameter, or of a tensor-parallel rank's shard of it.

    Args:
        parameter: the whole parameter or a shard.
        parts: its parts, as `export_recipe` names them: "whole" alone; "query", "key" and "value"; or "gate" and
            "up".
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


class Parts:
    """The HuggingFace tensors that one Megatron parameter consists of, as views that are created once.

    Creating a view takes longer than copying a small tensor. The views keep the parameter's memory alive.

    Args:
        parameter: not cut by any parallelism.
        parts: name of each part and of its HuggingFace tensor.
        heads, groups: of the attention that the parameter belongs to.
        rows: number of rows of "whole" to keep, the real tokens of a padded vocabulary; None keeps all.
    """

    def __init__(
        self, parameter: Tensor, parts: Mapping[str, str], *, heads: int, groups: int, rows: int | None
    ) -> None:
        self._data = parameter.detach()
        views = part_views(self._data, parts, queries=heads // groups, groups=groups)
        if rows is not None:
            views["whole"] = views["whole"][:rows]
        self._is_grouped = "query" in parts
        self._named = [(parts[part], view) for part, view in views.items()]

    def are_of(self, parameter: Tensor) -> bool:
        """Return whether the parameter has not moved; data parallelism, for one, moves it into a buffer."""
        return parameter.data_ptr() == self._data.data_ptr()

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (HuggingFace name, tensor): a view, or a copy of rows that are not contiguous in a fused attention."""
        for name, view in self._named:
            yield name, view.flatten(0, 1) if self._is_grouped else view
