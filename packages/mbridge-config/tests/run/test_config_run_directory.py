"""Where a run writes."""

from pathlib import Path

import pytest

from mbridge_config import ReasoningConfig, SFTConfig, checkpoint_directory, take_free_name
from mbridge_config.load.compose import from_tree
from mbridge_config.schema.provenance import Provenance

Kind = type[ReasoningConfig] | type[SFTConfig]


@pytest.mark.parametrize("kind", [ReasoningConfig, SFTConfig])
def test_logs_follow_the_free_name(tmp_path: Path, kind: Kind) -> None:
    for number in (1, 2, 3):
        tree = {"runner": {"output_dir": str(tmp_path), "experiment_name": "trial"}, "quickstart": {"enabled": True}}
        config = from_tree(tree, Provenance(), kind)
        take_free_name(config)
        name = "trial" if number == 1 else f"trial-{number}"
        assert config.runner.experiment_name == name
        assert (config.runner.logger.experiment_name, config.runner.logger.log_path) == (name, f"{tmp_path}/{name}")
        checkpoint_directory(config).mkdir(parents=True)


def test_logs_with_a_name_of_their_own_keep_it(tmp_path: Path) -> None:
    (tmp_path / "trial" / "checkpoints").mkdir(parents=True)
    runner = {"output_dir": str(tmp_path), "experiment_name": "trial"}
    runner |= {"logger": {"experiment_name": "mine", "log_path": "logs"}}
    config = from_tree({"runner": runner, "quickstart": {"enabled": True}}, Provenance(), ReasoningConfig)
    take_free_name(config)
    assert config.runner.experiment_name == "trial-2"
    assert (config.runner.logger.experiment_name, config.runner.logger.log_path) == ("mine", "logs")
