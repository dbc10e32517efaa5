"""`check` accepts exactly the values that schedules and losses accept, so mistakes are reported before loading."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from mbridge_config import ReasoningConfig, RunConfig, SFTConfig, check, longest_run
from mbridge_config.load.compose import from_tree
from mbridge_config.schema.provenance import Provenance
from mbridge_train.build import optimizer_settings
from mbridge_train.errors import TrainError
from mbridge_train.losses.base import LossInputs
from mbridge_train.losses.policy import policy_loss

STYLES = ["constant", "cosine", "inverse-square-root", "WSD"]
WARMUPS: list[dict[str, Any]] = [
    *({"lr_warmup_iters": steps} for steps in (0, 4, 9, 10, 20)),
    *({"lr_warmup_fraction": share} for share in (0.19, 0.5, 0.99, 1.0)),
]
DECAYS = [None, 10]
LAST_DECAYS = [None, 1, 5, 8, 5000]
RUNS: dict[str, tuple[type[RunConfig], dict[str, Any]]] = {
    "sft": (SFTConfig, {"runner": {"max_steps": 10}}),
    "one step": (SFTConfig, {"runner": {"max_steps": 1}}),
    "reasoning": (ReasoningConfig, {"runner": {"max_steps": 10}}),
    "minibatches": (ReasoningConfig, {"runner": {"max_steps": 5}, "algorithm": {"n_minibatches": 2}}),
    "epochs": (
        ReasoningConfig,
        {
            "runner": {"max_steps": 50, "max_epochs": 1},
            "data": {"type": "reasoning_gym", "rollout_batch_size": 4, "reasoning_gym": {"train_size": 43}},
        },
    ),
}


def schedules() -> Iterator[dict[str, Any]]:
    for style, warmup, decay, last in itertools.product(STYLES, WARMUPS, DECAYS, LAST_DECAYS):
        yield {"lr_decay_style": style, **warmup, "lr_decay_iters": decay, "lr_wsd_decay_iters": last}


@pytest.mark.parametrize("run", RUNS)
def test_schedules(run: str) -> None:
    schema, tree = RUNS[run]
    counts = {True: 0, False: 0}
    for schedule in schedules():
        config = from_tree(tree | {"actor": {"lr_sched": schedule}}, Provenance(), schema)
        refused = [problem for problem in check(config).errors if str(problem.key).startswith("actor.lr_sched")]
        length = longest_run(config)
        assert length is not None
        fault = None
        try:
            optimizer_settings(config.actor, optimizer_steps=length.optimizer_steps)
        except TrainError as error:
            fault = error
        assert bool(refused) == bool(fault), f"{schedule}: {list(map(str, refused))}, and Schedule: {fault}"
        keys = [problem.key for problem in refused]
        assert len(keys) == len(set(keys)), f"{schedule}: one mistake is said once"
        counts[fault is None] += 1
    assert min(counts.values()) > 50, counts


@pytest.mark.parametrize("low", [None, 0.0, 1.0, 1.5])
@pytest.mark.parametrize("high", [None, -0.5, 0.0, 1.5])
@pytest.mark.parametrize("both", [0.0, 1.0, 1.5])
@pytest.mark.parametrize("dual", [None, 1.0, 1.5])
def test_clip_ranges(low: float | None, high: float | None, both: float, dual: float | None) -> None:
    """Return the same for the policy loss."""
    given = {"clip_ratio_low": low, "clip_ratio_high": high, "ratio_clip_eps": both, "clip_ratio_c": dual}
    config = from_tree({"algorithm": given}, Provenance(), ReasoningConfig, strict=False)
    refused = [problem for problem in check(config).errors if "clip" in str(problem.key)]
    # As the trainer hands them on; a value out of range is not in the config any more.
    values: list[Any] = [config.algorithm.clip_ratio_low if low is None else low]
    values += [config.algorithm.clip_ratio_high if high is None else high, dual]
    token = torch.ones(1)
    inputs = LossInputs(weights=token, outputs={"logprobs": token}, fields={"old_logprobs": token, "advantages": token})
    fault = None
    try:
        policy_loss(inputs, clip_ratio_low=values[0], clip_ratio_high=values[1], dual_clip=values[2])
    except ValueError as error:
        fault = error
    assert bool(refused) == bool(fault), f"{list(map(str, refused))}, and the loss: {fault}"


@pytest.mark.parametrize("low", [None, -20.5, -20.0, -1.0, 0.0])
@pytest.mark.parametrize("high", [None, 20.5, 20.0, 1.0, 0.0])
def test_clamp_of_the_log_ratio(low: float | None, high: float | None) -> None:
    given = {"clip_log_ratio_min": low, "clip_log_ratio_max": high}
    config = from_tree({"algorithm": given}, Provenance(), ReasoningConfig, strict=False)
    names = [problem.key for problem in check(config).errors if "clip" in str(problem.key)]
    token = torch.ones(1)
    inputs = LossInputs(weights=token, outputs={"logprobs": token}, fields={"old_logprobs": token, "advantages": token})
    fault = None
    try:
        policy_loss(inputs, clip_log_ratio_min=low, clip_log_ratio_max=high)
    except ValueError as error:
        fault = error
    assert bool(names) == bool(fault)
