"""Paths that lead out of a checkpoint, and false manifests and indexes."""

import json
import os
from pathlib import Path

import pytest
import torch
from mbridge_ckpt import (
    CheckpointError,
    CorruptCheckpointError,
    Layout,
    Manifest,
    UnsafeCheckpointError,
    begin_save,
    find_resume,
    open_checkpoint,
    reshard,
    verify,
)
from mbridge_ckpt.files.hashing import hash_bytes
from mbridge_ckpt.formats.safetensors import read_safetensors_index
from mbridge_ckpt.formats.tensors import TensorRecord


@pytest.mark.parametrize("shard", ["/etc/passwd", "../../other/model.safetensors", "a/../../b", "", "a\\..\\b"])
def test_index_that_points_elsewhere(tmp_path, shard):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"good": "model-00001-of-00002.safetensors", "bad": shard}}))
    with pytest.raises(UnsafeCheckpointError, match="weight_map of 'bad'") as caught:
        read_safetensors_index(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"a": 1, "a": 2}'])
def test_index_that_is_none(tmp_path, text):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(text)
    with pytest.raises(CorruptCheckpointError):
        read_safetensors_index(path)


def saved(directory: Path) -> Path:
    with begin_save(directory, step=1, layout=Layout()) as writing:
        writing.write_torch("actor/iter_0000001/mp_rank_00/model_optim_rng.pt", {"model": {"x": torch.ones(2)}})
        writing.write_json("state/loop.json", {})
        return writing.commit()


def test_symlinks_out_of_the_checkpoint(tmp_path):
    path = saved(tmp_path / "run")
    file = path / "actor/iter_0000001/mp_rank_00/model_optim_rng.pt"
    outside = tmp_path / "outside.pt"
    file.rename(outside)  # same content, so that only where it lies is wrong
    file.symlink_to(outside)
    with pytest.raises(UnsafeCheckpointError, match=r"model_optim_rng.pt is a symlink to .*outside.pt, outside"):
        open_checkpoint(path).load_torch("actor/iter_0000001/mp_rank_00/model_optim_rng.pt")
    assert "is a symlink" in verify(path).faults[0].message
    assert find_resume(tmp_path / "run").checkpoint is None
    file.unlink()
    file.symlink_to(file.name)
    assert not verify(path).resumable


def test_a_directory_that_is_a_symlink_out_of_the_checkpoint(tmp_path):
    path = saved(tmp_path / "run")
    (path / "actor").rename(tmp_path / "actor")
    (path / "actor").symlink_to(tmp_path / "actor")
    assert all("is a symlink" in fault.message for fault in verify(path).faults)
    assert len(verify(path).faults) == 2


def test_a_manifest_that_is_a_symlink(tmp_path):
    path = saved(tmp_path / "run")
    (path / "manifest.json").rename(tmp_path / "manifest.json")
    (path / "manifest.json").symlink_to(tmp_path / "manifest.json")
    with pytest.raises(CorruptCheckpointError, match="it is a symlink"):
        open_checkpoint(path)


def test_pipes_are_not_waited_for(tmp_path):
    path = saved(tmp_path / "run")
    for name in ("state/loop.json", "manifest.json"):
        (path / name).unlink()
        os.mkfifo(path / name)
        resume = find_resume(tmp_path / "run")
        assert resume.checkpoint is None
        assert Path(name).name in resume.passed_over[0].reason and "no regular file" in resume.passed_over[0].reason


def signed(body: dict) -> bytes:
    def dump(value: dict) -> bytes:
        return json.dumps(value, separators=(",", ":")).encode()

    return dump({**body, "manifest_xxh3_128": hash_bytes(dump(body))})


BODY = {
    "format": "mbridge-checkpoint",
    "format_version": 1,
    "step": 1,
    "created": "",
    "layout": {"tensor": 2},
    "writer": {},
    "metadata": {},
    "files": [{"path": "a.pt", "bytes": 3, "xxh3_128": "0" * 32, "tensors": [["x", [2, 3], "float32"]]}],
}


def test_the_body_that_the_next_tests_spoil_is_good():
    assert Manifest.from_bytes(signed(BODY)).file("a.pt").tensors == (TensorRecord("x", (2, 3), "float32"),)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"files": [{"path": "../a.pt", "bytes": 3, "xxh3_128": "0" * 32}]}, "'..'"),
        ({"files": [{"path": "/etc/passwd", "bytes": 3, "xxh3_128": "0" * 32}]}, "absolute"),
        ({"files": [{"path": "a\ud800", "bytes": 3, "xxh3_128": "0" * 32}]}, "surrogates"),
        ({"files": [{"path": "a", "bytes": -3, "xxh3_128": "0" * 32}]}, "malformed"),
        ({"files": [{"path": "a", "bytes": True, "xxh3_128": "0" * 32}]}, "expected int"),
        ({"files": [{"path": "a", "bytes": 3, "xxh3_128": "0" * 31}]}, "malformed"),
        ({"files": [BODY["files"][0]] * 2}, "listed twice"),
        ({"files": [{**BODY["files"][0], "tensors": [["x", [-1], "float32"]]}]}, "malformed tensor record"),
        ({"files": [{**BODY["files"][0], "placements": [{"name": "x"}]}]}, "placement of 'x'"),
        ({"layout": {"tensor": 0}}, "tensor is 0"),
        ({"layout": {"tensors": 2}}, "layout"),
        ({"step": "1"}, "step: expected int"),
        ({"format_version": 2}, "format version 2, this program reads version 1"),
        ({"format": "other"}, 'no "format"'),
    ],
)
def test_manifests_that_lie(change, message):
    with pytest.raises(CheckpointError, match=message):
        Manifest.from_bytes(signed({**BODY, **change}))


@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN", "Infinity"])
def test_numbers_that_json_has_not(number):
    with pytest.raises(CorruptCheckpointError, match=f"{number} is no finite number"):
        Manifest.from_bytes(signed(BODY).replace(b'"metadata":{}', b'"metadata":{"a":%s}' % number.encode()))


class _MakesDirectory:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_with_code_is_a_fault_though_its_checksum_is_right(tmp_path):
    """An author of a hostile file may also write the manifest."""
    with begin_save(tmp_path / "run", step=1, layout=Layout()) as save:
        torch.save({"x": _MakesDirectory(tmp_path / "mark")}, save.file("state/more.pt"))
        path = save.commit()
    for contents in (True, False):
        (fault,) = verify(path, contents=contents).faults
        assert "its pickle calls posix.mkdir" in fault.message
    assert find_resume(tmp_path / "run").checkpoint is None
    with pytest.raises(CorruptCheckpointError, match="its pickle calls posix.mkdir"):
        reshard(path, tmp_path / "other", tensor=1, pipeline=1)
    assert not (tmp_path / "mark").exists() and not (tmp_path / "other").exists()
