"""What is checked before any rank starts, beside the config: data files, and where the run is to write.

No torch here: a mistake is said at once, not after the seconds that importing Megatron takes.
"""

import tempfile
from pathlib import Path

from mbridge_config import ConfigError, Problem, ReasoningConfig

from mbridge_reasoning.data import Problem as MathProblem
from mbridge_reasoning.data import read_problems


def check_start(config: ReasoningConfig) -> None:
    """Raise `DataError` or `ConfigError` for what would stop the run later. Nothing is left behind."""
    if config.data.type == "math":
        read_data_files(config)
    _refuse_existing(config)
    _refuse_unwritable(run_directory(config))


def read_data_files(config: ReasoningConfig) -> tuple[list[MathProblem], list[MathProblem]]:
    """(training, validation) problems of the files that `data` names; validation may be empty."""
    data = config.data
    training, validation = (
        [Path(path).expanduser() for path in paths] for paths in (data.train_data_paths, data.val_data_paths)
    )
    keys = {"prompt_key": data.prompt_key, "solutions_key": data.answer_key}
    return read_problems(training, **keys), read_problems(validation, **keys) if validation else []


def run_directory(config: ReasoningConfig) -> Path:
    """Where everything that the run writes goes."""
    return Path(config.runner.output_dir).expanduser() / config.runner.experiment_name


def _refuse_existing(config: ReasoningConfig) -> None:
    """An earlier run's checkpoints must not be mixed with a new one's. A quickstart takes a new name by itself."""
    if config.runner.resume_dir is not None or config.quickstart.enabled:
        return
    directory = run_directory(config)
    if any((directory / "checkpoints").glob("global_step_*")):
        raise ConfigError(
            Problem(
                id="run-exists",
                key="runner.experiment_name",
                value=config.runner.experiment_name,
                reason=f"{directory} holds the checkpoints of an earlier run, which a new one would mix with",
                fix="continue that run with runner.resume_dir=auto, or give this one another runner.experiment_name",
            )
        )


def _refuse_unwritable(directory: Path) -> None:
    """Tried with a file that has no name; permissions alone do not say it (root, read-only and network systems)."""
    directory = directory.absolute()
    existing = next(place for place in (directory, *directory.parents) if place.exists())
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise ConfigError(
            Problem(
                id="output-directory",
                key="runner.output_dir",
                value=str(directory.parent),
                reason=f"nothing can be written in {existing}: {error.strerror}",
                fix="give a directory that you may write to",
            )
        ) from None
