"""The reference pages, `mbridge-config explain`, and that no key and no problem is left out of them."""

import ast
import re
import sys
from pathlib import Path

import pytest

from mbridge_config import ReasoningConfig, SFTConfig, key_table
from mbridge_config.cli.main import main
from mbridge_config.cli.reference import PAGES, configuration_page, errors_page
from mbridge_config.compat.keys import compat_keys
from mbridge_config.rules import REASONING, SFT
from mbridge_config.rules.explanations import LOADING, explanations
from mbridge_config.schema.keys import Status

ROOT = Path(__file__).parents[4]
SCHEMAS = pytest.mark.parametrize("schema", [ReasoningConfig, SFTConfig])


@pytest.mark.parametrize("name", PAGES)
def test_pages_are_fresh(name: str) -> None:
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == PAGES[name](), "run `nox -s reference`"


@SCHEMAS
def test_every_key_says_what_it_means(schema: type) -> None:
    for info in key_table(schema):
        spec = info.spec
        if spec.status is Status.NO_EFFECT:
            assert spec.why and not spec.why.endswith("."), info.path
        else:
            assert re.fullmatch(r"\S.*[.:]", spec.doc), info.path
        assert (spec.alias_of is None) == (spec.status is not Status.ALIAS), info.path
        if spec.alias_of:
            assert spec.alias_of in {other.path for other in key_table(schema)}


@SCHEMAS
def test_every_key_has_its_row(schema: type) -> None:
    sections = dict(re.findall(r"^## `?([\w. -]+)`?\n(.*?)(?=^## |\Z)", configuration_page(), re.M | re.S))
    for info in key_table(schema):
        section, _, name = info.path.rpartition(".")
        title, name, columns = section or "Sections without keys of their own", name, (9, 2, 5, 7)
        if info.path in compat_keys(schema):
            title, name, columns = "Compatibility", info.path, (7, 2, 3, 5)
        width, kind, status, meaning = columns
        rows = [
            re.split(r"(?<!\\)\|", line) for line in sections[title].splitlines() if line.startswith(f"| `{name}` |")
        ]
        assert any(row[status].strip() == info.spec.status.value for row in rows), info.path
        assert all(len(row) == width and row[kind].strip() and row[meaning].strip() for row in rows), info.path


def test_some_rows() -> None:
    page = configuration_page()
    for row in (
        "| `distributed_timeout_minutes` | number, > 0 | `30` | minutes | honoured |  | Longest wait for another rank.",
        "| `algorithm.sampling_params.do_sample` | true \\| false \\| null | alias | reasoning | "
        "The opposite of `algorithm.sampling_params.use_greedy`. |",
        "| `rollout.detokenize` | true \\| false \\| null | no effect | reasoning | "
        "Belongs to a serving engine; answers are generated with transformers. |",
        "| `num_workers` | integer, ≥ 0 | `2` | processes | honoured | sft |",
    ):
        assert row in page, row
    assert "Also: kl (k1), mse (k2), low_var_kl (k3)." in page
    assert "Refused: True" not in page and "Refused: true (LoRA is not in this version)." in page


def test_every_rule_has_cause_and_fix() -> None:
    for rule in {*REASONING, *SFT}:
        assert rule.cause.endswith(".") and rule.fix.endswith(".") and "Fix:" not in rule.cause, rule.id


@pytest.mark.skipif(sys.version_info < (3, 12), reason="it reads sources of the other packages, which need Python 3.12")
def test_no_problem_is_left_out() -> None:
    """Every id in the sources of the packages and apps is explained, and none is explained that is not there."""
    found = {rule.id for rule in (*REASONING, *SFT)}
    for file in [*ROOT.glob("packages/*/src/**/*.py"), *ROOT.glob("apps/*/src/**/*.py")]:
        text = file.read_text(encoding="utf-8")
        if "mbridge_config" in text and file.name != "explanations.py":
            found |= _ids(ast.parse(text))
    assert found == set(explanations())
    assert found == set(re.findall(r"^## (\S+)$", errors_page(), re.M))
    assert not set(LOADING) & {rule.id for rule in (*REASONING, *SFT)}


def _ids(tree: ast.AST) -> set[str]:
    """Ids that a file gives to problems: `Problem(id=…)`, and what it hands to its own makers of problems."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            texts = [argument for argument in node.args if isinstance(argument, ast.Constant)]
            texts += [keyword.value for keyword in node.keywords if keyword.arg == "id"]  # type: ignore[misc]
            for text in texts:
                value = getattr(text, "value", None)
                made = name in ("Problem", "Unfit", "refusal", "report", "_empty", "read_json_object")
                if made and isinstance(value, str) and re.fullmatch(r"[a-z]+(-[a-z]+)+|usage|interpolation", value):
                    found.add(value)
    return found


def test_explain(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "unknown-key"]) == 0
    output = capsys.readouterr().out
    assert output.startswith("unknown-key\n  cause: There is no such key") and "\n  fix:   Use the name" in output
    assert main(["explain", "train-data-missing"]) == 0
    output = capsys.readouterr().out
    assert output.index("(reasoning runs)") < output.index("(sft runs)") and output.count("cause:") == 2


def test_explain_without_an_id_lists_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(explanations())
    assert all(len(line.split()) > 3 for line in lines)


@pytest.mark.parametrize(
    ("identity", "fix"),
    [("geometri", "did you mean geometry or"), ("zzz", "lists all ids"), ("unknownkey", "did you mean unknown-key?")],
)
def test_explain_an_unknown_id(identity: str, fix: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", identity]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error[no-such-problem] ID = {identity}: no problem has this id") and fix in error
