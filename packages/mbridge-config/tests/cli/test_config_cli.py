"""The check command, and the apps' arguments."""

import json
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from yaml import safe_load as load

from mbridge_config import ConfigError, ReasoningConfig, SFTConfig, check, compose, parse_arguments
from mbridge_config.cli.main import main
from mbridge_config.compat.keys import known_keys
from mbridge_config.load.catalog import config_directory, config_names, installed_directories

ROOT = Path(__file__).parents[4]


def test_check_good(yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "run", "--config-path", str(yaml), "--world-size", "4"]) == 0
    output = capsys.readouterr().out
    assert "ranks              4 = tensor 1 x pipeline 1 x data 4" in output
    assert "micro-batches      8 of 2 on each data-parallel rank" in output
    assert output.endswith("run: ok\n")
    resolved = output.partition("resolved config, without what is at its default:\n")[2].partition("\n\n")[0]
    found = load(resolved)
    assert found["actor"]["micro_batch_size"] == 2 and "seed" not in found["actor"]
    assert found["algorithm"] == {  # set by the file, and what follows from it
        "group_size": 4,
        "clip_ratio_low": 0.2,
        "clip_ratio_high": 0.2,
        "sampling_params": {"max_new_tokens": 192},
    }


def test_check_bad(yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["check", "run", "actor.bogus=1", "--config-path", str(yaml), "data.max_prompt_length=256"]
    assert main(words) == 2
    output = capsys.readouterr().out
    assert "error[unknown-key] actor.bogus = 1" in output and "error[prompt-length]" in output
    assert output.endswith("run: 2 errors\n")
    assert "resolved config" not in output, "what could not be used has its default there"


READ = ("honoured", "refused", "checked")


def leaves(tree: Any, path: str, keys: set[str]) -> Iterator[str]:
    if path in keys:
        yield path
    else:
        for name, value in tree.items():
            yield from leaves(value, f"{path}.{name}" if path else name, keys)


def test_check_json(yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["check", "run", "--config-path", str(yaml), "--json"]
    assert main([*words, "--world-size", "2"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] and report["world_size"] == 2 and report["plan"]["data_parallel"] == 2
    resolved = report["resolved"]
    assert (resolved["actor"]["seed"], resolved["actor"]["global_batch_size"]) == (1234, 64)
    assert "training_batch_size_per_gpu" not in resolved["algorithm"], "another spelling"
    read = [path for path, info in known_keys(ReasoningConfig).items() if info.spec.status.value in READ]
    assert sorted(leaves(resolved, "", set(read))) == sorted(read)
    assert main([*words, "actor.bogus=1"]) == 2
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert problem["id"] == "unknown-key" and problem["where"] == "command line: actor.bogus=1"
    assert main(["check", "nothing", "--config-path", str(yaml), "--json"]) == 2
    assert not json.loads(capsys.readouterr().out)["ok"]


@pytest.mark.parametrize(
    "words", [[], ["explode"], ["check"], ["check", "run", "--what"], ["check", "run", "--world-size", "0"]]
)
def test_wrong_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert "error[usage]" in capsys.readouterr().err


def test_usage_names_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check"]) == 2
    assert "the following arguments are required: NAME\n" in capsys.readouterr().err


def test_names_that_are_no_config(
    yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(name: str) -> str:
        assert main(["check", name]) == 2
        return capsys.readouterr().err

    monkeypatch.chdir(tmp_path)
    assert "it is a directory\n    fix: name a YAML file in it, or `--config-path configs`" in said("configs")
    (tmp_path / "run.yml").write_text((yaml / "run.yaml").read_text())
    assert "the file's name does not end in .yaml, as Hydra needs it\n    fix: rename it" in said("run.yml")
    if {"reasoning", "sft"} <= set(installed_directories()):
        assert "nearest first: reasoning/quickstart, sft/quickstart, " in said("quickstrat"), "names that can be typed"


def test_arguments_of_an_app(yaml: Path) -> None:
    words = ["runner.max_steps=-1", "--config-name", "run", "+actor.seed=3", "--config-path", str(yaml)]
    arguments = parse_arguments(words, program="app", package_config="mbridge_config", default_config="other")
    assert (arguments.config_name, arguments.config_path) == ("run", yaml)
    assert arguments.overrides == ("runner.max_steps=-1", "+actor.seed=3")
    config = compose(arguments.config_name, arguments.config_path, arguments.overrides)
    assert (config.runner.max_steps, config.actor.seed) == (-1, 3)
    assert parse_arguments([], program="app", package_config="x", default_config="other").config_name == "other"
    with pytest.raises(ConfigError, match="no config is named"):
        parse_arguments([], program="app", package_config="x")
    with pytest.raises(ConfigError, match="unrecognized arguments: --what"):
        parse_arguments(["--what"], program="app", package_config="x", default_config="other")


def test_help_lists_the_configs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_arguments(["--help"], program="app", package_config="nothing_of_this_name", default_config="other")
    assert stop.value.code == 0
    assert "none found" in capsys.readouterr().out


@pytest.mark.parametrize("place", ["package/config", "config"], ids=["installed", "source tree"])
def test_configs_of_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    source = tmp_path / "src"
    (source / "package").mkdir(parents=True)
    (source / "package" / "__init__.py").write_text("raise RuntimeError('apps are not imported')\n")
    directory = (source if place.startswith("package") else tmp_path) / place
    (directory / "math").mkdir(parents=True)
    (directory / "math" / "one.yaml").write_text("")
    monkeypatch.syspath_prepend(str(source))
    assert config_directory("package") == directory
    assert config_names(directory) == ["math/one"]
    assert compose("one", package_config="package").runner.seq_length == 2048
    with pytest.raises(ConfigError, match="has no directory of configs"):
        config_directory("nothing_of_this_name")


def test_configs_of_the_reasoning_app(tmp_path: Path) -> None:
    if "reasoning" not in installed_directories():
        pytest.skip("the reasoning app is not installed")
    report = check(
        compose("reasoning/quickstart", overrides=[f"runner.output_dir={tmp_path}"], strict=False), world_size=2
    )
    assert report.errors == []
    with pytest.raises(ConfigError) as error:
        compose("qwen2.5-1.5b-grpo-megatron")
    assert {problem.key for problem in error.value.problems} == {
        "rollout.model.model_path",
        "data.train_data_paths",
        "data.val_data_paths",
    }


@pytest.mark.skipif("sft" not in installed_directories(), reason="the apps are not installed")
def test_a_name_that_two_apps_have() -> None:
    with pytest.raises(ConfigError, match="use one of reasoning/quickstart, sft/quickstart"):
        compose("quickstart")
    assert isinstance(compose("sft/quickstart"), SFTConfig)
    assert isinstance(compose("qwen3_vl_megatron_sft_vlm", overrides=GIVEN), SFTConfig)


GIVEN = [f"{key}=x" for key in ("actor.model.model_path", "data.train_data_paths", "data.val_data_paths")]


@pytest.mark.skipif(not installed_directories(), reason="the apps are not installed")
@pytest.mark.parametrize(
    "readme", [ROOT / "README.md", ROOT / "packages" / "mbridge-config" / "README.md"], ids=["workspace", "package"]
)
def test_commands_of_the_readme_run_as_written(
    readme: Path, tmp_path: Path, real_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run in a directory with data files, with a model directory in place of the placeholder."""
    text = readme.read_text(encoding="utf-8").replace("\\\n", " ")
    commands = re.findall(r"^(?:\./uvw run )?mbridge-config ((?:check|fit|init|explain|schema) .*)", text, re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    for name in ("chats.jsonl", "train.jsonl", "validation.jsonl"):
        Path(name).write_text('{"prompt": "1+1", "solutions": ["2"]}\n')
    model = str(real_model("qwen2.5-1.5b"))
    codes = {}
    for command in commands:
        words = shlex.split(command.partition(">")[0].replace("DIRECTORY", model), comments=True)
        codes[command] = main(words)
    assert len(codes) >= 3 and codes == dict.fromkeys(codes, 0)
