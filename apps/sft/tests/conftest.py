"""The tiny model, written once for all tests of the app."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a tiny random Qwen3-VL with its processor. Not to be changed."""
    from mbridge_sft.tiny import write_tiny_model

    corpus = ["Which digit is this?\nChoose one:\n0\n1\n2", "What is in the image?"]
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model", corpus, seed=1)
