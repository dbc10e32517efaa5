"""Read and write Megatron-Core's `torch_dist` checkpoints: one set of files for all ranks, readable under any layout.

Keys are those of Megatron-Core: a weight has its sharded name, its optimizer state `optimizer.state.<kind>.<name>`, as
Megatron-LM writes them with fully reshardable optimizer state. The weights of directories that Megatron-LM wrote load,
too.

Such a directory may come from anywhere, and torch reads it with pickle. Its metadata is therefore checked first by an
unpickler that knows only the classes of a valid one; everything else is read with `weights_only`.
"""

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mbridge_ckpt import CorruptCheckpointError, Save, UnsafeCheckpointError
from mbridge_ckpt.store.whole_model import MASTER, MOMENTS
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from mbridge_train.checkpoint import optimizer_state
from mbridge_train.checkpoint.placement import named_chunks, parameter_names
from mbridge_train.engine.engine import Engine
from mbridge_train.errors import TrainError

_CONFIG_FILE = "metadata.json"
_METADATA_FILE = ".metadata"
_FACTS = "mbridge_facts"

# The names that the writers of torch and Megatron-Core use in `.metadata`.
_METADATA_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"),
        *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath"},
}


def is_torch_dist(directory: Path) -> bool:
    """Return whether `directory`, that of an iteration, holds files of this format."""
    return (directory / _CONFIG_FILE).is_file() and (directory / _METADATA_FILE).is_file()


def write(engine: Engine, save: Save, relative: str, state: dict[str, Any] | None) -> None:
    """Write model and optimizer below `relative` in a save in progress. Collective over all ranks.

    `state` is that of `optimizer_state.collect` on data-parallel rank 0.
    """
    directory = save.path / relative
    if save.is_first:
        directory.mkdir(parents=True)
    torch.distributed.barrier()
    content: dict[str, Any] = {"model": _sharded_state(engine)}
    if engine.optimizer is not None:
        content[_FACTS] = optimizer_state.facts(engine.optimizer)
    if state is not None:
        content["optimizer"] = _sharded_optimizer(engine, state)
    dist_checkpointing.save(content, str(directory))
    own = f"__{torch.distributed.get_rank()}_"
    for file in sorted(directory.iterdir()):
        if file.name.startswith(own) or (save.is_first and not file.name.startswith("__")):
            save.file(f"{relative}/{file.name}")


def read_model(engine: Engine, directory: Path) -> dict[str, Tensor]:
    """Read the weights of this rank by its own names. Collective over all ranks.

    Raises:
        TrainError: the directory holds another model.
        mbridge_ckpt.CheckpointError: a file is missing or damaged, or would run code.
    """
    with _reading(directory):
        loaded: dict[str, Tensor] = dist_checkpointing.load({"model": _sharded_model(engine)}, str(directory))["model"]
    return loaded


def read_optimizer(engine: Engine, directory: Path) -> dict[str, Any] | None:
    """Read the state of this rank's optimizer in the form of `optimizer_state.collect`; raises as `read_model`.

    Collective over all ranks.
    """
    content: dict[str, Any] = {}
    if engine.layout.is_writer:
        names = parameter_names(engine)
        empty = {name: torch.empty(parameter.shape) for parameter, name in names.items()}
        content["optimizer"] = _sharded_optimizer(engine, dict.fromkeys((MASTER, *MOMENTS), empty))
    with _reading(directory):
        loaded = dist_checkpointing.load(content, str(directory))
    if _FACTS not in loaded:
        raise TrainError(
            f"{directory} was not written by mbridge, so only its weights can be loaded; start from it with "
            "actor.megatron.use_hf_ckpt=false and actor.model.megatron_checkpoint"
        )
    if not engine.layout.is_writer:
        return None
    state: dict[str, Any] = loaded["optimizer"]
    return state | loaded[_FACTS]


def _sharded_state(engine: Engine) -> dict[str, Any]:
    """Return Megatron-Core's description of each weight's place in the whole model, by our names.

    Besides the weights it has the `_extra_state` of each layer, Transformer Engine's fp8 metadata, which is empty here.
    It is written because Megatron-Core by default refuses a checkpoint without it, but never read, since it is pickled.
    """
    return {
        prefix + name: value
        for prefix, chunk in named_chunks(engine)
        for name, value in chunk.sharded_state_dict().items()  # type: ignore[operator]  # a Megatron module
    }


def _sharded_model(engine: Engine) -> dict[str, Any]:
    """Return the weights alone of `_sharded_state`."""
    return {name: value for name, value in _sharded_state(engine).items() if not isinstance(value, ShardedObject)}


def _sharded_optimizer(engine: Engine, state: dict[str, Any]) -> dict[str, Any]:
    model = _sharded_model(engine)
    return {
        kind: {
            name: make_sharded_optimizer_tensor(model[name], tensor.clone(), f"optimizer.state.{kind}")
            for name, tensor in state[kind].items()
        }
        for kind in (MASTER, *MOMENTS)
    }


@contextmanager
def _reading(directory: Path) -> Iterator[None]:
    """Check the metadata, force `weights_only` on the rest, and raise upstream's errors as TrainError."""
    _check_metadata(directory / _METADATA_FILE)
    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        yield
    except (CheckpointingException, CheckpointException, RuntimeError, ValueError, KeyError) as error:
        raise TrainError(
            f"{directory} cannot be read into this model: {str(error).strip().splitlines()[-1]}; it was written for "
            "another model, or a file is damaged"
        ) from error
    finally:
        if before is None:
            del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
        else:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = before


def _check_metadata(file: Path) -> None:
    try:
        with file.open("rb") as stream:
            _MetadataUnpickler(stream, file).load()
    except (UnsafeCheckpointError, OSError):
        raise
    except Exception as error:  # noqa: BLE001 - damaged bytes may raise anything
        raise CorruptCheckpointError(f"{file}: not the metadata of a torch_dist checkpoint: {error}") from None


class _MetadataUnpickler(pickle.Unpickler):
    def __init__(self, stream: Any, file: Path) -> None:
        super().__init__(stream)
        self._file = file

    def find_class(self, module: str, name: str) -> Any:
        if name not in _METADATA_CLASSES.get(module, ()):
            raise UnsafeCheckpointError(
                f"{self._file} names {module}.{name}, which no torch_dist checkpoint needs; it could run code, so it "
                "is not read"
            )
        return super().find_class(module, name)
