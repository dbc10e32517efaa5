"""The order of rows: each once an epoch, another order each epoch, the same whatever the steps before."""

import json

import numpy
import pyarrow
import pyarrow.parquet
import pytest
from mbridge_train.data.errors import DataError
from mbridge_train.data.order import RowOrder, require_same_data
from mbridge_train.data.rows import read_examples


@pytest.mark.parametrize(("size", "batch_size"), [(10, 3), (7, 7), (3, 8), (1, 2)])
def test_every_row_once_an_epoch(size, batch_size):
    order = RowOrder(size=size, batch_size=batch_size, seed=5)
    given = [row for step in range(4 * size) for row in order.rows(step)]
    epochs = [given[start : start + size] for start in range(0, 4 * size * batch_size, size)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    if size >= 7:
        assert epochs[0] != epochs[1] != epochs[2]


def test_every_row_once_an_epoch_and_in_another_order():
    order = RowOrder(size=10, batch_size=4, seed=3)
    stream = [row for step in range(5) for row in order.rows(step)]
    assert sorted(stream[:10]) == sorted(stream[10:]) == list(range(10))
    assert stream[:10] != stream[10:]
    assert stream != [row for step in range(5) for row in RowOrder(size=10, batch_size=4, seed=4).rows(step)]
    in_order = RowOrder(size=10, batch_size=4, seed=None, epochs=1)
    assert [in_order.rows(step) for step in range(4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9], []]


def test_an_epoch_is_the_permutation_of_its_seed_and_number():
    order = RowOrder(size=50, batch_size=50, seed=3)
    for epoch in (0, 1, 7):
        assert order.rows(epoch) == numpy.random.default_rng([3, epoch]).permutation(50).tolist()
    assert RowOrder(size=50, batch_size=50, seed=None).rows(7) == list(range(50))


@pytest.mark.parametrize("sizes", [(0, 1), (1, 0)])
def test_an_order_of_nothing_is_refused(sizes):
    with pytest.raises(ValueError, match="both must be at least 1"):
        RowOrder(size=sizes[0], batch_size=sizes[1], seed=0)


def test_other_data_or_another_order_is_refused_on_resume():
    saved = {"rows": 10, "data.seed": 3, "data.shuffle": True}
    require_same_data(saved, dict(saved))
    with pytest.raises(DataError, match="the number of rows to train on was 10 when the checkpoint was .* is 11 now"):
        require_same_data(saved, saved | {"rows": 11})
    with pytest.raises(DataError, match=r"data\.seed was 3 when the checkpoint was saved and is 4 now"):
        require_same_data(saved, saved | {"data.seed": 4})
    require_same_data(saved, saved | {"the fingerprint of the rows": "ab"})  # a checkpoint from before there was one
    with pytest.raises(DataError, match=r"the fingerprint of the rows was ab when the checkpoint .* is cd now"):
        require_same_data({"the fingerprint of the rows": "ab"}, {"the fingerprint of the rows": "cd"})


def chats(path, *answers):
    turns = [[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": answer}] for answer in answers]
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))


def questions(path, *answers):
    rows = [{"question": "Hi", "correct_answer": answer, "image": b"x" * len(answer)} for answer in answers]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)


@pytest.mark.parametrize(("write", "suffix"), [(chats, ".jsonl"), (questions, ".parquet")])
def test_rows_in_another_order_have_another_fingerprint(tmp_path, write, suffix):
    def fingerprint(*files, directory="data"):
        (tmp_path / directory).mkdir(exist_ok=True)
        paths = [tmp_path / directory / f"{number}{suffix}" for number in range(len(files))]
        for path, answers in zip(paths, files, strict=True):
            write(path, *answers)
        return read_examples(paths).fingerprint()

    answers = ["a", "b", "ccc", "d", "ee", "f"]
    first = fingerprint(answers)
    assert fingerprint(answers, directory="moved") == first
    assert fingerprint(["b", "a", *answers[2:]]) != first  # of the same length
    assert fingerprint([*answers[:2], *answers[4:], *answers[2:4]]) != first
    assert fingerprint([*answers[:5], "ff"]) != first
    assert fingerprint(answers[:3], answers[3:]) != fingerprint(answers[3:], answers[:3])
