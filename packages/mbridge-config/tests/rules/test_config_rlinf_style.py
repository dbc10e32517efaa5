"""YAML files with the keys, interpolations and resolvers of RLinf's Megatron configs load as they are.

`rlinf_style/NAME.txt` is all that is said about `rlinf_style/NAME.yaml`. The models are those that the files are
about, by their config.json alone.
"""

import functools
import json
import os
from pathlib import Path

import pytest

from mbridge_config import Problem, ReasoningConfig, Report, RunConfig, SFTConfig, check, compose
from mbridge_config.compat.keys import known_keys, value_of
from mbridge_config.load.compose import from_tree
from mbridge_config.schema.keys import Status
from mbridge_config.schema.provenance import Provenance
from mbridge_config.schema.runner import OTHER_TASKS

CONFIGS = Path(__file__).parents[1] / "rlinf_style"
MODELS = json.loads((CONFIGS / "models.json").read_text())
RANKS = {
    "qwen2.5-1.5b-grpo-megatron": 16,
    "qwen2.5-1.5b-grpo-megatron-dynamic": 8,
    "qwen2.5-7b-grpo-megatron": 16,
    "qwen2.5-32b-grpo-megatron": 128,
    "qwen2.5-1.5b-ppo-megatron": 16,
    "qwen2.5-1.5b-reinpp-megatron": 16,
    "qwen3-30b-grpo-megatron": 16,
    "moonlight-16b-grpo-megatron": 8,
    "qwen2_5_vl_megatron_sft_vlm": 8,
    "qwen3_vl_moe_megatron_sft_vlm": 16,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the configs, and the models and data that they name."""
    root = tmp_path_factory.mktemp("rlinf_style")
    for name, config in MODELS.items():
        directory = root / "models" / name
        directory.mkdir(parents=True)
        (directory / "config.json").write_text(json.dumps(config))
        (directory / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0, "b": 1}}}')
        (directory / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    (root / "data" / "robots").mkdir(parents=True)
    (root / "data" / "robots" / "part.parquet").touch()
    (root / "data" / "made_up.jsonl").touch()
    (root / "rlinf_style").symlink_to(CONFIGS)
    return root


@pytest.fixture(autouse=True)
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


@functools.cache
def load(name: str, *overrides: str) -> tuple[RunConfig, Report]:
    config = compose(name, "rlinf_style", overrides, strict=False)
    return config, check(config, RANKS[name])


def test_every_file_has_its_ranks() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(RANKS)


@pytest.mark.parametrize("name", RANKS)
def test_all_that_is_said(name: str) -> None:
    _, report = load(name)
    said = str(report).replace(f"{CONFIGS}/", "") + "\n"
    golden = CONFIGS / f"{name}.txt"
    if os.environ.get("MBRIDGE_WRITE_GOLDEN"):
        golden.write_text(said)
    assert said == golden.read_text()


@pytest.mark.parametrize("name", RANKS)
def test_each_key_is_honoured_or_named(name: str) -> None:
    config, report = load(name)
    keys = known_keys(type(config))
    named: dict[str | None, list[Problem]] = {}
    for problem in report.problems:
        named.setdefault(problem.key, []).append(problem)
    for path, info in keys.items():
        if info.spec.status is not Status.NO_EFFECT or not config.provenance.was_set(path):
            continue
        notes = [problem for problem in named.get(path, []) if problem.id == "no-effect"]
        assert len(notes) == (value_of(config, path) not in (None, {})), f"{path}: said once, unless it is empty"
    lines = str(report).splitlines()
    reasons = [line.partition(": ")[2] for line in lines if line.startswith("note[no-effect]")]
    assert len(reasons) == len(set(reasons)), "one line a reason"
    assert not [problem for problem in report.problems if problem.id in ("unknown-key", "wrong-type", "interpolation")]


@pytest.mark.parametrize("name", ["qwen2.5-1.5b-grpo-megatron", "qwen2_5_vl_megatron_sft_vlm"])
def test_the_switch_of_the_command_line(name: str) -> None:
    _, report = load(name)
    config, switched = load(name, "+actor.megatron.mbridge=True")
    assert config.actor.megatron.mbridge is True
    assert [str(problem) for problem in switched.problems] == [str(problem) for problem in report.problems]


def test_values() -> None:
    config, report = load("qwen2.5-1.5b-grpo-megatron")
    assert report.errors == []
    assert config.runner.experiment_name == "2node-4*16-0.5"
    algorithm = config.algorithm
    assert (algorithm.sampling_params.max_new_tokens, algorithm.sampling_params.use_greedy) == (384, False)
    assert (algorithm.clip_ratio_low, algorithm.clip_ratio_high, algorithm.kl_penalty_type) == (0.2, 0.25, "k3")
    assert config.actor.micro_batch_size == 2 and value_of(config, "rollout.return_logprobs") is False
    assert report.plan is not None
    assert (report.plan.tensor_parallel, report.plan.data_parallel, report.plan.micro_batches) == (2, 8, 2)


def test_values_by_resolvers() -> None:
    config, _ = load("qwen2.5-1.5b-grpo-megatron-dynamic")
    assert (config.runner.max_tokens_per_mbs, config.runner.experiment_name) == (2048, "dynamic-2048")
    assert config.algorithm.sampling_params.max_new_tokens == 300
    assert value_of(config, "inference")["model"]["tensor_model_parallel_size"] == 1
    config, _ = load("qwen2.5-7b-grpo-megatron")
    assert value_of(config, "rollout.return_logprobs") is True and config.algorithm.sampling_params.use_greedy is False
    assert value_of(config, "actor.model.share_embeddings_and_output_weights") is False
    config, _ = load("qwen2.5-32b-grpo-megatron")
    assert config.actor.model.pipeline_model_parallel_size == 4 and config.actor.model.backend == "te"
    assert config.runner.checkpoint.async_save is True
    config, _ = load("qwen2_5_vl_megatron_sft_vlm")
    assert isinstance(config, SFTConfig)
    assert (config.runner.seq_length, config.actor.lr_sched.lr_decay_iters) == (1024, 40)
    assert config.data.val_data_paths == ["data/robots"] and config.data.dataset_name == "robo2vlm"


REFUSED = {
    "actor.training_backend=fsdp": "mbridge trains with Megatron-Core",
    "actor.model.is_lora=true": "LoRA is not in this version",
    "actor.megatron.use_torch_fsdp2=true": "mbridge trains with Megatron-Core's distributed optimizer",
    "actor.megatron.finetune=true": "a checkpoint holds the whole state, and a resumed run goes on with all of it",
    "actor.megatron.skip_train=true": "a run trains; only SFT can evaluate alone, with runner.only_eval",
    "reward.use_reward_model=true": "reward models are not in this version",
    "algorithm.importance_sampling_fix=true": "not in this version",
    "runner.task_type=embodied": "embodied agents are not trained by mbridge",
}


def test_what_this_version_has_not_is_refused() -> None:
    _, report = load("qwen2.5-1.5b-grpo-megatron", *REFUSED)
    found = {str(problem.where).removeprefix("command line: "): problem.reason for problem in report.errors}
    assert found == REFUSED
    assert {problem.id for problem in report.errors} == {"refused-value"}


@pytest.mark.parametrize("task", [*OTHER_TASKS, "seach"])
def test_other_tasks(task: str) -> None:
    origin = Provenance()
    from_tree({"runner": {"task_type": task}}, origin, ReasoningConfig, strict=False)
    (problem,) = origin.problems
    assert (problem.id, problem.reason) == (
        ("refused-value", OTHER_TASKS[task]) if task in OTHER_TASKS else ("wrong-value", problem.reason)
    )
