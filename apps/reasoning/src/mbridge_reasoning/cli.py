"""`mbridge-reasoning`: the command line. Nothing heavy is imported before the config is checked."""

import sys

from mbridge_config import ReasoningConfig
from mbridge_train.run.application import Application, run_application

from mbridge_reasoning.start import check_start

APPLICATION = Application(
    program="mbridge-reasoning", package="mbridge_reasoning", schema=ReasoningConfig, check_start=check_start
)


def main() -> int:
    """Exit code: 0; 2 for a mistake of the user, printed without a traceback; 130 for Ctrl-C; 1 for a crash."""
    return run_application(APPLICATION, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
