"""Whatever is written into a config, the answer is a config or a ConfigError."""

import contextlib
import json
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mbridge_config import ConfigError, HFFacts, ReasoningConfig, check, compose, key_table
from mbridge_config.compose import from_tree
from mbridge_config.origin import Origin

KEYS = [info.path for info in key_table(ReasoningConfig)]
SECTIONS = sorted({key.rpartition(".")[0] for key in KEYS if "." in key})

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
settings_of_many = st.lists(st.tuples(paths, values) | numbers, max_size=6)


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


@relaxed(100)
@given(settings_of_many)
def test_trees(assignments: list[tuple[str, Any]]) -> None:
    tree: dict[Any, Any] = {}
    for path, value in assignments:
        put(tree, path, value)
    origin = Origin()
    config = from_tree(tree, origin, ReasoningConfig, strict=False)
    report = check(config, world_size=4)
    str(report)
    json.dumps([problem.as_dict() for problem in report.problems])
    with contextlib.suppress(ConfigError):
        report.raise_for_errors()


override_texts = st.tuples(
    st.sampled_from(["", "+", "++", "~"]), paths, st.sampled_from(["=", "", "=="]), words | values.map(repr)
).map("".join)


@relaxed(40)
@given(st.lists(override_texts | st.text(max_size=20), min_size=1, max_size=3))
def test_arguments(yaml: Path, overrides: list[str]) -> None:
    try:
        report = check(compose("run", yaml, overrides, strict=False), world_size=4)
    except ConfigError as error:
        str(error)
    else:
        str(report)


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
        Origin(),
        ReasoningConfig,
        strict=False,
    )
    str(check(config, world_size=2))
