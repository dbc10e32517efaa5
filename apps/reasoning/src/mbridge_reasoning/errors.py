"""The errors that a user of the app can cause: each message says what is wrong, where, and what to change."""


class ReasoningError(Exception):
    """Base of the app's user errors: the entry point prints the message alone and exits with `exit_code`."""

    exit_code = 2


class RolloutError(ReasoningError):
    """Answers cannot be sampled with these weights or settings."""


class RewardError(ReasoningError):
    """Answers cannot be scored with these settings."""
