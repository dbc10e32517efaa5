"""Metrics of a run: one line of JSON per step in ``metrics.jsonl``, and optionally tracking services.

The report is made from ``metrics.jsonl``. Its lines are always valid JSON: NaN and infinities, which JSON lacks, become
null and are listed under ``"nonfinite"``.
"""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, Self

from mbridge_train.errors import TrainError
from mbridge_train.run.run_directory import replace_text, writing

METRICS_FILE = "metrics.jsonl"


class MetricsBackend(NamedTuple):
    """A tracking service: the functions that log the finite metrics of a step, and that end the run."""

    log: Callable[[int, Mapping[str, float]], None]
    close: Callable[[], None]


class MetricsWriter:
    """Writer that appends steps to ``<directory>/metrics.jsonl`` and logs them in tracking services.

    Only one rank should have a writer. Each line is flushed at once, though not synchronized to disk, so a killed
    process loses none.

    Args:
        directory: directory of the run; created if missing.
        resume_step: step of the checkpoint from which the run resumes. Lines of later steps, which will run again, and
            a truncated last line are dropped. None: a new run; the file of an earlier run is renamed to the first free
            name of ``metrics.1.jsonl``, ``metrics.2.jsonl``, ….
        resume_metrics: metrics of that step from its checkpoint, written if the run was killed after saving the
            checkpoint and before writing their line.
        backends: names from :data:`BACKENDS`.
        project, experiment, config: names of project and run, and its configuration, for the tracking services.
        backend_directory: directory for the files of the backends; None: `directory`.

    Raises:
        TrainError: a backend is unknown or not installed, or ``metrics.jsonl`` is not valid or cannot be written.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        resume_step: int | None = None,
        resume_metrics: Mapping[str, float] | None = None,
        backends: Sequence[str] = (),
        project: str = "mbridge",
        experiment: str = "run",
        config: Mapping[str, Any] | None = None,
        backend_directory: str | os.PathLike[str] | None = None,
    ) -> None:
        for name in backends:
            if name not in BACKENDS:
                raise TrainError(f"unknown metrics backend {name!r}: use one of {', '.join(BACKENDS)}")
        self.path = Path(directory) / METRICS_FILE
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        # A backend may be missing, so they start before the file is changed.
        self._backends = [
            BACKENDS[name](Path(backend_directory or directory), project, experiment, dict(config or {}))
            for name in backends
        ]
        self._last_step = -1
        existed = self.path.exists()
        if existed and resume_step is not None:
            self._last_step = _drop_after(self.path, resume_step)
        elif existed and self.path.stat().st_size:  # else the run ended before its first step
            names = (self.path.with_name(f"metrics.{number}.jsonl") for number in count(1))
            self.path.rename(next(name for name in names if not name.exists()))
        with writing(self.path):
            self._file = self.path.open("a", encoding="utf-8")
        if existed and resume_step is not None and resume_metrics and self._last_step < resume_step:
            self.write(resume_step, resume_metrics)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record one step.

        Raises:
            ValueError: `step` does not come after the last one, or the name of a metric is reserved.
            TrainError: the file cannot be written, or was deleted or moved.
        """
        if step <= self._last_step:
            raise ValueError(f"step {step} comes after step {self._last_step} in {self.path}")
        if reserved := {"step", "nonfinite"} & metrics.keys():
            raise ValueError(f"metrics may not be named {', '.join(sorted(reserved))}")
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        line: dict[str, Any] = {"step": step} | {name: finite.get(name) for name in metrics}
        if len(finite) < len(metrics):
            line["nonfinite"] = {name: str(float(metrics[name])) for name in metrics if name not in finite}
        # Else the lines would go into a file that nobody can open any more.
        if not os.fstat(self._file.fileno()).st_nlink or not self.path.exists():
            raise TrainError(
                f"{self.path} was deleted or moved during the run; start the run again, and leave its directory alone "
                "until it ends"
            )
        with writing(self.path):
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
        self._last_step = step
        if finite:  # a backend may refuse an empty record
            for backend in self._backends:
                backend.log(step, finite)

    def close(self) -> None:
        """Close the file and the backends."""
        with suppress(OSError):  # `write` has reported a line that did not fit
            self._file.close()
        for backend in self._backends:
            backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the lines of a ``metrics.jsonl`` in order of steps, without a truncated last line.

    Raises `TrainError` if a line, named with its file and number, is not a JSON object with an integer ``step``.
    """
    records = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(keepends=True), start=1):
        if not line.endswith("\n"):
            break  # the process was killed while it wrote this line
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise TrainError(f"{path}:{number}: not JSON ({error.msg}): delete or repair this line") from None
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise TrainError(f"{path}:{number}: not an object with an integer step: delete or repair this line")
        records.append(record)
    return records


def _drop_after(path: Path, step: int) -> int:
    """Drop the lines after ``step``, and return the step of the last line, or -1 if none is left."""
    kept = [record for record in read_metrics(path) if record["step"] <= step]
    replace_text(path, "".join(json.dumps(record) + "\n" for record in kept))
    return kept[-1]["step"] if kept else -1


def require_backends(names: Sequence[str]) -> None:
    """Raise `TrainError` if a backend is not installed, without importing it."""
    for name in names:
        if find_spec(name) is None:
            raise _not_installed(name, "there is no such package")


def _imported(module: str, package: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise _not_installed(package, error) from None


def _not_installed(package: str, why: object) -> TrainError:
    return TrainError(
        f"metrics backend {package!r} is not installed ({why}): pip install {package}, or take it out of "
        "runner.logger.logger_backends"
    )


def _tensorboard(directory: Path, project: str, experiment: str, config: dict[str, Any]) -> MetricsBackend:
    module = _imported("torch.utils.tensorboard", "tensorboard")
    writer = module.SummaryWriter(log_dir=str(directory / "tensorboard"))
    writer.add_text("config", f"```json\n{json.dumps(config, indent=2, default=str)}\n```")

    def log(step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return MetricsBackend(log, writer.close)


def _wandb(directory: Path, project: str, experiment: str, config: dict[str, Any]) -> MetricsBackend:
    run = _imported("wandb", "wandb").init(project=project, name=experiment, dir=str(directory), config=config)
    return MetricsBackend(lambda step, metrics: run.log(dict(metrics), step=step), run.finish)


def _swanlab(directory: Path, project: str, experiment: str, config: dict[str, Any]) -> MetricsBackend:
    swanlab = _imported("swanlab", "swanlab")
    swanlab.init(project=project, experiment_name=experiment, logdir=str(directory / "swanlab"), config=config)
    return MetricsBackend(lambda step, metrics: swanlab.log(dict(metrics), step=step), swanlab.finish)


BACKENDS: dict[str, Callable[[Path, str, str, dict[str, Any]], MetricsBackend]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "swanlab": _swanlab,
}
"""Tracking services by name. Each is imported on first use."""
