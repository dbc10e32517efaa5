"""The digits: real, complete, in the columns of Robo2VLM-1, and not written twice."""

import ast
import os
from pathlib import Path

import numpy
import pyarrow.parquet as pq
from mbridge_sft.quickstart.digits import write_digits
from mbridge_train.data.images import decode
from mbridge_train.data.rows import read_examples
from sklearn.datasets import load_digits


def test_all_digits_with_the_right_answers(tmp_path: Path) -> None:
    directories = write_digits(tmp_path)
    source = load_digits()
    held_out = {}
    for directory in directories:
        examples = read_examples([directory])
        names = pq.read_table(directory)["id"].to_pylist()
        for index, name in enumerate(names):
            number = int(name.removeprefix("digit-"))
            held_out[number] = directory.name == "eval"
            example = examples[index]
            assert example.answer == str(source.target[number])
            assert sorted(example.choices or ()) == list("0123456789")
            pixels = numpy.asarray(decode(example.images[0], name))
            assert pixels.shape == (32, 32, 3)
            assert numpy.array_equal(pixels[::4, ::4, 0], (source.images[number] * 255 / 16).round())
    assert sorted(held_out) == list(range(1797))
    evaluated = numpy.bincount([source.target[number] for number, is_eval in held_out.items() if is_eval])
    assert all(34 <= count <= 36 for count in evaluated)
    assert len({tuple(ast.literal_eval(text)) for text in pq.read_table(directories[0])["choices"].to_pylist()}) > 1400


def test_written_once_and_mended(tmp_path: Path) -> None:
    train, evaluation = (directory / "digits.parquet" for directory in write_digits(tmp_path))
    content, before = train.read_bytes(), os.stat(train)
    evaluation.write_bytes(evaluation.read_bytes()[:1000])
    write_digits(tmp_path)
    assert os.stat(train).st_ino == before.st_ino
    assert os.stat(train).st_mtime_ns == before.st_mtime_ns
    assert pq.read_table(evaluation).num_rows == 355
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["digits.parquet", "digits.parquet", "eval", "train"]
    train.unlink()
    write_digits(tmp_path)
    assert train.read_bytes() == content
