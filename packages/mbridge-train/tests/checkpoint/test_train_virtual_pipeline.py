"""Model chunks of an interleaved pipeline: each rank saves and loads all of them, and other layouts read them."""

from pathlib import Path
from typing import Any

import pytest
from mbridge_ckpt import Layout, WholeModel, open_checkpoint, reshard
from mbridge_ckpt.cli.diff import diff
from mbridge_model import Parallel

from testing.gang import Gang
from testing.tiny_models import make_model
from testing.training_runs import BETAS, LEARNING_RATE, SHARDED, WEIGHT_DECAY, build, leave, train

STEP = 2


def build_interleaved(directory: Path) -> Any:
    """Build an engine of two pipeline stages with two model chunks each, with random weights."""
    from mbridge_train.engine.engine import Engine, MicroBatching
    from mbridge_train.optim.optimizer import OptimizerSettings
    from mbridge_train.optim.schedule import Schedule

    plain = build(directory, Parallel(pipeline=2), SHARDED, weights=False)
    provider = plain.handle.provider
    provider.virtual_pipeline_model_parallel_size = 2
    chunks = [
        provider.provide(
            pre_process=plain.layout.is_first_stage and chunk == 0,
            post_process=plain.layout.is_last_stage and chunk == 1,
            vp_stage=chunk,
        )
        for chunk in (0, 1)
    ]
    schedule = Schedule(max_lr=LEARNING_RATE, warmup_steps=4, decay_steps=8, weight_decay=WEIGHT_DECAY)
    settings = OptimizerSettings(schedule=schedule, betas=BETAS, **SHARDED)
    return Engine(chunks, plain.handle, micro_batching=MicroBatching(micro_batch_size=2), optimizer=settings)


def save_plain(directory: Path, output: Path) -> None:
    from mbridge_train.checkpoint.save import save_checkpoint

    try:
        engine = build(directory, Parallel(tensor=2), SHARDED)
        train(engine, 0, STEP)
        save_checkpoint(engine, output, step=STEP, loop_state={}, export_hf=False)
    finally:
        leave()


def load_and_save_interleaved(directory: Path, source: Path, output: Path, file_format: Any) -> list[str]:
    """Load the checkpoint into a chunked engine, save it to `output`, and return the names of trained parameters."""
    from mbridge_train.checkpoint.load import load_checkpoint
    from mbridge_train.checkpoint.placement import parameter_names
    from mbridge_train.checkpoint.save import save_checkpoint

    try:
        engine = build_interleaved(directory)
        load_checkpoint(engine, source)
        save_checkpoint(engine, output, step=STEP, loop_state={}, export_hf=False, file_format=file_format)
        return list(parameter_names(engine).values())
    finally:
        leave()


def save_again(directory: Path, source: Path, output: Path) -> None:
    from mbridge_train.checkpoint.load import load_checkpoint
    from mbridge_train.checkpoint.save import save_checkpoint

    try:
        engine = build(directory, Parallel(), SHARDED, weights=False)
        load_checkpoint(engine, source)
        save_checkpoint(engine, output, step=STEP, loop_state={}, export_hf=False)
    finally:
        leave()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_all_chunks_are_saved_loaded_and_placed(gang2: Gang, tmp_path: Path, tied: bool) -> None:
    make_model("qwen2" if tied else "qwen3", tied, tmp_path / "model", num_hidden_layers=8)
    name = f"global_step_{STEP}"
    plain, interleaved = tmp_path / "plain" / name, tmp_path / "interleaved" / name
    gang2.run(save_plain, tmp_path / "model", plain.parent)
    names = gang2.run(load_and_save_interleaved, tmp_path / "model", plain, interleaved.parent, "torch")
    assert {text.split(".")[0] for text in names[1]} == {"chunk0", "chunk1"}
    assert diff(plain, interleaved) == []

    checkpoint = open_checkpoint(interleaved)
    assert checkpoint.layout == Layout(pipeline=2, virtual_pipeline=2)
    with WholeModel(checkpoint) as whole:
        layers = {p.placement.layer: p.files[0] for p in whole.parameters.values() if p.placement.layer is not None}
        # Megatron-Core's order: chunk 0 of both stages, then chunk 1 of both.
        assert [layers[layer].split("/")[-2][-1] for layer in range(8)] == list("00110011")

    again, elsewhere, cut = tmp_path / "again" / name, tmp_path / "elsewhere" / name, tmp_path / "cut"
    gang2.run(load_and_save_interleaved, tmp_path / "model", interleaved, again.parent, "torch")
    gang2.run(save_again, tmp_path / "model", interleaved, elsewhere.parent)
    for other in (again, elsewhere, reshard(interleaved, cut, tensor=2, pipeline=2)):
        assert diff(plain, other) == []


def test_chunks_in_megatron_cores_format(gang2: Gang, tmp_path: Path) -> None:
    make_model("qwen2", True, tmp_path / "model", num_hidden_layers=8)
    name = f"global_step_{STEP}"
    plain, interleaved, again = (tmp_path / place / name for place in ("plain", "interleaved", "again"))
    gang2.run(save_plain, tmp_path / "model", plain.parent)
    gang2.run(load_and_save_interleaved, tmp_path / "model", plain, interleaved.parent, "torch_dist")
    gang2.run(save_again, tmp_path / "model", interleaved, again.parent)
    assert diff(plain, again) == []
