"""Prefetching global batches of encoded rows, with the images of this rank's rows only.

A batch is prepared in two phases. First, every rank encodes the text of all rows and measures their images, which gives
the lengths, and from them the plan of micro-batches. Then each rank decodes the images of the rows that the plan
assigns to it. Before a batch is yielded, the ranks agree on its bad rows.

The rows of a batch depend only on the seed and the step, so a run resumes at any step without reading earlier rows. A
bad row leaves its batch one row smaller: if the next row took its place, every later batch would depend on it.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from itertools import count, takewhile
from typing import Any

from torch import distributed

from mbridge_train.data.errors import DataError, LongRowError, RowError
from mbridge_train.data.examples import Example, Examples
from mbridge_train.data.images import RowImages
from mbridge_train.data.order import RowOrder
from mbridge_train.data.workers import WorkerPool

PREFETCH = 2
"""Batches that workers prepare ahead."""

_NOTHING_USABLE = "correct the data, raise runner.seq_length if its rows are too long, or make batches larger"


class EncodedBatches[T]:
    """Iterate over batches of `encode(example)`, from `first_step` on. The number of workers does not change them.

    Worker processes end with the iteration, even if it is left early. Iterating is collective over all ranks.

    Args:
        examples: the rows.
        encode: a function such as `Encoder.encode`, which can be pickled if there are workers.
        batch_size: rows per batch.
        seed: seed of the order. None keeps the order of the files.
        epochs: passes over the rows; None: no end.
        decode: `Encoder.decode`, for results of `encode` with an attribute `images`; None: no images are decoded.
        own: given the results of a batch, returns the positions of those whose images this rank needs; None: all.
        workers: number of processes; 0 does the work in this process, on demand.
        first_step: number of the first batch, from 0.
        max_bad_rows: number of different rows that may be bad.
        bad_rows: rows found to be bad before `first_step`: `bad_rows` of the loader of the run that is resumed.
        skip_long: leave out rows that are too long without counting them as bad.
        report: called with a line for each row that is left out.

    Raises, when iterated:
        DataError: there are more bad rows than `max_bad_rows`, a file can no longer be read, a worker process died, or
            a batch has no good row. With `epochs`, a batch without good rows is skipped, unless no batch has any.
    """

    def __init__(
        self,
        examples: Examples,
        encode: Callable[[Example], T],
        *,
        batch_size: int,
        seed: int | None,
        epochs: int | None = None,
        decode: Callable[[RowImages], Any] | None = None,
        own: Callable[[list[T]], Collection[int]] | None = None,
        workers: int = 0,
        first_step: int = 0,
        max_bad_rows: int = 0,
        bad_rows: Iterable[int] = (),
        skip_long: bool = False,
        report: Callable[[str], None] = lambda message: None,
    ) -> None:
        self.order = RowOrder(size=len(examples), batch_size=batch_size, seed=seed, epochs=epochs)
        self._examples = examples
        self._module = encode.__module__
        self._tasks: dict[str, Callable[[Any], Any]] = {"encode": partial(_encode_row, examples, encode)}
        if decode is not None:
            self._tasks["decode"] = decode
        self._own = own or (lambda results: range(len(results)))
        self._workers = workers
        self._first_step = first_step
        self._max_bad_rows = max_bad_rows
        self._bad = set(bad_rows)
        self._long: set[int] = set()
        self._skip_long = skip_long
        self._report = report
        self._prefetch = PREFETCH if workers else 0

    @property
    def bad_rows(self) -> tuple[int, ...]:
        """Indices of the bad rows of all batches so far, to be saved with a checkpoint."""
        return tuple(sorted(self._bad))

    def __iter__(self) -> Iterator[list[T]]:
        is_usable = False
        with WorkerPool(self._tasks, self._workers, preload=[self._module]) as pool:
            rows_of_steps = takewhile(len, (self.order.rows(step) for step in count(self._first_step)))
            encoding = (self._encode(pool, rows) for rows in rows_of_steps)
            decoding = (self._plan(pool, batch) for batch in _ahead(encoding, min(1, self._prefetch)))
            for step, batch in enumerate(_ahead(decoding, self._prefetch), start=self._first_step):
                results = self._agreed(pool, batch)
                if results:
                    is_usable = True
                    yield results
                elif self.order.epochs is None:
                    last = self._examples.source(batch.rows[-1])
                    raise DataError(f"no row of batch {step} can be used, the last of them {last}; {_NOTHING_USABLE}")
        if not is_usable and self.order.rows(self._first_step):
            raise DataError(f"no row of the data can be used; {_NOTHING_USABLE}")

    def _encode(self, pool: WorkerPool, rows: list[int]) -> "_Batch":
        """Start the first phase of a batch. Rows known to be unusable are not read again."""
        known = self._bad | self._long
        batch = _Batch(rows=rows)
        for position, row in enumerate(rows):
            if row not in known:
                batch.encoding[position] = pool.submit("encode", row, self._examples.source(row))
        return batch

    def _plan(self, pool: WorkerPool, batch: "_Batch") -> "_Batch":
        """Start the second phase: decode the images of this rank's good rows."""
        for position, future in batch.encoding.items():
            result = future.result()
            (batch.errors if isinstance(result, DataError) else batch.results)[position] = result
        batch.encoding = {}
        batch.left_out = set(batch.errors)
        planned = batch.good
        if "decode" in self._tasks and planned:
            for index in self._own([batch.results[position] for position in planned]):
                images = batch.results[planned[index]].images
                if images is not None and planned[index] not in batch.decoding:
                    batch.decoding[planned[index]] = pool.submit("decode", images, images.source)
        return batch

    def _agreed(self, pool: WorkerPool, batch: "_Batch") -> list[T]:
        """Finish a batch and return the results of its good rows, with the images of this rank's rows decoded.

        If an image turns out to be broken, or only some ranks found a row to be bad, all ranks plan again without the
        row, and decode what the new plan assigns to them, until no rank finds another bad row.
        """
        while True:
            for position, future in batch.decoding.items():
                vision = future.result()
                if isinstance(vision, DataError):
                    batch.errors[position] = vision
                else:
                    batch.results[position].images.vision = vision
            findings = _of_all_ranks((batch.errors, batch.left_out))
            for errors, _ in reversed(findings):  # the first rank's error is the one that is reported
                batch.errors |= errors
            for error in batch.errors.values():
                if not isinstance(error, RowError):
                    raise error
            if all(batch.errors.keys() == left_out for _, left_out in findings):
                break
            self._plan(pool, batch)
        for position, error in sorted(batch.errors.items()):
            self._leave_out(batch.rows[position], error)
        return [batch.results[position] for position in batch.good]

    def _leave_out(self, row: int, error: DataError) -> None:
        is_long = self._skip_long and isinstance(error, LongRowError)
        known = self._long if is_long else self._bad
        if row in known:
            return
        known.add(row)
        if not is_long and len(self._bad) > self._max_bad_rows:
            others = f" ({len(self._bad)} bad rows so far)" if self._max_bad_rows else ""
            raise DataError(f"{error}\nMore bad rows than data.max_bad_rows={self._max_bad_rows}{others}")
        self._report(f"left out {error}")


def _encode_row(examples: Examples, encode: Callable[[Example], Any], row: int) -> Any:
    return encode(examples[row])


@dataclass(kw_only=True, slots=True)
class _Batch:
    """A batch in preparation. Positions are indices into `rows`, which include rows known to be unusable.

    Attributes:
        encoding: futures of the first phase by position, until all are in `results` or `errors`.
        errors: by position, a `RowError` for a bad row; any other `DataError` ends the run.
        left_out: positions of the bad rows that the plan leaves out.
        decoding: futures of this rank's images by position.
    """

    rows: list[int]
    encoding: dict[int, Future[Any]] = field(default_factory=dict)
    results: dict[int, Any] = field(default_factory=dict)
    errors: dict[int, DataError] = field(default_factory=dict)
    left_out: set[int] = field(default_factory=set)
    decoding: dict[int, Future[Any]] = field(default_factory=dict)

    @property
    def good(self) -> list[int]:
        """Positions of the rows that are not known to be bad."""
        return [position for position in self.results if position not in self.errors]


def _ahead[U](items: Iterator[U], number: int) -> Iterator[U]:
    """Yield all items, and read `number` items ahead."""
    waiting: deque[U] = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > number:
            yield waiting.popleft()
    yield from waiting


def _of_all_ranks[U](value: U) -> list[U]:
    """Return the values of all ranks. Collective."""
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values
