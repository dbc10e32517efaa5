"""The policy's weights to another process, such as a rollout engine's: in place, or through two buckets.

    stream_weights(engine, connection)                  # on every rank, `connection` None where nobody listens
    receive_weights(connection, model.state_dict())     # in the other process

On a GPU both processes use the same device, and memory is passed as CUDA IPC handles; on a CPU as shared memory. The
receiver reads where they are those weights that lie in memory it can map (`weights_in_place`), and the others from
buckets. The connection carries only what is where. Its other end must be a process that `multiprocessing` started, as
what comes through it is unpickled; and the starting process must close its own copy of that end, or a death is only
noticed after the timeout.

    sender:   memory ── bucket ── bucket ─────── bucket ─────── … ── in place ──── end
    receiver:              └─ taken ──┘   └─ taken ──┘                  └─ taken ──┘   └─ done | failed, and the reason
"""

from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed

from mbridge_train.errors import TrainError
from mbridge_train.weight_buckets import SharedMemory, fill_buckets, load_pieces, make_bucket_memory
from mbridge_train.weights_in_place import WeightsInPlace

if TYPE_CHECKING:
    from mbridge_train.engine import Engine

BUCKET_BYTES = 256 << 20
TIMEOUT = 600.0


def stream_weights(
    engine: "Engine", connection: Connection | None, *, bucket_bytes: int = BUCKET_BYTES, timeout: float = TIMEOUT
) -> None:
    """Send all weights under their HuggingFace names. Collective over all ranks.

    Beside the model this takes two buckets, on ranks with a connection, and what `export_weights` needs. The weights
    must not change before it returns.

    Args:
        connection: this rank's end of a pipe whose other end is in `receive_weights`; None: it sends nothing.
        bucket_bytes: size of a bucket, the same or another on each rank.
        timeout: longest wait for the receiver to take one bucket, in seconds.

    Raises:
        TrainError: on every rank, where a receiver ended, failed or took too long.
    """
    weights = engine.export_weights()
    error: str | None = None
    if connection is not None:
        try:
            memory = make_bucket_memory(bucket_bytes, engine.device)
            in_place = WeightsInPlace(engine.model, larger_than=bucket_bytes)
            _send(weights, in_place, connection, memory, timeout)
        except (EOFError, OSError) as problem:
            error = f"the process that receives the weights is gone ({type(problem).__name__}): see what it printed"
        except TrainError as problem:
            error = str(problem)
    for _ in weights:
        pass  # each rank takes part in every gather of the export, or the others wait for it forever
    errors: list[str | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(errors, error)
    for rank, found in enumerate(errors):
        if found is not None:
            raise TrainError(f"streaming weights from rank {rank}: {found}")


def receive_weights(connection: Connection, targets: Mapping[str, Tensor], *, timeout: float = TIMEOUT) -> set[str]:
    """Take one stream of weights in.

    Args:
        connection: other end of that of `stream_weights`.
        targets: contiguous tensors to copy into, by HuggingFace name. Two names may share one tensor's memory.
        timeout: longest wait for the next bucket, in seconds.

    Returns:
        The names that came, each complete.

    Raises:
        TrainError: a weight has no place here or another shape, or came in part; the sender is told and raises, too.
            The sender ended or took too long. Some of the targets are then overwritten.
    """
    try:
        memory: list[SharedMemory] = _receive(connection, timeout)
        counts: dict[str, int] = {}
        while (message := _receive(connection, timeout)) is not None:
            pieces, place = message
            data = place if isinstance(place, Tensor) else memory[place].data
            for name, count in load_pieces(pieces, data, targets).items():
                counts[name] = counts.get(name, 0) + count
            _synchronize(data)
            del message, place, data  # the sender wants to free it
            connection.send("taken")
        partial = sorted(name for name, count in counts.items() if count != targets[name].numel())
        if partial:
            raise TrainError(f"{len(partial)} weights came in part, first {partial[0]!r}")
    except EOFError:
        raise TrainError("the process that sends the weights is gone: see what it printed") from None
    except TrainError as error:
        connection.send(("failed", str(error)))
        raise
    del memory
    connection.send("done")
    return set(counts)


def _send(
    weights: Iterator[tuple[str, Tensor]],
    in_place: WeightsInPlace,
    connection: Connection,
    memory: list[SharedMemory],
    timeout: float,
) -> None:
    connection.send(memory)
    under_way = 0
    for bucket in fill_buckets(in_place.take_out(weights), [shared.data for shared in memory]):
        _synchronize(bucket.data)
        connection.send((bucket.pieces, bucket.slot))
        under_way += 1
        if under_way == len(memory):  # the next bucket has the memory of the oldest one
            _expect("taken", connection, timeout)
            under_way -= 1
    mapped = list(in_place.pieces())  # kept until nobody reads it
    for pieces, data in mapped:
        _synchronize(data)
        connection.send((pieces, data))
        under_way += 1
    for _ in range(under_way):
        _expect("taken", connection, timeout)
    connection.send(None)
    _expect("done", connection, timeout)  # the memory of the buckets must stay until nobody reads it, too


def _expect(answer: str, connection: Connection, timeout: float) -> None:
    message = _receive(connection, timeout)
    if message != answer:
        raise TrainError(f"the receiver says: {message[1]}")


def _receive(connection: Connection, timeout: float) -> Any:
    if not connection.poll(timeout):
        raise TrainError(f"the other process said nothing for {timeout:g} s; raise the timeout if it only is slow")
    return connection.recv()


def _synchronize(data: Tensor) -> None:
    """Wait until the copies into or from `data` are done: the other process knows nothing of this one's streams."""
    if data.is_cuda:
        torch.cuda.current_stream(data.device).synchronize()
