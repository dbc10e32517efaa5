"""What is checked before any rank starts, beside the config: data files, and where the run is to write.

No torch here: a mistake is said at once, not after the seconds that importing Megatron takes.
"""

from pathlib import Path

from mbridge_config import ReasoningConfig, refuse_existing_run, refuse_short_run, refuse_unwritable_directory

from mbridge_reasoning.data.problems import Problem, read_problems


def check_start(config: ReasoningConfig) -> None:
    """Raise `DataError` or `ConfigError` for what would stop the run later. Nothing is left behind."""
    if config.data.type == "math":
        training, _ = read_data_files(config)
        refuse_short_run(config, rows=len(training))
    refuse_existing_run(config)
    refuse_unwritable_directory(config)


def read_data_files(config: ReasoningConfig) -> tuple[list[Problem], list[Problem]]:
    """(training, validation) problems of the files that `data` names; validation may be empty."""
    data = config.data
    training, validation = (
        [Path(path).expanduser() for path in paths] for paths in (data.train_data_paths, data.val_data_paths)
    )
    keys = {"prompt_key": data.prompt_key, "solutions_key": data.answer_key}
    return read_problems(training, **keys), read_problems(validation, **keys) if validation else []
