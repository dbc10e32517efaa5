"""The output of `check` on the apps' example configs, compared with files whose diff shows the effect of a change.

    MBRIDGE_WRITE_GOLDEN=1 ./uvw run pytest packages/mbridge-config/tests/plan/test_config_golden.py

writes the files anew, to be read as a diff before they are committed.
"""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mbridge_config.cli.main import main
from mbridge_config.load.catalog import config_names, installed_directories

GOLDEN = Path(__file__).parents[1] / "golden"
# file: config, published model whose sizes it gets, arguments
CASES: dict[str, tuple[str, str | None, list[str]]] = {
    "reasoning-quickstart": ("reasoning/quickstart", None, ["--world-size", "2"]),
    "qwen2.5-1.5b-grpo-megatron": ("reasoning/qwen2.5-1.5b-grpo-megatron", "qwen2.5-1.5b", []),
    "qwen2.5-7b-on-80-gib": (
        "reasoning/qwen2.5-1.5b-grpo-megatron",
        "qwen2.5-7b",
        ["actor.model.pipeline_model_parallel_size=2", "actor.model.backend=te", "--memory", "80"],
    ),
    "sft-quickstart": ("sft/quickstart", None, ["--world-size", "2"]),
    "qwen2_5_vl_megatron_sft_vlm": ("sft/qwen2_5_vl_megatron_sft_vlm", "qwen2.5-vl-3b", ["--memory", "80"]),
    "qwen3_vl_megatron_sft_vlm": ("sft/qwen3_vl_megatron_sft_vlm", "qwen3-vl-4b", ["--memory", "80"]),
    "qwen3_vl_moe_megatron_sft_vlm": ("sft/qwen3_vl_moe_megatron_sft_vlm", "qwen3-vl-30b-a3b", ["--memory", "80"]),
}


def arguments(config: str, model: Path | None, data: Path) -> list[str]:
    """What an example leaves to the user."""
    if model is None:
        return [f"runner.output_dir={data}"]
    key = "rollout.model.model_path" if config.startswith("reasoning") else "actor.model.model_path"
    file = data / ("data.jsonl" if config.startswith("reasoning") else "data.parquet")
    file.write_text('{"prompt": "1+1", "solutions": ["2"]}\n')
    return [f"{key}={model}", f"data.train_data_paths=[{file}]", f"data.val_data_paths=[{file}]"]


@pytest.mark.parametrize("name", CASES)
def test_printed_plan(
    name: str,
    tmp_path: Path,
    real_model: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, model, more = CASES[name]
    app = config.partition("/")[0]
    configs = installed_directories().get(app)
    if configs is None:
        pytest.skip("the app is not installed")
    monkeypatch.chdir(tmp_path)
    directory = None if model is None else real_model(model)
    main(["check", config, *arguments(config, directory, tmp_path), *more])
    printed = capsys.readouterr().out.replace(str(configs), app).replace(f"{tmp_path}/", "").replace(str(tmp_path), ".")
    file = GOLDEN / f"{name}.txt"
    if os.environ.get("MBRIDGE_WRITE_GOLDEN"):
        file.write_text(printed)
    assert printed == file.read_text()


def test_all_examples_are_there() -> None:
    covered = {config for config, _, _ in CASES.values()}
    for app, directory in installed_directories().items():
        for config in config_names(directory):
            assert f"{app}/{config.rpartition('/')[2]}" in covered
