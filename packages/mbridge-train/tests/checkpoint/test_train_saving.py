"""Saves of a run: the state of that step in the background, HuggingFace copies at their interval, old ones removed."""

from pathlib import Path
from typing import Any

import torch
from mbridge_ckpt import Retention, open_checkpoint, verify
from mbridge_model import Parallel

from testing.gang import Gang
from testing.tiny_models import make_model
from testing.training_runs import OVERLAPPED, build, leave, train

END = 5


def run(directory: Path, output: Path, metrics: dict[str, float] | None = None, **settings: Any) -> Any:
    """Return the losses of END steps with a checkpoint after each, and the weights at each of them."""
    from mbridge_train.checkpoint.run_saver import RunSaver, SaveSettings

    try:
        engine = build(directory, Parallel(tensor=2), OVERLAPPED)
        record, weights = [], {}
        with RunSaver(engine, output, SaveSettings(interval=1, **settings)) as saver:
            for step in range(END):
                record += train(engine, step, step + 1)
                weights[step] = {name: tensor.clone() for name, tensor in engine.export_weights()}
                state = {"step": step}
                measured = {"loss": record[-1][0]} | (metrics or {})
                saver.save(step, last=step == END - 1, loop_state=state, metrics=measured)
                saver.check()
        return record, weights
    finally:
        leave()


def resume(directory: Path, checkpoint: Path) -> Any:
    from mbridge_train.checkpoint.load import load_checkpoint

    try:
        engine = build(directory, Parallel(tensor=2), OVERLAPPED, weights=False, seed=99)
        step = load_checkpoint(engine, checkpoint)["step"]
        weights = {name: tensor.clone() for name, tensor in engine.export_weights()}
        return step, weights, train(engine, step + 1, END)
    finally:
        leave()


def steps(output: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("global_step_")) for path in output.glob("global_step_*"))


def has_hf(output: Path) -> list[int]:
    return [step for step in steps(output) if (output / f"global_step_{step}" / "actor" / "hf_model").exists()]


def test_saves_in_the_background_are_those_of_their_step(gang2: Gang, tmp_path: Path) -> None:
    make_model("qwen2", True, tmp_path / "model")
    plain = gang2.run(run, tmp_path / "model", tmp_path / "plain", hf_export_every=0)
    record, weights = gang2.run(run, tmp_path / "model", tmp_path / "background", in_background=True)[0]
    assert record == plain[0][0]
    assert steps(tmp_path / "background") == has_hf(tmp_path / "background") == [0, 1, 2, 3, 4]
    assert has_hf(tmp_path / "plain") == []
    for step in range(END):
        checkpoint = tmp_path / "background" / f"global_step_{step}"
        assert verify(checkpoint).ok
        other = open_checkpoint(tmp_path / "plain" / checkpoint.name)
        for item in other.manifest.files:
            assert open_checkpoint(checkpoint).manifest.file(item.path).bytes == item.bytes
    checkpoint = tmp_path / "background" / "global_step_2"
    for step, loaded, rest in gang2.run(resume, tmp_path / "model", checkpoint):
        assert step == 2 and rest == record[3:]
        assert all(torch.equal(loaded[name], tensor) for name, tensor in weights[2].items())


def test_what_is_kept_and_exported(gang2: Gang, tmp_path: Path) -> None:
    make_model("qwen2", True, tmp_path / "model")
    retention = Retention(last=1, every=2)
    gang2.run(run, tmp_path / "model", tmp_path / "kept", hf_export_every=4, retention=retention, in_background=True)
    assert steps(tmp_path / "kept") == [0, 2, 4]
    assert has_hf(tmp_path / "kept") == [0, 4]


def test_what_cannot_be_compared_is_kept(gang2: Gang, tmp_path: Path) -> None:
    """A checkpoint is not ranked by a metric that is not measured or not finite."""
    make_model("qwen2", True, tmp_path / "model")
    retention = Retention(best=1, metric="validation/accuracy")
    metrics = {"reward": float("inf"), "entropy": float("nan")}
    gang2.run(run, tmp_path / "model", tmp_path / "kept", metrics, hf_export_every=0, retention=retention)
    assert steps(tmp_path / "kept") == [0, 1, 2, 3, 4]
    assert set(open_checkpoint(tmp_path / "kept" / "global_step_4").metadata["metrics"]) == {"loss"}


def test_save_that_comes_too_early_is_left_out(gang2: Gang, tmp_path: Path) -> None:
    """The last save is never skipped."""
    make_model("qwen2", True, tmp_path / "model")
    settings = {"in_background": True, "when_busy": "refuse", "hf_export_every": 0}
    gang2.run(run, tmp_path / "model", tmp_path / "run", **settings)
    assert {0, END - 1} <= set(steps(tmp_path / "run"))
