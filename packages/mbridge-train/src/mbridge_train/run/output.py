"""The output of a run, from rank 0: progress on the terminal, metrics.jsonl, config.yaml, report.html."""

import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import yaml
from mbridge_ckpt import Checkpoint
from mbridge_config import RunConfig, plain
from mbridge_config.schema.keys import filled
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text
from torch import distributed

from mbridge_train.errors import TrainError
from mbridge_train.run.metrics import METRICS_FILE, MetricsWriter
from mbridge_train.run.process_group import broadcast
from mbridge_train.run.profiler import StepProfiler
from mbridge_train.run.report import Chart, format_figure, write_report
from mbridge_train.run.run_directory import RunLock, replace_text

THROUGHPUT_CHARTS = (
    Chart(title="Model operations", metrics=("tflops_per_second",), unit="TFLOP/s per GPU"),
    Chart(title="Model FLOP utilization", metrics=("mfu",), unit="share of the GPU's bf16 peak"),
)
"""Charts of the metrics of `mbridge_train.engine.throughput`."""

RESUME_KEYS = ("runner.experiment_name", "runner.resume_dir", "runner.max_steps", "runner.max_epochs")


@dataclass(frozen=True, kw_only=True, slots=True)
class Display:
    """How an app shows its runs: the label of the progress bar, labels of a step's metrics by name, and charts."""

    description: str
    figures: Mapping[str, str]
    charts: tuple[Chart, ...]


class TrainingProgress:
    """Context manager that prints the key figures of each step.

    If the output is not a terminal (a log file, CI), lines are plain text without a bar or escape sequences.
    `total_steps` are those of the whole run, including the `first_step` ones before a resume. `figures` are labels by
    the names of metrics, in the order of display; metrics that a step lacks are left out. `description` is the bar's.
    """

    def __init__(
        self,
        total_steps: int,
        figures: Mapping[str, str],
        *,
        first_step: int = 0,
        description: str = "training",
        console: Console | None = None,
    ) -> None:
        self._console = console or Console()
        self._total_steps = total_steps
        self._figures = figures
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(description, total=total_steps, completed=first_step)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show that ``step`` steps are done, with the metrics of the last one."""
        width = len(str(self._total_steps))
        line = Text.assemble(("step ", "dim"), (f"{step:>{width}}/{self._total_steps}", "bold"))
        for name, label in self._figures.items():
            if name in metrics:
                line.append("  ").append(f"{label} ", style="dim").append(format_figure(metrics[name]))
        self.message(line)
        self._bar.update(self._task, completed=step)

    def message(self, text: str | Text) -> None:
        """Print a line of text, without markup, above the bar."""
        # Rich would wrap lines in a log, whose width it assumes.
        self._console.print(text, markup=False, emoji=False, soft_wrap=True, highlight=False)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()


class RunOutput:
    """The files and the terminal of the run that `command` started; `directory` is created with the first file."""

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
        self.is_preempted = False
        """Whether the run ends before its last step."""
        self.report_section = ""
        """HTML to show below the curves of the report."""
        self._writer: MetricsWriter | None = None
        self._progress: TrainingProgress | None = None

    def message(self, text: str) -> None:
        """Print one line to the terminal."""
        if self._progress is not None:
            self._progress.message(text)
        elif self.is_writer:
            print(text, flush=True)

    @contextmanager
    def recording(self, *, total_steps: int, first_step: int, resumed_from: Checkpoint | None = None) -> Iterator[None]:
        """Record and show the steps of the block, and write the report at its end, even after an error.

        Raises `TrainError` on every rank if another run uses the directory; on rank 0 if a file cannot be written.
        """
        if reason := broadcast(self._lock.take() if self.is_writer else None):
            raise TrainError(reason)
        with closing(self._lock), self._written(total_steps, first_step, resumed_from):
            yield

    @contextmanager
    def _written(self, total_steps: int, first_step: int, resumed_from: Checkpoint | None) -> Iterator[None]:
        """On rank 0, write the files of the run while the block lasts, and its report and results at the end."""
        if not self.is_writer:
            yield
            return
        logger = self.config.runner.logger
        values = plain(self.config)
        self._writer = MetricsWriter(
            self.directory,
            resume_step=first_step or None,
            resume_metrics=None if resumed_from is None else resumed_from.metadata.get("metrics"),
            backends=logger.logger_backends,
            project=logger.project_name,
            experiment=filled(logger.experiment_name),
            backend_directory=logger.log_path,
            config=values,
        )
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
        replace_text(self.directory / "config.yaml", text)
        progress = TrainingProgress(
            total_steps, self.display.figures, first_step=first_step, description=self.display.description
        )
        try:
            with progress as self._progress:
                yield
        except BaseException:
            try:
                self._finish(text)
            except Exception as error:  # noqa: BLE001 - must not hide the error of the run
                print(f"the report could not be written: {error}", file=sys.stderr)
            raise
        self._finish(text)
        self._print_results()

    def step(self, number: int, metrics: Mapping[str, float]) -> None:
        """Record and show a finished step."""
        if self._writer is not None and self._progress is not None:
            self._writer.write(number, metrics)
            self._progress.step(number, metrics)

    def _finish(self, config_text: str) -> None:
        assert self._writer is not None
        self._progress = None
        self._writer.close()
        write_report(
            self.directory / METRICS_FILE,
            self.directory / "report.html",
            title=self.config.runner.experiment_name,
            charts=self.display.charts,
            section=self.report_section,
            config=config_text,
        )

    def _print_results(self) -> None:
        """Print the paths of the results and the command that continues the run."""
        print(f"report      {self.directory / 'report.html'}")
        latest = self.checkpoints / "latest"
        if not latest.is_dir():
            return
        newest = self.checkpoints / latest.readlink()
        changed = RESUME_KEYS[:2] if self.is_preempted else RESUME_KEYS
        words = [word for word in self.command if word.partition("=")[0] not in changed]
        words += [f"runner.experiment_name={self.config.runner.experiment_name}", "runner.resume_dir=auto"]
        if not self.is_preempted:
            words.append(f"runner.max_steps={int(newest.name.rsplit('_', 1)[1]) * 2}")
            if self.config.runner.max_epochs is not None:  # may have been reached
                words.append("runner.max_epochs=null")
        ranks = distributed.get_world_size()
        is_given = any(word.startswith("launcher.nproc_per_node=") for word in words)
        # If torchrun or SLURM started the ranks, all on this host, the launcher can start them, too.
        if ranks > 1 and not is_given and ranks == int(os.environ.get("LOCAL_WORLD_SIZE", ranks)):
            words.append(f"launcher.nproc_per_node={ranks}")
        if "UV" in os.environ:
            words = ["./uvw" if Path("uvw").is_file() else "uv", "run", *words]
        print(f"checkpoint  {newest}")
        print(f"model       {newest / 'actor' / 'hf_model'}")
        print(f"to go on    {shlex.join(words)}")
