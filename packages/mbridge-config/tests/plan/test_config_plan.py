"""The plan of a config: its numbers, its text, its JSON, and what is said where a GPU is too small for it."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mbridge_config import HFFacts, Report, check, compose
from mbridge_config.cli.main import main
from mbridge_config.plan.memory import GIB
from mbridge_config.plan.plan import pipeline_bubble
from mbridge_config.plan.stages import make_stages

PP = "actor.model.pipeline_model_parallel_size"
FIRST = "actor.model.num_layers_in_first_pipeline_stage"
LAST = "actor.model.num_layers_in_last_pipeline_stage"
TP = "actor.model.tensor_model_parallel_size"
HF = "actor.megatron.ckpt_convertor.hf_model_path"


@pytest.fixture
def words(yaml: Path, real_model: Callable[[str], Path]) -> Callable[..., list[str]]:
    """`words("qwen2.5-7b", "key=value", ...)`: arguments of a command on the good config with that model."""

    def make(name: str, *more: str) -> list[str]:
        model = real_model(name)
        given = (f"{HF}={model}", f"actor.tokenizer.tokenizer_model={model}", "runner.seq_length=2048")
        return ["run", "--config-path", str(yaml), *given, *more]

    return make


@pytest.mark.parametrize(
    ("stages", "micro_batches", "share"),
    [(1, 8, 0.0), (4, 12, 3 / 15), (8, 1, 7 / 8)],
)
def test_bubble(stages: int, micro_batches: int, share: float) -> None:
    assert pipeline_bubble(stages, micro_batches) == pytest.approx(share)


def test_bubble_is_the_share_of_an_ideal_schedule() -> None:
    """Counted in a schedule where each pass takes one unit and needs its neighbour's: 1F1B's makespan."""
    stages, micro_batches = 3, 5
    ends: dict[tuple[str, int, int], int] = {}
    orders = []
    for stage in range(stages):
        ahead = min(stages - stage - 1, micro_batches)
        order = [("forward", number) for number in range(ahead)]
        for number in range(micro_batches):
            if number + ahead < micro_batches:
                order.append(("forward", number + ahead))
            order.append(("backward", number))
        orders.append(order)
    clocks, positions = [0] * stages, [0] * stages
    while any(position < len(order) for position, order in zip(positions, orders, strict=True)):
        for stage in range(stages):
            if positions[stage] == len(orders[stage]):
                continue
            kind, number = orders[stage][positions[stage]]
            before = stage - 1 if kind == "forward" else stage + 1
            if 0 <= before < stages and (kind, before, number) not in ends:
                continue
            start = max(clocks[stage], ends.get((kind, before, number), 0))
            clocks[stage] = ends[kind, stage, number] = start + 1
            positions[stage] += 1
    makespan = max(clocks)
    assert pipeline_bubble(stages, micro_batches) == pytest.approx(1 - 2 * micro_batches / makespan)


def test_what_stages_hold(real_facts: Callable[[str], HFFacts]) -> None:
    (only,) = make_stages((28,), real_facts("qwen2.5-7b"))
    assert str(only) == "embedding, layers 0-27, norm, output layer"
    tied = [str(stage) for stage in make_stages((14, 14), real_facts("qwen2.5-1.5b"))]
    assert tied == ["embedding, layers 0-13", "layers 14-27, norm, output layer (a copy of the embedding's weights)"]


def test_plan_of_a_pipeline(checked: Callable[..., Report]) -> None:
    plan = checked(f"{PP}=2", f"{TP}=2", world_size=8).plan
    assert plan is not None
    assert [stage.first_layer for stage in plan.stages] == [0, 3]
    assert plan.max_tokens_per_step == 64 * 256
    assert (plan.micro_batches, plan.pipeline_bubble) == (16, pytest.approx(1 / 17))
    assert plan.peak is not None and plan.peak.stage == max((0, 1), key=lambda stage: plan.memory[stage].peak)
    dynamic = ["runner.enable_dynamic_batch_size=true", "runner.max_tokens_per_mbs=600"]
    plan = checked(f"{PP}=2", *dynamic, world_size=8).plan
    assert plan is not None and plan.micro_batches is None
    assert plan.micro_batches_of_longest == 8, "64 sequences on 4 ranks, two of 256 tokens in 600"
    assert "pipeline bubble    11.1% of a step, more where sequences are shorter" in str(plan)


def test_memory_of_stages_whose_ends_are_given(checked: Callable[..., Report]) -> None:
    """A layer of the good model has 4 projections of width 96 by 96, 16, 16 and 96, their biases, the MLP and norms."""
    layer = 96 * (96 + 16 + 16 + 96) + (96 + 16 + 16) + 3 * 96 * 168 + 2 * 96
    rows = 256 * 96  # the vocabulary of 211, padded
    plan = checked(f"{PP}=3", f"{FIRST}=1", f"{LAST}=2").plan
    assert plan is not None and plan.layers_per_stage == (1, 3, 2)
    assert [stage.parameters for stage in plan.memory] == [layer + rows, 3 * layer, 2 * layer + 96 + rows]
    assert [str(stage) for stage in plan.stages][1] == "layers 1-3"
    assert "of a step if all stages take equally long\n" in str(plan)
    # in flight are 3, 2 and 1 micro-batches
    kept = [stage.activations for stage in plan.memory]
    assert kept[1] == 3 * 2 / 3 * kept[0]


def test_plan_without_a_known_model(checked: Callable[..., Report], make_model: Any, tmp_path: Path) -> None:
    plan = checked(f"{HF}=nowhere").plan
    assert plan is not None and plan.parameters is None and plan.memory == () and plan.stages == ()
    assert "memory a rank      not estimated: the model is not known" in str(plan)
    other = make_model(tmp_path / "other", model_type="deepseek_v3")
    plan = checked(f"{HF}={other}").plan
    assert plan is not None and "not estimated: this architecture is not counted" in str(plan)
    huge = checked(f"runner.seq_length={2**63 - 1}").plan
    assert huge is not None and huge.peak is not None and huge.peak.peak > 2**60


def test_json_has_all_of_the_plan(words: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    main(["check", *words("qwen2.5-7b", f"{PP}=2"), "--world-size", "8", "--json"])
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert plan["parameters"] == plan["active_parameters"] == 7_615_616_512
    assert [stage["layers"] for stage in plan["stages"]] == [14, 14]
    assert [stage["output"] for stage in plan["stages"]] == [None, "own"]
    assert plan["pipeline_bubble"] == pytest.approx(1 / 9) and plan["context_parallel"] == 1
    for stage in plan["memory"]:
        terms = ("weights", "gradients", "optimizer", "rollout_weights", "activations", "logits", "working")
        assert stage["peak"] == sum(stage[name] for name in terms)
        assert stage["largest"] == "optimizer" or stage["largest"] in terms


def test_memory_that_is_enough(words: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", *words("qwen2.5-1.5b"), "--world-size", "8", "--memory", "80"]) == 0
    assert " of 80 GiB, 90% of which may be planned" in capsys.readouterr().out


@pytest.mark.parametrize("dynamic", [False, True])
def test_memory_that_is_not(
    words: Callable[..., list[str]], capsys: pytest.CaptureFixture[str], yaml: Path, dynamic: bool
) -> None:
    """The printed fix, given as arguments, corrects the config."""
    settings = ["actor.micro_batch_size=8"]
    if dynamic:
        settings = ["runner.enable_dynamic_batch_size=true", "runner.max_tokens_per_mbs=32768"]
    arguments = words("qwen2.5-7b", *settings)
    assert main(["check", *arguments, "--world-size", "8", "--memory", "80"]) == 2
    output = capsys.readouterr().out
    assert "error[gpu-memory] a rank takes about" in output and "the largest term is activations" in output
    (fix,) = [line.partition("fix: set ")[2] for line in output.splitlines() if "fix: set " in line]
    mended = [*arguments, *shlex.split(fix.rpartition(": about")[0])]
    assert main(["check", *mended, "--world-size", "8", "--memory", "80"]) == 0
    report = check(compose("run", yaml, mended[3:]), 8)
    assert report.plan is not None and report.plan.peak is not None and report.plan.peak.peak < 72 * GIB


def test_memory_that_nothing_mends(words: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", *words("qwen2.5-32b"), "--world-size", "2", "--memory", "80", "--json"]) == 2
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert problem["id"] == "gpu-memory" and "the largest term is optimizer" in problem["reason"]
    assert "nothing fits 2 GPUs of 80 GiB" in problem["fix"]


@pytest.mark.parametrize("size", ["0", "-1", "inf", "nan", "much"])
def test_no_memory_size(words: Callable[..., list[str]], capsys: pytest.CaptureFixture[str], size: str) -> None:
    assert main(["check", *words("qwen2.5-7b"), f"--memory={size}"]) == 2
    assert f"{size} is no size of a GPU's memory" in capsys.readouterr().err
