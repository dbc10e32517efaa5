"""Training checkpoints that are never half written, never run code, and load under any parallel layout.

Importing this does not import torch; writing or reading a tensor does.
"""

from mbridge_ckpt.background.async_saver import AsyncSaver
from mbridge_ckpt.background.pending_save import SnapshotSave
from mbridge_ckpt.errors import (
    CheckpointError,
    CorruptCheckpointError,
    IncompleteCheckpointError,
    LayoutError,
    RanksLostError,
    SaveError,
    SaverBusyError,
    UnsafeCheckpointError,
)
from mbridge_ckpt.formats.tensors import TensorRecord
from mbridge_ckpt.formats.torch_reader import load_torch
from mbridge_ckpt.huggingface.export import ExportReport, export_hf
from mbridge_ckpt.huggingface.recipe import RECIPE_FILE, HfRecipe, HfTensor
from mbridge_ckpt.huggingface.write import write_hf
from mbridge_ckpt.manifest.layout import (
    HF_DIRECTORY,
    MANIFEST_FILE,
    Layout,
    iteration_directory,
    model_file,
    mp_rank_directory,
    optimizer_file,
)
from mbridge_ckpt.manifest.manifest import FileRecord, Manifest
from mbridge_ckpt.manifest.placement import ParameterPlacement, place_parameter
from mbridge_ckpt.megatron_lm.importer import import_megatron
from mbridge_ckpt.megatron_lm.tree import find_iteration
from mbridge_ckpt.reshard.reshard import reshard
from mbridge_ckpt.store.checkpoint import Checkpoint, PassedOver, Resume, find_resume, list_checkpoints, open_checkpoint
from mbridge_ckpt.store.checkpoint_writer import CheckpointWriter
from mbridge_ckpt.store.rank_state import capture_random_state, restore_random_state
from mbridge_ckpt.store.retention import PruneReport, Retention, prune
from mbridge_ckpt.store.transaction import Save, begin_save
from mbridge_ckpt.store.verify import Fault, VerifyReport, verify
from mbridge_ckpt.store.whole_model import WholeModel

__all__ = [
    "HF_DIRECTORY",
    "MANIFEST_FILE",
    "RECIPE_FILE",
    "AsyncSaver",
    "Checkpoint",
    "CheckpointError",
    "CheckpointWriter",
    "CorruptCheckpointError",
    "ExportReport",
    "Fault",
    "FileRecord",
    "HfRecipe",
    "HfTensor",
    "IncompleteCheckpointError",
    "Layout",
    "LayoutError",
    "Manifest",
    "ParameterPlacement",
    "PassedOver",
    "PruneReport",
    "RanksLostError",
    "Resume",
    "Retention",
    "Save",
    "SaveError",
    "SaverBusyError",
    "SnapshotSave",
    "TensorRecord",
    "UnsafeCheckpointError",
    "VerifyReport",
    "WholeModel",
    "begin_save",
    "capture_random_state",
    "export_hf",
    "find_iteration",
    "find_resume",
    "import_megatron",
    "iteration_directory",
    "list_checkpoints",
    "load_torch",
    "model_file",
    "mp_rank_directory",
    "open_checkpoint",
    "optimizer_file",
    "place_parameter",
    "prune",
    "reshard",
    "restore_random_state",
    "verify",
    "write_hf",
]
