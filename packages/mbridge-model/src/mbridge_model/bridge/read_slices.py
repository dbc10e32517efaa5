"""Read only the rows and columns of a weight that a rank holds, straight into the parameter.

Under tensor parallelism Megatron-Bridge's first rank reads and scatters whole tensors while the others wait. Where a
parameter consists of plain parts of HuggingFace tensors (see `export_recipe`), each rank copies its own shard here.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from mbridge_model.bridge.conversion_tasks import part_views


class SlicedReader:
    """Reads the slices that tensor-parallel rank `rank` of `size` needs; `files` has the file of each tensor."""

    def __init__(self, files: Mapping[str, Path], rank: int, size: int) -> None:
        self._files = files
        self._rank = rank
        self._size = size
        self._open: dict[Path, Any] = {}

    def fill(self, parameter: Tensor, parts: Mapping[str, str], *, queries: int, groups: int, pads_rows: bool) -> bool:
        """Copy this rank's shard of one Megatron parameter out of the mapped files, without an intermediate copy.

        Args:
            parameter: this rank's shard.
            parts: HuggingFace name of each part; parts are named as in `export_recipe`.
            queries, groups: query heads in a group, and groups, of the whole model.
            pads_rows: the tensor has a row per token, and the ranks together may have more rows, which become zeros.

        Returns:
            Whether the parameter was filled. False, with nothing copied, if it is cut in a way that is unknown here.

        Raises:
            ValueError: the slices of the tensors do not make up the parameter.
        """
        if "query" in parts and groups % self._size:
            return False  # ranks share groups
        if "whole" in parts:
            share = self._whole(parts["whole"], parameter.shape, pads_rows)
            if share is None:
                return False
            if pads_rows:
                parameter[len(share) :] = 0
                parameter = parameter[: len(share)]
            shares = {"whole": share}
        else:
            shares = {part: self._rows(name) for part, name in parts.items()}
        own = groups // self._size
        try:
            places = part_views(parameter, parts, queries=queries, groups=own)
            if "query" in parts:
                shares = {part: share.unflatten(0, (own, -1)) for part, share in shares.items()}
        except RuntimeError:  # rows that cannot be divided so
            places = {}
        if any(part not in places or places[part].shape != share.shape for part, share in shares.items()):
            raise ValueError(
                f"{' and '.join(parts.values())} have shares of {[tuple(share.shape) for share in shares.values()]} "
                f"for this rank, whose parameter has {tuple(parameter.shape)}"
            )
        for part, share in shares.items():
            places[part].copy_(share)
        return True

    def _whole(self, name: str, shape: torch.Size, pads_rows: bool) -> Tensor | None:
        """Return this rank's rows or columns of a tensor; of one with a row per token, the rows that exist."""
        whole = torch.Size(self._slice(name).get_shape())
        if pads_rows:
            begin, end = (min(rank * shape[0], whole[0]) for rank in (self._rank, self._rank + 1))
            rows: Tensor = self._slice(name)[begin:end]
            return rows
        if whole == shape:
            return self._slice(name)[:]
        # A parallel layer cuts one dimension evenly; which one shows in the shapes.
        cut = [dimension for dimension, (a, b) in enumerate(zip(whole, shape, strict=False)) if a != b]
        if len(whole) != len(shape) or len(cut) != 1 or whole[cut[0]] != shape[cut[0]] * self._size:
            return None
        begin, end = (part * shape[cut[0]] for part in (self._rank, self._rank + 1))
        return self._slice(name)[begin:end] if cut[0] == 0 else self._slice(name)[:, begin:end]

    def _rows(self, name: str) -> Tensor:
        rows = self._slice(name).get_shape()[0]
        begin, end = (part * rows // self._size for part in (self._rank, self._rank + 1))
        return self._slice(name)[begin:end]

    def _slice(self, name: str) -> Any:
        file = self._files[name]
        if file not in self._open:
            self._open[file] = safe_open(file, framework="pt", device="cpu")
        return self._open[file].get_slice(name)
