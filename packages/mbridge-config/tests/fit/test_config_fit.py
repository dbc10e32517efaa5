"""Layouts that fit: all of them pass the rules and fit into memory, in a defined order, and none is lost."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from mbridge_config import ConfigError, Report, check, compose
from mbridge_config.cli.main import main
from mbridge_config.fit.fit import Fit, fit
from mbridge_config.fit.layouts import KEYS, layouts, with_values
from mbridge_config.plan.memory import GIB, USABLE
from mbridge_config.schema.run_kinds import RunConfig

HF = "actor.megatron.ckpt_convertor.hf_model_path"
Case = Callable[..., tuple[RunConfig, Report]]


@pytest.fixture
def case(yaml: Path, real_model: Callable[[str], Path]) -> Case:
    """`case("qwen2.5-7b", "key=value", ..., gpus=8)`: the good config with that model, and the report on it."""

    def make(name: str, *more: str, gpus: int = 8) -> tuple[RunConfig, Report]:
        model = real_model(name)
        given = [f"{HF}={model}", f"actor.tokenizer.tokenizer_model={model}", "runner.seq_length=4096", *more]
        config = compose("run", yaml, given, strict=False)
        return config, check(config, gpus)

    return make


def fitting(case: Case, name: str, *more: str, gpus: int = 8, memory: float = 80) -> Fit:
    config, report = case(name, *more, gpus=gpus)
    return fit(config, report, gpus, memory)


def grids(found: Fit) -> list[tuple[int, int, int]]:
    plans = [layout.plan for layout in found.fitting]
    return [(plan.tensor_parallel, plan.pipeline_parallel, plan.data_parallel) for plan in plans]


def test_every_proposal_passes_and_fits(case: Case, yaml: Path) -> None:
    config, report = case("qwen2.5-7b")
    found = fit(config, report, 8, 80)
    assert len(found.fitting) > 3
    for layout in found.fitting:
        assert layout.peak <= USABLE * 80 * GIB
        # As a user would type it: composed anew, with all rules.
        typed = [f"{key}={'null' if value is None else str(value).lower()}" for key, value in layout.changes.items()]
        model = f"{HF}={report.facts.directory}" if report.facts else ""
        tokenizer = f"actor.tokenizer.tokenizer_model=${{{HF}}}"
        again = check(compose("run", yaml, [model, tokenizer, "runner.seq_length=4096", *typed]), 8)
        assert not again.errors and again.plan is not None and again.plan.peak == layout.plan.peak


def test_order(case: Case) -> None:
    """A small model needs neither; a larger one needs recomputation, then sharing; and it is one layout a grid."""
    small = fitting(case, "qwen2.5-1.5b")
    assert grids(small)[0] == (1, 1, 8) and small.fitting[0].recomputed == 0
    assert grids(small) == sorted(grids(small)), "least tensor parallelism first, then least pipeline"
    assert len(set(grids(small))) == len(grids(small))
    middle = fitting(case, "qwen2.5-7b", "runner.max_tokens_per_mbs=4096")
    assert middle.fitting[0].plan.tensor_parallel <= 2 and middle.fitting[0].recomputed > 0
    large = fitting(case, "qwen2.5-32b", gpus=32, memory=141).fitting[0].plan
    assert large.tensor_parallel * large.pipeline_parallel > 1


def test_recomputation_goes_before_small_micro_batches(case: Case) -> None:
    config, report = case("qwen2.5-1.5b", "runner.enable_dynamic_batch_size=true")
    found = fit(config, report, 8, 32)
    first = found.fitting[0]
    assert (first.plan.tensor_parallel, first.plan.pipeline_parallel) == (1, 1)
    assert first.tokens >= 8192 and first.recomputed > 0
    rejected = [layout for layout in layouts(config, report, 8) if layout.rank < first.rank]
    assert rejected and all(layout.peak > USABLE * 32 * GIB for layout in rejected), "nothing better fits"


def test_rules_bar_layouts(case: Case) -> None:
    """28 heads and 4 groups: tensor parallelism of 8 does not divide 28."""
    config, report = case("qwen2.5-7b")
    assert {layout.plan.tensor_parallel for layout in layouts(config, report, 8)} == {1, 2, 4}
    assert {layout.plan.pipeline_parallel for layout in layouts(config, report, 8)} == {1, 2, 4}


def test_stages_of_their_own_sizes(case: Case) -> None:
    """They are kept where the number of stages allows it, and given up elsewhere."""
    first, last = "actor.model.num_layers_in_first_pipeline_stage", "actor.model.num_layers_in_last_pipeline_stage"
    config, report = case("qwen2.5-7b", "actor.model.pipeline_model_parallel_size=4", f"{first}=6", f"{last}=6")
    plans = [layout.plan for layout in fit(config, report, 8, 80).fitting]
    sizes = {plan.pipeline_parallel: plan.layers_per_stage for plan in plans}
    assert sizes == {1: (28,), 2: (14, 14), 4: (6, 8, 8, 6)}
    found = layouts(config, report, 8)
    assert {layout.plan.layers_per_stage for layout in found} == {*sizes.values(), (7, 7, 7, 7)}
    changes = [layout.changes for layout in found if layout.plan.pipeline_parallel == 2]
    assert all((change[first], change[last]) == (None, None) for change in changes)


def test_hosts(case: Case) -> None:
    config, report = case("qwen2.5-32b", gpus=16)
    found = layouts(config, report, 16)
    assert max(layout.plan.tensor_parallel for layout in found) == 8, "one host's"
    assert {(layout.values["cluster.num_nodes"], layout.values["launcher.nproc_per_node"]) for layout in found} == {
        (2, 8)
    }


def test_nothing_fits(case: Case) -> None:
    found = fitting(case, "qwen2.5-32b", gpus=2)
    assert not found.fitting and found.least is not None
    text = str(found)
    assert text.startswith("nothing fits 2 GPUs of 80 GiB (90% of which may be planned). The least is ")
    assert "the largest term is optimizer" in text and "what would help: more GPUs" in text
    none = fitting(case, "qwen2.5-7b", "data.rollout_batch_size=1", "algorithm.group_size=3", gpus=64)
    assert none.least is None and "no layout on 64 GPUs passes the rules" in str(none)


def test_unknown_models(case: Case) -> None:
    config, report = case("qwen2.5-7b", f"{HF}=nowhere")
    with pytest.raises(ConfigError, match="the model is not known, so nothing fits") as error:
        fit(config, report, 8, 80)
    assert error.value.problems[0].id == "hf-directory-missing"


def test_with_values_shares_what_is_the_same(case: Case) -> None:
    config, _ = case("qwen2.5-7b")
    changed = with_values(config, {"actor.model.sequence_parallel": True, "runner.seq_length": 7})
    assert (changed.actor.model.sequence_parallel, changed.runner.seq_length) == (True, 7)
    assert (config.actor.model.sequence_parallel, config.runner.seq_length) == (False, 4096)
    assert changed.data is config.data and changed.actor.optim is config.actor.optim


def test_command(yaml: Path, real_model: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    model = real_model("qwen2.5-7b")
    words = ["run", "--config-path", str(yaml), f"{HF}={model}", f"actor.tokenizer.tokenizer_model={model}"]
    assert main(["fit", *words, "--gpus", "8", "--memory", "80"]) == 0
    output = capsys.readouterr().out
    assert output.startswith("1. tensor ") and "most of it" in output
    arguments = next(line for line in output.splitlines() if line.startswith("   actor.") or "launcher." in line)
    assert {word.partition("=")[0] for word in shlex.split(arguments)} <= set(KEYS)
    assert main(["fit", *words, "--gpus", "8", "--memory", "80", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] and found["fitting"][0]["plan"]["world_size"] == 8 and found["fitting"][0]["reasons"]
    assert main(["fit", *words, "data.train_data_paths=[]", "--gpus", "8", "--memory", "80"]) == 2
    output = capsys.readouterr().out
    assert "error[train-data-missing]" in output and "No layout mends that" in output and "1. tensor " in output
    assert main(["fit", *words, "--gpus", "0", "--memory", "80"]) == 2
    assert "0 is no number of GPUs" in capsys.readouterr().err
