"""Mistakes of the user: one message that names the place and the fix, exit code 2, no traceback, nothing changed.

These are found before a rank starts; `test_sft_run.py` has those that only a rank can find.
"""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mbridge_ckpt import Layout, begin_save
from mbridge_sft import cli

from testing.app_runs import tree

Fail = Callable[..., str]
TP = "actor.model.tensor_model_parallel_size"
ROW = {"question": "Which?", "choices": ["1", "2"], "correct_answer": 0, "image": {"bytes": b"x", "path": None}}


@pytest.fixture
def place(tmp_path: Path, tiny_vision_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of a user: `model`, `train/a.parquet`, `chats.jsonl`, an earlier run; it is the working directory."""
    shutil.copytree(tiny_vision_model, tmp_path / "model")
    (tmp_path / "train").mkdir()
    pq.write_table(pa.Table.from_pylist([ROW] * 3), tmp_path / "train" / "a.parquet")
    (tmp_path / "chats.jsonl").write_text("{}\n")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with begin_save(tmp_path / "results" / "earlier" / "checkpoints", step=1, layout=Layout()) as save:
        save.write_json("state/loop.json", {"step": 1})
        save.commit({})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def settings() -> list[str]:
    return [
        "quickstart.enabled=false",
        "actor.model.model_path=model",
        "data.train_data_paths=[train]",
        "data.val_data_paths=[chats.jsonl]",
        "runner.output_dir=results",
        "runner.experiment_name=mine",
        "runner.max_steps=1",
        "actor.lr_sched.lr_warmup_iters=0",
    ]


@pytest.fixture
def fail(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Fail:
    """`fail("key=value", …)` runs the app with a mistake in it, and returns what it says."""

    def run(*overrides: str) -> str:
        before = tree(place)
        monkeypatch.setattr(sys, "argv", ["mbridge-sft", *settings(), *overrides])
        capsys.readouterr()
        code = cli.main()
        said = capsys.readouterr()
        assert code == 2, said.err
        assert "Traceback" not in said.err
        assert tree(place) == before
        return said.err

    return run


def test_missing_model_directory(fail: Fail) -> None:
    said = fail("actor.model.model_path=nowhere/model")
    assert "actor.model.model_path = nowhere/model: there is no such directory" in said
    assert "at:  command line: actor.model.model_path=nowhere/model" in said and "fix: " in said


def test_model_under_the_key_of_reasoning(fail: Fail) -> None:
    said = fail("actor.model.model_path=null", "actor.megatron.ckpt_convertor.hf_model_path=model")
    assert "actor.model.model_path is empty and actor.megatron.ckpt_convertor.hf_model_path is set (model)" in said
    assert said.count("error[") == 1


def test_unknown_key(fail: Fail) -> None:
    said = fail("data.train_paths=[train]")
    assert "data.train_paths" in said and "did you mean data.train_data_paths" in said


def test_missing_data(fail: Fail) -> None:
    assert "data.val_data_paths = ['nowhere']: there is no file or directory nowhere" in fail(
        "data.val_data_paths=[nowhere]"
    )


def test_corrupt_parquet(fail: Fail, place: Path) -> None:
    file = place / "train" / "a.parquet"
    file.write_bytes(file.read_bytes()[:-9])
    said = fail()
    assert said.startswith("error: train/a.parquet cannot be read as parquet:") and said.count("\n") == 1


def test_wrong_column(fail: Fail) -> None:
    said = fail("data.prompt_key=text")
    assert said.startswith("error: train/a.parquet has no column 'text', only question, choices, correct_answer, image")
    assert "correct data.prompt_key" in said


def test_wrong_image_column(fail: Fail) -> None:
    assert "has no column 'picture'" in fail("data.image_keys=[picture]")


def test_empty_parquet(fail: Fail, place: Path) -> None:
    pq.write_table(pa.Table.from_pylist([ROW]).slice(0, 0), place / "train" / "a.parquet")
    assert fail().startswith("error: train/a.parquet has no rows")


def test_empty_chats(fail: Fail, place: Path) -> None:
    (place / "chats.jsonl").write_text("\n \n")
    assert fail().startswith("error: chats.jsonl holds no examples")


def test_directory_without_data(fail: Fail, place: Path) -> None:
    (place / "train" / "a.parquet").rename(place / "train" / "a.arrow")
    assert "train holds no .parquet file and no .jsonl file" in fail()


def test_warm_up_longer_than_the_epochs(fail: Fail) -> None:
    epochs = ("runner.max_steps=-1", "runner.max_epochs=4", "actor.global_batch_size=2")
    said = fail(*epochs, "actor.lr_sched.lr_decay_style=cosine", "actor.lr_sched.lr_warmup_iters=6")
    assert "actor.lr_sched.lr_warmup_iters = 6: not shorter than the run" in said
    assert "6 steps of actor.global_batch_size 2 in runner.max_epochs 4 of 3 rows" in said
    assert "fix: use less than 6, train for longer" in said


def test_metrics_backend_that_is_not_installed(fail: Fail, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "swanlab", None)  # also where it is installed
    said = fail("runner.logger.logger_backends=[swanlab]")
    assert "metrics backend 'swanlab' is not installed" in said and "runner.logger.logger_backends" in said


def test_fused_rotary_kernel(fail: Fail) -> None:
    assert "actor.model.apply_rope_fusion = true: the fused kernel cannot take" in fail(
        "actor.model.apply_rope_fusion=true"
    )


def test_fewer_layers_than_deepstack_features(fail: Fail, place: Path) -> None:
    file = place / "model" / "config.json"
    config = json.loads(file.read_text())
    config["text_config"]["num_hidden_layers"] = 1
    file.write_text(json.dumps(config))
    said = fail()
    assert "2 deepstack_visual_indexes" in said and "only 1 language layers" in said


def test_tensor_parallel_size_that_the_tower_cannot_share(fail: Fail) -> None:
    assert "the vision tower's 2 attention heads cannot be shared by 4 ranks" in fail(
        f"{TP}=4", "launcher.nproc_per_node=4"
    )


def test_truncated_weights(fail: Fail, place: Path) -> None:
    file = place / "model" / "model.safetensors"
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - 1)
    assert "model.safetensors is truncated" in fail()


def test_reasoning_config(fail: Fail) -> None:
    assert "runner.task_type = reasoning: this app trains SFT runs" in fail("runner.task_type=reasoning")


def test_run_that_is_there_already(fail: Fail) -> None:
    said = fail("runner.experiment_name=earlier")
    assert "results/earlier holds the checkpoints of an earlier run" in said and "runner.resume_dir=auto" in said


def test_output_directory_that_cannot_be_written(fail: Fail) -> None:
    assert "runner.output_dir = /proc/runs: nothing can be written in /proc" in fail("runner.output_dir=/proc/runs")


def test_several_hosts_need_torchrun(fail: Fail) -> None:
    said = fail("cluster.num_nodes=2")
    assert "error[one-host] cluster.num_nodes = 2" in said and "-m mbridge_sft.cli" in said


def test_a_missing_part_of_several_is_said_together(fail: Fail) -> None:
    said = fail("data.train_data_paths=[]", "actor.model.freeze_vision_models=true", "data.max_bad_rows=-1")
    assert said.count("error[") == 3 and said.rstrip().endswith("3 errors in the config")
