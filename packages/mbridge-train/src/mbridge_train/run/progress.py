"""Progress of a run: one line per step and, on a terminal, a progress bar below the lines."""

from collections.abc import Mapping
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text


class TrainingProgress:
    """Context manager that prints the key figures of each step.

    If the output is not a terminal (a log file, CI), lines are plain text without a bar or escape sequences.

    Args:
        total_steps: number of steps of the whole run, including the `first_step` ones before a resume.
        figures: labels by the names of metrics, in the order of display. Metrics that a step lacks are left out.
        description: label of the bar.
        console: None: standard output.
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


def format_figure(value: float) -> str:
    """Format `value` with at most four significant digits, whole numbers in full."""
    if isinstance(value, int) or (value.is_integer() and abs(value) < 1e9):
        return str(int(value))
    return f"{value:.4g}"
