"""The plan of a global batch: which data-parallel rank runs which sample in which micro-batch.

It is a deterministic function of the lengths, so every rank computes the same plan without communication.
"""

from collections.abc import Sequence
from itertools import chain

from mbridge_train.errors import TrainError

Plan = list[list[list[int]]]
"""``plan[data_parallel_rank][micro_batch]`` is a list of sample indices, possibly empty."""


def plan_micro_batches(
    lengths: Sequence[int],
    data_parallel_size: int,
    *,
    micro_batch_size: int | None = None,
    token_budget: int | None = None,
    pad_each_to_multiple: int = 1,
) -> Plan:
    """Spread samples evenly by tokens over data-parallel ranks, and cut each rank's share into micro-batches.

    All ranks get the same number of micro-batches, the smallest that fits, some of which may be empty. The assignment
    is longest-processing-time-first (Graham 1969): the longest remaining sample goes to the rank with the fewest
    tokens.

    Args:
        lengths: number of tokens of each sample.
        micro_batch_size: largest number of samples in a micro-batch; samples of similar length share one.
        token_budget: instead, largest number of tokens in a packed micro-batch; those of a rank are balanced by tokens.
        pad_each_to_multiple: lengths are rounded up to a multiple of this.

    Raises:
        TrainError: there are no samples, or a sample alone exceeds ``token_budget``.
        ValueError: not exactly one of ``micro_batch_size`` and ``token_budget``, or a size below 1.
    """
    limit = micro_batch_size if token_budget is None else token_budget
    if (micro_batch_size is None) == (token_budget is None) or limit is None:
        raise ValueError("give exactly one of micro_batch_size and token_budget")
    if limit < 1 or data_parallel_size < 1 or pad_each_to_multiple < 1 or min(lengths, default=1) < 1:
        raise ValueError("sizes and lengths must be at least 1")
    if not lengths:
        raise TrainError("the global batch has no samples: check the data filter and global_batch_size")
    padded = [round_up(length, pad_each_to_multiple) for length in lengths]
    # Longest first; equal lengths in order of index, so that the order is the same everywhere.
    order = sorted(range(len(padded)), key=lambda index: (-padded[index], index))

    if micro_batch_size is not None:
        count = -(-len(padded) // (data_parallel_size * micro_batch_size))
        shares = _spread(order, padded, data_parallel_size, most=count * micro_batch_size)
        plan = [[share[m * micro_batch_size : (m + 1) * micro_batch_size] for m in range(count)] for share in shares]
    else:
        assert token_budget is not None
        longest = order[0]
        if padded[longest] > token_budget:
            raise TrainError(
                f"sample {longest} has {lengths[longest]} tokens ({padded[longest]} with padding), more than the "
                f"micro-batch token budget of {token_budget}: raise the budget or shorten the sequences"
            )
        shares = _spread(order, padded, data_parallel_size)
        packed = [_first_fit(share, padded, token_budget) for share in shares]
        count = max(len(micro_batches) for micro_batches in packed)
        plan = [
            _even_out(share, padded, micro_batches, count, token_budget)
            for share, micro_batches in zip(shares, packed, strict=True)
        ]
    return [[sorted(micro_batch) for micro_batch in micro_batches] for micro_batches in plan]


def padding_share(plan: Plan, lengths: Sequence[int], *, packed: bool, pad_each_to_multiple: int = 1) -> float:
    """Return the share of padding, in [0, 1), among the positions of all micro-batches of all ranks.

    Samples are laid out end to end if `packed`, else in rows (`collate`), and each sample or row is padded to a
    multiple of `pad_each_to_multiple`.
    """
    positions = 0
    for micro_batch in filter(None, chain.from_iterable(plan)):
        padded = [round_up(lengths[index], pad_each_to_multiple) for index in micro_batch]
        positions += sum(padded) if packed else len(padded) * max(padded)
    return 1 - sum(lengths) / positions


def round_up(value: int, multiple: int) -> int:
    """Return the smallest multiple of ``multiple`` that is not below ``value``."""
    return -(-value // multiple) * multiple


def _spread(order: list[int], lengths: list[int], count: int, most: int | None = None) -> list[list[int]]:
    """Deal ``order`` (longest first) into ``count`` shares of at most ``most`` samples, balanced by tokens."""
    shares: list[list[int]] = [[] for _ in range(count)]
    totals = [0] * count
    for index in order:
        open_shares = [share for share in range(count) if most is None or len(shares[share]) < most]
        smallest = min(open_shares, key=lambda share: (totals[share], share))
        shares[smallest].append(index)
        totals[smallest] += lengths[index]
    return shares


def _first_fit(order: list[int], lengths: list[int], budget: int) -> list[list[int]]:
    """Pack ``order`` (longest first) into bins of at most ``budget`` tokens: first-fit decreasing."""
    bins: list[list[int]] = []
    room: list[int] = []
    for index in order:
        target = next((b for b, left in enumerate(room) if left >= lengths[index]), len(bins))
        if target == len(bins):
            bins.append([])
            room.append(budget)
        bins[target].append(index)
        room[target] -= lengths[index]
    return bins


def _even_out(
    order: list[int], lengths: list[int], fitted: list[list[int]], count: int, budget: int
) -> list[list[int]]:
    """Return ``count`` bins balanced by tokens if they keep to the budget, else ``fitted`` and empty bins."""
    even = _spread(order, lengths, count)
    if all(sum(lengths[index] for index in micro_batch) <= budget for micro_batch in even):
        return even
    return fitted + [[] for _ in range(count - len(fitted))]
