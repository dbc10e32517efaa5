"""What a run shows and leaves behind: progress on the terminal, metrics.jsonl, report.html. Rank 0 alone writes."""

import dataclasses
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from mbridge_config import ReasoningConfig
from mbridge_train.metrics import MetricsWriter
from mbridge_train.progress import TrainingProgress
from torch import distributed

from mbridge_reasoning.report import write_run_report

FIGURES = {
    "train/accuracy": "accuracy",
    "validation/accuracy": "held-out",
    "train/response_length": "length",
    "policy/kl": "kl",
    "policy/entropy": "entropy",
    "policy/grad_norm": "grad norm",
    "mismatch/logprob_mean_abs": "mismatch",
    "time/step": "seconds",
}

RESUME_KEYS = ("runner.experiment_name", "runner.resume_dir", "runner.max_steps")


class RunOutput:
    """The files of one run under `<output_dir>/<experiment_name>`.

    Args:
        config: of the run.
        directory: of the run; made with the first file.
        command: the words of the command that started the run.
    """

    def __init__(self, config: ReasoningConfig, directory: Path, command: list[str]) -> None:
        self.config = config
        self.directory = directory
        self.command = command
        self.checkpoints = directory / "checkpoints"
        self.is_writer = distributed.get_rank() == 0
        self._writer: MetricsWriter | None = None
        self._progress: TrainingProgress | None = None

    def message(self, text: str) -> None:
        """One line on the terminal."""
        if not self.is_writer:
            return
        if self._progress is not None:
            self._progress.message(text)
        else:
            print(text, flush=True)

    @contextmanager
    def recording(self, *, total_steps: int, first_step: int) -> Iterator[None]:
        """Show and record steps; at the end, however it comes, the report is written from what was recorded."""
        if not self.is_writer:
            yield
            return
        logger = self.config.runner.logger
        plain = _plain(self.config)
        self._writer = MetricsWriter(
            self.directory,
            resume_step=first_step if first_step else None,
            backends=logger.logger_backends,
            project=logger.project_name,
            experiment=logger.experiment_name or self.config.runner.experiment_name,
            backend_directory=logger.log_path,
            config=plain,
        )
        text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
        (self.directory / "config.yaml").write_text(text, encoding="utf-8")
        try:
            with TrainingProgress(total_steps, FIGURES, first_step=first_step, description="GRPO") as self._progress:
                yield
        finally:
            self._progress = None
            self._writer.close()
            write_run_report(self.directory, title=self.config.runner.experiment_name, config=text)
        self._say_where()

    def step(self, number: int, metrics: Mapping[str, float]) -> None:
        """Record and show a finished step."""
        if self._writer is not None and self._progress is not None:
            self._writer.write(number, metrics)
            self._progress.step(number, metrics)

    def _say_where(self) -> None:
        checkpoints = sorted(self.checkpoints.glob("global_step_*"), key=lambda path: int(path.name.rsplit("_", 1)[1]))
        print(f"report      {self.directory / 'report.html'}")
        if checkpoints:
            newest = checkpoints[-1]
            words = [word for word in self.command if word.partition("=")[0] not in RESUME_KEYS]
            words += [
                f"runner.experiment_name={self.config.runner.experiment_name}",
                "runner.resume_dir=auto",
                f"runner.max_steps={int(newest.name.rsplit('_', 1)[1]) * 2}",
            ]
            print(f"checkpoint  {newest}")
            print(f"model       {newest / 'actor' / 'hf_model'}")
            print(f"to go on    {shlex.join(words)}")


def _plain(value: Any) -> Any:
    """The config as YAML can hold it, without the record of where its keys were set."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: _plain(getattr(value, field.name))
            for field in dataclasses.fields(value)
            if field.name != "origin"
        }
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
