"""Random and randomly damaged input to every parser: a CheckpointError or a right answer, and nothing else."""

import json
import struct
from contextlib import suppress

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mbridge_ckpt import CheckpointError, FileRecord, Layout, Manifest, ParameterPlacement, TensorRecord, load_torch
from mbridge_ckpt.files.hashing import hash_bytes
from mbridge_ckpt.formats.safetensors import read_safetensors_header, read_safetensors_index

FUZZ = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
FILE = {"path": "a.pt", "bytes": 3, "xxh3_128": "0" * 32, "tensors": [["x", [2, 3], "float32"]]}


def signed(change: dict) -> bytes:
    """Return a manifest of any content with the right checksum."""
    empty = {"layout": {}, "writer": {}, "metadata": {}, "files": [FILE]}
    body = {"format": "mbridge-checkpoint", "format_version": 1, "step": 1, "created": "", **empty, **change}
    text = json.dumps(body, separators=(",", ":")).encode()
    return text[:-1] + b',"manifest_xxh3_128":"' + hash_bytes(text).encode() + b'"}'


def test_the_manifest_that_is_spoiled_is_good():
    assert Manifest.from_bytes(signed({})).file("a.pt").bytes == 3


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


@FUZZ
@given(st.dictionaries(st.sampled_from(list(Manifest.__dataclass_fields__)), JSON))
def test_fuzz_manifest_values(change):
    with suppress(CheckpointError):
        Manifest.from_bytes(signed(change))


@FUZZ
@given(st.fixed_dictionaries({}, optional=dict.fromkeys(("path", "bytes", "xxh3_128", "tensors", "placements"), JSON)))
def test_fuzz_manifest_files(change):
    with suppress(CheckpointError):
        Manifest.from_bytes(signed({"files": [{**FILE, **change}]}))


@FUZZ
@given(st.binary(max_size=300))
def test_fuzz_manifest_bytes(data):
    with pytest.raises(CheckpointError):
        Manifest.from_bytes(data)


NAMES = st.text(max_size=12)


TENSORS = st.builds(TensorRecord, NAMES, st.lists(st.integers(0, 9), max_size=3).map(tuple), st.just("float32"))
PLACEMENTS = st.builds(
    ParameterPlacement,
    name=NAMES,
    global_name=NAMES,
    stage=st.sampled_from(["first", "last", "every"]),
    partition_dim=st.integers(0, 2),
    partition_stride=st.integers(1, 3),
    vocabulary_rows=st.none() | st.integers(0, 9),
    last_stage_copy=st.none() | NAMES,
)


@FUZZ
@given(st.lists(TENSORS, max_size=4).map(tuple), st.lists(PLACEMENTS, max_size=3).map(tuple), JSON)
def test_fuzz_manifest_round_trip(tensors, placements, metadata):
    file = FileRecord(path="a/b", bytes=1, xxh3_128="a" * 32, tensors=tensors, placements=placements)
    manifest = Manifest(step=1, created="x", layout=Layout(), writer={}, files=(file,), metadata={"m": metadata})
    assert Manifest.from_bytes(manifest.to_bytes()) == manifest


@FUZZ
@given(JSON | st.dictionaries(NAMES, JSON), st.binary(max_size=20), st.integers(-3, 3))
def test_fuzz_safetensors_and_index(tmp_path, header, data, error):
    path = tmp_path / "x.safetensors"
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", max(len(text) + error, 0)) + text + data)
    with suppress(CheckpointError):
        read_safetensors_header(path)
    path.write_bytes(text)
    with suppress(CheckpointError):
        read_safetensors_index(path)


@FUZZ
@given(st.data())
def test_fuzz_safetensors_entries(tmp_path, data):
    entry = st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "U8", "X"]),
            "shape": st.lists(st.integers(-1, 4), max_size=2),
            "data_offsets": st.lists(st.integers(-1, 9), min_size=2, max_size=2),
        }
    )
    path = tmp_path / "x.safetensors"
    header = json.dumps(data.draw(st.dictionaries(NAMES, entry, max_size=3))).encode()
    length = data.draw(st.integers(0, 9))
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(length))
    try:
        tensors = read_safetensors_header(path)
    except CheckpointError:
        return
    width = {"float32": 4, "uint8": 1}
    assert sum(width[tensor.dtype] * torch.Size(tensor.shape).numel() for tensor in tensors) == length


@FUZZ
@given(st.data())
def test_fuzz_torch_files(tmp_path, data):
    path = tmp_path / "x.pt"
    torch.save({"a": torch.ones(3), "b": [1, {"c": torch.zeros(2, dtype=torch.bfloat16)}]}, path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(len(content) // 2, len(content)))])
    with suppress(CheckpointError):
        load_torch(path)
