"""What a run measured, one line of JSON per step in ``metrics.jsonl``, and optionally in a tracking service as well.

``metrics.jsonl`` is always written and is what the report is made from. Its lines are valid JSON whatever the numbers
are: NaN and infinities, which JSON has not, become null and are listed under ``"nonfinite"``.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from mbridge_train.errors import TrainError
from mbridge_train.run.files import replace_text, writing

METRICS_FILE = "metrics.jsonl"


class MetricsBackend(Protocol):
    """A tracking service. It is given finite numbers only."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class MetricsWriter:
    """Appends to ``<directory>/metrics.jsonl`` and passes the numbers on to the backends.

    Only one rank should have one. Each line is handed to the operating system at once, so a killed process loses
    none; it is not forced to disk.

    Args:
        directory: of the run; made if missing.
        resume_step: step of the checkpoint that the run resumes from. Lines of later steps, which will be run again,
            and a last line that was cut off are dropped. None: a new run; a file that is already there is kept under
            the first free name of ``metrics.1.jsonl``, ``metrics.2.jsonl``, ….
        resume_metrics: those of that step, as its checkpoint holds them: for the line that a run which was killed right
            after it had saved could not write.
        backends: names from :data:`BACKENDS`.
        project: name of the project at the tracking service.
        experiment: name of the run there.
        config: what to show as the run's configuration there.
        backend_directory: where the backends put their files; None: `directory`.

    Raises:
        TrainError: an unknown backend, one that is not installed, a file to resume that is not valid, or one that
            cannot be written.
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
        # Before the file is touched, since a backend may be missing.
        self._backends = [
            BACKENDS[name](Path(backend_directory or directory), project, experiment, dict(config or {}))
            for name in backends
        ]
        self._last_step = -1
        if self.path.exists():
            if resume_step is None:
                _set_aside(self.path)
            else:
                self._last_step = _drop_after(self.path, resume_step)
        was_there = self.path.exists()
        with writing(self.path):
            self._file = self.path.open("a", encoding="utf-8")
        if was_there and resume_step is not None and resume_metrics and self._last_step < resume_step:
            self.write(resume_step, resume_metrics)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record one step. Steps must increase; a metric that was not measured in a step is simply left out.

        Raises:
            ValueError: a step that does not come after the last one, or a metric with a reserved name.
            TrainError: there is no room for it.
        """
        if step <= self._last_step:
            raise ValueError(f"step {step} comes after step {self._last_step} in {self.path}")
        if reserved := {"step", "nonfinite"} & metrics.keys():
            raise ValueError(f"metrics may not be named {', '.join(sorted(reserved))}")
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        line: dict[str, Any] = {"step": step} | {name: finite.get(name) for name in metrics}
        if len(finite) < len(metrics):
            line["nonfinite"] = {name: str(float(metrics[name])) for name in metrics if name not in finite}
        with writing(self.path):
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
        self._last_step = step
        if finite:  # a backend may refuse an empty record
            for backend in self._backends:
                backend.log(step, finite)

    def close(self) -> None:
        """Close the file and end the runs of the backends."""
        with suppress(OSError):  # of a line that did not fit, which `write` has said
            self._file.close()
        for backend in self._backends:
            backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl`` in order of steps; a last line that was cut off is left out.

    Raises:
        TrainError: a line that is not a JSON object with an integer ``step``, naming file and line.
    """
    return [record for record, _ in _lines(Path(path))]


def _lines(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    text = path.read_text(encoding="utf-8")
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        if not line.endswith("\n"):
            return  # the process was killed while it wrote this
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise TrainError(f"{path}:{number}: not JSON ({error.msg}): delete or repair this line") from None
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise TrainError(f"{path}:{number}: not an object with an integer step: delete or repair this line")
        yield record, line


def _set_aside(path: Path) -> None:
    number = 1
    while (target := path.with_name(f"metrics.{number}.jsonl")).exists():
        number += 1
    path.rename(target)


def _drop_after(path: Path, step: int) -> int:
    """Keep the lines up to ``step``; returns the last step kept, -1 if none is left."""
    kept = [(record["step"], line) for record, line in _lines(path) if record["step"] <= step]
    replace_text(path, "".join(line for _, line in kept))
    return kept[-1][0] if kept else -1


def require_backends(names: Sequence[str]) -> None:
    """Raise `TrainError` for a backend that is not installed, without importing any."""
    for name in names:
        if find_spec(name) is None:
            raise _not_installed(name, "there is no such package")


def _import_backend(module: str, package: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise _not_installed(package, error) from None


def _not_installed(package: str, why: object) -> TrainError:
    return TrainError(
        f"metrics backend {package!r} is not installed ({why}): pip install {package}, or take it out of "
        "runner.logger.logger_backends"
    )


class _TensorBoard:
    def __init__(self, directory: Path, project: str, experiment: str, config: dict[str, Any]) -> None:
        module = _import_backend("torch.utils.tensorboard", "tensorboard")
        self._writer = module.SummaryWriter(log_dir=str(directory / "tensorboard"))
        self._writer.add_text("config", f"```json\n{json.dumps(config, indent=2, default=str)}\n```")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    def __init__(self, directory: Path, project: str, experiment: str, config: dict[str, Any]) -> None:
        module = _import_backend("wandb", "wandb")
        self._run = module.init(project=project, name=experiment, dir=str(directory), config=config)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class _SwanLab:
    def __init__(self, directory: Path, project: str, experiment: str, config: dict[str, Any]) -> None:
        self._module = _import_backend("swanlab", "swanlab")
        self._module.init(project=project, experiment_name=experiment, logdir=str(directory / "swanlab"), config=config)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._module.log(dict(metrics), step=step)

    def close(self) -> None:
        self._module.finish()


BACKENDS: dict[str, Callable[[Path, str, str, dict[str, Any]], MetricsBackend]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WeightsAndBiases,
    "swanlab": _SwanLab,
}
"""Tracking services by name. None is imported before it is asked for."""
