"""The command line `mbridge-sft`. Nothing heavy is imported before the config is checked."""

import sys

from mbridge_config import SFTConfig
from mbridge_train.run.application import Application, run_application


def main() -> int:
    """Return the exit code: 0; 2 for a user's mistake, printed without a traceback; 130 for Ctrl-C; 1 for a crash."""
    return run_application(APPLICATION, sys.argv[1:])


def _check_start(config: SFTConfig) -> None:
    from mbridge_sft.start import check_start  # with pyarrow

    check_start(config)


APPLICATION = Application(program="mbridge-sft", package="mbridge_sft", schema=SFTConfig, check_start=_check_start)


if __name__ == "__main__":
    sys.exit(main())
