"""Geometry comes from config.json alone, and model, generating model and tokenizer must belong together."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mbridge_config import Problem, Report, Severity
from mbridge_config.compat.keys import CHECKED

Checked = Callable[..., Report]
MakeModel = Callable[..., Path]
HF = "actor.megatron.ckpt_convertor.hf_model_path"
TOKENIZER = "actor.tokenizer.tokenizer_model"

# key of actor.model, a wrong value, and the value that the model has
WRONG: list[tuple[str, Any, str]] = [
    ("num_layers", 7, "6"),
    ("hidden_size", 97, "96"),
    ("ffn_hidden_size", 169, "168"),
    ("num_attention_heads", 11, "12"),
    ("num_query_groups", 3, "2"),
    ("kv_channels", 9, "8"),
    ("vocab_size", 212, "211"),
    ("max_position_embeddings", 4097, "4096"),
    ("rotary_base", 10000.0, "1000000.0"),
    ("rotary_percentage", 0.5, "0.25"),
    ("layernorm_epsilon", 1e-5, "1e-06"),
    ("add_qkv_bias", "false", "true"),
    ("add_bias_linear", "true", "false"),
    ("qk_layernorm", "true", "false"),
    ("multi_latent_attention", "true", "false"),
    ("share_embeddings_and_output_weights", "false", "true"),
    ("num_moe_experts", 4, "8"),
]
SAID = {
    "partial_rotary_factor": 0.25,
    "mlp_bias": False,
    "use_qk_norm": False,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}


@pytest.mark.parametrize(("name", "wrong", "right"), WRONG)
def test_wrong_geometry_names_both_values(
    checked: Checked, model: Path, make_model: MakeModel, name: str, wrong: Any, right: str
) -> None:
    make_model(model, **SAID)
    (problem,) = checked(f"actor.model.{name}={wrong}").errors
    assert (problem.id, problem.key) == ("geometry", f"actor.model.{name}")
    assert str(problem).startswith(f"error[geometry] actor.model.{name} = {wrong}: the model has {right} (")


def test_every_repeated_fact_is_tried() -> None:
    kinds = {"activation", "normalization", "position_embedding_type"}
    assert {name for name, _, _ in WRONG} | kinds == set(CHECKED)
    assert {name for name, row in CHECKED.items() if row.fact is None} == kinds


@pytest.mark.parametrize(
    ("family", "key", "says"),
    [
        ("qwen2", "add_qkv_bias", {"attention_bias": False}),
        ("qwen2_5_vl_text", "add_qkv_bias", {}),
        ("qwen3", "qk_layernorm", {"use_qk_norm": False}),
        ("qwen3_vl_moe_text", "qk_layernorm", {}),
    ],
)
def test_forced_by_the_family(
    checked: Checked, model: Path, make_model: MakeModel, family: str, key: str, says: dict[str, Any]
) -> None:
    make_model(model, model_type=family, **says)
    (wrong,) = checked(f"actor.model.{key}=false").errors
    assert wrong.id == "geometry" and wrong.reason == f"the model has true (forced for every {family} model)"
    (right,) = checked(f"actor.model.{key}=true").problems
    assert right.id == "geometry-forced" and right.severity is Severity.NOTE
    assert right.reason.startswith(f"forced for every {family} model, whatever config.json says")


def test_not_forced_for_other_families(checked: Checked, model: Path, make_model: MakeModel) -> None:
    make_model(model, model_type="llama", attention_bias=False)
    (wrong,) = checked("actor.model.add_qkv_bias=true").errors
    assert wrong.reason == "the model has false (attention_bias in config.json)"
    assert checked("actor.model.qk_layernorm=true").problems == [], "config.json does not say"


def disagreements(report: Report) -> list[Problem]:
    return [problem for problem in report.problems if problem.id in ("rollout-model", "tokenizer-directory")]


def test_directories_that_disagree(checked: Checked, model: Path, make_model: MakeModel, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other")
    (problem,) = disagreements(checked(f"rollout.model.model_path={other}"))
    assert (problem.id, problem.key) == ("rollout-model", "rollout.model.model_path")
    assert str(model) in problem.reason and problem.fix.startswith(f"set {HF}=${{rollout.model.model_path}}")
    # the same place under another name is no disagreement
    (tmp_path / "link").symlink_to(model)
    assert disagreements(checked(f"rollout.model.model_path={tmp_path / 'link'}", f"{TOKENIZER}={model}/")) == []
    # and neither is another directory with the same tokens
    assert disagreements(checked(f"{TOKENIZER}={other}")) == []


def write_tokens(directory: Path, vocabulary: Any, added: list[dict[str, Any]]) -> None:
    (directory / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}, "added_tokens": added}))


def test_the_tokenizer_of_another_model(checked: Checked, make_model: MakeModel, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other")
    write_tokens(other, {"t0": 0, "t1": 2, "t2": 1}, [])
    (problem,) = disagreements(checked(f"{TOKENIZER}={other}"))
    assert (problem.id, problem.severity) == ("tokenizer-directory", Severity.ERROR)
    assert "token 't1' is 2 here and 1 there" in problem.reason and HF in problem.fix
    # tokens that the model's own tokenizer lacks are allowed: the embedding has rows for them
    write_tokens(other, {"t0": 0, "new": 205}, [{"id": 199, "content": "<end>"}])
    assert disagreements(checked(f"{TOKENIZER}={other}")) == []
    write_tokens(other, {"t0": 0}, [{"id": 150, "content": "<end>"}])
    (problem,) = disagreements(checked(f"{TOKENIZER}={other}"))
    assert "token '<end>' is 150 here and 199 there" in problem.reason
    # Unigram: the place in the list is the id
    write_tokens(other, [["t1", -1.0], ["t0", -2.0]], [])
    assert len(disagreements(checked(f"{TOKENIZER}={other}"))) == 1
    # a vocab.json without tokenizer.json
    (other / "tokenizer.json").unlink()
    (other / "vocab.json").write_text('{"t3": 4}')
    assert len(disagreements(checked(f"{TOKENIZER}={other}"))) == 1


def test_reading_needs_neither_torch_nor_transformers(model: Path, run_python: Callable[..., str]) -> None:
    run_python(f"""
import sys
from mbridge_config import HFFacts
from mbridge_config.facts.tokenizer import tokenizer_size
assert HFFacts.load({str(model)!r}).num_layers == 6 and tokenizer_size({str(model)!r}) == 200
heavy = {{"torch", "transformers", "tokenizers", "numpy", "yaml"}} & set(sys.modules)
assert not heavy, heavy
""")


def test_numbers_beyond_all_reason(checked: Checked, model: Path, make_model: MakeModel) -> None:
    """They cost neither memory nor a traceback."""
    make_model(model, num_hidden_layers=2 * 10**9)
    (problem,) = checked("actor.model.pipeline_model_parallel_size=1000000000").errors
    assert problem.id == "hf-config-field" and "more than the 10000 that any model has" in problem.reason
    make_model(model, rope_theta=10**400)
    assert checked().errors == []
    (model / "config.json").write_text('{"num_hidden_layers": ' + "9" * 5000 + "}")
    (problem,) = checked().errors
    assert problem.id == "hf-config-json" and "cannot be read" in problem.reason
    made = ["quickstart.enabled=true", "quickstart.num_hidden_layers=20000", f"{HF}=made", f"{TOKENIZER}=made"]
    assert [problem.key for problem in checked(*made).errors] == ["quickstart.num_hidden_layers"]


def test_the_experts_of_a_token_are_left_to_the_model(checked: Checked, model: Path, make_model: MakeModel) -> None:
    """RLinf overwrites the key with config.json's value, and its files for mixtures of experts say something else."""
    make_model(model, **SAID)
    report = checked("actor.model.moe_router_topk=8")
    assert report.errors == []
    (note,) = [problem for problem in report.problems if problem.key == "actor.model.moe_router_topk"]
    assert (note.id, note.severity) == ("no-effect", Severity.NOTE)
