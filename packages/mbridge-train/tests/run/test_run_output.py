"""The output of a run that fails: its files and its messages."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mbridge_config import SFTConfig
from mbridge_train.errors import TrainError
from mbridge_train.run.metrics import read_metrics
from mbridge_train.run.output import Display, RunOutput
from mbridge_train.run.report import Chart
from torch import distributed

DISPLAY = Display(description="training", figures={"loss": "loss"}, charts=(Chart(title="Loss", metrics=("loss",)),))


@pytest.fixture
def output(tmp_path: Path) -> Iterator[RunOutput]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        config = SFTConfig()
        config.runner.logger.experiment_name = "run"
        yield RunOutput(config, tmp_path / "run", ["mbridge-sft"], DISPLAY)
    finally:
        distributed.destroy_process_group()


def record(output: RunOutput, *then: Callable[[], object]) -> None:
    """A run that takes a step and calls functions."""
    with output.recording(total_steps=2, first_step=0):
        output.step(1, {"loss": 2.0})
        for function in then:
            function()


def crash() -> None:
    raise ZeroDivisionError


def damage(output: RunOutput) -> Callable[[], object]:
    return lambda: (output.directory / "metrics.jsonl").write_text("[]\n")


def test_a_crash_leaves_metrics_and_report(output: RunOutput) -> None:
    with pytest.raises(ZeroDivisionError):
        record(output, crash)
    assert read_metrics(output.directory / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]
    assert "Loss" in (output.directory / "report.html").read_text()


def test_a_report_that_fails_does_not_replace_the_crash(output: RunOutput, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError):
        record(output, damage(output), crash)
    said = capsys.readouterr().err
    assert said.startswith("the report could not be written: ") and "metrics.jsonl:1: not an object" in said


def test_a_report_that_fails_after_all_steps_is_an_error(output: RunOutput) -> None:
    with pytest.raises(TrainError, match="not an object"):
        record(output, damage(output))


def test_a_deleted_directory_ends_the_run(output: RunOutput, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TrainError, match=r"metrics\.jsonl was deleted or moved during the run"):
        record(output, lambda: shutil.rmtree(output.directory), lambda: output.step(2, {"loss": 1.0}))
    assert "the report could not be written" in capsys.readouterr().err
    assert not output.directory.exists()
