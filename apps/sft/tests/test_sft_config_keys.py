"""A key that the schema calls honoured is read by some code, so that no setting is silently without effect."""

from mbridge_config import SFTConfig
from mbridge_config.schema.keys import Status

from testing.config_keys import unread_keys

PACKAGES = ("mbridge_sft", "mbridge_train", "mbridge_config")


def test_honoured_keys_are_read() -> None:
    unread, count = unread_keys(SFTConfig, PACKAGES, Status.HONOURED)
    assert unread == [], "read these, or declare them no_effect or refused"
    assert count > 80


def test_a_key_that_nothing_reads_is_found() -> None:
    """The search is not blind: keys without effect are, but for namesakes, not read."""
    unread, count = unread_keys(SFTConfig, PACKAGES, Status.NO_EFFECT)
    assert len(unread) > 0.7 * count
