"""Composition: defaults, overrides, types, spellings, places."""

import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from mbridge_config import ConfigError, ReasoningConfig, Severity, check, compose, key_table
from mbridge_config.compat.keys import value_of
from mbridge_config.load.compose import from_tree
from mbridge_config.schema.keys import filled
from mbridge_config.schema.provenance import Provenance
from mbridge_config.schema.run_kinds import SCHEMAS

Composed = Callable[..., ReasoningConfig]


def ids(error: pytest.ExceptionInfo[ConfigError]) -> list[str]:
    return [problem.id for problem in error.value.problems]


def test_values_and_defaults(composed: Composed) -> None:
    config = composed()
    assert config.runner.seq_length == 256
    assert config.actor.optim.adam_beta2 == 0.999
    # what the file leaves null follows from what it sets
    assert config.algorithm.sampling_params.max_new_tokens == 192
    assert config.actor.global_batch_size == 64
    assert (config.algorithm.clip_ratio_low, config.algorithm.clip_ratio_high) == (0.2, 0.2)
    assert config.runner.logger.log_path == "results/default"
    assert (config.actor.optim.bf16, config.actor.optim.fp16) == (True, False)


@pytest.mark.parametrize("sign", ["", "+", "++"])
@pytest.mark.parametrize("key", ["runner.max_steps", "actor.micro_batch_size"], ids=["not in the file", "in the file"])
def test_every_sign_sets_a_key(composed: Composed, sign: str, key: str) -> None:
    section, name = key.split(".")
    assert getattr(getattr(composed(f"{sign}{key}=4"), section), name) == 4


def test_mbridge_switch_of_the_command_line(composed: Composed) -> None:
    assert composed("+actor.megatron.mbridge=True").actor.megatron.mbridge is True


def test_deleting_a_key_restores_its_default(composed: Composed) -> None:
    config = composed("~algorithm.group_size")
    assert config.algorithm.group_size == 8
    assert not config.provenance.was_set("algorithm.group_size")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("actor.model.precision=32", "fp32"),
        ("actor.model.precision=bf16-mixed", "bf16"),
        ("actor.model.precision=FP16", "fp16"),
    ],
)
def test_precision_spellings(composed: Composed, override: str, expected: str) -> None:
    assert composed(override).actor.model.precision == expected


@pytest.mark.parametrize(("spelling", "expected"), [("kl", "k1"), ("abs", "abs"), ("mse", "k2"), ("low_var_kl", "k3")])
def test_penalty_spellings(composed: Composed, spelling: str, expected: str) -> None:
    assert composed(f"algorithm.kl_penalty_type={spelling}").algorithm.kl_penalty_type == expected


def test_other_spellings_reach_their_key(yaml: Path) -> None:
    text = (yaml / "run.yaml").read_text().replace("  micro_batch_size: 2\n", "  checkpoint_load_path: there\n")
    text += "rollout:\n  model_dir: here\n"
    text = text.replace(
        "algorithm:\n", "algorithm:\n  training_batch_size_per_gpu: 8\n  sampling_params:\n    do_sample: false\n"
    )
    (yaml / "old.yaml").write_text(text)
    config = compose("old", yaml)
    assert config.actor.micro_batch_size == 8
    assert config.algorithm.sampling_params.use_greedy is True
    assert config.rollout.model.model_path == "here"
    assert config.actor.model.megatron_checkpoint == "there"


def test_conflicting_spellings(composed: Composed) -> None:
    with pytest.raises(ConfigError) as error:
        composed("algorithm.training_batch_size_per_gpu=8", "actor.micro_batch_size=2")
    assert ids(error) == ["alias-conflict"]
    assert "actor.micro_batch_size, which is 2 at command line" in str(error.value)


def test_spelling_on_the_command_line_wins_over_the_file(yaml: Path) -> None:
    """As it does for one key; so what `fit` proposes can be typed after a file with the other spelling."""
    assert compose("run", yaml, ["algorithm.training_batch_size_per_gpu=8"]).actor.micro_batch_size == 8
    ends = "  model: {decoder_first_pipeline_num_layers: 4, decoder_last_pipeline_num_layers: 1}\n"
    text = (yaml / "run.yaml").read_text()
    (yaml / "ends.yaml").write_text(text.replace("  micro_batch_size: 2\n", ends))
    model = compose("ends", yaml, ["actor.model.num_layers_in_first_pipeline_stage=null"]).actor.model
    assert (model.num_layers_in_first_pipeline_stage, model.num_layers_in_last_pipeline_stage) == (None, 1)


def test_spelling_out_of_range(composed: Composed) -> None:
    with pytest.raises(ConfigError, match=r"training_batch_size_per_gpu = 0: less than 1"):
        composed("algorithm.training_batch_size_per_gpu=0")


def test_a_section_that_is_none_is_one_mistake(yaml: Path) -> None:
    """Rules that read its keys are silent: these have their defaults."""
    (problem,) = check(compose("run", yaml, ["actor=5"], strict=False), 3).errors
    assert (problem.id, problem.key) == ("wrong-type", "actor")


def test_place_of_a_section_that_an_argument_makes(yaml: Path) -> None:
    (problem,) = compose("run", yaml, ["+bar.baz.qux=2"], strict=False).provenance.problems
    assert problem.key == "bar" and str(problem.where) == "command line: +bar.baz.qux=2"


def test_each_wrong_interpolation_is_told(yaml: Path) -> None:
    """Of a chain, only the end is reported; of two independent mistakes, both are."""
    wrong = ["actor.seed=${nothing.here}", "runner.max_epochs=${nothing.here}", "runner.max_steps=${actor.seed}"]
    problems = compose("run", yaml, wrong, strict=False).provenance.problems
    assert {problem.key for problem in problems} == {"actor.seed", "runner.max_epochs"}


def test_one_path_is_a_list_of_one(composed: Composed) -> None:
    assert composed("data.train_data_paths=a.jsonl").data.train_data_paths == ["a.jsonl"]


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("actor.optim.learning_rate=1", None),
        ("actor.optim.weigth_decay=1", "actor.optim.weight_decay"),
        ("actor.weight_decay=1", "actor.optim.weight_decay"),
        ("actor.model.tensor_parallel_size=2", "actor.model.tensor_model_parallel_size"),
        ("algoritm.group_size=2", "algorithm"),
        ("runner.loger.log_path=x", "runner.logger"),
        ("actor.bogus=1", None),
        ("actor.megatron.microbatch_size=1", "actor.micro_batch_size"),
        ("max_steps=1", "runner.max_steps"),
        ("runner.eval_interval=1", "runner.val_check_interval"),
        ("algorithm.sampling_params.temprature=1", "algorithm.sampling_params.temperature"),
        ("algorithm.sampling_params.topk=1", "algorithm.sampling_params.top_k"),
        ("algorithm.max_new_tokens=1", "algorithm.sampling_params.max_new_tokens"),
    ],
)
def test_unknown_key_names_the_nearest(composed: Composed, override: str, nearest: str | None) -> None:
    with pytest.raises(ConfigError) as error:
        composed(override)
    (problem,) = error.value.problems
    assert problem.id == "unknown-key"
    assert problem.fix.startswith(f"did you mean {nearest}?") if nearest else problem.fix


@pytest.mark.parametrize(
    "override",
    [
        "runner.log_interval=5",  # not runner.save_interval
        "algorithm.ratio_clip_max=1",  # not algorithm.ratio_clip_eps
        "algorithm.gamma_decay=1",  # not a key without effect
        "algorithm.max_prompt_length_low=1",
        "rollout.type=x",  # not data.type
        "reward.seed=1",  # not data.seed
        "actor.model.lora_rank=8",  # not num_layers or the like
        "actor.optim.muon_momentum=1",
        "data.image_keys_max=1",
        "actor.model.num_attention_sinks=1",  # not num_attention_heads
    ],
)
def test_strangers_are_not_proposed(composed: Composed, override: str) -> None:
    with pytest.raises(ConfigError) as error:
        composed(override)
    (problem,) = error.value.problems
    assert (problem.id, problem.fix) == ("unknown-key", "remove it; docs/configuration.md has all keys")


@pytest.mark.parametrize(
    ("override", "identity", "text"),
    [
        ("runner.seq_length=long", "wrong-type", "integer is expected"),
        ("runner.seq_length=long", "wrong-type", "fix: write an integer, without quotes"),
        ("runner.seq_length=1e30", "out-of-range", "too large"),
        ("runner.seq_length=true", "wrong-type", "integer is expected"),
        ("runner.seq_length=2.5", "wrong-type", "integer is expected"),
        ("runner.seq_length=null", "wrong-type", "null is not allowed"),
        ("runner.seq_length=1", "out-of-range", "less than 2"),
        ("actor=3", "wrong-type", "a section of keys is expected"),
        ("runner.seq_length={a: 1}", "wrong-type", "integer is expected"),
        ("actor.optim.lr='1e-6'", "wrong-type", "number is expected"),
        (f"runner.seq_length=1{'0' * 400}", "out-of-range", "too large"),
        (f"actor.optim.lr=1{'0' * 400}", "out-of-range", "too large"),
        ("actor.optim.lr=nan", "out-of-range", "finite"),
        ("actor.offload_grad=1", "wrong-type", "true | false is expected"),
        ("algorithm.sampling_params.top_p=1.5", "out-of-range", "more than 1"),
        ("algorithm.sampling_params.temperature=0", "out-of-range", "not above 0"),
        ("algorithm.loss_agg_func=token_mean", "wrong-value", "did you mean token-mean?"),
        ("algorithm.adv_type=gae", "refused-value", "PPO with a critic"),
        ("actor.model.is_lora=true", "refused-value", "LoRA"),
        ("runner.logger.logger_backends=[wand]", "wrong-value", "did you mean wandb?"),
        ("runner.experiment_name=${runner.nothing}", "interpolation", "not found"),
        ("runner.experiment_name=${runner.experiment_name}", "interpolation", "leads back to itself"),
        ("runner.seq_length=${subtract:4,x}", "interpolation", "subtract takes numbers"),
        (
            "runner.experiment_name=${oc.env:MBRIDGE_UNSET}",
            "interpolation",
            "set the environment variable MBRIDGE_UNSET",
        ),
        ("runner.experiment_name=???", "missing-value", "add runner.experiment_name=..."),
        ("runner.max_steps=1,2", "override-syntax", "the argument cannot be used"),
        ("runner.max_steps", "override-syntax", "not a key=value argument"),
        ("=3", "override-syntax", "the argument cannot be used"),
    ],
)
def test_wrong_values(composed: Composed, override: str, identity: str, text: str) -> None:
    with pytest.raises(ConfigError) as error:
        composed(override)
    assert identity in ids(error)
    assert text in str(error.value)
    assert f"command line: {override}" in str(error.value)


def test_all_mistakes_at_once(composed: Composed) -> None:
    with pytest.raises(ConfigError) as error:
        composed(
            "runner.seq_length=long", "actor.nothing=1", "algorithm.group_size=0", "rollout.gpu_memory_utilization=0.5"
        )
    assert sorted(ids(error)) == ["no-effect", "out-of-range", "unknown-key", "wrong-type"]
    assert error.value.problems[-1].severity is Severity.NOTE, "errors come first"
    assert str(error.value).endswith("3 errors in the config")


def test_missing_value_is_reported_once(yaml: Path) -> None:
    (yaml / "run.yaml").write_text("""\
rollout: {model: {model_path: '???'}}
actor:
  tokenizer: {tokenizer_model: "${rollout.model.model_path}"}
  megatron: {ckpt_convertor: {hf_model_path: "${rollout.model.model_path}"}}
""")
    with pytest.raises(ConfigError) as error:
        compose("run", yaml)
    (problem,) = error.value.problems
    assert (problem.id, problem.key) == ("missing-value", "rollout.model.model_path")


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("${subtract:10,3}", 7),
        ("${add:1,2,3}", 6),
        ("${multiply:${algorithm.group_size},4}", 16),
        ("${divide:12,4}", 3),
        ("${int_div:13,4}", 3),
        ("${max:3,9}", 9),
    ],
)
def test_arithmetic(composed: Composed, expression: str, value: int) -> None:
    assert composed(f"runner.max_steps='{expression}'").runner.max_steps == value


def test_number_formats_of_torch(composed: Composed) -> None:
    assert composed("actor.model.precision='${torch.dtype:float16}'").actor.model.precision == "fp16"


def test_negation(composed: Composed) -> None:
    config = composed(
        "algorithm.recompute_logprobs=false", "rollout.return_logprobs='${not:${algorithm.recompute_logprobs}}'"
    )
    assert value_of(config, "rollout.return_logprobs") is True


def test_interpolation_of_a_default(composed: Composed) -> None:
    assert composed("runner.experiment_name=seed-${actor.seed}").runner.experiment_name == "seed-1234"


def test_places(composed: Composed, yaml: Path) -> None:
    origin = composed("algorithm.group_size=2").provenance
    file = yaml / "run.yaml"
    line = file.read_text().splitlines().index("    tokenizer_model: " + str(yaml.parent / "model")) + 1
    assert str(origin.where("actor.tokenizer.tokenizer_model")).endswith(f"run.yaml:{line}")
    assert str(origin.where("algorithm.group_size")) == "command line: algorithm.group_size=2"
    assert not origin.was_set("actor.optim.lr")


def test_defaults_list_in_nested_folders(yaml: Path) -> None:
    (yaml / "optimizer").mkdir()
    (yaml / "optimizer" / "fast.yaml").write_text("# @package actor.optim\nlr: 0.5\nbogus: 1\n")
    (yaml / "math").mkdir()
    (yaml / "math" / "base.yaml").write_text("runner:\n  max_steps: 7\n  seq_length: 128\n")
    (yaml / "math" / "nested.yaml").write_text(
        "defaults:\n  - base\n  - /optimizer: fast\n  - _self_\n  - override hydra/job_logging: stdout\n"
        "hydra:\n  run:\n    dir: .\n  output_subdir: null\nrunner:\n  seq_length: 64\n"
    )
    config = compose("nested", yaml, strict=False)
    assert (config.runner.max_steps, config.runner.seq_length, config.actor.optim.lr) == (7, 64, 0.5)
    (problem,) = config.provenance.problems
    assert problem.key == "actor.optim.bogus"
    assert str(problem.where).endswith("optimizer/fast.yaml:3"), problem.where
    assert str(config.provenance.where("runner.max_steps")).endswith("math/base.yaml:2")
    assert str(config.provenance.where("runner.seq_length")).endswith("math/nested.yaml:11")


def test_names(yaml: Path) -> None:
    (yaml / "math").mkdir()
    (yaml / "math" / "other.yaml").write_text("runner:\n  max_steps: 3\n")
    assert compose("math/other", yaml).runner.max_steps == 3
    assert compose("other", yaml).runner.max_steps == 3
    assert compose("other.yaml", yaml).runner.max_steps == 3
    assert compose(str(yaml / "math" / "other.yaml")).runner.max_steps == 3
    with pytest.raises(ConfigError, match="available, nearest first: math/other, run"):
        compose("othr", yaml)
    (yaml / "code").mkdir()
    (yaml / "code" / "other.yaml").write_text("")
    with pytest.raises(ConfigError, match="use one of code/other, math/other"):
        compose("other", yaml)
    with pytest.raises(ConfigError, match="there is no such directory"):
        compose("run", yaml / "nowhere")


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("runner:\n  a: [1\nb: 2\n", 3, "not valid YAML.*while parsing a flow sequence that starts in line 2"),
        ("- 1\n- 2\n", 1, "holds no keys"),
        ("runner: {seq_length: 8}\nrunner: {seq_length: 9}\n", 2, "duplicate key"),
        ("a: \x07\n", None, "cannot be read"),
    ],
)
def test_broken_files(yaml: Path, text: str, line: int | None, reason: str) -> None:
    (yaml / "run.yaml").write_text(text)
    with pytest.raises(ConfigError, match=reason) as error:
        compose("run", yaml)
    assert error.value.problems[0].id == "yaml-syntax"
    where = error.value.problems[0].where
    assert where is not None and where.line == line


def test_missing_default_file(yaml: Path) -> None:
    (yaml / "run.yaml").write_text("defaults:\n  - nothing_here\n")
    with pytest.raises(ConfigError, match="nothing_here") as error:
        compose("run", yaml)
    assert ids(error) == ["compose-failed"]
    (problem,) = error.value.problems
    assert str(problem.where).endswith("run.yaml:1") and "search path" not in problem.reason


def test_empty_file_is_all_defaults(yaml: Path) -> None:
    (yaml / "run.yaml").write_text("")
    assert compose("run", yaml).runner.seq_length == ReasoningConfig().runner.seq_length == 2048


def test_config_travels_to_other_processes(composed: Composed) -> None:
    config = composed()
    copy = pickle.loads(pickle.dumps(config))
    assert copy == config
    assert copy.provenance.places == config.provenance.places


@pytest.mark.parametrize("kind", SCHEMAS)
def test_what_stands_for_null_is_filled_in(kind: str) -> None:
    """A key whose doc says `null: other.key.` has that key's value once composed, so that nobody else resolves it."""
    config = from_tree({"runner": {"task_type": kind}, "actor": {"optim": {"lr": 3e-4}}}, Provenance(), SCHEMAS[kind])
    keys = {info.path: info for info in key_table(SCHEMAS[kind])}
    filled_in = 0
    for path, info in keys.items():
        section, match = path.rpartition(".")[0], re.search(r"null: `?([a-z_.]+)`?\.( |$)", info.spec.doc)
        if match is None or info.default is not None:
            continue
        places = [f"{prefix}{match[1]}" for prefix in (f"{section}.", f"{section.rpartition('.')[0]}.", "")]
        if (source := next((place for place in places if place in keys), None)) is not None:
            assert value_of(config, path) == value_of(config, source), f"{path} is {source} if null"
            filled_in += 1
    assert filled_in >= 5


def test_a_null_that_nobody_filled_in_is_an_error() -> None:
    assert filled(0.0) == 0.0
    with pytest.raises(ValueError, match="compose the config"):
        filled(ReasoningConfig().algorithm.clip_ratio_low)
