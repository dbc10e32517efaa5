"""Read any piece of any parameter of the whole model from a checkpoint, whatever layout wrote it.

The manifest's placements say where each rank's piece belongs; a piece for another tensor-parallel size is assembled
from the rows or columns of the pieces that overlap it. Memory: the requested piece and one stored piece.
"""

import re
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from mbridge_ckpt.errors import LayoutError
from mbridge_ckpt.formats.torch_pickle import StoredTensor, map_tensors
from mbridge_ckpt.formats.torch_reader import TorchFileReader
from mbridge_ckpt.manifest.placement import ParameterPlacement
from mbridge_ckpt.store.checkpoint import Checkpoint

if TYPE_CHECKING:
    from torch import Tensor

MODEL, MASTER, MOMENTS = "model", "fp32_param", ("exp_avg", "exp_avg_sq")
"""Kinds of parameters in a checkpoint: the weights, and of the optimizer the master weights and Adam's moments."""
_MODEL_FILE = re.compile(r"(actor/iter_[0-9]{7}/mp_rank_)([0-9]{2,})((?:_[0-9]{3,})*)/model_optim_rng\.pt")


@dataclass(slots=True)
class _Parameter:
    """A parameter of the whole model: its placement, and the files of its pieces by tensor rank."""

    placement: ParameterPlacement
    files: dict[int, str] = field(default_factory=dict)


class WholeModel:
    """The parameters of a checkpoint by global name; a context manager that keeps the files open.

    Parameter kinds are `MODEL` and those of the optimizer, `MASTER` and `MOMENTS`. Raises LayoutError for a checkpoint
    without placements or with expert parallelism. Checksums are not compared here; `verify` the checkpoint first.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        layout = checkpoint.layout
        if layout.expert > 1 or layout.expert_tensor not in (1, layout.tensor):
            raise LayoutError(f"{checkpoint.path}: {layout} has expert parallelism, which cannot be resharded")
        self.checkpoint = checkpoint
        self.parameters: dict[str, _Parameter] = {}
        self._open = ExitStack()
        self._readers: dict[str, TorchFileReader] = {}
        for record in checkpoint.manifest.files:
            match = _MODEL_FILE.fullmatch(record.path)
            if not match:
                continue
            for placement in record.placements:
                parameter = self.parameters.setdefault(placement.global_name, _Parameter(placement))
                parameter.files[int(match[2])] = record.path
            placed = {placement.name for placement in record.placements}
            bare = [t.name for t in record.tensors if t.name.startswith("model/") and t.name[6:] not in placed]
            if bare:
                raise LayoutError(
                    f"{checkpoint.path / record.path}: no placement is recorded for {bare[0][6:]!r}, so it is unknown"
                    " how the layout cut it; save with placements=..."
                )
        if not self.parameters:
            raise LayoutError(f"{checkpoint.path} holds no model parameters with placements")
        for name, parameter in self.parameters.items():
            if sorted(parameter.files) != list(range(layout.tensor)):
                raise LayoutError(f"{checkpoint.path}: {name} exists for tensor ranks {sorted(parameter.files)} only")

    @property
    def layers(self) -> int:
        """Transformer layers of the whole model."""
        return max(
            (1 + p.placement.layer for p in self.parameters.values() if p.placement.layer is not None), default=0
        )

    def copied_names(self) -> set[str]:
        """Return the names under which a last stage holds copies of tied embeddings; other layouts may have none."""
        return {p.placement.last_stage_copy for p in self.parameters.values() if p.placement.last_stage_copy}

    def load(self, file: str) -> dict[str, Any]:
        """Load the content of a file apart from the state of parameters: its small values, including tensors."""
        reader = self.reader(file)
        names = {parameter.placement.name for parameter in self.parameters.values()}
        return {
            key: map_tensors(item, reader.read)
            for key, item in reader.value.items()
            if not (isinstance(item, dict) and names & set(item))
        }

    def reader(self, file: str) -> TorchFileReader:
        """Return the open file; its `value` has StoredTensors in place of tensors."""
        if file not in self._readers:
            self._readers[file] = self._open.enter_context(TorchFileReader(self.checkpoint.path / file))
        return self._readers[file]

    def has(self, kind: str, name: str) -> bool:
        """Return whether the parameter has this kind of state (a frozen one has none of the optimizer)."""
        parameter = self.parameters[name]
        file = _file_of(kind, parameter.files[0])
        return self.checkpoint.has(file) and parameter.placement.name in self._table(kind, file)

    def shape(self, kind: str, name: str, *, size: int = 1, rows: int | None = None) -> tuple[tuple[int, ...], str]:
        """Return shape and dtype of a piece for tensor-parallel size `size`; `rows` are those of a whole vocabulary."""
        parameter = self.parameters[name]
        placement = parameter.placement
        _, stored = self._stored(kind, parameter, 0)
        shape = list(stored.shape)
        if placement.partition_dim >= 0:
            whole = shape[placement.partition_dim] * len(parameter.files)
            whole = rows if rows is not None and placement.vocabulary_rows is not None else whole
            if whole % (size * placement.partition_stride):
                raise LayoutError(
                    f"{name}: {whole} rows or columns cannot be cut into {size} equal pieces; change the size"
                )
            shape[placement.partition_dim] = whole // size
        return tuple(shape), stored.dtype

    def read(self, kind: str, name: str, *, rank: int = 0, size: int = 1, rows: int | None = None) -> "Tensor":
        """Read the piece of tensor rank `rank` of `size`; the whole parameter by default.

        `rows` is the padded number of rows of a vocabulary (embedding, output layer) for this size; rows beyond those
        that were stored are zero.
        """
        import torch

        parameter = self.parameters[name]
        placement, count = parameter.placement, len(parameter.files)
        shape, dtype = self.shape(kind, name, size=size, rows=rows)
        dimension, blocks = placement.partition_dim, placement.partition_stride
        if dimension < 0 or (size == count and rows is None):
            reader, stored = self._stored(kind, parameter, rank if dimension >= 0 else 0)
            return reader.read(stored)
        piece = torch.zeros(shape, dtype=getattr(torch, dtype))
        ours = shape[dimension] // blocks
        theirs = self._stored(kind, parameter, 0)[1].shape[dimension] // blocks
        for source in range(count):
            # Both cut each block into equal parts, ours into `size` and the stored ones into `count`.
            begin = max(rank * ours, source * theirs)
            end = min((rank + 1) * ours, (source + 1) * theirs)
            if begin >= end:
                continue
            reader, stored = self._stored(kind, parameter, source)
            other = None if dimension == 0 else reader.read(stored)
            for block in range(blocks):
                start = block * theirs + begin - source * theirs
                if other is None:
                    part = reader.read(stored, (start, start + end - begin))
                else:
                    part = other.narrow(dimension, start, end - begin)
                piece.narrow(dimension, block * ours + begin - rank * ours, end - begin).copy_(part)
        return piece

    def _table(self, kind: str, file: str) -> dict[str, Any]:
        table = self.reader(file).value
        found = table.get(kind) if isinstance(table, dict) else None
        return found if isinstance(found, dict) else {}

    def _stored(self, kind: str, parameter: _Parameter, rank: int) -> tuple[TorchFileReader, StoredTensor]:
        file = _file_of(kind, parameter.files[rank])
        stored = self._table(kind, file).get(parameter.placement.name)
        if not isinstance(stored, StoredTensor):
            raise LayoutError(f"{self.checkpoint.path / file}: no {kind} of {parameter.placement.name}")
        return self.reader(file), stored

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()


def _file_of(kind: str, model_file: str) -> str:
    return model_file if kind == MODEL else model_file.replace("model_optim_rng.pt", "distrib_optim.pt")
