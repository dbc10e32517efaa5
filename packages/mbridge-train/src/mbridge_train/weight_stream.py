"""The policy's weights to another process, such as a rollout engine's: in place, or through two buckets.

    stream_weights(engine, connection)                  # on every rank, `connection` None where nobody listens
    receive_weights(connection, model.state_dict())     # in the other process

On a GPU both processes use the same device, and memory is passed as CUDA IPC handles; on a CPU as shared memory. The
receiver reads where they are those weights that lie in memory it can map (`weights_in_place`), and the others from
buckets. The connection carries only what is where. Its other end must be a process that `multiprocessing` started, as
what comes through it is unpickled; and the starting process must close its own copy of that end, or a death is only
noticed after the timeout.

    sender:   pieces ── pieces ───────── pieces ───────── … ── end
    receiver:    └─ taken ──┘   └─ taken ──┘                    └─ done | failed, and the reason

A message has some pieces, and the number of the memory they are in, which comes with the first of its messages. What
is in a bucket is copied when it is "taken"; in place, when all is "done".
"""

from collections.abc import Iterator, Mapping
from itertools import chain
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed

from mbridge_train.errors import TrainError
from mbridge_train.weight_buckets import (
    BUCKETS,
    Elements,
    Piece,
    SharedMemory,
    Targets,
    fill_buckets,
    make_bucket_memory,
)
from mbridge_train.weights_in_place import WeightsInPlace

if TYPE_CHECKING:
    from mbridge_train.engine.engine import Engine

BUCKET_BYTES = 256 << 20
TIMEOUT = 600.0


def stream_weights(
    engine: "Engine", connection: Connection | None, *, bucket_bytes: int = BUCKET_BYTES, timeout: float = TIMEOUT
) -> None:
    """Send all weights under their HuggingFace names. Collective over all ranks.

    Beside the model this takes what `export_weights` needs and, on ranks with a connection whose weights cannot all be
    read in place, two buckets. The weights must not change before it returns.

    Args:
        connection: this rank's end of a pipe whose other end is in `receive_weights`; None: it sends nothing.
        bucket_bytes: size of a bucket, the same or another on each rank.
        timeout: longest wait for the receiver to take the pieces of one message, in seconds.

    Raises:
        TrainError: on every rank, where a receiver ended, failed or took too long.
    """
    weights = engine.export_blocks()
    error: str | None = None
    if connection is not None:
        try:
            in_place = WeightsInPlace(engine.model, larger_than=bucket_bytes)
            _Sender(connection, timeout).send(weights, in_place, bucket_bytes, engine.device)
        except (EOFError, OSError) as problem:
            error = f"the process that receives the weights is gone ({type(problem).__name__}): see what it printed"
        except TrainError as problem:
            error = str(problem)
    for _ in weights:
        pass  # each rank takes part in every gather of the export, or the others wait for it forever
    failures = torch.tensor(error is not None, dtype=torch.int32, device=engine.device)
    distributed.all_reduce(failures)
    if failures.item():
        errors: list[str | None] = [None] * distributed.get_world_size()
        distributed.all_gather_object(errors, error)
        rank, found = next((rank, found) for rank, found in enumerate(errors) if found is not None)
        raise TrainError(f"streaming weights from rank {rank}: {found}")


def receive_weights(connection: Connection, targets: Mapping[str, Tensor], *, timeout: float = TIMEOUT) -> set[str]:
    """Take one stream of weights in.

    Args:
        connection: other end of that of `stream_weights`.
        targets: contiguous tensors to copy into, by HuggingFace name. Two names may share one tensor's memory.
        timeout: longest wait for the next message, in seconds.

    Returns:
        The names that came, each complete.

    Raises:
        TrainError: a weight has no place here or another shape, or came in part; the sender is told and raises, too.
            The sender ended or took too long. Some of the targets are then overwritten.
    """
    loading = Targets(targets)
    try:
        _load(connection, loading, timeout)
        names = loading.complete()
    except EOFError:
        raise TrainError("the process that sends the weights is gone: see what it printed") from None
    except TrainError as error:
        connection.send(("failed", str(error)))
        raise
    connection.send("done")
    return names


def _load(connection: Connection, loading: Targets, timeout: float) -> None:
    """Load all pieces; keeps none of the sender's memory, which wants to free it."""
    places: list[tuple[Elements, bool]] = []  # with whether it is a bucket, which the sender fills again
    while (message := _receive(connection, timeout)) is not None:
        pieces, number, place = message
        if place is not None:
            is_bucket = isinstance(place, SharedMemory)
            places.append((Elements(place.data if is_bucket else place), is_bucket))
        elements, is_bucket = places[number]
        loading.load(pieces, elements)
        if is_bucket:
            _synchronize(elements.device)
        connection.send("taken")
    for elements, _ in places:
        _synchronize(elements.device)


class _Sender:
    def __init__(self, connection: Connection, timeout: float) -> None:
        self._connection = connection
        self._timeout = timeout
        self._numbers: dict[int, int] = {}
        self._under_way = 0

    def send(
        self,
        weights: Iterator[tuple[str, list[Tensor]]],
        in_place: WeightsInPlace,
        bucket_bytes: int,
        device: torch.device,
    ) -> None:
        _synchronize(device)
        elsewhere = in_place.take_out(weights, self._send_pieces)
        first = next(elsewhere, None)
        if first is not None:
            memory = make_bucket_memory(bucket_bytes, device)
            for bucket in fill_buckets(chain([first], elsewhere), [shared.data for shared in memory]):
                _synchronize(device)
                self._send_pieces(bucket.pieces, memory[bucket.slot])
        while self._under_way:
            self._expect_taken()
        self._connection.send(None)
        _expect("done", self._connection, self._timeout)

    def _send_pieces(self, pieces: list[Piece], place: SharedMemory | Tensor) -> None:
        is_new = id(place) not in self._numbers
        number = self._numbers.setdefault(id(place), len(self._numbers))
        self._connection.send((pieces, number, place if is_new else None))
        self._under_way += 1
        if self._under_way == BUCKETS:  # the next one may have the memory of the oldest
            self._expect_taken()

    def _expect_taken(self) -> None:
        _expect("taken", self._connection, self._timeout)
        self._under_way -= 1


def _expect(answer: str, connection: Connection, timeout: float) -> None:
    message = _receive(connection, timeout)
    if message != answer:
        raise TrainError(f"the receiver says: {message[1]}")


def _receive(connection: Connection, timeout: float) -> Any:
    if not connection.poll(timeout):
        raise TrainError(f"the other process said nothing for {timeout:g} s; raise the timeout if it only is slow")
    return connection.recv()


def _synchronize(device: torch.device) -> None:
    """Wait until all copies are done: the other process knows nothing of this one's streams."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
