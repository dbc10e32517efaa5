"""Any content of a config results in a config or a ConfigError."""

import contextlib
import io
import json
import unittest.mock
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from yaml import safe_dump as dump

from mbridge_config import ConfigError, HFFacts, ReasoningConfig, RunConfig, check, compose, key_table
from mbridge_config.cli.main import COMMANDS, main
from mbridge_config.load.compose import from_tree
from mbridge_config.schema.provenance import Provenance
from mbridge_config.schema.run_kinds import SCHEMAS

TABLES = {schema: {info.path: info for info in key_table(schema)} for schema in SCHEMAS.values()}
KEYS = sorted({path for table in TABLES.values() for path in table})
SECTIONS = sorted({key.rpartition(".")[0] for key in KEYS if "." in key})
# values that a key takes, as far as its type says them
CHOICES = sorted({word for table in TABLES.values() for info in table.values() for word in info.type_name.split(" | ")})

words = st.text(max_size=12) | st.sampled_from(
    [
        "${runner.seq_length}",
        "${subtract:1,a}",
        "${a",
        "}",
        "${oc.env:X}",
        "???",
        "null",
        "1e400",
        "${oc.create:${x}}",
        "",
        "~nobody_of_this_name/x",
        "a" * 300,
        "a\0b",
    ]
)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | words
values: st.SearchStrategy[Any] = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words | st.integers(), inner, max_size=3),
    max_leaves=6,
)
paths = st.sampled_from(KEYS) | st.sampled_from(SECTIONS) | st.lists(words, min_size=1, max_size=3).map(".".join)
# numbers of every size where the schema takes numbers: these reach the rules and the plan
numbers = st.tuples(st.sampled_from(KEYS), st.integers(-2, 40) | st.sampled_from([0.0, 0.5, True, 10**30]))
choices = st.tuples(st.sampled_from(KEYS), st.sampled_from([*CHOICES, True, False, None, [], {}]))
settings_of_many = st.lists(st.tuples(paths, values) | numbers | choices, max_size=6)


def relaxed(examples: int) -> settings:
    return settings(
        max_examples=examples,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


def put(tree: dict[Any, Any], path: str, value: Any) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        below = tree.setdefault(parent, {})
        if not isinstance(below, dict):
            return
        tree = below
    tree[name] = value


def tree_of(assignments: list[tuple[str, Any]]) -> dict[Any, Any]:
    tree: dict[Any, Any] = {}
    for path, value in assignments:
        put(tree, path, value)
    return tree


@pytest.mark.parametrize("schema", SCHEMAS.values())
@relaxed(70)
@given(settings_of_many)
def test_trees(schema: type[RunConfig], assignments: list[tuple[str, Any]]) -> None:
    config = from_tree(tree_of(assignments), Provenance(), schema, strict=False)
    report = check(config, world_size=4)
    str(report)
    json.dumps([problem.as_dict() for problem in report.problems])
    with contextlib.suppress(ConfigError):
        report.raise_for_errors()


override_texts = st.tuples(
    st.sampled_from(["", "+", "++", "~"]), paths, st.sampled_from(["=", "", "=="]), words | values.map(repr)
).map("".join)


@relaxed(30)
@given(st.lists(override_texts | st.text(max_size=20), min_size=1, max_size=3))
def test_arguments(yaml: Path, overrides: list[str]) -> None:
    try:
        report = check(compose("run", yaml, overrides, strict=False), world_size=4)
    except ConfigError as error:
        str(error)
    else:
        str(report)


def exit_code(words: list[str]) -> int | str | None:
    """Of `mbridge-config`, in this process; what it prints is thrown away."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            return main(words)
        except SystemExit as stop:  # --help
            return stop.code


@relaxed(25)
@given(
    settings_of_many,
    st.lists(override_texts, max_size=2),
    st.sampled_from([[], ["--json"], ["--world-size", "4"], ["--world-size", "-1"], ["--json", "--world-size", "7"]]),
    st.sampled_from(["reasoning", "sft"]),
)
def test_check_command(
    yaml: Path, assignments: list[tuple[str, Any]], overrides: list[str], options: list[str], task: str
) -> None:
    tree = tree_of([("runner.task_type", task), *assignments])
    (yaml / "fuzzed.yaml").write_text(dump(tree, allow_unicode=True), encoding="utf-8", errors="replace")
    assert exit_code(["check", "fuzzed", "--config-path", str(yaml), *options, *overrides]) in (0, 2)


@relaxed(40)
@given(st.sampled_from([*COMMANDS, "-sc", "--shell-completion"]), st.lists(words | st.sampled_from(KEYS), max_size=3))
def test_commands(yaml: Path, command: str, rest: list[str]) -> None:
    assert exit_code([command, *rest]) in (0, 2)


@relaxed(60)
@given(st.lists(override_texts | st.sampled_from([*COMMANDS, "-cp", "--config-name", "run"]) | words, max_size=4))
def test_completion(yaml: Path, line: list[str]) -> None:
    with unittest.mock.patch.dict("os.environ", {"COMP_LINE": " ".join(["mbridge-config", *line]).replace("\0", "")}):
        assert exit_code(["-sc", "query=bash"]) == 0


@relaxed(60)
@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "replace")))
def test_files(yaml: Path, content: bytes) -> None:
    (yaml / "noise.yaml").write_bytes(content)
    with contextlib.suppress(ConfigError):
        check(compose("noise", yaml, strict=False))


json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


@relaxed(60)
@given(st.data())
def test_model_directories(model: Path, geometry: dict[str, Any], data: st.DataObject) -> None:
    names = [*geometry, "text_config", "rope_parameters", "head_dim", "num_experts", "attention_bias"]
    changes = data.draw(st.dictionaries(st.sampled_from(names), json_values, max_size=4))
    (model / "config.json").write_text(json.dumps(geometry | changes))
    (model / "tokenizer.json").write_text(json.dumps(data.draw(json_values)))
    with contextlib.suppress(ConfigError):
        HFFacts.load(model)
    config = from_tree(
        {
            "actor": {
                "tokenizer": {"tokenizer_model": str(model)},
                "megatron": {"ckpt_convertor": {"hf_model_path": str(model)}},
            }
        },
        Provenance(),
        ReasoningConfig,
        strict=False,
    )
    str(check(config, world_size=2))
