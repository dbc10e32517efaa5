"""The configs that `init` writes pass the check, and the apps take them as far as can be seen without training."""

from collections.abc import Callable
from pathlib import Path

import pytest

from mbridge_config import ReasoningConfig, SFTConfig, check, compose
from mbridge_config.cli.init import config_text
from mbridge_config.cli.main import main


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "here"
    directory.mkdir()
    monkeypatch.chdir(directory)
    return directory


@pytest.mark.parametrize(
    ("task", "name", "data"),
    [
        ("reasoning", "qwen2.5-1.5b", None),
        ("reasoning", "qwen3-4b", '{"prompt": "1+1", "solutions": ["2"]}\n'),
        ("sft", "qwen3-vl-4b", None),
        ("sft", "qwen2.5-vl-3b", None),
        ("sft", "llama-3.1-8b", '{"messages": []}\n'),
    ],
)
def test_written_configs_pass(
    real_model: Callable[[str], Path],
    here: Path,
    capsys: pytest.CaptureFixture[str],
    task: str,
    name: str,
    data: str | None,
) -> None:
    model = real_model(name)
    words = ["init", task, "--model", str(model), "--output", "run.yaml"]
    if data is not None:
        (here / "data.jsonl").write_text(data)
        words += ["--data", "data.jsonl"]
    assert main(words) == 0
    assert capsys.readouterr().out.startswith("wrote run.yaml\n  mbridge-config check run.yaml\n")
    config = compose("run.yaml")
    assert isinstance(config, ReasoningConfig if task == "reasoning" else SFTConfig)
    report = check(config, 8)
    assert report.problems == [] and report.facts is not None
    assert report.facts.directory == model
    assert config.data.train_data_paths == (
        [] if data is None and task == "reasoning" else config.data.train_data_paths
    )
    if data is not None:
        assert config.data.train_data_paths == [str(here / "data.jsonl")]
    assert main(["check", "run.yaml", "--world-size", "8"]) == 0, "as the user is told to"


def test_comments_have_the_geometry(real_model: Callable[[str], Path]) -> None:
    text = config_text("reasoning", real_model("qwen2.5-7b"))
    assert text.startswith("# GRPO with Qwen2ForCausalLM, 28 layers, 7,615,616,512 parameters.\n")
    assert len([line for line in text.splitlines() if "#" in line]) >= 8


def test_lengths_are_those_the_model_can_take(make_model: Callable[..., Path], tmp_path: Path) -> None:
    text = config_text("reasoning", make_model(tmp_path / "short", max_position_embeddings=200))
    assert "seq_length: 200 " in text and "max_prompt_length: 50\n" in text


def test_chat_template(make_model: Callable[..., Path], tmp_path: Path) -> None:
    model = make_model(tmp_path / "chat")
    assert "apply_chat_template: false" in config_text("reasoning", model)
    (model / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    assert "apply_chat_template: true" in config_text("reasoning", model)


def test_odd_names(make_model: Callable[..., Path], tmp_path: Path) -> None:
    model = make_model(tmp_path / 'a ${b} "c": #d')
    assert main(["init", "reasoning", "--model", str(model), "--output", "odd.yaml"]) == 0
    config = compose("odd.yaml")
    assert config.actor.megatron.ckpt_convertor.hf_model_path == str(model)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["reasoning", "--output", "there.yaml"], "the file is there already"),
        (["reasoning", "--output", "nowhere/a.yaml"], "it cannot be written"),
        (["reasoning", "--output", "run.txt"], "a config ends in .yaml"),
        (["reasoning", "--output", "run.yml"], "a config ends in .yaml"),
        (["sft"], "the data that can be created is images"),
        (["training"], "invalid choice"),
    ],
)
def test_refusals(model: Path, here: Path, capsys: pytest.CaptureFixture[str], words: list[str], reason: str) -> None:
    (here / "there.yaml").write_text("mine")
    assert main(["init", words[0], "--model", str(model), *words[1:]]) == 2
    assert reason in capsys.readouterr().err
    assert (here / "there.yaml").read_text() == "mine"
    assert [file.name for file in here.iterdir()] == ["there.yaml"]


def test_no_model(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "reasoning", "--model", "nowhere"]) == 2
    assert "--model = nowhere: there is no such directory" in capsys.readouterr().err


def test_reasoning_on_images_is_refused(real_model: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "reasoning", "--model", str(real_model("qwen3-vl-4b"))]) == 2
    assert "reasoning runs train on text" in capsys.readouterr().err


def test_a_model_without_weights_is_told(real_model: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    model = real_model("qwen2.5-1.5b")
    (model / "model.safetensors").unlink()
    assert main(["init", "reasoning", "--model", str(model)]) == 2
    assert "error[weights-missing]" in capsys.readouterr().out


@pytest.mark.parametrize(("task", "name"), [("reasoning", "qwen2.5-1.5b"), ("sft", "qwen3-vl-4b")])
def test_the_app_starts_with_it(real_model: Callable[[str], Path], here: Path, task: str, name: str) -> None:
    """Do what the app's command does before it starts ranks: check schema, rules, data and disk."""
    start = pytest.importorskip(f"mbridge_{task}.start")
    main(["init", task, "--model", str(real_model(name))])
    schema = ReasoningConfig if task == "reasoning" else SFTConfig
    config = compose(f"{task}.yaml", package_config=f"mbridge_{task}", schema=schema)
    check(config, 8).raise_for_errors()
    start.check_start(config)
    assert [file.name for file in here.iterdir()] == [f"{task}.yaml"], "nothing is left behind"
