"""A run that is resumed with other tensor-, pipeline- or data-parallel sizes trains on as if nothing had changed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from mbridge_model import Parallel

from testing.gang import Gang
from testing.tiny_models import make_model
from testing.training_runs import OVERLAPPED, PLAIN, SHARDED, build, leave, train

STOP, END = 3, 8


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("train_relayout")
    make_model("qwen2", True, root / "tied")
    make_model("qwen3", False, root / "untied")
    return root


def save_and_go_on(
    directory: Path, output: Path, parallel: Parallel, optimizer: dict[str, Any], dtype: str, file_format: str = "torch"
) -> Any:
    """Train, save, train on; return losses and norms after the checkpoint, and the weights at the end."""
    from mbridge_train.checkpoint.save import save_checkpoint

    try:
        engine = build(directory, parallel, optimizer, dtype=dtype)
        train(engine, 0, STOP)
        save_checkpoint(engine, output, step=STOP, loop_state={"step": STOP}, export_hf=False, file_format=file_format)
        saved = {name: tensor.clone() for name, tensor in engine.export_weights()}
        return saved, train(engine, STOP, END)
    finally:
        leave()


def resume(directory: Path, output: Path, parallel: Parallel, optimizer: dict[str, Any], dtype: str) -> Any:
    from mbridge_train.checkpoint.load import load_checkpoint

    try:
        engine = build(directory, parallel, optimizer, dtype=dtype, weights=False)
        state = load_checkpoint(engine, output / f"global_step_{STOP}")
        loaded = {name: tensor.clone() for name, tensor in engine.export_weights()}
        return loaded, train(engine, state["step"], END)
    finally:
        leave()


ALONE, TENSOR, PIPELINE = Parallel(), Parallel(tensor=2), Parallel(pipeline=2)
BOTH = Parallel(tensor=2, pipeline=2, sequence=True)

# Model, format, what saves (gang, layout, optimizer), what resumes.
CASES = [
    ("tied", "torch", (2, TENSOR, SHARDED), [(2, PIPELINE, PLAIN), (2, ALONE, OVERLAPPED), (4, BOTH, SHARDED)]),
    ("tied", "torch", (4, BOTH, SHARDED), [(2, ALONE, SHARDED), (2, TENSOR, PLAIN)]),
    ("untied", "torch", (2, PIPELINE, PLAIN), [(2, TENSOR, SHARDED), (4, Parallel(tensor=2), SHARDED)]),
    ("tied", "torch_dist", (4, BOTH, SHARDED), [(4, BOTH, SHARDED), (2, TENSOR, PLAIN), (2, ALONE, SHARDED)]),
    ("untied", "torch_dist", (2, ALONE, PLAIN), [(2, PIPELINE, SHARDED)]),
]


@pytest.mark.parametrize(
    "case", CASES, ids=["TP 2", "TP 2 PP 2", "PP 2 untied", "torch_dist TP 2 PP 2", "torch_dist DP 2 untied"]
)
def test_training_goes_on_under_another_layout(
    gang2: Gang, gang4: Gang, models: Path, tmp_path: Path, case: Any
) -> None:
    gangs = {2: gang2, 4: gang4}
    model, file_format, (size, *saved_as), resumed_as = case
    weights, expected = gangs[size].run(save_and_go_on, models / model, tmp_path, *saved_as, "float32", file_format)[0]
    for size, *arguments in resumed_as:
        for loaded, record in gangs[size].run(resume, models / model, tmp_path, *arguments, "float32"):
            assert weights.keys() == loaded.keys()
            assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())
            for (loss, norm, rate, _), (want_loss, want_norm, want_rate, _) in zip(record, expected, strict=True):
                assert loss == pytest.approx(want_loss, rel=1e-6)
                assert norm == pytest.approx(want_norm, rel=1e-4)
                assert rate == want_rate


def test_half_precision_keeps_its_master_weights(gang2: Gang, models: Path, tmp_path: Path) -> None:
    """The first loss is exactly that of the weights; later ones differ by the rounding of bf16."""
    weights, expected = gang2.run(save_and_go_on, models / "tied", tmp_path, TENSOR, SHARDED, "bfloat16")[0]
    for loaded, record in gang2.run(resume, models / "tied", tmp_path, PIPELINE, SHARDED, "bfloat16"):
        assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())
        assert [row[0] for row in record] == pytest.approx([row[0] for row in expected], abs=0.03)
