"""`torch_dist` directories from elsewhere: weights are loaded, code is not run, damage is named."""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint
from mbridge_model import Parallel

from testing.gang import Gang
from testing.tiny_models import make_model
from testing.training_runs import SHARDED, build, leave, train


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("torch_dist")
    make_model("qwen3", False, root / "model")
    make_model("qwen3", False, root / "shallow", num_hidden_layers=2)
    return root


def write_as_megatron_does(directory: Path) -> Any:
    """Save weights and Transformer Engine's metadata, and nothing of ours; return the weights by HuggingFace name."""
    from mbridge_train.checkpoint.placement import named_chunks
    from megatron.core import dist_checkpointing

    try:
        engine = build(directory / "model", Parallel(tensor=2), SHARDED)
        train(engine, 0, 1)
        (directory / "iter_0000001").mkdir(exist_ok=True)
        ((_, model),) = named_chunks(engine)
        dist_checkpointing.save(model.sharded_state_dict() | {"iteration": 1}, str(directory / "iter_0000001"))
        return {name: tensor.clone() for name, tensor in engine.export_weights()}
    finally:
        leave()


def save_and_read_as_megatron_does(directory: Path) -> list[str]:
    """Return the names of weights that Megatron-Core, at its default strictness, reads with other values than saved."""
    from mbridge_train.checkpoint.placement import model_state, named_chunks
    from mbridge_train.checkpoint.save import save_checkpoint
    from megatron.core import dist_checkpointing

    try:
        engine = build(directory / "model", Parallel(tensor=2), SHARDED)
        train(engine, 0, 1)
        path = save_checkpoint(
            engine, directory / "ours", step=1, loop_state={}, export_hf=False, file_format="torch_dist"
        )
        saved = {name: tensor.clone() for name, tensor in model_state(engine).items()}
        train(engine, 1, 2)
        ((_, model),) = named_chunks(engine)
        loaded = dist_checkpointing.load(model.sharded_state_dict(), str(path / "actor/iter_0000001"))
        return [name for name, tensor in saved.items() if not torch.equal(loaded[name], tensor)]
    finally:
        leave()


def test_megatron_core_reads_what_is_saved(gang2: Gang, directory: Path) -> None:
    assert gang2.run(save_and_read_as_megatron_does, directory) == [[], []]


def read(model: Path, checkpoint: Path, parallel: Parallel) -> Any:
    """Return the weights after reading, or class and message of the exception."""
    from mbridge_train.checkpoint.load import load_start

    try:
        engine = build(model, parallel, SHARDED, weights=False)
        load_start(engine, checkpoint)
        return {name: tensor.clone() for name, tensor in engine.export_weights()}
    except Exception as error:  # noqa: BLE001 - the test compares classes
        return type(error).__name__, str(error)
    finally:
        leave()


class Harmful:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.mark,)


def harmful_metadata(checkpoint: Path, mark: Path) -> None:
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Harmful(mark)))


def harmful_object(checkpoint: Path, mark: Path) -> None:
    """Put an object that runs code in place of the small values that are read along with the tensors."""
    for file in checkpoint.iterdir():
        if file.name != "metadata.json":
            file.unlink()
    torch.distributed.checkpoint.save(
        {"common_state/shard_0_1": Harmful(mark)}, checkpoint_id=str(checkpoint), no_dist=True
    )


def cut_metadata(checkpoint: Path, mark: Path) -> None:
    content = (checkpoint / ".metadata").read_bytes()
    (checkpoint / ".metadata").write_bytes(content[: len(content) // 2])


def cut_tensors(checkpoint: Path, mark: Path) -> None:
    file = max(checkpoint.glob("*.distcp"), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def test_directories_from_elsewhere(gang2: Gang, directory: Path, tmp_path: Path) -> None:
    weights = gang2.run(write_as_megatron_does, directory)[0]
    checkpoint = directory / "iter_0000001"
    for parallel in (Parallel(pipeline=2), Parallel()):
        for loaded in gang2.run(read, directory / "model", checkpoint, parallel):
            assert weights.keys() == loaded.keys()
            assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())
    tree = tmp_path / "tree"  # with a tracker file, as Megatron-LM leaves it
    shutil.copytree(checkpoint, tree / checkpoint.name)
    (tree / "latest_checkpointed_iteration.txt").write_text("1")
    assert isinstance(gang2.run(read, directory / "model", tree, Parallel())[0], dict)
    (tree / "iter_0000001" / "metadata.json").unlink()
    (tree / "iter_0000001" / "mp_rank_00").mkdir()
    for kind, message in gang2.run(read, directory / "model", tree, Parallel()):
        assert kind == "TrainError" and f"mbridge-ckpt import-megatron {tree}" in message
    for kind, message in gang2.run(read, directory / "shallow", checkpoint, Parallel()):
        assert kind == "TrainError" and "another model" in message

    mark = tmp_path / "code ran"
    for number, (spoil, expected, text) in enumerate(
        [
            (harmful_metadata, "UnsafeCheckpointError", "could run code"),
            (harmful_object, "TrainError", "cannot be read"),
            (cut_metadata, "CorruptCheckpointError", "not the metadata"),
            (cut_tensors, "TrainError", "cannot be read"),
        ]
    ):
        spoiled = tmp_path / str(number)
        shutil.copytree(checkpoint, spoiled)
        spoil(spoiled, mark)
        for kind, message in gang2.run(read, directory / "model", spoiled, Parallel()):
            assert (kind, text in message) == (expected, True), message
            assert str(spoiled) in message
    assert not mark.exists()
