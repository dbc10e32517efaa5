"""Checking data files and the output directory before any rank starts.

Nothing here imports torch, so that a mistake is reported at once, not after the seconds that importing Megatron takes.
"""

from pathlib import Path

from mbridge_config import SFTConfig, refuse_existing_run, refuse_short_run, refuse_unwritable_directory
from mbridge_config.schema.sft import SFTDataConfig
from mbridge_train.data.examples import Examples, ReadSettings
from mbridge_train.data.rows import read_examples


def check_start(config: SFTConfig) -> None:
    """Raise `DataError` or `ConfigError` for faults that would stop the run later. Nothing is left behind."""
    for paths, is_training in zip(data_paths(config), (True, False), strict=True):
        # The quickstart makes missing files.
        if paths and not (config.quickstart.enabled and not all(path.exists() for path in paths)):
            examples = read_examples(paths, read_settings(config.data))
            if is_training:
                refuse_short_run(config, rows=len(examples))
    if not config.runner.only_eval:
        refuse_existing_run(config)
    refuse_unwritable_directory(config)


def read_data(config: SFTConfig) -> tuple[Examples | None, Examples | None]:
    """Return the (training, evaluation) examples of the paths in `data`; None if there are no paths."""
    settings = read_settings(config.data)
    training, evaluation = (read_examples(paths, settings) if paths else None for paths in data_paths(config))
    return training, evaluation


def data_paths(config: SFTConfig) -> tuple[list[Path], list[Path]]:
    """Return the (training, evaluation) files and directories; none to train on if the run only evaluates."""
    data = config.data
    training = [] if config.runner.only_eval else data.train_data_paths
    return [Path(path).expanduser() for path in training], [Path(path).expanduser() for path in data.val_data_paths]


def read_settings(data: SFTDataConfig) -> ReadSettings:
    """Return the settings of reading that `data` holds."""
    return ReadSettings(
        prompt_key=data.prompt_key,
        choice_key=data.choice_key,
        answer_key=data.answer_key,
        image_keys=None if data.image_keys is None else tuple(data.image_keys),
        answer_format=data.answer_format,
        image_root=None if data.image_root is None else Path(data.image_root).expanduser(),
        allow_urls=data.allow_urls,
        private_networks=tuple(data.private_networks),
    )
