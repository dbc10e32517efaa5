"""Weights in buckets, and to another process: all of them, bit for bit, through two buckets or in place."""

import multiprocessing
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from mbridge_model import Parallel
from mbridge_train.errors import TrainError
from mbridge_train.weight_buckets import Elements, Piece, Targets, fill_buckets, make_bucket_memory
from mbridge_train.weights_in_place import WeightsInPlace

from testing.gang import Gang
from testing.tiny_models import make_model
from testing.training_runs import SHARDED, build, leave, train
from testing.weight_receiver import digest, receive

BUCKET_BYTES = 10_000  # the embedding, of 131 rows of 64, needs several; a layer's biases share one


def make_weights() -> dict[str, torch.Tensor]:
    """Of several dtypes and odd sizes, one of them not contiguous, one larger than two buckets."""
    generator = torch.Generator().manual_seed(0)
    return {
        "matrix": torch.randn(33, 7, generator=generator),
        "scalar": torch.randn((), generator=generator).bfloat16(),
        "transposed": torch.randn(5, 9, generator=generator).bfloat16().T,
        "long": torch.randn(301, generator=generator).half(),
        "counts": torch.arange(3),
        "bytes": torch.arange(77, dtype=torch.uint8),
    }


@pytest.mark.parametrize("bucket_bytes", [64, 200, 600, 100_000])
def test_buckets_hold_every_weight(bucket_bytes: int) -> None:
    weights = make_weights()
    places = {name: torch.zeros_like(tensor).contiguous() for name, tensor in weights.items()}
    targets = Targets(places)
    memory = [shared.data for shared in make_bucket_memory(bucket_bytes, torch.device("cpu"))]
    slots = []
    for bucket in fill_buckets(weights.items(), memory):
        assert all(piece.offset + piece.size * piece.dtype.itemsize <= bucket_bytes for piece in bucket.pieces)
        slots.append(bucket.slot)
        targets.load(bucket.pieces, Elements(memory[bucket.slot]))
    assert targets.complete() == set(weights)
    for name, tensor in weights.items():
        assert torch.equal(places[name], tensor), name
    assert slots == [number % 2 for number in range(len(slots))]
    # Every bucket but the last is full but for alignment and what is left when the next element does not fit.
    total = sum(tensor.nbytes for tensor in weights.values())
    assert total / bucket_bytes <= len(slots) <= (total + 64 * len(weights)) / (bucket_bytes - 7) + 1


def test_weights_are_cast_to_the_receivers_dtype() -> None:
    weights = {"matrix": torch.randn(33, 7)}
    places = {"matrix": torch.zeros(33, 7, dtype=torch.bfloat16)}
    targets, memory = Targets(places), [torch.empty(128, dtype=torch.uint8)] * 2
    for bucket in fill_buckets(weights.items(), memory):
        targets.load(bucket.pieces, Elements(memory[bucket.slot]))
    assert torch.equal(places["matrix"], weights["matrix"].bfloat16())


def test_buckets_that_do_not_fit() -> None:
    memory = [torch.empty(128, dtype=torch.uint8)] * 2
    (bucket,) = fill_buckets({"matrix": torch.zeros(3, 2)}.items(), memory)
    with pytest.raises(TrainError, match="'matrix' is streamed, and the receiving model has no such"):
        Targets({}).load(bucket.pieces, Elements(memory[0]))
    with pytest.raises(TrainError, match=r"shape \(3, 2\), the receiving model has \(2, 3\)"):
        Targets({"matrix": torch.zeros(2, 3)}).load(bucket.pieces, Elements(memory[0]))
    with pytest.raises(TrainError, match="'matrix' is not contiguous in the receiving model"):
        Targets({"matrix": torch.zeros(2, 3).T}).load(bucket.pieces, Elements(memory[0]))
    with pytest.raises(TrainError, match="bucket_bytes is 8"):
        make_bucket_memory(8, torch.device("cpu"))


def test_a_weight_that_comes_in_part() -> None:
    targets = Targets({"matrix": torch.zeros(3, 2)})
    targets.load([Piece("matrix", (3, 2), torch.float32, 0, 4, 0)], Elements(torch.zeros(16, dtype=torch.uint8)))
    with pytest.raises(TrainError, match="1 weights came in part, first 'matrix'"):
        targets.complete()


def test_what_is_read_in_place() -> None:
    """Views of large shared parameters; not what is copied, cut, or in a parameter of this process alone."""
    shared, private = torch.nn.Linear(4, 6, dtype=torch.bfloat16), torch.nn.Linear(3, 20)
    shared.share_memory()
    rows = shared.weight.detach()
    weights = {
        "rows": [rows[1:4]],
        "columns": [rows[:, 1:3]],
        "copy": [rows.clone()],
        "blocks": [rows[4:6], rows[1:2]],
        "bias": [shared.bias.detach()],
        "half a copy": [rows[2:3], rows[:1].clone()],
        "private": [private.weight.detach()],
        "last": [rows[5]],
    }
    places = {name: torch.zeros_like(torch.cat(blocks)) for name, blocks in weights.items()}
    targets = Targets(places)
    in_place = WeightsInPlace([shared, private], larger_than=12)
    elsewhere = in_place.take_out(weights.items(), lambda pieces, data: targets.load(pieces, Elements(data)))
    assert [(name, tensor.shape) for name, tensor in elsewhere] == [
        ("columns", (6, 2)),
        ("copy", (6, 4)),
        ("bias", (6,)),
        ("half a copy", (2, 4)),
        ("private", (20, 3)),
    ]
    assert targets.complete() == {"rows", "blocks", "last"}
    for name in ("rows", "blocks", "last"):
        assert torch.equal(places[name], torch.cat(weights[name])), name


LAYOUTS = (Parallel(tensor=2), Parallel(pipeline=2), Parallel())


def to_another_process(directory: Path) -> Any:
    """On rank 0: for each layout the weights as exported and as received by another process, and which of them through
    buckets; and how a last stream ends, which that process leaves after its beginning, and after how many seconds. On
    the other rank how it ends."""
    from mbridge_train.weight_stream import stream_weights

    first = torch.distributed.get_rank() == 0
    connection = process = None
    if first:
        context = multiprocessing.get_context("spawn")
        connection, other = context.Pipe()
        process = context.Process(target=receive, args=(other, directory, len(LAYOUTS)), daemon=True)
        process.start()
        other.close()
    found = []
    try:
        for parallel in LAYOUTS:
            engine = build(directory, parallel, SHARDED)
            train(engine, 0, 1)
            if parallel == Parallel():  # as if on a GPU, whose memory every process can map
                for parameter in engine.model[0].parameters():
                    parameter.share_memory_()
            stream_weights(engine, connection, bucket_bytes=BUCKET_BYTES, timeout=60)
            in_place = WeightsInPlace(engine.model, larger_than=BUCKET_BYTES)
            in_buckets = [name for name, _ in in_place.take_out(engine.export_blocks(), lambda *_: None)]
            expected = digest({name: tensor.clone() for name, tensor in engine.export_weights()})
            found.append((expected, connection.recv() if connection is not None else None, in_buckets))
        begin = time.perf_counter()
        with pytest.raises(TrainError) as error:
            stream_weights(engine, connection, bucket_bytes=BUCKET_BYTES, timeout=60)
        seconds = time.perf_counter() - begin
        return (found, str(error.value), seconds) if first else str(error.value)
    finally:
        leave()
        if process is not None:
            process.kill()


def test_another_process_receives_every_weight(gang2: Gang, tmp_path: Path) -> None:
    make_model("qwen3", False, tmp_path)
    (found, message, seconds), other_message = gang2.run(to_another_process, tmp_path)
    assert len(found) == len(LAYOUTS)
    for layout, (expected, (names, received), in_buckets) in zip(LAYOUTS, found, strict=True):
        assert received == expected and names == set(expected)
        assert sorted(in_buckets) == ([] if layout == Parallel() else sorted(expected))
    assert message == other_message
    assert message.startswith("streaming weights from rank 0: the process that receives the weights is gone")
    assert seconds < 20


class FixedWeights:
    """What `stream_weights` uses of an engine."""

    device = torch.device("cpu")
    model = ()

    def export_blocks(self) -> Any:
        return ((name, [tensor]) for name, tensor in make_weights().items())


def to_a_thread(targets: dict[str, torch.Tensor], timeout: float) -> tuple[str, str]:
    """What the sender and the receiver raise."""
    from mbridge_train.weight_stream import receive_weights, stream_weights

    connection, other = multiprocessing.Pipe()
    errors: dict[str, str] = {}

    def run(name: str, action: Any) -> None:
        try:
            action()
        except TrainError as error:
            errors[name] = str(error)

    receiver = threading.Thread(target=run, args=("receiver", lambda: receive_weights(other, targets)))
    if targets:
        receiver.start()
    engine: Any = FixedWeights()
    run("sender", lambda: stream_weights(engine, connection, bucket_bytes=128, timeout=timeout))
    if targets:
        receiver.join()
    return errors["sender"], errors.get("receiver", "")


def both_errors() -> Any:
    return to_a_thread({"matrix": torch.zeros(1)}, 60), to_a_thread({}, 0.1)


def test_what_the_receiver_cannot_take(gang2: Gang) -> None:
    (sender, receiver), (silent, _) = gang2.run(both_errors)[0]
    assert receiver.startswith("weight 'matrix' is streamed with shape (33, 7)")
    assert sender == f"streaming weights from rank 0: the receiver says: {receiver}"
    assert "said nothing for 0.1 s" in silent
