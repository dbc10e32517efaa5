"""Configs of SFT runs: schema, rules, vision-language models and how their layers stand on the pipeline stages."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mbridge_config import ConfigError, HFFacts, ReasoningConfig, Report, SFTConfig, check, compose, refuse_short_run
from mbridge_config.cli.main import main
from mbridge_config.plan.stages import stage_sizes
from mbridge_config.rules import SFT

TP = "actor.model.tensor_model_parallel_size"
PP = "actor.model.pipeline_model_parallel_size"
VISION = {"num_heads": 6, "intermediate_size": 40, "deepstack_visual_indexes": [5, 11, 17]}
Checked = Callable[..., Report]


@pytest.fixture
def vision_model(tmp_path: Path, make_model: Callable[..., Path], geometry: dict[str, Any]) -> Callable[..., Path]:
    """`vision_model(field=value, ...)` writes a Qwen3-VL of 8 layers whose text or vision part has these changes."""

    def write(text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None) -> Path:
        directory = make_model(tmp_path / "vision")
        config = {
            "architectures": ["Qwen3VLForConditionalGeneration"],
            "model_type": "qwen3_vl",
            "num_hidden_layers": 999,
            "text_config": geometry | {"model_type": "qwen3_vl_text", "num_hidden_layers": 8} | (text or {}),
            "vision_config": VISION | (vision or {}),
        }
        (directory / "config.json").write_text(json.dumps(config))
        return directory

    return write


@pytest.fixture
def sft(tmp_path: Path, vision_model: Callable[..., Path]) -> Path:
    """A directory with a good config named `tune`."""
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.parquet").write_bytes(b"PAR1")
    (tmp_path / "chats.jsonl").write_text("{}\n")
    directory = tmp_path / "sft"
    directory.mkdir()
    (directory / "tune.yaml").write_text(f"""\
runner:
  task_type: sft
  seq_length: 256
data:
  train_data_paths: {tmp_path / "train"}
  val_data_paths: [{tmp_path / "chats.jsonl"}]
actor:
  global_batch_size: 24
  micro_batch_size: 3
  model:
    model_path: {vision_model()}
""")
    return directory


@pytest.fixture
def checked(sft: Path) -> Checked:
    def run(*overrides: str, world_size: int | None = None) -> Report:
        return check(compose("tune", sft, overrides, schema=SFTConfig, strict=False), world_size)

    return run


def test_good_config(checked: Checked, sft: Path, tmp_path: Path) -> None:
    report = checked(world_size=4)
    assert report.problems == []
    config = compose("tune", sft)
    assert isinstance(config, SFTConfig), "task_type decides"
    assert config.data.train_data_paths == [str(tmp_path / "train")]
    assert config.actor.tokenizer.tokenizer_model == config.actor.model.model_path
    assert config.actor.eval_batch_size == 24
    assert report.plan is not None and report.plan.sequences_per_step == 24 and report.plan.micro_batches == 2


CASES = [
    ("task-type", ["runner.task_type=reasoning"], None, "this app trains SFT runs"),
    ("rope-fusion", ["actor.model.apply_rope_fusion=true"], None, "actor.model.apply_rope_fusion = true"),
    ("tensor-parallel-vision", [f"{TP}=4"], 4, "the vision tower's 6 attention heads cannot be shared by 4 ranks"),
    ("tensor-parallel-vision", [f"{TP}=3"], 3, "the vision tower's 40 MLP columns cannot be shared by 3 ranks"),
    (
        "freeze-without-vision",
        [f"actor.model.freeze_{part}=true" for part in ("language_model", "vision_model", "vision_projection")],
        None,
        "nothing is trained",
    ),
    ("train-data-missing", ["data.train_data_paths=[]"], None, "there is nothing to train on"),
    ("evaluation-data-missing", ["data.val_data_paths=[]", "runner.only_eval=true"], None, "nothing to evaluate on"),
    (
        "evaluation-data-missing",
        ["data.val_data_paths=[]", "runner.val_check_interval=3"],
        None,
        "val_check_interval is 3",
    ),
    ("data-path", ["data.train_data_paths=[nowhere]"], None, "there is no file or directory nowhere"),
    (
        "data-path",
        ["data.train_data_paths=[${actor.model.model_path}]"],
        None,
        "holds no .parquet file and no .jsonl file",
    ),
    ("data-path", ["data.val_data_paths=[${actor.model.model_path}/config.json]"], None, "is no .parquet file"),
    ("data-path", ["data.dataset_name=robo2vlm"], None, "chats.jsonl is no .parquet file"),
    ("data-path", ["data.dataset_name=messages"], None, "train holds no .jsonl file"),
    ("pixel-range", ["data.min_pixels=100", "data.max_pixels=99"], None, "more than data.max_pixels 99"),
    ("offload-without-turns", ["actor.offload_grad=true"], None, "SFT has no other phase"),
    ("quickstart-model", ["quickstart.enabled=true", "quickstart.num_key_value_heads=3"], None, "shared by 3 groups"),
    (
        "quickstart-model",
        ["quickstart.enabled=true", "quickstart.vision_num_heads=3"],
        None,
        "width 32 make 96",
    ),
    ("quickstart-model", ["quickstart.enabled=true", "quickstart.vision_depth=1"], None, "tower has 1 layers"),
    (
        "warmup-length",
        ["runner.max_steps=5", "actor.lr_sched.lr_warmup_iters=5", "actor.lr_sched.lr_decay_style=cosine"],
        None,
        "not shorter than the run, over which the rate decays: runner.max_steps 5",
    ),
    (
        "warmup-length",
        ["runner.max_steps=5", "actor.lr_sched.lr_wsd_decay_iters=6", "actor.lr_sched.lr_decay_style=WSD"],
        None,
        "longer than the run, over which the rate decays: runner.max_steps 5",
    ),
    (
        "schedule-lengths",
        ["actor.lr_sched.lr_warmup_fraction=1.0", "actor.lr_sched.lr_decay_style=cosine"],
        None,
        "nothing is left to decay in",
    ),
    ("global-batch-ranks", [], 16, "not a multiple of data-parallel 16"),
    ("pipeline-parallel-layers", [f"{PP}=7"], 7, "8 layers cannot be shared by 7 stages"),
    ("no-effect", ["data.lazy_loading=true"], None, "images are always decoded when they are needed"),
    ("no-effect", ["data.type=vlm"], None, "dataset_name says how files are read"),
]


@pytest.mark.parametrize(("identity", "overrides", "world_size", "text"), CASES)
def test_rule(checked: Checked, identity: str, overrides: list[str], world_size: int | None, text: str) -> None:
    report = checked(*overrides, world_size=world_size)
    found = [problem for problem in report.problems if problem.id == identity]
    assert found, f"{identity} is silent; there is: {report}"
    assert any(text in str(problem) for problem in found), str(report)


def test_rules_of_sft_are_tried_and_documented() -> None:
    own = {rule.id for rule in SFT if rule.check.__module__.rpartition(".")[2] in ("sft", "vision")}
    assert own <= {case[0] for case in CASES} | {"deepstack-layers"}
    assert all(rule.cause.endswith(".") for rule in SFT)
    assert len({rule.id for rule in SFT}) == len(SFT)


def test_a_schedule_is_checked_against_the_rows_of_the_data(sft: Path) -> None:
    """The app checks what `check` cannot know, once it has read the data."""
    given = ("actor.lr_sched.lr_decay_style=cosine", "actor.lr_sched.lr_warmup_iters=5", "runner.max_epochs=2")
    config = compose("tune", sft, given)
    assert check(config).errors == []
    refuse_short_run(config, rows=72)
    with pytest.raises(ConfigError, match=r"5 steps of actor\.global_batch_size 24 in runner\.max_epochs 2") as refused:
        refuse_short_run(config, rows=71)
    (problem,) = refused.value.problems
    assert (problem.id, problem.key) == ("warmup-length", "actor.lr_sched.lr_warmup_iters")
    assert str(problem.where) == "command line: actor.lr_sched.lr_warmup_iters=5"


def test_freezing_a_text_model(checked: Checked, model: Path) -> None:
    (problem,) = checked(f"actor.model.model_path={model}", "actor.model.freeze_vision_model=true").errors
    assert problem.id == "freeze-without-vision" and "no vision tower (Qwen2ForCausalLM)" in problem.reason


def test_the_model_under_the_key_of_reasoning(checked: Checked, model: Path) -> None:
    report = checked("actor.model.model_path=null", f"actor.megatron.ckpt_convertor.hf_model_path={model}")
    (problem,) = report.errors
    assert problem.id == "hf-path-empty" and problem.key == "actor.model.model_path"
    assert "actor.megatron.ckpt_convertor.hf_model_path is set" in problem.reason
    assert "an SFT run reads its model from actor.model.model_path" in problem.reason
    assert problem.fix == f"set actor.model.model_path={model}"


def test_only_evaluation_needs_no_training_data(checked: Checked) -> None:
    assert checked("runner.only_eval=true", "data.train_data_paths=[]").errors == []


def test_lengths_under_the_model_key(sft: Path) -> None:
    file = sft / "tune.yaml"
    file.write_text(file.read_text().replace("  seq_length: 256\n", "") + "    seq_length: 100\n")
    config = compose("tune", sft)
    assert config.runner.seq_length == config.actor.model.seq_length == 100
    assert config.runner.max_tokens_per_mbs == 100


def test_facts_of_a_vision_language_model(vision_model: Callable[..., Path]) -> None:
    facts = HFFacts.load(vision_model())
    assert (facts.num_layers, facts.num_attention_heads, facts.vocab_size) == (8, 12, 211)
    assert (facts.vision_heads, facts.vision_ffn_hidden_size) == (6, 40)
    assert facts.deepstack_visual_indexes == (5, 11, 17)


def test_deepstack_indexes_that_are_none(checked: Checked, vision_model: Callable[..., Path]) -> None:
    vision_model(vision={"deepstack_visual_indexes": [5, "x"]})
    (problem,) = checked().errors
    assert "vision_config.deepstack_visual_indexes is [5, 'x'], not a list of layer numbers" in problem.reason


def test_fewer_layers_than_deepstack_features(checked: Checked, vision_model: Callable[..., Path]) -> None:
    vision_model(text={"num_hidden_layers": 2})
    (problem,) = checked().errors
    assert problem.id == "deepstack-layers" and problem.key == "actor.model.model_path"
    assert "3 deepstack_visual_indexes" in problem.reason and "only 2 language layers" in problem.reason


@pytest.mark.parametrize(
    ("layers", "stages", "deepstack", "expected"),
    [
        (8, 2, 3, (4, 4)),
        (8, 4, 3, (3, 2, 2, 1)),
        (5, 2, 3, (3, 2)),
        (4, 4, 3, (1, 1, 1, 1)),  # the features travel
        (36, 8, 3, None),
        (36, 4, 0, (9, 9, 9, 9)),
        (3, 1, 3, (3,)),
        (5, 4, 3, None),
    ],
)
def test_layers_of_the_stages(layers: int, stages: int, deepstack: int, expected: tuple[int, ...] | None) -> None:
    assert stage_sizes(layers, stages, deepstack) == expected


@pytest.mark.parametrize(
    ("layers", "stages", "first", "last", "expected"),
    [
        (64, 4, 14, 14, (14, 18, 18, 14)),
        (7, 3, None, 3, (2, 2, 3)),
        (7, 3, 1, None, (1, 3, 3)),
        (5, 2, 4, None, (4, 1)),
        (5, 2, 4, 1, (4, 1)),
        (5, 2, 3, 1, None),
        (5, 2, 5, None, None),
        (5, 2, 6, None, None),
        (6, 3, 3, 3, None),  # nothing for the second stage
        (7, 4, 2, 2, None),
        (5, 1, 5, None, None),
        (5, 1, 2, 3, None),
    ],
)
def test_layers_of_the_stages_whose_ends_are_given(
    layers: int, stages: int, first: int | None, last: int | None, expected: tuple[int, ...] | None
) -> None:
    """Deepstack features then travel where they have to."""
    for deepstack in (0, 3):
        assert stage_sizes(layers, stages, deepstack, first=first, last=last) == expected


def test_plan_shows_layers_and_features_of_each_stage(sft: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def stages(*overrides: str) -> list[str]:
        assert main(["check", "tune", "--config-path", str(sft), *overrides]) == 0
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith(("layers", "stage"))]

    assert stages(f"{PP}=4", "actor.global_batch_size=12") == [
        "layers by stage    3, 2, 2, 1",
        "stage 0            vision tower, embedding, layers 0-2; after layers 0-2 the deepstack features 5, 11, 17",
        "stage 1            layers 3-4",
        "stage 2            layers 5-6",
        "stage 3            layer 7, norm, output layer (a copy of the embedding's weights)",
    ]
    assert stages(f"{PP}=8")[1:4] == [
        "stage 0            vision tower, embedding, layer 0; after layer 0 the deepstack features 5",
        "stage 1            layer 1; after layer 1 the deepstack features 11",
        "stage 2            layer 2; after layer 2 the deepstack features 17",
    ]


FIELD = """\
cluster: {{num_nodes: 1, component_placement: {{actor: all}}}}
runner:
  task_type: sft
  logger: {{log_path: "${{runner.output_dir}}/x", project_name: trial, logger_backends: ["tensorboard"]}}
  max_epochs: 7
  max_steps: -1
  val_check_interval: 50
  experiment_name: tuned
  output_dir: ../trial
data:
  type: vlm
  dataset_name: "robo2vlmsft"
  apply_chat_template: True
  use_chat_template: True
  train_data_paths: "{train}"
  eval_data_paths: "{train}"
  prompt_key: "question"
  choice_key: "choices"
  answer_key: "correct_answer"
  image_keys: ["image"]
  max_prompt_length: 1024
  lazy_loading: false
  num_workers: 16
  answer_separator: ""
algorithm: {{adv_type: gae}}
actor:
  group_name: "ActorGroup"
  training_backend: megatron
  micro_batch_size: 4
  eval_batch_size: 1
  global_batch_size: 256
  model:
    megatron_checkpoint: null
    add_qkv_bias: False
    qk_layernorm: True
    moe_permute_fusion: True
    model_path: "{model}"
    seq_length: 1024
    encoder_seq_length: ${{actor.model.seq_length}}
    apply_rope_fusion: False
  lr_sched: {{lr_warmup_iters: 2, lr_decay_style: cosine, lr_decay_iters: "${{runner.max_epochs}}"}}
  tokenizer: {{tokenizer_model: "{model}", use_fast: False, padding_side: right}}
  megatron: {{use_hf_ckpt: True, ckpt_format: torch}}
reward: {{use_reward_model: False}}
critic: {{use_critic_model: False}}
"""


def test_keys_of_the_field(tmp_path: Path, sft: Path, vision_model: Callable[..., Path]) -> None:
    model = vision_model(text={"attention_bias": False})
    (sft / "field.yaml").write_text(FIELD.format(train=tmp_path / "train", model=model))
    config = compose("field", sft)
    report = check(config, world_size=8)
    assert report.errors == []
    assert isinstance(config, SFTConfig)
    assert (config.data.dataset_name, config.data.val_data_paths) == ("robo2vlm", [str(tmp_path / "train")])
    assert (config.runner.seq_length, config.actor.eval_batch_size) == (1024, 1)
    assert {"data.type", "algorithm", "actor.model.moe_permute_fusion"} <= {problem.key for problem in report.problems}


def test_without_a_task_type_it_is_reasoning(yaml: Path) -> None:
    assert isinstance(compose("run", yaml), ReasoningConfig)
