"""What a run shows and leaves behind: progress on the terminal, metrics.jsonl, report.html. Rank 0 alone writes."""

import os
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml
from mbridge_ckpt import Checkpoint
from mbridge_config import RunConfig, plain
from torch import distributed

from mbridge_train.errors import TrainError
from mbridge_train.run.files import replace_text
from mbridge_train.run.lock import RunLock
from mbridge_train.run.metrics import METRICS_FILE, MetricsWriter
from mbridge_train.run.processes import broadcast
from mbridge_train.run.profiler import StepProfiler
from mbridge_train.run.progress import TrainingProgress
from mbridge_train.run.report import Chart, write_report

THROUGHPUT_CHARTS = (
    Chart(title="Model operations", metrics=("tflops_per_second",), unit="TFLOP/s of a GPU"),
    Chart(title="Model FLOP utilisation", metrics=("mfu",), unit="share of the GPU's bf16 peak"),
)
"""Of what `throughput` measures."""

RESUME_KEYS = ("runner.experiment_name", "runner.resume_dir", "runner.max_steps", "runner.max_epochs")


@dataclass(frozen=True, kw_only=True, slots=True)
class Display:
    """What an app shows of its runs.

    Attributes:
        description: what is trained, for the progress bar.
        figures: labels of the metrics in a step's line on the terminal, by the metric's name.
        charts: of the report.
    """

    description: str
    figures: Mapping[str, str]
    charts: tuple[Chart, ...]


class RunOutput:
    """The files of one run.

    Args:
        config: of the run.
        directory: of the run; made with the first file.
        command: the words of the command that started the run.
        display: what to show.
    """

    def __init__(self, config: RunConfig, directory: Path, command: list[str], display: Display) -> None:
        self.config = config
        self.directory = directory
        self.command = command
        self.display = display
        self.checkpoints = directory / "checkpoints"
        megatron = config.actor.megatron
        self.profiler = StepProfiler(megatron.profiler if megatron.use_profiler else None, directory / "profiler")
        self.is_writer = distributed.get_rank() == 0
        self._lock = RunLock(directory)
        self.report_section = ""
        """HTML that the report shows below its curves."""
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
    def recording(self, *, total_steps: int, first_step: int, resumed_from: Checkpoint | None = None) -> Iterator[None]:
        """Show and record steps; at the end the report is written from what was recorded, also after an error.

        Raises:
            TrainError: on every rank, another run writes there; on rank 0, something cannot be written.
        """
        if reason := broadcast(self._lock.take() if self.is_writer else None):
            raise TrainError(reason)
        if not self.is_writer:
            yield
            return
        logger = self.config.runner.logger
        values = plain(self.config)
        self._writer = MetricsWriter(
            self.directory,
            resume_step=first_step if first_step else None,
            resume_metrics=None if resumed_from is None else resumed_from.metadata.get("metrics"),
            backends=logger.logger_backends,
            project=logger.project_name,
            experiment=logger.experiment_name or self.config.runner.experiment_name,
            backend_directory=logger.log_path,
            config=values,
        )
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
        replace_text(self.directory / "config.yaml", text)
        shown = self.display
        try:
            with TrainingProgress(
                total_steps, shown.figures, first_step=first_step, description=shown.description
            ) as self._progress:
                yield
        finally:
            self._progress = None
            self._writer.close()
            write_report(
                self.directory / METRICS_FILE,
                self.directory / "report.html",
                title=self.config.runner.experiment_name,
                charts=shown.charts,
                section=self.report_section,
                config=text,
            )
        self._say_where()

    def step(self, number: int, metrics: Mapping[str, float]) -> None:
        """Record and show a finished step."""
        if self._writer is not None and self._progress is not None:
            self._writer.write(number, metrics)
            self._progress.step(number, metrics)

    def _say_where(self) -> None:
        print(f"report      {self.directory / 'report.html'}")
        latest = self.checkpoints / "latest"
        if not latest.is_dir():
            return
        newest = self.checkpoints / latest.readlink()
        words = [word for word in self.command if word.partition("=")[0] not in RESUME_KEYS]
        words += [
            f"runner.experiment_name={self.config.runner.experiment_name}",
            "runner.resume_dir=auto",
            f"runner.max_steps={int(newest.name.rsplit('_', 1)[1]) * 2}",
        ]
        if self.config.runner.max_epochs is not None:  # which may be over
            words.append("runner.max_epochs=null")
        ranks = distributed.get_world_size()
        started = any(word.startswith("launcher.nproc_per_node=") for word in words)
        if ranks > 1 and not started and ranks == int(os.environ.get("LOCAL_WORLD_SIZE", ranks)):  # by torchrun, say
            words.append(f"launcher.nproc_per_node={ranks}")
        if "UV" in os.environ:
            words = ["./uvw" if Path("uvw").is_file() else "uv", "run", *words]
        print(f"checkpoint  {newest}")
        print(f"model       {newest / 'actor' / 'hf_model'}")
        print(f"to go on    {shlex.join(words)}")
