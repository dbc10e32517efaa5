"""Each rule reports its mistake with the right message, and is silent on a good config."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mbridge_config import ReasoningConfig, Report, Severity
from mbridge_config.rules import REASONING
from mbridge_config.run.steps import is_recorded, is_warmup

Checked = Callable[..., Report]

TP = "actor.model.tensor_model_parallel_size"
PP = "actor.model.pipeline_model_parallel_size"
FIRST = "actor.model.num_layers_in_first_pipeline_stage"
LAST = "actor.model.num_layers_in_last_pipeline_stage"
HF = "actor.megatron.ckpt_convertor.hf_model_path"
BACKEND = "actor.model.backend"
EXPERTS = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": 4}
PROFILER = "actor.megatron.profiler"
PROFILE = "actor.megatron.use_profiler=true"
MADE = ["data.type=reasoning_gym", "data.reasoning_gym={task: basic_arithmetic, train_size: 64}"]  # 4 batches of 16


def test_good_config_has_no_problems(checked: Checked) -> None:
    report = checked(world_size=4)
    assert report.problems == []
    report.raise_for_errors()


def sched(
    style: str,
    *,
    warmup: int | None = None,
    fraction: float | None = None,
    decay: int | None = None,
    last: int | None = None,
) -> list[str]:
    """Overrides of `actor.lr_sched`."""
    lengths = {"warmup_iters": warmup, "warmup_fraction": fraction, "decay_iters": decay, "wsd_decay_iters": last}
    given = {"decay_style": style} | {name: value for name, value in lengths.items() if value is not None}
    return [f"actor.lr_sched.lr_{name}={value}" for name, value in given.items()]


# the good model: 6 layers, 12 heads, 2 key-value heads, MLP width 168, vocabulary 211; 16 x 4 answers a step
CASES = [
    ("profiler-steps", [PROFILE, f"{PROFILER}.steps=[3,0]"], None, "counted from 1"),
    ("profiler-steps", [PROFILE, f"{PROFILER}.steps=[]"], None, "no step is named"),
    ("profiler-steps", [PROFILE, f"{PROFILER}.steps=[5,6]", "runner.max_steps=4"], None, "ends with step 4"),
    ("profiler-steps", [PROFILE, "runner.max_steps=6"], None, "the first recorded step is 7"),
    (
        "profiler-steps",
        [PROFILE, f"{PROFILER}.steps=[5]", *MADE, "runner.max_steps=9", "runner.max_epochs=1"],
        None,
        "the run ends with step 4: ",
    ),
    (
        "profiler-steps",
        [PROFILE, f"{PROFILER}.schedule_wait={10**15}", f"runner.max_steps={10**14}"],
        None,
        f"the first recorded step is {10**15 + 2}",
    ),
    ("profiler-activities", [PROFILE, f"{PROFILER}.activities=[]"], None, "nothing would be recorded"),
    (
        "profiler-files",
        [PROFILE, f"{PROFILER}.export_tensorboard=false", f"{PROFILER}.export_chrome_trace=false"],
        None,
        "no trace would be written",
    ),
    ("profiler-prefix", [PROFILE, f"{PROFILER}.chrome_filename_prefix=a/b"], None, "beginning of a file's name"),
    ("shard-size", ["runner.checkpoint.max_shard_size=5 apples"], None, "not a size in bytes"),
    ("shard-size", ["runner.checkpoint.max_shard_size=0GB"], None, "not a size in bytes"),
    (
        "async-torch-dist",
        ["runner.checkpoint.async_save=true", "actor.megatron.use_dist_ckpt=true"],
        None,
        "while training waits",
    ),
    ("keep-best-metric", ["runner.checkpoint.keep_best=2"], None, "measured with the last step only"),
    ("tensor-parallel-heads", [f"{TP}=5"], 5, "12 attention heads cannot be shared by 5 ranks"),
    ("tensor-parallel-kv-groups", [f"{TP}=3"], 3, "2 key-value heads (groups) are neither a multiple nor a divisor"),
    ("tensor-parallel-ffn", [f"{TP}=9"], 9, "MLP width 168 cannot be shared by 9 ranks"),
    ("world-size", [f"{TP}=2", f"{PP}=2"], 6, "a world size of 6 is not a multiple of tensor 2 x pipeline 2 = 4"),
    ("pipeline-parallel-layers", [f"{PP}=4"], 4, "6 layers cannot be shared by 4 stages"),
    ("context-parallel-not-built", ["actor.model.context_parallel_size=2"], None, "not built yet"),
    ("expert-parallel-not-built", ["actor.model.expert_model_parallel_size=2"], None, "not built yet"),
    ("virtual-pipeline-not-built", ["actor.model.virtual_pipeline_model_parallel_size=2"], None, "not built yet"),
    ("pipeline-split", [f"{FIRST}=6"], 1, "the only stage has all layers"),
    (
        "pipeline-split",
        [f"{PP}=2", f"{FIRST}=3", f"{LAST}=2"],
        2,
        "3 layers in the first stage and 2 layers in the last",
    ),
    ("pipeline-split", [f"{PP}=3", f"{LAST}=3"], 3, "leave 3 of the model's 6, which 2 other stages cannot share"),
    ("pipeline-split", [f"{PP}=3", f"{FIRST}=3", f"{LAST}=3"], 3, "leave 0 of the model's 6 for 1 other stage, each"),
    ("pipeline-split", [f"{PP}=2", f"{FIRST}=9"], 2, "leave 0 of the model's 6 for 1 other stage, each of which needs"),
    ("sequence-parallel-without-tensor-parallel", ["actor.model.sequence_parallel=true"], None, "has no effect"),
    ("minibatches", ["algorithm.n_minibatches=3"], None, "64 answers a step cannot be cut into 3 equal minibatches"),
    ("minibatches", ["actor.global_batch_size=16", "algorithm.n_minibatches=2"], None, "make 32 each, not 16"),
    ("minibatches", ["actor.global_batch_size=48"], None, "are not a multiple of it"),
    ("global-batch-ranks", ["actor.micro_batch_size=3"], 1, "64 sequences are not a multiple of data-parallel 1 x"),
    ("global-batch-ranks", [], 3, "not a multiple of data-parallel 3 x actor.micro_batch_size 2 = 6"),
    ("global-batch-ranks", ["runner.enable_dynamic_batch_size=true"], 65, "too few for 65 data-parallel ranks"),
    ("group-of-one", ["algorithm.group_size=1"], None, "every advantage is 0"),
    ("greedy-group", ["algorithm.sampling_params.use_greedy=true"], None, "every advantage is 0"),
    (
        "clip-range",
        ["algorithm.ratio_clip_eps=1.5"],
        None,
        "algorithm.clip_ratio_low is null, so this is the lower range, too",
    ),
    ("prompt-length", ["data.max_prompt_length=256"], None, "no room for an answer in runner.seq_length 256"),
    ("answer-length", ["algorithm.sampling_params.max_new_tokens=193"], None, "64 + 193 new tokens = 257, more than"),
    ("least-answer-length", ["algorithm.sampling_params.min_new_tokens=200"], None, "max_new_tokens 192"),
    ("model-sequence-length", ["actor.model.seq_length=255"], None, "less than runner.seq_length 256"),
    ("position-embeddings", ["runner.seq_length=4097"], None, "more than the 4096 positions"),
    (
        "dynamic-batch-tokens",
        ["runner.enable_dynamic_batch_size=true", "runner.max_tokens_per_mbs=255"],
        None,
        "one sequence of runner.seq_length 256 tokens does not fit",
    ),
    ("precision-conflict", ["actor.optim.bf16=false"], None, "actor.model.precision is bf16"),
    (
        "precision-conflict",
        ["actor.optim.bf16=false", "actor.optim.use_precision_aware_optimizer=true"],
        None,
        "the precision-aware optimizer (actor.optim.use_precision_aware_optimizer), which needs",
    ),
    ("precision-conflict", ["actor.optim.fp16=true"], None, "actor.model.precision is bf16"),
    ("precision-conflict", ["actor.model.precision=32", "actor.optim.bf16=true"], None, "precision is fp32"),
    ("loss-scale-without-fp16", ["actor.optim.loss_scale=65536"], None, "only fp16 scales the loss"),
    ("recompute", ["actor.model.recompute_granularity=full"], None, "full needs a method"),
    (
        "recompute",
        ["actor.model.recompute_granularity=full", "actor.model.recompute_method=block"],
        None,
        "full needs a number of layers",
    ),
    (
        "recompute",
        ["actor.model.recompute_granularity=selective", "actor.model.recompute_num_layers=2"],
        None,
        "selective recomputes attention in all layers",
    ),
    ("recompute", ["actor.model.recompute_num_layers=2"], None, "nothing is recomputed"),
    (
        "recompute-layers",
        [
            f"{PP}=2",
            "actor.model.recompute_granularity=full",
            "actor.model.recompute_method=block",
            "actor.model.recompute_num_layers=4",
        ],
        2,
        "a pipeline stage has 3 layers",
    ),
    ("learning-rate-twice", ["actor.optim.lr=1e-5", "actor.lr_sched.max_lr=2e-5"], None, "max_lr 2e-05 is used"),
    (
        "loss-scale-range",
        ["actor.optim.initial_loss_scale=2", "actor.optim.min_loss_scale=4"],
        None,
        "min_loss_scale 4",
    ),
    ("out-of-range", ["actor.optim.adam_beta1=1"], None, "not below 1"),
    ("out-of-range", ["actor.optim.adam_beta2=1.0"], None, "not below 1"),
    ("weight-decay-schedule", ["actor.lr_sched.end_weight_decay=0.1"], None, "start_weight_decay is 0.01"),
    (
        "weight-decay-schedule",
        ["actor.optim.weight_decay=0.1", "actor.lr_sched.start_weight_decay=0.2"],
        None,
        "start_weight_decay 0.2 is used",
    ),
    ("lowest-learning-rate", ["actor.lr_sched.min_lr=1e-3"], None, "above the highest learning rate 1e-06"),
    ("schedule-lengths", sched("cosine", decay=5, warmup=5), None, "not shorter than lr_decay_iters 5"),
    ("schedule-lengths", sched("wsd"), None, "WSD needs the length of its last decay"),
    ("schedule-lengths", sched("cosine", fraction=1.0), None, "nothing is left to decay in"),
    ("schedule-lengths", sched("linear", fraction=1.0, decay=10), None, "nothing is left to decay in"),
    (
        "schedule-lengths",
        sched("wsd", decay=10, last=8, warmup=5),
        None,
        "longer than the 5 steps that lr_warmup_iters 5 leaves of lr_decay_iters 10",
    ),
    (
        "schedule-lengths",
        sched("wsd", decay=10, last=10, fraction=0.1),
        None,
        "longer than the 9 steps that lr_warmup_fraction 0.1 leaves of lr_decay_iters 10",
    ),
    ("schedule-lengths", sched("wsd", decay=10, last=11), None, "longer than lr_decay_iters 10"),
    (
        "warmup-length",
        [*sched("cosine", warmup=20), "runner.max_steps=10"],
        None,
        "over which the rate decays: algorithm.n_minibatches 1 x runner.max_steps 10 = 10 optimizer steps",
    ),
    (
        "warmup-length",
        [*sched("cosine", warmup=20), "runner.max_steps=10", "algorithm.n_minibatches=2"],
        None,
        "algorithm.n_minibatches 2 x runner.max_steps 10 = 20 optimizer steps",
    ),
    (
        "warmup-length",
        [*sched("linear", warmup=4), *MADE, "runner.max_epochs=1", "runner.max_steps=100"],
        None,
        "4 steps of data.rollout_batch_size 16 in runner.max_epochs 1 of 64 rows = 4 optimizer steps",
    ),
    ("warmup-length", [*sched("wsd", last=5000), "runner.max_steps=10"], None, "longer than the run, over which"),
    (
        "warmup-length",
        [*sched("wsd", last=6, warmup=5), "runner.max_steps=10"],
        None,
        "longer than the 5 steps that lr_warmup_iters 5 leaves of the run, over which",
    ),
    (
        "overlap",
        ["actor.optim.overlap_param_gather=true", "actor.optim.use_distributed_optimizer=false"],
        None,
        "only the distributed optimizer gathers weights",
    ),
    ("overlap", ["actor.optim.overlap_param_gather=true"], None, "it needs overlap_grad_reduce"),
    (
        "megatron-checkpoint-required",
        ["actor.megatron.use_hf_ckpt=false"],
        None,
        "model.megatron_checkpoint is required if use_hf_ckpt is False",
    ),
    (
        "megatron-checkpoint-forbidden",
        ["actor.model.megatron_checkpoint=x"],
        None,
        "model.megatron_checkpoint should be None if use_hf_ckpt is True",
    ),
    (
        "reference-weights",
        ["actor.megatron.use_hf_ckpt=false", "runner.resume_dir=auto", "algorithm.kl_beta=0.1"],
        None,
        "the one that the run began with, which is not named",
    ),
    ("mbridge-off", ["actor.megatron.mbridge=false"], None, "loaded through Megatron-Bridge alone"),
    (
        "megatron-checkpoint-missing",
        ["actor.megatron.use_hf_ckpt=false", "actor.model.megatron_checkpoint=nowhere"],
        None,
        "there is no such directory",
    ),
    ("resume-directory", ["runner.resume_dir=nowhere"], None, "there is no such directory"),
    ("rollout-model", ["rollout.model.model_path=another"], None, "the trained model is another one"),
    ("hf-path-empty", [f"{HF}=null"], None, "so there is no model to start from"),
    (
        "hf-path-empty",
        [f"{HF}=null", "actor.model.model_path=stray"],
        None,
        "hf_model_path is empty and actor.model.model_path is set (stray)",
    ),
    (
        "hf-path-empty",
        [f"{HF}=null", "rollout.model.model_path=stray"],
        None,
        "hf_model_path is empty and rollout.model.model_path is set (stray)",
    ),
    ("tokenizer-path-empty", ["actor.tokenizer.tokenizer_model=null"], None, "hf_model_path is set"),
    ("hf-directory-missing", [f"{HF}=nowhere"], None, "there is no such directory"),
    ("task-type", ["runner.task_type=sft"], None, "this app trains reasoning runs"),
    ("no-steps", ["runner.max_steps=0"], None, "0 steps trains nothing"),
    ("critic-not-built", ["critic={use_critic_model: true, model: {precision: bf16}}"], None, "not built yet"),
    ("rollout-backend", ["rollout.rollout_backend=vllm"], None, "generates with transformers"),
    ("train-data-missing", ["data.train_data_paths=[]"], None, "nothing to train on"),
    ("data-path", ["data.val_data_paths=[nowhere.jsonl]"], None, "there is no file nowhere.jsonl"),
    ("data-path", ["data.val_data_paths=[/]"], None, "/ is a directory"),
    ("unused-data-files", MADE, None, "data.type=reasoning_gym makes the problems, so"),
    ("reasoning-gym-task", ["data.type=reasoning_gym"], None, "needs a task"),
    ("reward-type", ["reward.reward_type=reasoning_gym"], None, "reasoning-gym cannot score"),
    ("reward-function", ["reward.function=nowhere.py:score"], None, "there is no file nowhere.py"),
    ("reward-function", ["reward.function=score"], None, "it does not name a function"),
    ("quickstart-width", ["quickstart.enabled=true", "quickstart.hidden_size=100"], None, "of width 32 make 128"),
    ("quickstart-width", ["quickstart.enabled=true", "quickstart.num_key_value_heads=3"], None, "by 3 groups"),
    ("output-directory", ["runner.output_dir=${data.train_data_paths.0}/x"], None, "data.jsonl is a file"),
    ("geometry", ["actor.model.num_layers=7"], None, "the model has 6 (num_hidden_layers in config.json)"),
    ("geometry", ["actor.model.rotary_base=10000"], None, "the model has 1000000.0 (rope_theta in config.json)"),
    ("geometry", ["actor.model.add_qkv_bias=false"], None, "the model has true (forced for every qwen2 model)"),
    ("geometry-forced", ["actor.model.add_qkv_bias=true"], None, "forced for every qwen2 model, whatever config.json"),
    ("geometry", ["actor.model.untie_embeddings_and_output_weights=true"], None, "tie_word_embeddings in config"),
    ("geometry-kind", ["actor.model.activation=gelu"], None, "the model has swiglu"),
]


@pytest.mark.parametrize(("identity", "overrides", "world_size", "text"), CASES, ids=[case[0] for case in CASES])
def test_rule(checked: Checked, identity: str, overrides: list[str], world_size: int | None, text: str) -> None:
    report = checked(*overrides, world_size=world_size)
    found = [problem for problem in report.problems if problem.id == identity]
    assert found, f"{identity} is silent; there is: {report}"
    assert any(text in problem.reason for problem in found), str(report)
    for problem in found:
        assert problem.fix
        assert problem.reason in str(problem) and problem.fix in str(problem)


def test_every_rule_is_tried_and_documented() -> None:
    tried = {case[0] for case in CASES} | {
        "architecture",
        "weights-missing",
        "weights-damaged",
        "tokenizer-vocabulary",
        "tokenizer-directory",
    }
    assert {rule.id for rule in REASONING} <= tried
    assert len({rule.id for rule in REASONING}) == len(REASONING), "ids must be unique"
    assert all(rule.cause.endswith(".") for rule in REASONING)


@pytest.mark.parametrize(
    ("fields", "backend", "reason"),
    [
        ({"architectures": ["Olmo2ForCausalLM"]}, "te", "names Olmo2ForCausalLM, which Megatron-Bridge does not know"),
        ({"architectures": ["Gemma2ForCausalLM"]}, "torch", "which is not built with plain torch layers"),
        ({"architectures": ["Qwen3NextForCausalLM"]}, "auto", f"plain torch layers, and {BACKEND} is auto"),
        ({"architectures": ["DeepseekV3ForCausalLM"]}, "te", None),
        (EXPERTS, "auto", None),
        (EXPERTS | {"mlp_only_layers": [1, 4]}, "te", "layers 1, 4 have no experts"),
        (EXPERTS | {"decoder_sparse_step": 2}, "auto", "layers 0, 2, 4 have no experts"),
    ],
)
def test_architectures(
    checked: Checked, model: Path, geometry: dict[str, Any], fields: dict[str, Any], backend: str, reason: str | None
) -> None:
    (model / "config.json").write_text(json.dumps(geometry | fields))
    found = [problem for problem in checked(f"{BACKEND}={backend}").problems if problem.id == "architecture"]
    assert [problem.key for problem in found] == ([HF] if reason else [])
    assert reason is None or reason in found[0].reason


@pytest.mark.parametrize(
    ("given", "refused"),
    [
        (["ratio_clip_eps=1.5"], "ratio_clip_eps"),
        (["ratio_clip_eps=1.5", "clip_ratio_high=0.3"], "ratio_clip_eps"),
        (["clip_ratio_low=1.5"], "clip_ratio_low"),
        (["clip_ratio_c=1"], "clip_ratio_c"),
        (["clip_ratio_high=-0.1"], "clip_ratio_high"),
        (["clip_log_ratio_min=0"], "clip_log_ratio_min"),
        (["clip_log_ratio_min=-21"], "clip_log_ratio_min"),
        (["clip_log_ratio_max=0"], "clip_log_ratio_max"),
        (["clip_log_ratio_max=21"], "clip_log_ratio_max"),
        (["clip_log_ratio_min=null", "clip_log_ratio_max=null"], None),
        (["clip_log_ratio_min=-20", "clip_log_ratio_max=0.5"], None),
        (["ratio_clip_eps=1"], None),
        (["ratio_clip_eps=1.5", "clip_ratio_low=0.2"], None),  # it is the upper range alone
        (["clip_ratio_high=1.5"], None),
        (["clip_ratio_c=1.1"], None),
    ],
)
def test_clip_ranges(checked: Checked, given: list[str], refused: str | None) -> None:
    """What the policy loss takes: low in [0, 1], high from 0 on, the dual clip above 1, logarithms up to 20."""
    found = [problem.key for problem in checked(*(f"algorithm.{word}" for word in given)).errors]
    assert found == ([f"algorithm.{refused}"] if refused else [])


@pytest.mark.parametrize(
    "given",
    [
        sched("constant", warmup=20),
        sched("constant", warmup=20, decay=10),  # nothing decays, so the length of it is of no matter
        sched("constant", fraction=1.0),
        sched("cosine", warmup=9),
        sched("cosine", warmup=20, fraction=0.5),
        sched("cosine", warmup=20, decay=21),
        sched("wsd", warmup=4, last=6),
        sched("wsd", warmup=5, decay=10, last=5),
        sched("wsd", fraction=0.19, last=9),
    ],
)
def test_schedules_that_fit(checked: Checked, given: list[str]) -> None:
    assert checked(*given, "runner.max_steps=10").errors == []


def test_a_run_as_long_as_its_data(checked: Checked) -> None:
    """The app, which reads the data, says whether it is long enough."""
    assert checked(*sched("cosine", warmup=10**6)).errors == []


def test_right_geometry_is_accepted(checked: Checked, geometry: dict[str, Any]) -> None:
    keys = {
        "num_layers": "num_hidden_layers",
        "hidden_size": "hidden_size",
        "ffn_hidden_size": "intermediate_size",
        "num_attention_heads": "num_attention_heads",
        "num_query_groups": "num_key_value_heads",
        "vocab_size": "vocab_size",
        "rotary_base": "rope_theta",
        "layernorm_epsilon": "rms_norm_eps",
    }
    overrides = [f"actor.model.{key}={geometry[field]}" for key, field in keys.items()]
    overrides += ["actor.model.kv_channels=8", "actor.model.add_qkv_bias=true", "actor.model.activation=swiglu"]
    overrides += ["actor.model.normalization=RMSNorm", "actor.model.position_embedding_type=rope"]
    (forced,) = checked(*overrides).problems
    assert (forced.id, forced.key, forced.severity) == ("geometry-forced", "actor.model.add_qkv_bias", Severity.NOTE)


@pytest.mark.parametrize("tensor", [1, 2, 4, 6, 12])
def test_kv_groups_that_megatron_takes(checked: Checked, tensor: int) -> None:
    assert checked(f"{TP}={tensor}", world_size=tensor).errors == []


def test_resume_satisfies_the_checkpoint(checked: Checked, tmp_path: Path) -> None:
    step = tmp_path / "run" / "checkpoints" / "global_step_10"
    (step / "actor").mkdir(parents=True)
    assert checked("actor.megatron.use_hf_ckpt=false", f"runner.resume_dir={step}").errors == []
    assert checked("actor.megatron.use_hf_ckpt=false", f"actor.model.megatron_checkpoint={step}").errors == []
    # mbridge off goes on from a checkpoint that mbridge made
    off = ["actor.megatron.use_hf_ckpt=false", "actor.megatron.mbridge=false"]
    assert checked(*off, f"actor.model.megatron_checkpoint={step}").errors == []
    (step.parent / "global_step_9" / "actor").mkdir(parents=True)
    (problem,) = checked(f"runner.resume_dir={tmp_path / 'run'}").errors
    assert problem.id == "resume-directory" and problem.fix.endswith("checkpoints/global_step_10")


def test_tokenizer_larger_than_the_model(checked: Checked, model: Path, make_model: Callable[..., Path]) -> None:
    make_model(model, tokens=211)
    assert checked().errors == []
    make_model(model, tokens=212)
    (problem,) = checked().errors
    assert problem.id == "tokenizer-vocabulary"
    assert "the tokenizer has 212 tokens and the model embeddings for 211" in problem.reason


@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_dynamic_rope_ends_at_its_positions(
    checked: Checked, model: Path, make_model: Callable[..., Path], key: str
) -> None:
    make_model(model, rope_scaling={key: "dynamic", "factor": 2.0})
    assert not checked("runner.seq_length=4096").errors
    (found,) = checked("runner.seq_length=4097").errors
    assert found.id == "position-embeddings" and "beyond them rope_type 'dynamic'" in found.reason


def test_problems_of_keys_and_rules_come_together(checked: Checked) -> None:
    report = checked(
        f"{TP}=5", "actor.bogus=1", "rollout.vllm={a: 1}", "actor.model.sequence_parallel=true", world_size=5
    )
    found = [problem.id for problem in report.problems]
    assert found[:2] == ["unknown-key", "tensor-parallel-heads"] and found[-1] == "no-effect"
    severities = [problem.severity for problem in report.problems]
    assert severities == sorted(severities)


def test_a_value_that_does_not_fit_silences_the_rules_that_read_it(checked: Checked) -> None:
    assert [problem.id for problem in checked(f"{TP}=five", world_size=5).errors if TP in str(problem.key)] == [
        "wrong-type"
    ]


def test_places_of_rule_problems(checked: Checked) -> None:
    (problem,) = [problem for problem in checked(f"{PP}=4", world_size=4).errors if problem.key == PP]
    assert str(problem.where) == f"command line: {PP}=4"
    assert problem.severity is Severity.ERROR
    (problem,) = checked("runner.seq_length=64").errors
    assert problem.key == "data.max_prompt_length" and str(problem.where).endswith("run.yaml:4")


@pytest.mark.parametrize(
    ("world_size", "overrides", "expected"),
    [
        (1, [], (1, 1, 1, (6,), 32)),
        (8, [f"{TP}=2", f"{PP}=2"], (2, 2, 2, (3, 3), 16)),
        (3 * 8, [f"{PP}=3"], (1, 3, 8, (2, 2, 2), 4)),
        (8, [f"{PP}=2", f"{FIRST}=4"], (1, 2, 4, (4, 2), 8)),
        (8, [f"{PP}=4", f"{FIRST}=1", f"{LAST}=1"], (1, 4, 2, (1, 2, 2, 1), 16)),
        (8, [f"{PP}=4", "actor.model.decoder_last_pipeline_num_layers=3"], (1, 4, 2, (1, 1, 1, 3), 16)),
        (4, ["runner.enable_dynamic_batch_size=true"], (1, 1, 4, (6,), None)),
    ],
)
def test_plan(checked: Checked, world_size: int, overrides: list[str], expected: tuple[object, ...]) -> None:
    plan = checked(*overrides, world_size=world_size).plan
    assert plan is not None
    shares = (plan.tensor_parallel, plan.pipeline_parallel, plan.data_parallel, plan.layers_per_stage)
    assert (*shares, plan.micro_batches) == expected
    assert plan.sequences_per_step == 64
    assert f"ranks              {world_size} = " in str(plan)


def test_plan_of_minibatches(checked: Checked) -> None:
    plan = checked("algorithm.n_minibatches=4", world_size=2).plan
    assert plan is not None
    assert (plan.optimizer_steps_per_step, plan.global_batch_size, plan.micro_batches) == (4, 16, 4)


def test_minibatches_of_a_global_batch(composed: Callable[..., ReasoningConfig]) -> None:
    """Either of the two gives the other, so that the trainer and the plan agree."""
    assert composed("actor.global_batch_size=16").algorithm.n_minibatches == 4
    assert composed("algorithm.n_minibatches=2").actor.global_batch_size == 32
    assert composed("actor.global_batch_size=32", "algorithm.n_minibatches=2").algorithm.n_minibatches == 2


@pytest.mark.parametrize(
    "override",
    [
        "actor.optim.optimizer=sgd",
        "actor.lr_sched.weight_decay_incr_style=cosine",
    ],
)
def test_what_this_version_does_not_do_is_refused(checked: Checked, override: str) -> None:
    (problem,) = checked(override).errors
    assert problem.id == "refused-value" and "in this version" in problem.reason


def test_steps_that_the_profiler_records(composed: Callable[..., ReasoningConfig]) -> None:
    def recorded(*settings: str) -> tuple[list[int], list[int]]:
        profiler = composed(PROFILE, *(f"{PROFILER}.{setting}" for setting in settings)).actor.megatron.profiler
        steps = range(1, 20)
        return [n for n in steps if is_recorded(profiler, n)], [n for n in steps if is_warmup(profiler, n)]

    assert recorded() == ([7, 8, 9, 16, 17, 18], [6, 15])
    assert recorded("steps=[9,3,4]", "schedule_warmup=2") == ([3, 4, 9], [1, 2, 7, 8])
    assert recorded("schedule_wait=4", "schedule_warmup=0", "schedule_active=2", "schedule_repeat=0") == (
        [5, 6, 11, 12, 17, 18],
        [],
    )


def test_weight_decay_of_the_schedule(composed: Callable[..., ReasoningConfig]) -> None:
    config = composed("actor.optim.weight_decay=0.3")
    assert (config.actor.lr_sched.start_weight_decay, config.actor.lr_sched.end_weight_decay) == (0.3, 0.3)
    assert composed("actor.lr_sched.start_weight_decay=0.2").actor.lr_sched.end_weight_decay == 0.2


def test_world_size_from_the_config(checked: Checked) -> None:
    report = checked("launcher.nproc_per_node=4", "cluster.num_nodes=2")
    assert report.world_size == 8 and report.plan is not None and report.plan.data_parallel == 8
    assert checked("launcher.nproc_per_node=4", world_size=2).world_size == 2
