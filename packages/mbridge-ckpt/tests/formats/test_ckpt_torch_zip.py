"""The streaming writer makes files that torch.load reads, and the reader without torch agrees with torch."""

import io
import zipfile
from collections import OrderedDict

import mbridge_ckpt.formats.torch_zip
import pytest
import torch
from mbridge_ckpt.errors import CheckpointError
from mbridge_ckpt.files.hashing import HashingFile, hash_file
from mbridge_ckpt.formats.tensors import DTYPE_BYTES
from mbridge_ckpt.formats.torch_reader import TorchFileReader, inspect_torch_file, load_torch
from mbridge_ckpt.formats.torch_zip import LazyTensor, write_torch_file

CONTAINERS = {
    "a": [1, -2.5, None, True, "text", (1, 2)],
    7: OrderedDict(x=torch.Size([2, 3])),
    "big": 1 << 90,
    "t": torch.int8,
}


def every_dtype() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, width in DTYPE_BYTES.items():
        raw = torch.randint(0, 2 if name == "bool" else 120, (3 * 5 * width,), dtype=torch.uint8, generator=generator)
        tensors[name] = raw.view(getattr(torch, name)).reshape(3, 5)
    return tensors


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    return torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)))


def write(path, value):
    file = HashingFile(path)
    records = write_torch_file(file, value)
    return records, file.close()


@pytest.mark.parametrize("wide_from", [0xFFFFFFFF, 200, 0], ids=["narrow", "mixed", "wide"])
def test_torch_reads_what_is_written(tmp_path, monkeypatch, wide_from):
    monkeypatch.setattr(mbridge_ckpt.formats.torch_zip, "WIDE_FROM", wide_from)
    tensors = every_dtype() | {
        "scalar": torch.tensor(3.25),
        "empty": torch.empty(0, 4),
        "view": torch.arange(100.0)[10:13],
        "transposed": torch.arange(6).reshape(2, 3).t(),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    records, digest = write(tmp_path / "a.pt", {"tensors": tensors, "other": CONTAINERS})
    assert hash_file(tmp_path / "a.pt")[1] == digest
    for loaded in (
        torch.load(tmp_path / "a.pt", weights_only=True),
        torch.load(tmp_path / "a.pt", weights_only=True, mmap=True),
        load_torch(tmp_path / "a.pt"),
    ):
        assert loaded["other"] == CONTAINERS
        assert list(loaded["tensors"]) == list(tensors)
        for name, tensor in tensors.items():
            assert same_bits(loaded["tensors"][name], tensor.detach()) and not loaded["tensors"][name].requires_grad
    assert inspect_torch_file(tmp_path / "a.pt") == records
    assert [record.name for record in records] == [f"tensors/{name}" for name in tensors]


def test_storages_are_aligned_and_small_entries_have_their_crc(tmp_path):
    tensors = [torch.ones(3), torch.full((5,), 7.0)]
    write(tmp_path / "a.pt", tensors)
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        archive.read("archive/data.pkl")  # raises if the CRC is wrong
    data = (tmp_path / "a.pt").read_bytes()
    assert [data.index(tensor.numpy().tobytes()) % 64 for tensor in tensors] == [0, 0]


@pytest.mark.parametrize("ours", [True, False])
def test_reading_single_tensors_and_rows(tmp_path, ours):
    tensors = every_dtype() | {
        "view": torch.arange(100.0)[10:31].reshape(7, 3),
        "t": torch.arange(12).reshape(4, 3).t(),
    }
    if ours:
        write(tmp_path / "a.pt", tensors)
    else:
        torch.save(tensors, tmp_path / "a.pt")
    with TorchFileReader(tmp_path / "a.pt") as reader:
        assert list(reader.value) == list(tensors)
        for name, tensor in tensors.items():
            assert same_bits(reader.read(reader.value[name]), tensor)
            assert same_bits(reader.read(reader.value[name], (1, 3)), tensor[1:3])
            assert same_bits(reader.read(reader.value[name], (2, 2)), tensor[2:2])


def test_lazy_tensors_are_made_one_at_a_time_and_must_keep_their_word():
    alive = []

    def make(number):
        alive.append(number)
        return torch.full((2, 3), float(number))

    out = io.BytesIO()
    write_torch_file(out, {str(n): LazyTensor((2, 3), "float32", lambda n=n: make(n)) for n in range(3)})
    out.seek(0)
    loaded = torch.load(out, weights_only=True)
    assert alive == [0, 1, 2] and torch.equal(loaded["2"], torch.full((2, 3), 2.0))
    with pytest.raises(ValueError, match=r"announced float32\[3, 2\], got float32\[2, 3\]"):
        write_torch_file(io.BytesIO(), [LazyTensor((3, 2), "float32", lambda: make(0))])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": {"b": object()}}, "a/b: a builtins.object cannot be stored"),
        ([b"bytes"], "0: a builtins.bytes cannot be stored"),
        ({(1, 2): 3}, "key .* is no text or number"),
        ({"s": torch.eye(2).to_sparse()}, "s: tensors of dtype float32, or sparse"),
        ({"c": torch.zeros(1, dtype=torch.complex64)}, "c: tensors of dtype complex64"),
    ],
)
def test_what_cannot_be_read_back_is_refused(value, message):
    with pytest.raises(CheckpointError, match=message):
        write_torch_file(io.BytesIO(), value)


def test_a_value_that_contains_itself_is_refused():
    value: list = []
    value.append(value)
    with pytest.raises(CheckpointError, match="containing themselves"):
        write_torch_file(io.BytesIO(), value)
