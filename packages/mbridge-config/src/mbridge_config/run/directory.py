"""Decide where a run writes, and refuse places where it must not or cannot."""

import tempfile
from pathlib import Path

from mbridge_config.paths import is_there, user_path
from mbridge_config.problems import refusal
from mbridge_config.schema.run_kinds import RunConfig


def run_directory(config: RunConfig) -> Path:
    """Return the directory of everything that the run writes."""
    return user_path(config.runner.output_dir) / config.runner.experiment_name


def checkpoint_directory(config: RunConfig) -> Path:
    """Return the directory that holds the checkpoints of the run, `global_step_<n>`."""
    return run_directory(config) / "checkpoints"


def take_free_name(config: RunConfig) -> None:
    """Give a repeated quickstart an unused name in `config`, so that the README's command works twice.

    Name and directory of the logs follow it where they were those of the run.
    """
    runner, logger = config.runner, config.runner.logger
    if not config.quickstart.enabled or runner.resume_dir is not None:
        return
    name, number = runner.experiment_name, 1
    while is_there(checkpoint_directory(config)):
        number += 1
        runner.experiment_name = f"{name}-{number}"
    if logger.experiment_name == name:
        logger.experiment_name = runner.experiment_name
    if logger.log_path == f"{runner.output_dir}/{name}":
        logger.log_path = f"{runner.output_dir}/{runner.experiment_name}"


def refuse_existing_run(config: RunConfig) -> None:
    """Raise `ConfigError` if the checkpoints of a new run would be mixed with those of an earlier one.

    A quickstart is exempt: it takes a new name.
    """
    if config.runner.resume_dir is not None or config.quickstart.enabled:
        return
    directory = run_directory(config)
    if any(checkpoint_directory(config).glob("global_step_*")):
        name = "runner.experiment_name"
        reason = f"{directory} holds the checkpoints of an earlier run, which a new one would mix with"
        fix = f"continue that run with runner.resume_dir=auto, or give this one another {name}"
        raise refusal("run-exists", reason, fix, key=name, value=config.runner.experiment_name)


def refuse_unwritable_directory(config: RunConfig) -> None:
    """Raise `ConfigError` if the run could not write; nothing is left behind.

    An unnamed file is created to find out, since permissions do not tell (root, read-only and network file systems).
    """
    directory = run_directory(config).absolute()
    existing = next(place for place in (directory, *directory.parents) if is_there(place))
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        key, reason = "runner.output_dir", f"nothing can be written in {existing}: {error.strerror}"
        fix = "give a directory that you may write to"
        raise refusal("output-directory", reason, fix, key=key, value=str(directory.parent)) from None
