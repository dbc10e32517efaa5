"""Invalid and unreadable paths are reported like paths of missing files."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from yaml import safe_dump as dump
from yaml import safe_load as load

from mbridge_config import check, compose
from mbridge_config.cli.main import main
from mbridge_config.paths import fault, files_in, same_place, user_path

HF = "actor.megatron.ckpt_convertor.hf_model_path"
KEYS = {
    HF: "hf-directory-missing",
    "actor.tokenizer.tokenizer_model": "hf-directory-missing",
    "rollout.model.model_path": "rollout-model",
    "data.train_data_paths": "data-path",
    "runner.resume_dir": "resume-directory",
    "runner.output_dir": "output-directory",
}
ODD = {"nobody's home": "~nobody_of_this_name/x", "too long": "a" * 300, "null": "a\0b"}


@pytest.mark.parametrize("odd", ODD.values(), ids=list(ODD))
@pytest.mark.parametrize(("key", "identity"), KEYS.items(), ids=list(KEYS))
def test_odd_paths(yaml: Path, key: str, identity: str, odd: str) -> None:
    tree: dict[str, Any] = load((yaml / "run.yaml").read_text())
    *sections, name = key.split(".")
    section = tree
    for part in sections:
        section = section.setdefault(part, {})
    section[name] = odd
    (yaml / "odd.yaml").write_text(dump(tree))
    errors = check(compose("odd", yaml, strict=False)).errors
    if key == "runner.output_dir" and odd.startswith("~"):
        assert errors == [], "a directory of this name can be made, as a shell would"
        return
    assert [(problem.id, problem.key) for problem in errors] == [(identity, key)]
    assert errors[0].fix


@pytest.mark.parametrize("odd", [ODD["nobody's home"], ODD["too long"]])
def test_odd_paths_on_the_command_line(
    yaml: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, odd: str
) -> None:
    monkeypatch.chdir(tmp_path)
    init = ["init", "reasoning", "--model"]
    for words in (
        ["check", odd],
        ["check", f"{odd}.yaml"],
        ["check", "run", "--config-path", odd],
        [*init, odd],
        [*init, str(model), "--output", f"{odd}.yaml"],
        [*init, str(model), "--data", odd],
    ):
        assert main(words) == 2, words


@pytest.mark.skipif(os.geteuid() == 0, reason="root may look at everything")
def test_a_directory_of_others(yaml: Path, tmp_path: Path, make_model: Callable[..., Path]) -> None:
    others = make_model(tmp_path / "others" / "model").parent
    others.chmod(0)
    try:
        (problem,) = check(compose("run", yaml, [f"{HF}={others / 'model'}"], strict=False)).errors
        assert problem.id == "hf-directory-missing"
        assert fault(others / "x") == "Permission denied" and files_in(others) == []
    finally:
        others.chmod(0o700)


def test_same_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert same_place(user_path("~/link"), tmp_path) and not same_place(user_path("~/loop"), tmp_path)
    assert fault(tmp_path / "nothing" / "here") is None and fault(tmp_path / "loop") is not None
