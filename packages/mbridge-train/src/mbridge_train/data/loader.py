"""Global batches of encoded examples, decoded ahead of their use in worker processes.

Which rows a batch holds depends on the seed and the number of the step alone, so a run resumes at any step without
reading what came before. A bad row leaves its batch one smaller: were the next row to take its place, every later
batch would depend on it.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import count, takewhile

from mbridge_train.data.errors import DataError, LongRowError, RowError
from mbridge_train.data.examples import Example, Examples
from mbridge_train.data.order import RowOrder
from mbridge_train.data.workers import WorkerPool, encode_row


class EncodedBatches[T]:
    """Iterates over batches of `encode(example)`, the same batches whatever the number of workers.

    A new iteration starts at `first_step` again. Worker processes end with the iteration, also where it is left early.

    Args:
        examples: the rows.
        encode: such as `Encoder.encode` or `Encoder.encode_choices`; with workers, something that can be pickled.
        batch_size: rows of a batch.
        seed: of the order. None: as the rows lie in the files.
        epochs: passes over the rows; None: without end.
        workers: processes; 0 encodes in this one, when the batch is asked for.
        first_step: number of the first batch, from 0.
        max_bad_rows: how many different rows may be bad.
        bad_rows: rows that were met before `first_step` and are bad: `bad_rows` of the loader that went before.
        skip_long: leave out rows that are too long without counting them as bad.
        report: told of each row that is left out.
        prefetch: batches that are encoded ahead.

    Raises, when iterated:
        DataError: there are more bad rows than `max_bad_rows`, a file cannot be read any more, a worker process died,
            or no row of a batch is good. With `epochs`, such a batch is left out, unless all are such.
    """

    def __init__(
        self,
        examples: Examples,
        encode: Callable[[Example], T],
        *,
        batch_size: int,
        seed: int | None,
        epochs: int | None = None,
        workers: int = 0,
        first_step: int = 0,
        max_bad_rows: int = 0,
        bad_rows: Iterable[int] = (),
        skip_long: bool = False,
        report: Callable[[str], None] = lambda message: None,
        prefetch: int = 2,
    ) -> None:
        self.order = RowOrder(size=len(examples), batch_size=batch_size, seed=seed, epochs=epochs)
        self._examples = examples
        self._encode = encode
        self._workers = workers
        self._first_step = first_step
        self._max_bad_rows = max_bad_rows
        self._bad = set(bad_rows)
        self._long: set[int] = set()
        self._skip_long = skip_long
        self._report = report
        self._prefetch = prefetch

    @property
    def bad_rows(self) -> tuple[int, ...]:
        """Indices of the bad rows of all batches so far, to be kept with a checkpoint."""
        return tuple(sorted(self._bad))

    def __iter__(self) -> Iterator[list[T]]:
        if not self._workers:
            yield from self._batches(lambda rows: (encode_row(self._examples, self._encode, row) for row in rows))
            return
        ahead = self._prefetch * self.order.batch_size
        with WorkerPool(self._examples, self._encode, self._workers) as pool:
            yield from self._batches(lambda rows: pool.map(rows, ahead))

    def _batches(self, encode_rows: Callable[[Iterator[int]], Iterator[T | RowError]]) -> Iterator[list[T]]:
        # Rows known to be bad before this iteration are not read again; those found on the way are, at most once an
        # epoch, because the workers are ahead of what is known here.
        known = frozenset(self._bad)
        steps = (self.order.rows(step) for step in count(self._first_step))
        outcomes = encode_rows(row for rows in takewhile(len, steps) for row in rows if row not in known)
        is_usable = False
        for step in count(self._first_step):
            rows = self.order.rows(step)
            if not rows:
                break
            batch = []
            for row in rows:
                if row in known:
                    continue
                outcome = next(outcomes)
                if isinstance(outcome, RowError):
                    self._leave_out(row, outcome)
                else:
                    batch.append(outcome)
            if batch:
                is_usable = True
                yield batch
            elif self.order.epochs is None:
                raise self._nothing_usable(
                    f"batch {step} can be used, the last of them {self._examples.source(rows[-1])}"
                )
        if not is_usable and step > self._first_step:
            raise self._nothing_usable("the data can be used")

    def _nothing_usable(self, what: str) -> DataError:
        return DataError(
            f"no row of {what}; correct the data, raise runner.seq_length if its rows are too long, or make batches "
            "larger"
        )

    def _leave_out(self, row: int, error: RowError) -> None:
        is_long = self._skip_long and isinstance(error, LongRowError)
        known = self._long if is_long else self._bad
        if row in known:
            return
        known.add(row)
        if not is_long and len(self._bad) > self._max_bad_rows:
            others = f" ({len(self._bad)} bad rows so far)" if self._max_bad_rows else ""
            raise DataError(f"{error}\nMore bad rows than data.max_bad_rows={self._max_bad_rows}{others}")
        self._report(f"left out {error}")
