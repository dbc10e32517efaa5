"""`mbridge-reasoning`: the command line. Nothing here imports torch, so that a mistake is reported at once."""

import sys

from mbridge_config import ReasoningConfig, refuse_existing_run, refuse_short_run, refuse_unwritable_directory
from mbridge_train.run.application import Application, run_application

from mbridge_reasoning.data.prompts import read_data_files
from mbridge_reasoning.rewards.pool import RewardPool


def check_start(config: ReasoningConfig) -> None:
    """Raise a user error for data, reward function or directories that would stop the run later.

    Nothing is left behind.
    """
    if config.data.type == "math":
        training, _ = read_data_files(config)
        refuse_short_run(config, rows=len(training))
    if config.reward.function is not None:
        with RewardPool.of(config) as rewards:
            rewards.wait_until_ready()
    refuse_existing_run(config)
    refuse_unwritable_directory(config)


APPLICATION = Application(
    program="mbridge-reasoning", package="mbridge_reasoning", schema=ReasoningConfig, check_start=check_start
)


def main() -> int:
    """Return the exit code: 0; 2 for a mistake of the user, without a traceback; 130 for Ctrl-C; 1 for a crash."""
    return run_application(APPLICATION, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
