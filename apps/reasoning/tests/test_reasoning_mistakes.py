"""Mistakes of the user: one message that names the place and the fix, exit code 2, no traceback, nothing changed.

These are found before a rank starts; `test_reasoning_run.py` has those that only a rank can find.
"""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from mbridge_ckpt import Layout, begin_save
from mbridge_config.schema.reasoning import QuickstartConfig
from mbridge_reasoning import cli
from mbridge_reasoning.quickstart.model import write_tiny_model

from testing.app_runs import tree

Fail = Callable[..., str]
HF = "actor.megatron.ckpt_convertor.hf_model_path"
TP = "actor.model.tensor_model_parallel_size"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    geometry = QuickstartConfig(hidden_size=64, intermediate_size=64, num_attention_heads=2, num_hidden_layers=1)
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model", ["3 + 4 = 7"], seed=1, geometry=geometry)


@pytest.fixture
def place(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of a user: `model`, `train.jsonl`, an earlier run in `results`; it is the working directory."""
    shutil.copytree(tiny, tmp_path / "model")
    (tmp_path / "train.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{n} + 1 =", "solutions": [str(n + 1)]}) + "\n" for n in range(8))
    )
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    earlier = tmp_path / "results" / "earlier"
    for step in (1, 2):
        with begin_save(earlier / "checkpoints", step=step, layout=Layout()) as save:
            save.write_json("state/loop.json", {"step": step})
            save.commit({})
    (earlier / "metrics.jsonl").write_text('{"step": 1}\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def settings() -> list[str]:
    return [
        "quickstart.enabled=false",
        f"{HF}=model",
        "data.type=math",
        "data.train_data_paths=[train.jsonl]",
        "reward.reward_type=math",
        "runner.output_dir=results",
        "runner.experiment_name=mine",
        "runner.max_steps=1",
    ]


@pytest.fixture
def fail(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Fail:
    """`fail("key=value", …)` runs the app with a mistake in it, and returns what it says."""

    def run(*overrides: str) -> str:
        before = tree(place)
        monkeypatch.setattr(sys, "argv", ["mbridge-reasoning", *settings(), *overrides])
        capsys.readouterr()
        code = cli.main()
        said = capsys.readouterr()
        assert code == 2, said.err
        assert "Traceback" not in said.err
        assert tree(place) == before
        return said.err

    return run


def test_missing_model_directory(fail: Fail) -> None:
    said = fail(f"{HF}=nowhere/model")
    assert f"{HF} = nowhere/model: there is no such directory" in said
    assert f"at:  command line: {HF}=nowhere/model" in said and "fix: " in said


def test_config_without_architectures(fail: Fail, place: Path) -> None:
    file = place / "model" / "config.json"
    config = json.loads(file.read_text())
    del config["architectures"]
    file.write_text(json.dumps(config))
    said = fail()
    assert "architectures" in said and "model/config.json" in said


def test_truncated_weights(fail: Fail, place: Path) -> None:
    file = place / "model" / "model.safetensors"
    size = file.stat().st_size
    with file.open("r+b") as stream:
        stream.truncate(size - 1)
    said = fail()
    assert f"model.safetensors is truncated: its header describes {size} bytes, the file has {size - 1}" in said
    assert HF in said and "fix: copy or download the file again" in said


def test_line_that_is_not_json(fail: Fail, place: Path) -> None:
    with (place / "train.jsonl").open("a") as stream:
        stream.write('{"prompt": "1 + 1", solutions: ["2"]}\n')
    said = fail()
    assert said.startswith("error: train.jsonl:9: not JSON:") and said.count("\n") == 1


def test_empty_data(fail: Fail, place: Path) -> None:
    (place / "train.jsonl").write_text("\n")
    assert fail().startswith("error: train.jsonl holds no examples")


def test_missing_data_file(fail: Fail) -> None:
    assert "data.val_data_paths = ['valid.jsonl']: there is no file valid.jsonl" in fail(
        "data.val_data_paths=[valid.jsonl]"
    )


def test_record_without_solutions(fail: Fail) -> None:
    said = fail("data.answer_key=answer")
    assert said.startswith("error: train.jsonl:1: no key 'answer'; the keys here are 'prompt', 'solutions'")


def test_reward_function_without_file_or_name(fail: Fail, place: Path) -> None:
    said = fail("reward.function=reward.py:score")
    assert "error[reward-function] reward.function = reward.py:score: there is no file reward.py" in said
    assert "it does not name a function" in fail("reward.function=reward.py")
    (place / "reward.py").write_text("def points(text, row, end): return 1.0")
    said = fail("reward.function=reward.py:score")
    assert said == (
        "error: reward.function=reward.py:score: reward.py holds no function 'score'; its functions are points\n"
    )


def test_prompt_that_leaves_no_room(fail: Fail) -> None:
    said = fail("data.max_prompt_length=64", "runner.seq_length=64", "algorithm.sampling_params.max_new_tokens=8")
    assert "leaves no room for an answer in runner.seq_length 64" in said


def test_tensor_parallel_size_without_ranks(fail: Fail) -> None:
    said = fail(f"{TP}=2")
    assert "a world size of 1 is not a multiple of tensor 2 x pipeline 1 = 2" in said
    assert "launcher.nproc_per_node" in said


def test_unknown_key(fail: Fail) -> None:
    said = fail("actor.optim.lrr=1e-6")
    assert "actor.optim.lrr" in said and "did you mean" in said and "actor.optim.lr" in said


def test_value_of_the_wrong_type(fail: Fail) -> None:
    assert "runner.max_steps = many" in fail("runner.max_steps=many")


def test_config_name_that_is_not_there(fail: Fail) -> None:
    said = fail("--config-name", "qwen2.5-1.5b-grpo")
    assert "qwen2.5-1.5b-grpo-megatron" in said


def test_model_under_the_key_of_sft(fail: Fail) -> None:
    said = fail(f"{HF}=null", "actor.model.model_path=model")
    assert f"{HF.rpartition('.')[2]} is empty" in said and "actor.model.model_path is set" in said


def test_made_model_of_an_impossible_width(fail: Fail) -> None:
    said = fail("quickstart.enabled=true", f"{HF}=new", "quickstart.hidden_size=100")
    assert "quickstart.hidden_size = 100: 4 query heads of width 32 make 128" in said


def test_resume_directory_that_is_no_checkpoint(fail: Fail) -> None:
    said = fail("runner.resume_dir=results/earlier")
    assert "it holds no `actor` directory" in said
    assert "fix: set runner.resume_dir=results/earlier/checkpoints/global_step_2" in said


def test_output_directory_that_cannot_be_written(fail: Fail) -> None:
    assert "runner.output_dir = /proc/runs: nothing can be written in /proc" in fail("runner.output_dir=/proc/runs")


def test_output_directory_that_is_a_file(fail: Fail) -> None:
    assert "train.jsonl is a file" in fail("runner.output_dir=train.jsonl")


def test_run_that_is_there_already(fail: Fail) -> None:
    said = fail("runner.experiment_name=earlier")
    assert "results/earlier holds the checkpoints of an earlier run" in said
    assert "runner.resume_dir=auto" in said


def test_several_mistakes_are_said_together(fail: Fail) -> None:
    said = fail(f"{TP}=2", "launcher.nproc_per_node=3", "algorithm.group_size=1", "reward.timeout=0")
    assert said.count("error[") >= 3 and said.rstrip().endswith("errors in the config")
