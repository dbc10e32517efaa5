"""Hostile files: each gets its own error that names the file; none runs code, fills the memory or hangs."""

import io
import json
import os
import pickle
import struct
import time
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mbridge_ckpt import CorruptCheckpointError, UnsafeCheckpointError, load_torch
from mbridge_ckpt.formats.safetensors import read_safetensors_header
from mbridge_ckpt.formats.tensors import TensorRecord
from mbridge_ckpt.formats.torch_reader import inspect_torch_file

Expected = tuple[type[Exception], str]
MARK = "hostile_mark"  # a file that code in a pickle would make


class Calls:
    """Pickles as a call."""

    def __init__(self, function: Callable, *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> Any:
        return self._call


def archive(path: Path, pickled: bytes, storages: dict[str, bytes] | None = None, **options: Any) -> None:
    with zipfile.ZipFile(path, "w", **options) as zipped:
        zipped.writestr("archive/data.pkl", pickled)
        zipped.writestr("archive/byteorder", "little")
        zipped.writestr("archive/version", "3\n")
        for key, data in (storages or {}).items():
            zipped.writestr(f"archive/data/{key}", data)


def tensor_pickle(elements: int, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    """Return the pickle of {"x": tensor} with a float32 storage "0" of `elements`, in torch's form."""

    class Storage:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", elements) if isinstance(value, Storage) else None

    stream = io.BytesIO()
    call = Calls(torch._utils._rebuild_tensor_v2, Storage(), offset, size, stride, False, {})
    Pickler(stream, protocol=2).dump({"x": call})
    return stream.getvalue()


def pickle_that_runs_a_command(path: Path) -> Expected:
    torch.save({"model": Calls(os.system, f"touch {path.with_name(MARK)}")}, path)
    return UnsafeCheckpointError, "its pickle calls posix.system"


def pickle_that_evaluates_text(path: Path) -> Expected:
    torch.save([Calls(eval, f"open({str(path.with_name(MARK))!r}, 'w')")], path)
    return UnsafeCheckpointError, "its pickle calls __builtin__.eval"


def pickle_of_a_later_protocol_with_code(path: Path) -> Expected:
    archive(path, pickle.dumps(Calls(os.mkdir, str(path.with_name(MARK))), protocol=5))
    return UnsafeCheckpointError, "its pickle calls posix.mkdir"


def pickle_without_archive(path: Path) -> Expected:
    path.write_bytes(pickle.dumps(Calls(os.mkdir, str(path.with_name(MARK)))))
    return CorruptCheckpointError, "not a torch.save file"


def old_format_of_torch_save(path: Path) -> Expected:
    torch.save({"x": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    return CorruptCheckpointError, "not a torch.save file"


def zip_bomb(path: Path) -> Expected:
    data = {"0": bytes(64 << 20)}
    archive(path, tensor_pickle(16 << 20, 0, (16 << 20,), (1,)), data, compression=zipfile.ZIP_DEFLATED)
    return UnsafeCheckpointError, "is compressed .* may expand to fill the memory"


def overlapping_entries(path: Path) -> Expected:
    archive(path, tensor_pickle(1000, 0, (1000,), (1,)), {str(number): bytes(4000) for number in range(3)})
    data = bytearray(path.read_bytes())
    directory = data.index(b"PK\1\2")
    first = None
    while (directory := data.find(b"PK\1\2", directory)) >= 0:
        size = struct.unpack_from("<I", data, directory + 24)[0]
        if size == 4000:
            first = data[directory + 42 : directory + 46] if first is None else first
            data[directory + 42 : directory + 46] = first
            struct.pack_into("<II", data, directory + 20, 9000, 9000)
        directory += 4
    path.write_bytes(data)
    return UnsafeCheckpointError, "its entries overlap"


def entry_outside_the_archive(path: Path) -> Expected:
    archive(path, tensor_pickle(2, 0, (2,), (1,)), {"../../../x": b"1"})
    return UnsafeCheckpointError, "lies outside the archive"


def two_entries_of_one_name(path: Path) -> Expected:
    with zipfile.ZipFile(path, "w") as zipped:
        for data in (b"first", b"other"):
            zipped.writestr("archive/data.pkl", data)
    return UnsafeCheckpointError, "same name"


def tensor_beyond_its_storage(path: Path) -> Expected:
    archive(path, tensor_pickle(4, 1, (2, 2), (2, 1)), {"0": bytes(16)})
    return CorruptCheckpointError, "reaches beyond its storage"


def tensor_of_endless_stride(path: Path) -> Expected:
    archive(path, tensor_pickle(4, 0, (2, 2), (1 << 62, 1)), {"0": bytes(16)})
    return CorruptCheckpointError, "reaches beyond its storage"


def tensor_of_negative_size(path: Path) -> Expected:
    archive(path, tensor_pickle(4, 0, (-1, 2), (2, 1)), {"0": bytes(16)})
    return CorruptCheckpointError, r"tensor with offset 0, size \(-1, 2\)"


def storage_larger_than_its_entry(path: Path) -> Expected:
    archive(path, tensor_pickle(1 << 40, 0, (1 << 40,), (1,)), {"0": bytes(16)})
    return CorruptCheckpointError, "storage '0' of 1099511627776 elements is not in the file in full"


def storage_that_is_missing(path: Path) -> Expected:
    archive(path, tensor_pickle(4, 0, (4,), (1,)))
    return CorruptCheckpointError, "storage '0' of 4 elements is not in the file in full"


def memo_index_without_measure(path: Path) -> Expected:
    archive(path, b"\x80\x02]r" + struct.pack("<I", 0xFFFFFFF0) + b".")
    return UnsafeCheckpointError, "memo index 4294967280"


def key_of_tuples_nested_without_end(path: Path) -> Expected:
    # Hashing such a key ends the process with a segmentation fault, from some hundred thousand on.
    archive(path, b"\x80\x02})" + b"\x85" * 30_000 + b"K\x01s.")
    return UnsafeCheckpointError, "nests tuples without bound"


def key_of_tuples_nested_by_the_memo(path: Path) -> Expected:
    # The same of tuples with marks, each put into the memo, dropped and fetched again.
    level = b"(" + b"h\x00" + b"tq\x000"
    archive(path, b"\x80\x02})q\x000" + level * 30_000 + b"h\x00K\x01s.")
    return UnsafeCheckpointError, "nests tuples without bound"


def tuples_nested_with_marks(path: Path) -> Expected:
    archive(path, b"\x80\x02" + b"(" * 500_000 + b"t" * 500_000 + b".")
    return UnsafeCheckpointError, "nests tuples without bound"


def key_of_sizes_nested_without_end(path: Path) -> Expected:
    archive(path, b"\x80\x02}ctorch\nSize\nq\x00)" + b"\x85" * 2 + b"RK\x01s.")
    return CorruptCheckpointError, "torch.Size of something other than integers"


def lists_nested_without_end(path: Path) -> Expected:
    archive(path, b"\x80\x02" + b"]" * 10_000 + b"a" * 9_999 + b".")
    return UnsafeCheckpointError, "nested deeper than 64"


def lists_that_double_at_each_level(path: Path) -> Expected:
    value: list = []
    for _ in range(60):
        value = [value, value]
    archive(path, pickle.dumps(value, protocol=2))
    return UnsafeCheckpointError, "without end"


def pickle_that_changes_what_it_is_given(path: Path) -> Expected:
    # Sets __defaults__ of the function that rebuilds tensors, which would stay so for the next file.
    build = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x0c\x00\x00\x00__defaults__K\x01\x85s\x86b."
    archive(path, build)
    return CorruptCheckpointError, "damaged pickle: AttributeError"


def safetensors(header: bytes, data: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def safetensors_of(entries: dict[str, Any], data: bytes) -> bytes:
    return safetensors(json.dumps(entries).encode(), data)


def floats(begin: int, end: int, *shape: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}


SAFETENSORS: dict[str, tuple[bytes, type[Exception], str]] = {
    "overlapping": (
        safetensors_of({"a": floats(0, 8, 2), "b": floats(4, 12, 2)}, bytes(12)),
        UnsafeCheckpointError,
        "'b': its bytes overlap",
    ),
    "beyond_the_file": (
        safetensors_of({"a": floats(0, 80, 20)}, bytes(8)),
        UnsafeCheckpointError,
        "'a': bytes 0 to 80",
    ),
    "backwards": (safetensors_of({"a": floats(8, 0, 2)}, bytes(8)), UnsafeCheckpointError, "'a': bytes 8 to 0"),
    "negative": (safetensors_of({"a": floats(-8, 0, 2)}, bytes(8)), UnsafeCheckpointError, "'a': bytes -8 to 0"),
    "header_longer_than_the_file": (safetensors(b"{}", b"", 1 << 60), UnsafeCheckpointError, "its header claims"),
    "shape_that_overflows": (
        safetensors_of({"a": floats(0, 8, 1 << 62, 1 << 62)}, bytes(8)),
        CorruptCheckpointError,
        "does not fit 8 bytes",
    ),
    "hole": (
        safetensors_of({"a": floats(0, 4, 1), "b": floats(8, 12, 1)}, bytes(12)),
        CorruptCheckpointError,
        "'b': 4 bytes before it belong to no tensor",
    ),
    "tail": (safetensors_of({"a": floats(0, 4, 1)}, bytes(9)), CorruptCheckpointError, "5 bytes at the end"),
    "name_twice": (
        safetensors(b'{"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]},"a":{}}', bytes(4)),
        CorruptCheckpointError,
        "twice",
    ),
    "unknown_dtype": (
        safetensors_of({"a": {"dtype": "OBJECT", "shape": [], "data_offsets": [0, 0]}}, b""),
        CorruptCheckpointError,
        "malformed entry",
    ),
    "float_offsets": (safetensors_of({"a": floats(0.0, 4.0, 1)}, bytes(4)), CorruptCheckpointError, "malformed"),  # type: ignore[arg-type]
    "no_json": (safetensors(b"\xff" * 10, b""), CorruptCheckpointError, "not JSON"),
    "nested_json": (safetensors(b"[" * 100_000, b""), CorruptCheckpointError, "not JSON"),
    "json_list": (safetensors(b"[]", b""), CorruptCheckpointError, "not an object"),
    "too_short": (b"\x01\x02", CorruptCheckpointError, "too short"),
}

TORCH_FILES = [
    pickle_that_runs_a_command,
    pickle_that_evaluates_text,
    pickle_of_a_later_protocol_with_code,
    pickle_without_archive,
    old_format_of_torch_save,
    zip_bomb,
    overlapping_entries,
    entry_outside_the_archive,
    two_entries_of_one_name,
    tensor_beyond_its_storage,
    tensor_of_endless_stride,
    tensor_of_negative_size,
    storage_larger_than_its_entry,
    storage_that_is_missing,
    memo_index_without_measure,
    key_of_tuples_nested_without_end,
    key_of_tuples_nested_by_the_memo,
    tuples_nested_with_marks,
    key_of_sizes_nested_without_end,
    lists_nested_without_end,
    lists_that_double_at_each_level,
    pickle_that_changes_what_it_is_given,
]


@pytest.mark.parametrize("make", TORCH_FILES, ids=lambda make: make.__name__)
def test_hostile_torch_files(tmp_path, make):
    path = tmp_path / "model_optim_rng.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile, about the names
        kind, message = make(path)
    tracemalloc.start()
    begin = time.process_time()
    try:
        for read in (inspect_torch_file, load_torch):
            with pytest.raises(kind, match=message) as caught:
                read(path)
            assert str(path) in str(caught.value) and type(caught.value) is kind
        assert tracemalloc.get_traced_memory()[1] < 200 << 20 and time.process_time() - begin < 30
    finally:
        tracemalloc.stop()
    assert not (tmp_path / MARK).exists()
    torch.save({"x": torch.ones(3)}, path)
    assert inspect_torch_file(path) == (TensorRecord("x", (3,), "float32"),)  # nothing it did stays


@pytest.mark.parametrize("name", SAFETENSORS)
def test_hostile_safetensors_headers(tmp_path, name):
    data, kind, message = SAFETENSORS[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(kind, match=message) as caught:
        read_safetensors_header(path)
    assert str(path) in str(caught.value)
