"""Reading, under tensor parallelism, only the rows and columns of a weight that a rank holds.

Megatron-Bridge lets the first tensor-parallel rank read and convert whole tensors and scatter them, so that its disk,
its host and its link carry everything while the others wait. Where a parameter is a plain part of HuggingFace tensors
(see `export_recipe`), each rank can cut out its own share from the safetensors file, which is mapped, not read.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional

from mbridge_model.errors import ModelError


class SlicedReader:
    """Slices of the tensors of a safetensors directory, as one tensor-parallel rank needs them.

    Args:
        path: directory of the files.
        files: file name of each tensor.
        rank, size: of tensor parallelism.
    """

    def __init__(self, path: Path, files: Mapping[str, str], rank: int, size: int) -> None:
        self._path = path
        self._files = files
        self._rank = rank
        self._size = size
        self._open: dict[str, Any] = {}

    def read(self, parts: Mapping[str, str], shape: torch.Size, *, groups: int, pads_rows: bool) -> Tensor | None:
        """This rank's share of one Megatron parameter.

        Args:
            parts: name of each part, as `export_recipe` calls them, and of its HuggingFace tensor: "whole" alone;
                "query", "key" and "value"; or "gate" and "up".
            shape: of this rank's share.
            groups: query groups of the whole model.
            pads_rows: the tensor has a row a token, and the ranks together may have more rows, which are zeros.

        Returns:
            [*shape] on the CPU in the file's dtype; None if the parameter is not cut in a way that is known here.

        Raises:
            ModelError: the shares of the tensors do not make up the shape.
        """
        if "whole" in parts:
            share = self._whole(parts["whole"], shape, pads_rows)
        elif "gate" in parts:
            share = torch.cat([self._rows(parts["gate"]), self._rows(parts["up"])])
        elif groups % self._size:
            return None  # ranks share groups
        else:
            # Megatron-Core keeps the queries of a group, its key and its value next to each other.
            heads = [self._rows(parts[part]) for part in ("query", "key", "value")]
            own = groups // self._size
            share = torch.cat([rows.unflatten(0, (own, -1)) for rows in heads], dim=1).flatten(0, 1)
        if share is not None and share.shape != shape:
            raise ModelError(
                f"{' and '.join(parts.values())} have a share of shape {tuple(share.shape)} for this rank, whose "
                f"parameter has {tuple(shape)}"
            )
        return share

    def _whole(self, name: str, shape: torch.Size, pads_rows: bool) -> Tensor | None:
        whole = torch.Size(self._slice(name).get_shape())
        if pads_rows:
            begin = min(self._rank * shape[0], whole[0])
            rows: Tensor = self._slice(name)[begin : min(begin + shape[0], whole[0])]
            return functional.pad(rows, (0, 0, 0, shape[0] - len(rows)))
        if whole == shape:
            return self._slice(name)[:]
        # A parallel layer cuts one dimension evenly; which one shows in the shapes.
        cut = [dimension for dimension, (a, b) in enumerate(zip(whole, shape, strict=True)) if a != b]
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
            self._open[file] = safe_open(self._path / file, framework="pt", device="cpu")
        return self._open[file].get_slice(name)
