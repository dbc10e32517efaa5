"""The documented status of a key is its behavior: a key is honoured or refused, never both."""

import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mbridge_config import KeyInfo, Report, Status, check, key_table
from mbridge_config.facts.directories import REASONING_KEY, SFT_KEY
from mbridge_config.load.compose import from_tree
from mbridge_config.schema.provenance import Provenance
from mbridge_config.schema.run_kinds import SCHEMAS, schema_of

PP = "actor.model.pipeline_model_parallel_size"
COMPANIONS: dict[str, dict[str, Any]] = {
    "actor.optim.fp16": {"actor.model.precision": "fp16"},
    "actor.optim.bf16": {"actor.model.precision": "fp32"},
    "actor.optim.overlap_param_gather": {"actor.optim.overlap_grad_reduce": True},
    "actor.lr_sched.lr_decay_style": {"actor.lr_sched.lr_wsd_decay_iters": 2},
    "actor.model.recompute_granularity": {
        "actor.model.recompute_method": "uniform",
        "actor.model.recompute_num_layers": 1,
    },
    "actor.model.num_layers_in_first_pipeline_stage": {PP: 2},
    "actor.model.num_layers_in_last_pipeline_stage": {PP: 2},
    "actor.model.seq_length": {"runner.seq_length": 128},
    "actor.megatron.use_hf_ckpt": {"runner.resume_dir": "auto"},
    "actor.megatron.mbridge": {"actor.megatron.use_hf_ckpt": False, "runner.resume_dir": "auto"},
    "reward.reward_type": {"data.type": "reasoning_gym"},
}
"""Keys that need others beside them, as the messages of their rules say."""

EQUAL = {"actor.lr_sched.end_weight_decay": "actor.lr_sched.start_weight_decay"}
"""Keys that must have the value of another."""

CHOOSES_THE_KIND = "runner.task_type"
"""Its other value makes a run of another kind, which reads its model from another key."""


def values_of(hint: Any) -> Iterator[Any]:
    """A few values of the type; none for text and sections, whose values are names of things that must exist."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        for part in typing.get_args(hint):
            yield from values_of(part)
    elif typing.get_origin(hint) is typing.Literal:
        yield from typing.get_args(hint)
    elif typing.get_origin(hint) is list:
        yield from ([value] for value in values_of(typing.get_args(hint)[0]))
    elif hint is bool:
        yield from (False, True)
    elif hint is int:
        yield from (2, 3, 4, 64, 128, 512)
    elif hint is float:
        yield from (2.0, 0.5, 1e-3, 1e-7)


def is_legal(value: Any, info: KeyInfo) -> bool:
    spec = info.spec
    if value == info.default or isinstance(value, bool | str | list):
        return value != info.default
    return (
        (spec.minimum is None or value >= spec.minimum)
        and (spec.maximum is None or value <= spec.maximum)
        and (spec.above is None or value > spec.above)
        and (spec.below is None or value < spec.below)
    )


@pytest.fixture
def report_on(model: Path, real_model: Callable[[str], Path], tmp_path: Path) -> Callable[..., Report]:
    """`report_on("sft", {"key": value})`: what is said of a good config with these keys."""
    (tmp_path / "data.jsonl").touch()
    models = {"reasoning": model, "sft": real_model("qwen3-vl-4b")}

    def run(kind: str, keys: dict[str, Any]) -> Report:
        tree: dict[str, Any] = {}
        good: dict[str, Any] = {
            "runner.task_type": kind,
            "runner.seq_length": 256,
            "runner.max_steps": 40,
            "runner.val_check_interval": 5,
            "data.train_data_paths": [str(tmp_path / "data.jsonl")],
            "data.val_data_paths": [str(tmp_path / "data.jsonl")],
            "actor.tokenizer.tokenizer_model": str(models[kind]),
            MODEL_KEYS[kind]: str(models[kind]),
        }
        if kind == "reasoning":
            good |= {"data.max_prompt_length": 64, "data.reasoning_gym.task": "basic_arithmetic"}
        for key, value in (good | keys).items():
            *sections, name = key.split(".")
            section = tree
            for part in sections:
                section = section.setdefault(part, {})
            section[name] = value
        return check(from_tree(tree, Provenance(), schema_of(tree), strict=False))

    return run


MODEL_KEYS = {"reasoning": REASONING_KEY, "sft": SFT_KEY}
KEYS = [(kind, info) for kind, schema in SCHEMAS.items() for info in key_table(schema)]


@pytest.mark.parametrize("kind", SCHEMAS)
def test_the_good_config_is_good(report_on: Callable[..., Report], kind: str) -> None:
    assert report_on(kind, {}).errors == []


@pytest.mark.parametrize("kind", SCHEMAS)
def test_an_honoured_key_has_a_value_that_is_accepted(report_on: Callable[..., Report], kind: str) -> None:
    """Only a value other than the default tells: the default of a key that is refused is accepted, too."""
    refused = {}
    for key_kind, info in KEYS:
        values = [value for value in values_of(info.type) if is_legal(value, info)]
        if key_kind != kind or info.spec.status is not Status.HONOURED or info.path == CHOOSES_THE_KIND or not values:
            continue
        said: list[str] = []
        for value in values:
            equal = {EQUAL[info.path]: value} if info.path in EQUAL else {}
            errors = report_on(kind, COMPANIONS.get(info.path, {}) | equal | {info.path: value}).errors
            if not errors:
                break
            said.append(f"{value}: {errors[0].key} {errors[0].reason}")
        else:
            refused[info.path] = said
    assert refused == {}


@pytest.mark.parametrize("kind", SCHEMAS)
def test_a_refused_key_has_a_value_that_is_refused(report_on: Callable[..., Report], kind: str) -> None:
    for key_kind, info in KEYS:
        if key_kind == kind and info.spec.status is Status.REFUSED:
            others = [value for value in values_of(info.type) if is_legal(value, info)]
            others += [*info.spec.refused, {"use_critic_model": True}]
            reports = [report_on(kind, {info.path: {"True": True}.get(str(value), value)}) for value in others]
            accepted = [value for value, report in zip(others, reports, strict=True) if not report.errors]
            assert not accepted, f"{info.path} says refused and takes {accepted}"
