"""The order of problems: every one once an epoch, another order each epoch, exact resume."""

import json

import pytest
from mbridge_reasoning.data.order import ProblemSampler
from mbridge_train.data.errors import DataError


@pytest.mark.parametrize(("size", "batch_size"), [(10, 3), (7, 7), (3, 8), (1, 2)])
def test_every_problem_once_an_epoch(size, batch_size):
    sampler = ProblemSampler(size, batch_size=batch_size, seed=5)
    given = [index for _ in range(4 * size) for index in sampler.next_batch()]
    epochs = [given[start : start + size] for start in range(0, 4 * size * batch_size, size)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    if size >= 7:
        assert epochs[0] != epochs[1] != epochs[2]


def test_order_depends_on_the_seed_and_shuffle():
    def first(**settings):
        return ProblemSampler(50, batch_size=50, **settings).next_batch()

    assert first(seed=1) == first(seed=1) != first(seed=2)
    assert first(seed=1, shuffle=False) == list(range(50))


@pytest.mark.parametrize("steps", [0, 1, 3, 9])
def test_resume_goes_on_where_it_stopped(steps):
    one = ProblemSampler(10, batch_size=4, seed=3)
    for _ in range(steps):
        one.next_batch()
    state = json.loads(json.dumps(one.state_dict()))
    other = ProblemSampler(10, batch_size=4, seed=3)
    other.load_state_dict(state)
    assert [one.next_batch() for _ in range(6)] == [other.next_batch() for _ in range(6)]


def test_resume_with_other_data_is_refused():
    state = ProblemSampler(10, batch_size=4, seed=3).state_dict()
    with pytest.raises(DataError, match="number of problems was 10 .* is 11 now"):
        ProblemSampler(11, batch_size=4, seed=3).load_state_dict(state)
    with pytest.raises(DataError, match=r"data\.seed was 3 .* is 4 now"):
        ProblemSampler(10, batch_size=4, seed=4).load_state_dict(state)
