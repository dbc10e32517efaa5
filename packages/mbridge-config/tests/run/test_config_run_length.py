"""How many steps a run has: of max_steps and max_epochs whichever is reached first."""

from typing import Any

import pytest

from mbridge_config import ReasoningConfig, SFTConfig, longest_run, run_length
from mbridge_config.load.catalog import installed_directories
from mbridge_config.load.compose import compose, from_tree
from mbridge_config.schema.provenance import Provenance

CASES = [
    # max_steps, max_epochs, rows, steps in batches of 4
    (30, None, 10, 30),  # no epochs, no limit but the steps
    (30, 2, 10, 5),
    (3, 2, 10, 3),
    (5, 2, 10, 5),
    (-1, None, 10, 2),  # one epoch
    (-1, 1, 10, 2),
    (-1, 4, 10, 10),
    (-1, 1, 3, 1),  # never less than a step
    (30, 1, 3, 1),
]


def reasoning(**tree: Any) -> ReasoningConfig:
    return from_tree(tree, Provenance(), ReasoningConfig)


def sft(**tree: Any) -> SFTConfig:
    return from_tree(tree, Provenance(), SFTConfig)


@pytest.mark.parametrize(("max_steps", "max_epochs", "rows", "steps"), CASES)
def test_whichever_is_reached_first(max_steps: int, max_epochs: int | None, rows: int, steps: int) -> None:
    runner = {"max_steps": max_steps, "max_epochs": max_epochs}
    tuned = run_length(sft(runner=runner, actor={"global_batch_size": 4}), rows=rows)
    assert (tuned.steps, tuned.optimizer_steps) == (steps, steps)
    batches = {"data": {"rollout_batch_size": 4}, "algorithm": {"n_minibatches": 2}}
    trained = run_length(reasoning(runner=runner, **batches), rows=rows)
    assert (trained.steps, trained.optimizer_steps) == (steps, 2 * steps)


def test_minibatches_that_follow_from_the_global_batch() -> None:
    config = reasoning(
        runner={"max_steps": 3},
        data={"rollout_batch_size": 4},
        algorithm={"group_size": 8},
        actor={"global_batch_size": 16},
    )
    assert run_length(config, rows=100).optimizer_steps == 6


def test_what_makes_it_so_long() -> None:
    batches = {"data": {"rollout_batch_size": 4}, "algorithm": {"n_minibatches": 2}}
    batch = {"global_batch_size": 4}
    by_epochs, by_steps = {"max_epochs": 2}, {"max_steps": 3}
    assert [
        run_length(config, rows=rows).reason
        for config, rows in (
            (reasoning(runner=by_epochs, **batches), 10),
            (reasoning(runner=by_steps, **batches), 10),
            (sft(runner=by_epochs, actor=batch), 10),
            (sft(runner=by_steps, actor=batch), 10),
            (sft(actor=batch), 1),
        )
    ] == [
        "algorithm.n_minibatches 2 x 5 steps of data.rollout_batch_size 4 in runner.max_epochs 2 of 10 rows"
        " = 10 optimizer steps",
        "algorithm.n_minibatches 2 x runner.max_steps 3 = 6 optimizer steps",
        "5 steps of actor.global_batch_size 4 in runner.max_epochs 2 of 10 rows",
        "runner.max_steps 3",
        "1 step of actor.global_batch_size 4 in runner.max_epochs 1 of 1 row",
    ]


def test_what_the_config_alone_says() -> None:
    """Files are not read for it; the number of made problems is known."""
    assert longest_run(sft(runner={"max_epochs": 2})) is None
    assert longest_run(reasoning(runner={"max_epochs": 2})) is None
    for runner in ({"max_steps": 7}, {"max_steps": 7, "max_epochs": 1}):
        for config in (sft(runner=runner), reasoning(runner=runner)):
            longest = longest_run(config)
            assert longest is not None and longest.steps == 7
    made = {"data": {"type": "reasoning_gym", "rollout_batch_size": 4, "reasoning_gym": {"train_size": 10}}}
    for runner, steps in (
        ({}, 2),
        ({"max_epochs": 2}, 5),
        ({"max_steps": 3, "max_epochs": 2}, 3),
        ({"max_steps": 9}, 9),
    ):
        longest = longest_run(reasoning(runner=runner, **made))
        assert longest is not None and longest.steps == steps


@pytest.mark.skipif("sft" not in installed_directories(), reason="the apps are not installed")
def test_quickstarts_are_as_long_as_their_steps() -> None:
    """Whatever the number of rows: nobody has set a number of epochs."""
    for name, steps in (("reasoning/quickstart", 30), ("sft/quickstart", 200)):
        config = compose(name)
        assert run_length(config, rows=40).steps == steps
