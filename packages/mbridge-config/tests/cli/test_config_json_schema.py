"""The JSON schema for editors accepts the values that the loader accepts."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from mbridge_config import ReasoningConfig, SFTConfig, key_table
from mbridge_config.cli.json_schema import json_schema
from mbridge_config.cli.main import main
from mbridge_config.load.catalog import config_names, installed_directories
from mbridge_config.load.validate import Unfit, check_range, fit
from mbridge_config.schema.keys import KeyInfo, Status
from mbridge_config.schema.run_kinds import SCHEMAS, schema_of

STYLE = Path(__file__).parents[1] / "rlinf_style"
WHOLE = {kind: json_schema(kind) for kind in SCHEMAS}
KINDS = {schema: kind for kind, schema in SCHEMAS.items()}
_IS = {
    "null": lambda value: value is None,
    "boolean": lambda value: isinstance(value, bool),
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "string": lambda value: isinstance(value, str),
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
}


def faults(schema: dict[str, Any], value: Any, place: str = "") -> Iterator[str]:
    """What is wrong with `value`, by the keywords that our schemas use. An unknown keyword is an error."""
    rest = set(schema) - {"$schema", "title", "description", "default", "deprecated", "properties", "pattern"}
    rest -= {"additionalProperties", "items", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
    assert rest <= {"type", "enum", "anyOf"}, rest
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(_IS[kind](value) for kind in kinds):
        yield f"{place}: {value!r} is none of {kinds}"
    if "enum" in schema and not any(value == word and type(value) is type(word) for word in schema["enum"]):
        yield f"{place}: {value!r} is none of {schema['enum']}"
    if "anyOf" in schema and all(list(faults(branch, value)) for branch in schema["anyOf"]):
        yield f"{place}: {value!r} fits no branch"
    if isinstance(value, str) and not re.search(schema.get("pattern", ""), value):
        yield f"{place}: {value!r} has not the pattern"
    if _IS["number"](value):
        inside = value >= schema.get("minimum", value) and value <= schema.get("maximum", value)
        between = schema.get("exclusiveMinimum", -math.inf) < value < schema.get("exclusiveMaximum", math.inf)
        if not (inside and between):
            yield f"{place}: {value!r} is out of range"
    if isinstance(value, list):
        for number, item in enumerate(value):
            yield from faults(schema.get("items", {}), item, f"{place}[{number}]")
    if isinstance(value, dict):
        for name, item in value.items():
            if name in schema.get("properties", {}):
                yield from faults(schema["properties"][name], item, f"{place}.{name}")
            elif schema.get("additionalProperties", True) is False:
                yield f"{place}.{name}: no such key"


def tree_of(file: Path) -> Any:
    return OmegaConf.to_container(OmegaConf.load(file), resolve=False)


APPS = [
    directory / f"{name}.yaml" for directory in installed_directories().values() for name in config_names(directory)
]
FILES = [*APPS, *sorted(STYLE.glob("*.yaml"))]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_good_files_fit(file: Path) -> None:
    tree = tree_of(file)
    if "defaults" in tree and "task_type" not in tree.get("runner", {}):
        kind = "sft" if "_vl_" in file.stem else "reasoning"  # a file of the list says it
    else:
        kind = KINDS[schema_of(tree)]
    # what this version refuses is not among the values of the schema
    refused = {f".{info.path}" for info in key_table(SCHEMAS[kind]) if info.spec.refused}
    found = [fault for fault in faults(WHOLE[kind], tree) if fault.partition(":")[0] not in refused]
    assert found == []


@pytest.mark.skipif("sft" not in installed_directories(), reason="the apps are not installed")
def test_apps_are_there() -> None:
    assert len(APPS) >= 5


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("runner: {seq_lenght: 5}", ".runner.seq_lenght"),
        ("runner: {seq_length: long}", ".runner.seq_length"),
        ("runner: {seq_length: 1}", ".runner.seq_length"),
        ("actor: {model: {precision: int8}}", ".actor.model.precision"),
        ("runner: {logger: {logger_backends: [wand]}}", ".runner.logger.logger_backends"),
        ("algorithm: {adv_type: gae}", ".algorithm.adv_type"),
        ("actor: 3", ".actor"),
        ("actor: plain text", ".actor"),
        ("runners: {}", ".runners"),
    ],
)
def test_mistakes_are_found(text: str, place: str) -> None:
    (fault,) = faults(WHOLE["reasoning"], yaml.safe_load(text))
    assert fault.startswith(f"{place}:")


def test_open_values_fit_everywhere() -> None:
    for kind, schema in SCHEMAS.items():
        for info in key_table(schema):
            for text in ("${runner.seq_length}", "a-${x}", "???"):
                tree: Any = text
                for name in reversed(info.path.split(".")):
                    tree = {name: tree}
                if info.type != dict[str, Any]:
                    assert list(faults(WHOLE[kind], tree)) == [], info.path
        assert list(faults(WHOLE[kind], {"actor": {"model": "${other}"}, "defaults": ["a", {"b": "c"}]})) == []


PROBES: list[Any] = [None, True, 0, 1, 2, -1, 5, 400, 0.5, -0.5, 1.0e9, "x", "", "math", [], ["x"], [1], {}, {"a": 1}]


@pytest.mark.parametrize("schema", [ReasoningConfig, SFTConfig])
def test_agrees_with_the_loader(schema: type) -> None:
    whole = WHOLE[KINDS[schema]]
    tried = 0
    for info in key_table(schema):
        found = whole
        for name in info.path.split("."):
            found = found["properties"][name]
        words = [word for part in _branches(found) for word in part.get("enum", [])]
        for value in [*PROBES, *words]:
            if isinstance(value, float) and value.is_integer():
                continue  # a whole number to JSON
            assert (not list(faults(found, value))) == _loads(info, value), (info.path, value)
            tried += 1
        assert ("deprecated" in found) == (info.spec.status is Status.NO_EFFECT)
        assert found["description"]
    assert tried > 3000


def _branches(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield schema
    for branch in schema.get("anyOf", []):
        yield from _branches(branch)


def _loads(info: KeyInfo, value: Any) -> bool:
    try:
        if str(value) in info.spec.refused and not isinstance(value, bool):
            return False
        check_range(fit(value, info.type, info.spec), info.spec)
    except Unfit:
        return False
    return True


def test_printed(capsys: pytest.CaptureFixture[str]) -> None:
    for kind in SCHEMAS:
        assert main(["schema", kind]) == 0
        printed = json.loads(capsys.readouterr().out)
        assert printed == json.loads(json.dumps(json_schema(kind)))
        assert printed["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert main(["schema", "other"]) == 2
    assert "invalid choice: 'other'" in capsys.readouterr().err


@pytest.mark.parametrize("kind", SCHEMAS)
def test_is_a_schema(kind: str) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator
    validator.check_schema(json_schema(kind))
    for file in APPS:
        tree = tree_of(file)
        if KINDS[schema_of(tree)] == kind:
            validator(json_schema(kind)).validate(tree)
