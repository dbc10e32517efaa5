"""Batches: the same whatever the workers and wherever a run resumes; bad rows counted; crashes named."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from mbridge_sft.quickstart.digits import write_digits
from mbridge_train.data.encode import Encoder
from mbridge_train.data.errors import DataError, LongRowError, RowError
from mbridge_train.data.loader import EncodedBatches
from mbridge_train.data.order import RowOrder
from mbridge_train.data.rows import read_examples


def number(example):
    """Encodes a row as its number, as these tests' rows say it."""
    text = example.messages[0].text
    if text.startswith("long"):
        raise LongRowError(f"{example.source}: too long")
    if text.startswith("bad"):
        raise RowError(f"{example.source}: bad")
    if text.startswith("kill"):
        os.kill(os.getpid(), signal.SIGKILL)
    if text.startswith("bug"):
        raise KeyError("a mistake in the code")
    if text.startswith("tensor"):
        return {"a": torch.arange(3), "b": (torch.tensor(1.5), None), "strided": torch.arange(6).view(2, 3).T}
    return int(text)


def rows(tmp_path, texts):
    lines = [
        {"messages": [{"role": "user", "content": str(text)}, {"role": "assistant", "content": "ok"}]} for text in texts
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read_examples([path])


def take(batches, count):
    return [batch for _, batch in zip(range(count), batches, strict=False)]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_do_not_depend_on_workers(tmp_path, workers):
    examples = rows(tmp_path, range(10))
    order = RowOrder(size=10, batch_size=4, seed=7)
    batches = EncodedBatches(examples, number, batch_size=4, seed=7, workers=workers)
    assert take(batches, 6) == [order.rows(step) for step in range(6)]
    resumed = EncodedBatches(examples, number, batch_size=4, seed=7, workers=workers, first_step=4)
    assert take(resumed, 2) == [order.rows(step) for step in (4, 5)]
    once = EncodedBatches(examples, number, batch_size=4, seed=None, epochs=1, workers=workers)
    assert list(once) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert list(once) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_resume_decodes_nothing_of_what_came_before(tmp_path):
    decoded = []
    batches = EncodedBatches(
        rows(tmp_path, range(100)), lambda example: decoded.append(number(example)), batch_size=4, seed=1, first_step=20
    )
    take(batches, 1)
    assert decoded == RowOrder(size=100, batch_size=4, seed=1).rows(20)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_rows_are_left_out_counted_once_and_survive_a_resume(tmp_path, workers):
    texts = [f"bad{row}" if row in (2, 5) else row for row in range(8)]
    examples = rows(tmp_path, texts)
    settings = {"batch_size": 3, "seed": 5, "workers": workers}
    messages = []
    batches = EncodedBatches(examples, number, **settings, max_bad_rows=2, report=messages.append)
    whole = take(batches, 8)
    order = RowOrder(size=8, batch_size=3, seed=5)
    assert whole == [[row for row in order.rows(step) if row not in (2, 5)] for step in range(8)]
    assert batches.bad_rows == (2, 5)
    assert sorted(messages) == [f"left out {tmp_path}/a.jsonl:{row + 1}: bad" for row in (2, 5)]
    # What is counted is what the batches so far hold, however far ahead the workers are.
    met = {row for row in order.rows(0) if row in (2, 5)}
    first = EncodedBatches(examples, number, **settings, max_bad_rows=2)
    assert take(first, 1) == whole[:1]
    assert first.bad_rows == tuple(sorted(met))
    resumed = EncodedBatches(examples, number, **settings, max_bad_rows=2, bad_rows=first.bad_rows, first_step=1)
    assert take(resumed, 7) == whole[1:]
    assert resumed.bad_rows == (2, 5)
    with pytest.raises(DataError, match=r":\d: bad\nMore bad rows than data.max_bad_rows=1 \(2 bad rows so far\)"):
        take(EncodedBatches(examples, number, **settings, max_bad_rows=1), 8)
    with pytest.raises(DataError, match=r"a.jsonl:\d: bad\nMore bad rows than data.max_bad_rows=0$"):
        take(EncodedBatches(examples, number, **settings), 8)


def test_long_rows_are_bad_unless_they_may_be_left_out(tmp_path):
    examples = rows(tmp_path, [0, "long", 2])
    with pytest.raises(DataError, match=r"a.jsonl:2: too long\nMore bad rows than"):
        take(EncodedBatches(examples, number, batch_size=3, seed=None), 1)
    batches = EncodedBatches(examples, number, batch_size=3, seed=None, skip_long=True)
    assert take(batches, 2) == [[0, 2], [0, 2]]
    assert batches.bad_rows == ()
    with pytest.raises(DataError, match=r"no row of batch 1 can be used, the last of them .*a.jsonl:2"):
        take(EncodedBatches(examples, number, batch_size=1, seed=None, skip_long=True), 2)
    # An evaluation goes on without such a batch, as nothing depends on its number.
    settings = {"seed": None, "skip_long": True, "epochs": 1}
    assert list(EncodedBatches(examples, number, batch_size=1, **settings)) == [[0], [2]]
    with pytest.raises(DataError, match="no row of the data can be used"):
        list(EncodedBatches(rows(tmp_path, ["long", "long"]), number, batch_size=1, **settings))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_that_dies_names_the_row(tmp_path, workers):
    examples = rows(tmp_path, [0, 1, "kill", 3, 4, 5])
    batches = EncodedBatches(examples, number, batch_size=2, seed=None, workers=workers)
    iterator = iter(batches)
    assert next(iterator) == [0, 1]
    with pytest.raises(DataError, match=r"a.jsonl:3: the process that decoded this row ended by signal 9"):
        next(iterator)


@pytest.mark.parametrize("workers", [0, 1])
def test_any_other_error_names_the_row(tmp_path, workers):
    batches = EncodedBatches(rows(tmp_path, [0, "bug"]), number, batch_size=2, seed=None, workers=workers)
    with pytest.raises(DataError, match=r"a.jsonl:2: cannot be encoded: KeyError: 'a mistake in the code'"):
        take(batches, 1)


def test_tensors_arrive_whole_and_writable(tmp_path):
    examples = rows(tmp_path, ["tensor"])
    ((here,),) = take(EncodedBatches(examples, number, batch_size=1, seed=None, epochs=1), 1)
    ((there,),) = take(EncodedBatches(examples, number, batch_size=1, seed=None, epochs=1, workers=1), 1)
    assert torch.equal(there["a"], here["a"])
    assert torch.equal(there["strided"], here["strided"])
    assert there["b"][0].dtype == torch.float32
    assert there["b"][0].item() == 1.5
    there["a"] += 1


def test_workers_encode_as_this_process_does(tiny_vision_model, tmp_path):
    examples = read_examples([write_digits(tmp_path)[1]])
    encoder = Encoder(tiny_vision_model)
    settings = {"batch_size": 5, "seed": 1, "decode": encoder.decode}
    here = take(EncodedBatches(examples, encoder.encode, **settings), 3)
    there = take(EncodedBatches(examples, encoder.encode, **settings, workers=2), 3)
    for one, other in zip(
        (row for batch in here for row in batch), (row for batch in there for row in batch), strict=True
    ):
        assert one.source == other.source
        for name in ("tokens", "trained", "position_ids"):
            assert torch.equal(getattr(one, name), getattr(other, name))
        assert torch.equal(one.images.grid_thw, other.images.grid_thw)
        pixels = one.images.materialize().pixel_values
        assert torch.equal(pixels, other.images.materialize().pixel_values)
        assert torch.equal(pixels, encoder.decode(one.images).pixel_values)
    (choices,) = take(EncodedBatches(examples, encoder.encode_choices, batch_size=5, seed=1, workers=1), 1)
    assert [len(row) for row in choices] == [10] * 5
    assert len(pickle.dumps(encoder)) < 500


PROGRAM = """
import multiprocessing, signal, sys, time
from mbridge_train.data.rows import read_examples
from mbridge_train.data.loader import EncodedBatches

def slow(example):
    time.sleep(0.2)

if __name__ == "__main__":
    batches = iter(EncodedBatches(read_examples([sys.argv[1]]), slow, batch_size=2, seed=1, workers=2))
    next(batches)
    print(*[process.pid for process in multiprocessing.active_children()], "megatron" in sys.modules, flush=True)
    if sys.argv[2:] == ["preempted"]:
        asked = []
        signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
        print("ready", flush=True)
        while not asked:
            time.sleep(0.05)
        for _ in range(6):  # more than workers have prepared
            next(batches)
        again = iter(EncodedBatches(read_examples([sys.argv[1]]), slow, batch_size=2, seed=1, workers=1))
        print(next(again), flush=True)
        sys.exit()  # with the workers still there
    for _ in batches:
        pass
"""


def start_program(tmp_path, *arguments):
    rows(tmp_path, range(5))
    (tmp_path / "program.py").write_text(PROGRAM)
    process = subprocess.Popen(
        [sys.executable, tmp_path / "program.py", tmp_path / "a.jsonl", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    *workers, has_megatron = process.stdout.readline().split()
    assert len(workers) == 2
    assert has_megatron == "False"
    return process, workers


def test_ctrl_c_ends_all_processes_quietly(tmp_path):
    process, workers = start_program(tmp_path)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all processes
    started = time.monotonic()
    _, errors = process.communicate(timeout=30)
    assert time.monotonic() - started < 10
    assert process.returncode == -signal.SIGINT
    assert errors.count("Traceback") == 1  # the program's own
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)


def test_sigterm_to_all_processes_is_for_the_training_process(tmp_path):
    """As SLURM and the init process of a container send it. The fork server serves later pools as well."""
    process, workers = start_program(tmp_path, "preempted")
    assert process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signal.SIGTERM)
    output, errors = process.communicate(timeout=30)
    assert (process.returncode, output, errors) == (0, "[None, None]\n", "")
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
