"""Make a HuggingFace directory from a checkpoint, without Megatron and without transformers.

If the checkpoint was saved with its export, the files are compared with their checksums and copied, or split into
shards of another size. If it was saved without, the weights are built by its recipe (see `recipe`).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mbridge_ckpt.errors import CheckpointError, IncompleteCheckpointError, LayoutError
from mbridge_ckpt.formats.safetensors import read_safetensors
from mbridge_ckpt.huggingface.directory import NewDirectory
from mbridge_ckpt.huggingface.recipe import RECIPE_FILE, HfRecipe, read_recipe
from mbridge_ckpt.huggingface.write import copy_file, is_weights, other_files, parse_size, write_weights
from mbridge_ckpt.manifest.layout import HF_DIRECTORY
from mbridge_ckpt.store.checkpoint import Checkpoint, open_checkpoint
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
                records = write_weights(sink, _counted(_exported(opened, weights), progress), limit)
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


def _exported(checkpoint: Checkpoint, paths: list[str]) -> "Iterator[tuple[str, Tensor]]":
    for path in sorted(paths):
        yield from read_safetensors(checkpoint.path / path)


def _counted(tensors: "Iterator[tuple[str, Tensor]]", progress: Progress) -> "Iterator[tuple[str, Tensor]]":
    for name, tensor in tensors:
        if progress is not None:
            progress(tensor.nbytes)
        yield name, tensor
        del tensor  # before the next one is read
