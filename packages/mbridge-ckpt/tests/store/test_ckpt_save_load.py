"""A checkpoint that is saved loads back equal, in the layout that the documentation promises."""

import json
import os
import random
from datetime import datetime, timedelta
from pathlib import Path

import mbridge_ckpt
import numpy
import pytest
import torch
from mbridge_ckpt import (
    CheckpointError,
    CorruptCheckpointError,
    IncompleteCheckpointError,
    Layout,
    SaveError,
    begin_save,
    find_resume,
    open_checkpoint,
    verify,
)

LAYOUT = Layout(tensor=2)


def rank_content(tensor_rank: int, step: int) -> tuple[dict, dict]:
    generator = torch.Generator().manual_seed(100 * step + tensor_rank)
    weight = torch.randn(5, 3, generator=generator)
    bias = torch.randn(7, generator=generator).bfloat16()
    model = {
        "model": {"decoder.layers.0.mlp.linear_fc1.weight": weight, "decoder.final_layernorm.weight": bias},
        "iteration": step,
        "opt_param_scheduler": {"max_lr": 1e-3, "num_steps": step},
        "rng_state": [torch.get_rng_state()],
    }
    optimizer = {"fp32_param": {"w": weight.double()}, "exp_avg": {"w": weight * 2}, "step": step}
    return model, optimizer


def save(directory: Path, step: int, metadata: dict | None = None, **options) -> Path:
    with begin_save(directory, step=step, layout=LAYOUT, **options) as writing:
        for tensor_rank in range(LAYOUT.tensor):
            model, optimizer = rank_content(tensor_rank, step)
            writing.write_torch(mbridge_ckpt.model_file(step, LAYOUT, tensor_rank=tensor_rank), model)
            writing.write_torch(mbridge_ckpt.optimizer_file(step, LAYOUT, tensor_rank=tensor_rank), optimizer)
        writing.write_json("actor/hf_model/config.json", {"model_type": "qwen2"})
        writing.file("actor/hf_model/tokenizer.json").write_text("{}")
        writing.write_rank_state({"data": {"position": 17}})
        return writing.commit(metadata)


def assert_equal(found: object, expected: object) -> None:
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype and torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_equal(found[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert type(found) is type(expected) and len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_equal(one, other)
    else:
        assert type(found) is type(expected) and found == expected


def test_layout_on_disk(tmp_path):
    path = save(tmp_path, 10)
    assert path == tmp_path / "global_step_10"
    files = sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())
    assert files == [
        "actor/hf_model/config.json",
        "actor/hf_model/tokenizer.json",
        "actor/iter_0000010/mp_rank_00/distrib_optim.pt",
        "actor/iter_0000010/mp_rank_00/model_optim_rng.pt",
        "actor/iter_0000010/mp_rank_01/distrib_optim.pt",
        "actor/iter_0000010/mp_rank_01/model_optim_rng.pt",
        "actor/latest_checkpointed_iteration.txt",
        "manifest.json",
        "state/rank_00000.pt",
    ]
    assert (path / "actor/latest_checkpointed_iteration.txt").read_text() == "10"
    assert os.readlink(tmp_path / "latest") == "global_step_10"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["global_step_10", "latest"]


@pytest.mark.parametrize("mmap", [False, True])
def test_content_comes_back_equal(tmp_path, mmap):
    save(tmp_path, 3)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.step == 3 and checkpoint.layout == LAYOUT
    for tensor_rank in range(2):
        model, optimizer = rank_content(tensor_rank, 3)
        path = mbridge_ckpt.model_file(3, LAYOUT, tensor_rank=tensor_rank)
        assert_equal(checkpoint.load_torch(path, mmap=mmap), model)
        path = mbridge_ckpt.optimizer_file(3, LAYOUT, tensor_rank=tensor_rank)
        assert_equal(checkpoint.load_torch(path, mmap=mmap), optimizer)
    assert checkpoint.load_json("actor/hf_model/config.json") == {"model_type": "qwen2"}
    assert checkpoint.load_rank_state(0) == {"data": {"position": 17}}
    assert checkpoint.load_rank_state(1) is None


def test_manifest_lists_tensors(tmp_path):
    save(tmp_path, 3, {"metrics": {"reward": 0.5}})
    manifest = open_checkpoint(tmp_path / "global_step_3").manifest
    assert manifest.metadata == {"metrics": {"reward": 0.5}}
    assert manifest.writer["torch"] == torch.__version__.split("+")[0] or manifest.writer["torch"] == torch.__version__
    tensors = {
        t.name: (t.shape, t.dtype) for t in manifest.file("actor/iter_0000003/mp_rank_01/distrib_optim.pt").tensors
    }
    assert tensors == {"fp32_param/w": ((5, 3), "float64"), "exp_avg/w": ((5, 3), "float32")}


def test_a_view_is_stored_without_its_buffer(tmp_path):
    buffer = torch.arange(1_000_000, dtype=torch.float32)
    transposed = torch.arange(6).reshape(2, 3).t()
    with begin_save(tmp_path, step=1, layout=Layout()) as writing:
        writing.write_torch("a.pt", {"view": buffer[10:20], "transposed": transposed})
        writing.commit()
    assert (tmp_path / "global_step_1/a.pt").stat().st_size < 10_000
    loaded = open_checkpoint(tmp_path).load_torch("a.pt")
    assert_equal(loaded, {"view": torch.arange(10, 20, dtype=torch.float32), "transposed": transposed.contiguous()})


def test_what_could_not_be_read_back_is_refused_when_saving(tmp_path):
    message = "args/lr: a numpy.float64 cannot be stored"
    with pytest.raises(CheckpointError, match=message), begin_save(tmp_path, step=1, layout=Layout()) as writing:
        writing.write_torch("a.pt", {"args": {"lr": numpy.float64(1.0)}})
    assert list(tmp_path.iterdir()) == []


def test_the_same_step_is_replaced_whole_or_refused(tmp_path):
    save(tmp_path, 5)
    with begin_save(tmp_path, step=5, layout=Layout()) as writing:
        writing.write_json("only.json", [1])
        writing.commit()
    assert [record.path for record in open_checkpoint(tmp_path).manifest.files] == ["only.json"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["global_step_5", "latest"]
    with pytest.raises(SaveError, match="global_step_5 exists"):
        begin_save(tmp_path, step=5, layout=Layout(), existing="refuse")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["global_step_5", "latest"]


def test_replacing_without_an_atomic_exchange(tmp_path, monkeypatch):
    save(tmp_path, 5)
    monkeypatch.setattr("mbridge_ckpt.store.publish.exchange", lambda first, second: False)
    save(tmp_path, 5, {"second": True})
    assert open_checkpoint(tmp_path).metadata == {"second": True}
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["global_step_5", "latest"]


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_save_whose_link_cannot_be_made_gives_the_names_back(tmp_path, monkeypatch, exchanges):
    if not exchanges:
        monkeypatch.setattr("mbridge_ckpt.store.publish.exchange", lambda first, second: False)
    save(tmp_path, 5, {"first": True})
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").mkdir()  # a rename puts no link in its place
    for step in (5, 6):
        with pytest.raises(SaveError, match=f"global_step_{step} was not saved: .*latest"):
            save(tmp_path, step)
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["global_step_5", "latest"]
        assert open_checkpoint(tmp_path / "global_step_5").metadata == {"first": True}
        assert verify(tmp_path / "global_step_5").ok


def test_a_block_that_raises_leaves_nothing(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(KeyError), begin_save(tmp_path, step=2, layout=LAYOUT) as writing:  # noqa: PT012
        writing.write_json("a.json", 1)
        raise KeyError("not an I/O error")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["global_step_1", "latest"]


def test_a_block_without_commit_is_an_error(tmp_path):
    with pytest.raises(SaveError, match="without commit"), begin_save(tmp_path, step=2, layout=LAYOUT) as writing:
        writing.write_json("a.json", 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "path", ["../a.pt", "/a.pt", "a//b.pt", "manifest.json", "actor/latest_checkpointed_iteration.txt"]
)
def test_paths_that_leave_the_checkpoint_or_are_ours_are_refused(tmp_path, path):
    with pytest.raises(CheckpointError), begin_save(tmp_path, step=2, layout=LAYOUT) as writing:
        writing.write_json(path, 1)


def test_the_export_may_be_deleted(tmp_path):
    path = save(tmp_path, 4)
    for file in (path / "actor/hf_model").iterdir():
        file.unlink()
    report = verify(path)
    assert report.ok and report.resumable and "actor/hf_model" in report.notes[0]
    assert find_resume(tmp_path).checkpoint.path == path


def test_a_damaged_export_is_reported_but_does_not_stop_resuming(tmp_path):
    path = save(tmp_path, 4)
    (path / "actor/hf_model/config.json").write_text("{}")
    report = verify(path)
    assert not report.ok and report.resumable
    resume = find_resume(tmp_path)
    assert resume.checkpoint.path == path and resume.passed_over == ()


def test_resume_takes_the_newest_that_verifies_and_says_what_it_passed_over(tmp_path):
    for step in (2, 9, 10):
        save(tmp_path, step)
    model = tmp_path / "global_step_10/actor/iter_0000010/mp_rank_01/model_optim_rng.pt"
    data = bytearray(model.read_bytes())
    data[len(data) // 2] ^= 1
    model.write_bytes(data)
    (tmp_path / "global_step_9/manifest.json").unlink()
    (tmp_path / ".global_step_11.saving-0123456789ab").mkdir()
    resume = find_resume(tmp_path)
    assert resume.checkpoint.step == 2
    assert [item.path.name for item in resume.passed_over] == [
        ".global_step_11.saving-0123456789ab",
        "global_step_9",
        "global_step_10",
    ]
    assert "unfinished" in resume.passed_over[0].reason
    assert "manifest.json" in resume.passed_over[1].reason
    assert str(model) in resume.passed_over[2].reason and "content changed" in resume.passed_over[2].reason


def test_a_run_that_went_back_goes_on_with_its_own(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step)
    save(tmp_path, 15)  # resumed from step 10
    assert find_resume(tmp_path).checkpoint.step == 15
    save(tmp_path, 18)
    mbridge_ckpt.prune(tmp_path, mbridge_ckpt.Retention(last=2))
    assert [path.name for path in mbridge_ckpt.list_checkpoints(tmp_path)] == ["global_step_18", "global_step_15"]


def test_a_clock_that_goes_back_does_not_change_the_order(tmp_path, monkeypatch):
    save(tmp_path, 1)
    created = open_checkpoint(tmp_path / "global_step_1").manifest.created
    before = datetime.fromisoformat(created) - timedelta(hours=1)

    class SlowClock(datetime):
        @classmethod
        def now(cls, tz=None):
            return before

    monkeypatch.setattr("mbridge_ckpt.store.publish.datetime", SlowClock)
    save(tmp_path, 2)
    assert open_checkpoint(tmp_path / "global_step_2").manifest.created > created
    assert find_resume(tmp_path).checkpoint.step == 2


def test_resume_with_nothing_there(tmp_path):
    assert find_resume(tmp_path / "none") == mbridge_ckpt.Resume(None, ())
    with pytest.raises(IncompleteCheckpointError, match="not a directory"):
        open_checkpoint(tmp_path / "none")


def test_loading_checks_the_checksum(tmp_path):
    path = save(tmp_path, 4)
    target = path / "state/rank_00000.pt"
    target.write_bytes(target.read_bytes().replace(b"position", b"positiom"))
    with pytest.raises(CorruptCheckpointError, match="rank_00000.pt: its content changed"):
        open_checkpoint(path).load_rank_state(0)


def test_random_state_goes_on_where_it_was(tmp_path):
    random.seed(3)
    numpy.random.seed(4)
    torch.manual_seed(5)
    random.gauss(0, 1)
    numpy.random.randn()
    with begin_save(tmp_path, step=1, layout=Layout()) as writing:
        writing.write_rank_state({"random": mbridge_ckpt.capture_random_state()})
        writing.commit()
    expected = (random.gauss(0, 1), random.random(), numpy.random.randn(3).tolist(), torch.rand(3).tolist())
    mbridge_ckpt.restore_random_state(open_checkpoint(tmp_path).load_rank_state(0)["random"])
    assert (random.gauss(0, 1), random.random(), numpy.random.randn(3).tolist(), torch.rand(3).tolist()) == expected


def test_mp_rank_names_are_megatrons():
    name = mbridge_ckpt.mp_rank_directory
    assert name(Layout(tensor=2), tensor_rank=1) == "mp_rank_01"
    assert name(Layout(tensor=2, pipeline=4), tensor_rank=1, pipeline_rank=3) == "mp_rank_01_003"
    assert name(Layout(pipeline=2, expert=8), tensor_rank=0, pipeline_rank=1, expert_rank=7) == "mp_rank_00_001_007"
    assert name(Layout(expert=8), tensor_rank=0, expert_rank=7) == "mp_rank_00_007"


def test_manifest_is_plain_json_with_its_own_checksum(tmp_path):
    path = save(tmp_path, 4) / "manifest.json"
    value = json.loads(path.read_text())
    assert value["format_version"] == 1 and value["layout"]["tensor"] == 2
    value["step"] = 5
    path.write_text(json.dumps(value, separators=(",", ":")))
    with pytest.raises(CorruptCheckpointError, match="manifest.json: its checksum does not fit"):
        open_checkpoint(path.parent)
