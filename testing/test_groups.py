"""Tests that share expensive fixtures run in one process."""

import os

import pytest


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="all tests run in one process")
def test_pytest_xdist_knows_the_groups(request: pytest.FixtureRequest) -> None:
    assert request.node.nodeid.endswith(f"@{request.path}")
