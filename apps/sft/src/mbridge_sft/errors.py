"""The errors that a user of the app can cause: each message says what is wrong, where, and what to change."""


class SFTError(Exception):
    """Base of the app's user errors: the entry point prints the message alone and exits with `exit_code`."""

    exit_code = 2


class DataError(SFTError):
    """Examples cannot be read, found or used."""


class RowError(DataError):
    """One row cannot be used: the loader skips up to `data.max_bad_rows` of them."""


class LongRowError(RowError):
    """One row has more tokens than a sequence may have."""
