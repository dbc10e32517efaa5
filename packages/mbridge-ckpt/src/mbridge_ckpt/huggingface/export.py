"""Make a HuggingFace directory from a checkpoint, without Megatron and without transformers.

If the checkpoint was saved with its export, the files are compared with their checksums and copied, or split into
shards of another size. If it was saved without, the weights are built by its recipe (see `recipe`).
"""

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from mbridge_ckpt.errors import CheckpointError, IncompleteCheckpointError, LayoutError
from mbridge_ckpt.files.durable import fsync_path, fsync_tree_directories
from mbridge_ckpt.files.hashing import HashingFile
from mbridge_ckpt.files.paths import inside
from mbridge_ckpt.formats.safetensors import read_safetensors
from mbridge_ckpt.huggingface.recipe import RECIPE_FILE, HfRecipe, read_recipe
from mbridge_ckpt.huggingface.write import copy_file, is_weights, other_files, parse_size, write_weights
from mbridge_ckpt.manifest.layout import HF_DIRECTORY, refuse_inside_checkpoint
from mbridge_ckpt.store.checkpoint import Checkpoint, open_checkpoint
from mbridge_ckpt.store.checkpoint_writer import FileSink, SaveStream
from mbridge_ckpt.store.whole_model import MODEL, WholeModel

if TYPE_CHECKING:
    from torch import Tensor

DEFAULT_SHARD = "5GB"
Progress = Callable[[int], None] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportReport:
    """The result of `export_hf`: the directory, its total size, the number of tensors, and where they came from."""

    path: Path
    bytes: int
    tensors: int
    weights_from: Literal["export", "recipe"]


def export_hf(
    checkpoint: str | Path,
    destination: str | Path,
    *,
    max_shard_size: int | str | None = None,
    hf_files: str | Path | None = None,
    progress: Progress = None,
) -> ExportReport:
    """Write the weights of `checkpoint` as the HuggingFace directory `destination`, which must not exist.

    Args:
        checkpoint: as `open_checkpoint` takes it.
        destination: appears whole or not at all.
        max_shard_size: bytes, or text such as "5GB". None: files of an export as they are, built weights in 5 GB.
        hf_files: HuggingFace directory with config.json, tokenizer and so on, for a checkpoint without them. None: the
            directory that the recipe names.
        progress: gets the bytes of each tensor or file written.

    Every file that is used is first compared with its checksum. Memory: one shard and a few tensors.

    Raises CheckpointError's classes, naming file and tensor: IncompleteCheckpointError (no export and no recipe, or no
    config.json to be had), CorruptCheckpointError, LayoutError (the recipe does not fit the weights).
    """
    opened = open_checkpoint(checkpoint)
    limit = parse_size(max_shard_size or DEFAULT_SHARD)
    prefix = f"{HF_DIRECTORY}/"
    paths = [record.path for record in opened.manifest.files if record.path.startswith(prefix)]
    if not any((opened.path / path).exists() for path in paths):
        paths = []  # an export may be deleted, see `verify`
    weights = [path for path in paths if path.endswith(".safetensors")]
    has_export = bool(weights)
    if not has_export and not opened.has(RECIPE_FILE):
        raise IncompleteCheckpointError(
            f"{opened.path} has neither {HF_DIRECTORY} nor {RECIPE_FILE}; save with the export, or with a recipe"
        )
    if hf_files is not None and paths:
        raise CheckpointError(
            f"{opened.path / HF_DIRECTORY} has the files that go with the weights; leave hf_files out"
        )
    recipe = None if has_export else read_recipe(opened)
    with NewDirectory(Path(destination)) as sink:
        if recipe is not None:
            files = _files_for(opened, paths, hf_files, recipe)
            for record in opened.manifest.files:
                if record.placements:
                    opened.verified(record.path)
            with WholeModel(opened) as whole:
                _check(recipe, whole)
                records = write_weights(sink, _counted(_build(recipe, whole), progress), limit)
                count = len(records)
        else:
            records = []
            files = [(path.removeprefix(prefix), opened.verified(path)) for path in paths]
            count = sum(len(opened.manifest.file(path).tensors) for path in weights)
            if max_shard_size is not None:
                files = [(path, file) for path, file in files if not is_weights(Path(path).name)]
                tensors = chain.from_iterable(read_safetensors(opened.path / path) for path in sorted(weights))
                records = write_weights(sink, _counted(tensors, progress), limit)
        for path, file in files:
            copy_file(sink, file, path, records)
            if progress is not None:
                progress(file.stat().st_size)
        total = sum(file.stat().st_size for file in sink.path.rglob("*") if file.is_file())
        made = sink.commit()
    return ExportReport(path=made, bytes=total, tensors=count, weights_from="export" if has_export else "recipe")


def _files_for(
    checkpoint: Checkpoint, paths: list[str], hf_files: str | Path | None, recipe: HfRecipe
) -> list[tuple[str, Path]]:
    """Return the small files: from the checkpoint if it has them, else `hf_files`, else the recipe's source."""
    if paths:
        return [(path.removeprefix(f"{HF_DIRECTORY}/"), checkpoint.verified(path)) for path in paths]
    source = hf_files or recipe.source
    if source is None or (hf_files is None and not Path(source).is_dir()):
        where = f"the model came from {source}, which is not there" if source else "the recipe names no source"
        raise IncompleteCheckpointError(
            f"{checkpoint.path} has no config.json and tokenizer, and {where}; give a directory with --hf-files"
        )
    files = other_files(Path(source))
    if "config.json" not in (path for path, _ in files):
        raise IncompleteCheckpointError(f"{source} has no config.json; give a HuggingFace model's directory")
    return files


def _check(recipe: HfRecipe, whole: WholeModel) -> None:
    """Check that every tensor can be made before the first one is."""
    for tensor in recipe.tensors:
        if tensor.parameter not in whole.parameters:
            raise LayoutError(
                f"{whole.checkpoint.path}: {tensor.name} is made of {tensor.parameter}, which the checkpoint lacks;"
                f" its {RECIPE_FILE} is of another model"
            )
        rows = whole.parameters[tensor.parameter].placement.vocabulary_rows
        tensor.shape(whole.shape(MODEL, tensor.parameter, rows=rows)[0])


def _build(recipe: HfRecipe, whole: WholeModel) -> "Iterator[tuple[str, Tensor]]":
    """Yield the tensors of the recipe. A parameter of several consecutive tensors is read once."""
    name, parameter = "", None
    for tensor in recipe.tensors:
        if tensor.parameter != name or parameter is None:
            parameter = None  # not two at a time
            name = tensor.parameter
            parameter = whole.read(MODEL, name, rows=whole.parameters[name].placement.vocabulary_rows)
        yield tensor.name, tensor.take(parameter)


def _counted(tensors: "Iterator[tuple[str, Tensor]]", progress: Progress) -> "Iterator[tuple[str, Tensor]]":
    for name, tensor in tensors:
        if progress is not None:
            progress(tensor.nbytes)
        yield name, tensor
        del tensor  # before the next one is read


class NewDirectory(FileSink):
    """A directory that appears whole under its name or not at all.

    Files go into a hidden directory beside `final`, which `commit` renames; without it the block's end removes it.
    Raises CheckpointError if `final` exists, since nothing is overwritten, or lies in a checkpoint.
    """

    def __init__(self, final: Path) -> None:
        self.final = Path(os.path.abspath(final))
        self.path = self.final.with_name(f".{self.final.name}.writing-{uuid.uuid4().hex[:12]}")
        self._refuse_existing()
        refuse_inside_checkpoint(self.final)
        self.path.mkdir(parents=True)

    @contextmanager
    def stream(self, path: str) -> Iterator[SaveStream]:
        """Open a new file, which is on the disk when the block ends."""
        target = inside(self.path, path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with HashingFile(target) as file:
            yield SaveStream(file.write)
            file.close()

    def rename(self, old: str, new: str) -> None:
        """Rename a file."""
        os.rename(inside(self.path, old), inside(self.path, new))

    def commit(self) -> Path:
        """Give the directory its final name and return it."""
        fsync_tree_directories(self.path)
        self._refuse_existing()
        os.rename(self.path, self.final)
        fsync_path(self.final.parent)
        return self.final

    def _refuse_existing(self) -> None:
        if os.path.lexists(self.final):
            raise CheckpointError(f"{self.final} exists; nothing is overwritten, give another directory")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
