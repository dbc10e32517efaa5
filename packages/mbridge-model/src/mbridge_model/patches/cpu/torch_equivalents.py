"""CPU equivalents of the torch.cuda functions that raise where there is no GPU.

Work on a CPU is done when the call returns, so streams have nothing to order and events nothing to wait for. There is
one random generator, the CPU's: `torch.cuda.get_rng_state()` and `torch.get_rng_state()` are the same state.
"""

import contextlib
import time
from collections.abc import Iterator
from typing import Any, Self

import torch
from torch import Tensor


class Event(torch.cpu.Event):
    """A point in time. All work that was issued before `record` is done by then."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._seconds: float | None = None

    def record(self, stream: "Stream | None" = None) -> None:
        self._seconds = time.perf_counter()

    def elapsed_time(self, end_event: "Event") -> float:
        """Return the milliseconds from this event to `end_event`."""
        if self._seconds is None or end_event._seconds is None:
            raise ValueError("both events must be recorded before elapsed_time is asked for")
        return (end_event._seconds - self._seconds) * 1000.0


class Stream(torch.cpu.Stream):
    """A queue of work, all of which is done already."""

    device = torch.device("cpu")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._previous: list[Stream] = []

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return (0, 0)

    def synchronize(self) -> None:
        """Return at once."""

    def query(self) -> bool:
        return True

    def record_event(self, event: Event | None = None) -> Event:  # type: ignore[override]  # torch's returns None
        event = event or Event()
        event.record(self)
        return event

    def __enter__(self) -> Self:
        self._previous.append(current_stream())
        set_stream(self)
        return self

    def __exit__(self, *exception: object) -> None:
        set_stream(self._previous.pop())


_default_stream = _current_stream = Stream()


def current_stream(device: Any = None) -> Stream:
    return _current_stream


def default_stream(device: Any = None) -> Stream:
    return _default_stream


def set_stream(stream: Stream | None) -> None:
    global _current_stream
    if stream is not None:
        _current_stream = stream


@contextlib.contextmanager
def stream(stream: Stream | None) -> Iterator[None]:
    """Make `stream` current in the block; None changes nothing, as in torch.cuda."""
    with stream or contextlib.nullcontext():
        yield


def nothing(*args: Any, **kwargs: Any) -> None:
    """For statistics to reset and profiler ranges to mark, of which there are none."""


def manual_seed(seed: int) -> None:
    # Not torch.manual_seed, which would call torch.cuda.manual_seed_all for every generator of the process.
    torch.default_generator.manual_seed(int(seed))


def get_rng_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> Tensor:
    _refuse_graphs(graph_safe)
    return torch.get_rng_state()


def set_rng_state(new_state: Tensor, device: Any = "cuda", graph_safe: bool = False) -> None:
    _refuse_graphs(graph_safe)
    torch.set_rng_state(new_state)


def _refuse_graphs(graph_safe: bool) -> None:
    """Raise for an argument of Megatron-Core's versions of the two functions above."""
    if graph_safe:
        raise NotImplementedError("a random generator for CUDA graphs needs a GPU; set use_cudagraphable_rng to False")


def stay[Movable: (Tensor, torch.nn.Module)](movable: Movable, *args: Any, **kwargs: Any) -> Movable:
    """Return the tensor or module, which is already where it belongs."""
    return movable
