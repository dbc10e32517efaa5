import json
import math
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from mbridge_train.errors import TrainError
from mbridge_train.run.metrics import BACKENDS, MetricsWriter, read_metrics


def test_one_valid_json_line_a_step(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "new") as writer:
        writer.write(1, {"loss": 0.5, "tokens": 12})
        # Readable while the run goes on.
        assert read_metrics(writer.path) == [{"step": 1, "loss": 0.5, "tokens": 12}]
        writer.write(2, {"loss": math.nan, "grad_norm": math.inf, "kl": -math.inf, "tokens": 3})
    lines = writer.path.read_text().splitlines()

    def reject(name: str) -> None:
        raise AssertionError(name)

    assert json.loads(lines[1], parse_constant=reject) == {
        "step": 2,
        "loss": None,
        "grad_norm": None,
        "kl": None,
        "tokens": 3,
        "nonfinite": {"loss": "nan", "grad_norm": "inf", "kl": "-inf"},
    }


def test_resume_is_continuous(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        for step in range(1, 6):
            writer.write(step, {"loss": float(step)})
    with writer.path.open("a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    assert [record["step"] for record in read_metrics(writer.path)] == [1, 2, 3, 4, 5]
    with MetricsWriter(tmp_path, resume_step=3) as writer:
        with pytest.raises(ValueError, match="step 3 comes after step 3"):
            writer.write(3, {})
        writer.write(4, {"loss": -4.0})
    assert [(r["step"], r["loss"]) for r in read_metrics(writer.path)] == [(1, 1), (2, 2), (3, 3), (4, -4)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_resume_without_a_file_and_before_every_step(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, resume_step=3) as writer:
        writer.write(4, {})
    with MetricsWriter(tmp_path, resume_step=0) as writer:
        writer.write(1, {})
    assert [record["step"] for record in read_metrics(writer.path)] == [1]


def test_the_line_of_a_checkpoint_that_the_run_did_not_survive(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write(0, {"loss": 3.0})
        writer.write(1, {"loss": 2.0})
    for _ in range(2):  # the second time it is there
        with MetricsWriter(tmp_path, resume_step=2, resume_metrics={"loss": 1.5}) as writer:
            pass
        assert read_metrics(tmp_path / "metrics.jsonl")[-1] == {"step": 2, "loss": 1.5}
    elsewhere = tmp_path / "elsewhere"  # a run of its own, which starts from that checkpoint
    with MetricsWriter(elsewhere, resume_step=2, resume_metrics={"loss": 1.5}) as writer:
        writer.write(3, {"loss": 1.0})
    assert [record["step"] for record in read_metrics(elsewhere / "metrics.jsonl")] == [3]


@pytest.mark.parametrize("has_checkpoint", [False, True])
def test_a_full_disk_is_said(tmp_path: Path, has_checkpoint: bool) -> None:
    if has_checkpoint:
        (tmp_path / "checkpoints" / "global_step_1").mkdir(parents=True)
        (tmp_path / "checkpoints" / "latest").symlink_to("global_step_1")
    writer = MetricsWriter(tmp_path)
    os.dup2(os.open("/dev/full", os.O_WRONLY), writer._file.fileno())
    message = r"metrics\.jsonl cannot be written: No space left on device; make room .*, then "
    message += "continue .* with runner.resume_dir=auto$" if has_checkpoint else "start the run again"
    with pytest.raises(TrainError, match=message):
        writer.write(1, {"loss": 1.0})
    writer.close()


@pytest.mark.parametrize("again", [False, True])
def test_a_deleted_directory_is_said(tmp_path: Path, again: bool) -> None:
    with MetricsWriter(tmp_path / "run") as writer:
        writer.write(1, {"loss": 1.0})
        shutil.rmtree(tmp_path / "run")
        if again:  # by another run of the same name
            MetricsWriter(tmp_path / "run").close()
        with pytest.raises(TrainError, match=r"metrics\.jsonl was deleted or moved during the run"):
            writer.write(2, {"loss": 1.0})


def test_new_run_keeps_the_file_of_an_old_one(tmp_path: Path) -> None:
    for loss in (1.0, 2.0, 3.0):
        with MetricsWriter(tmp_path) as writer:
            writer.write(1, {"loss": loss})
    names = ["metrics.1.jsonl", "metrics.2.jsonl", "metrics.jsonl"]
    assert [read_metrics(tmp_path / name)[0]["loss"] for name in names] == [1, 2, 3]


def test_runs_without_a_step_leave_no_files(tmp_path: Path) -> None:
    for _ in range(3):
        MetricsWriter(tmp_path).close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("line", ["{oops}", "[1]", '{"step": "2"}', "{}"])
def test_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(TrainError, match=r"metrics\.jsonl:2: not .* repair this line"):
        MetricsWriter(tmp_path, resume_step=2)
    assert path.read_text().count("\n") == 3


def test_backend_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TrainError, match="unknown metrics backend 'mlflow': use one of tensorboard, wandb, swanlab"):
        MetricsWriter(tmp_path, backends=["mlflow"])
    for name, module in (("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb"), ("swanlab", "swanlab")):
        monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
        with pytest.raises(TrainError, match=f"pip install {name}"):
            MetricsWriter(tmp_path, backends=[name])


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsWriter(tmp_path, backends=["tensorboard"], config={"seed": 1}) as writer:
        writer.write(1, {"loss": 0.5})
        writer.write(2, {"loss": math.nan})
        writer.write(3, {"loss": 0.25})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0.5), (3, 0.25)]


def test_reserved_names(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer, pytest.raises(ValueError, match="may not be named step"):
        writer.write(1, {"step": 3})


def test_backend_gets_finite_numbers_and_no_empty_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[tuple[int, dict[str, float]]] = []

    class Recorder:
        def log(self, step: int, metrics: Mapping[str, float]) -> None:
            logged.append((step, dict(metrics)))

        def close(self) -> None:
            logged.append((-1, {}))

    monkeypatch.setitem(BACKENDS, "recorder", lambda *arguments: Recorder())
    with MetricsWriter(tmp_path, backends=["recorder"]) as writer:
        writer.write(1, {"loss": 0.5, "kl": math.nan})
        writer.write(2, {"loss": math.nan})
    assert logged == [(1, {"loss": 0.5}), (-1, {})]
