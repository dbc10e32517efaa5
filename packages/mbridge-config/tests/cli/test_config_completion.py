"""Shell completion, by Hydra's protocol: what is offered, and that bash takes it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mbridge_config import ConfigError, parse_arguments
from mbridge_config.cli.completion import FLAGS
from mbridge_config.cli.main import COMMANDS, main
from mbridge_config.load.catalog import installed_directories

TERNARY = ("false", "null", "true")


@pytest.fixture
def offered(yaml: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> "Offered":
    (yaml / "tune.yaml").write_text("runner: {task_type: sft}\n")
    (yaml / "built.yaml").write_text("defaults: [tune, _self_]\n")
    (yaml / "broken.yaml").write_text("runner: [\n")
    return Offered(yaml, monkeypatch, capsys)


class Offered:
    """`offered(line)`: the words that a shell is offered for a line of `mbridge-config` or of an app."""

    def __init__(self, yaml: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
        self.yaml, self.monkeypatch, self.capsys = yaml, monkeypatch, capsys

    def __call__(self, line: str, shell: str = "bash", point: int | None = None) -> list[str]:
        self.monkeypatch.setenv("COMP_LINE", line.replace("DIR", str(self.yaml)))
        self.monkeypatch.setenv("COMP_POINT", "" if point is None else str(point))
        words = ["-sc", f"query={shell}"]
        if line.startswith("mbridge-config"):
            assert main(words) == 0
        else:
            with pytest.raises(SystemExit) as stop:
                parse_arguments(words, program="app", package_config="no_package", default_config="run")
            assert stop.value.code == 0
        return self.capsys.readouterr().out.split()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("mbridge-config ", " ".join(sorted(COMMANDS))),
        ("mbridge-config ex", "explain"),
        ("mbridge-config explain geometry", "geometry geometry-forced geometry-kind"),
        ("mbridge-config explain geometry ", ""),
        ("mbridge-config schema ", "reasoning sft"),
        ("mbridge-config nothing ", ""),
        ("mbridge-config check -cp DIR ", "broken built run tune"),
        ("mbridge-config check -cp DIR r", "run"),
        ("mbridge-config check -cp DIR run --", "--config-path --help --json --memory --world-size"),
        ("mbridge-config check -cp DIR run runner.s", "runner.save_interval= runner.seq_length="),
        ("mbridge-config check -cp DIR --world-size 4 run +++actor.opt", "+++actor.optim."),
        ("mbridge-config check run -cp DIR data.seed=1 ~data.sh", "~data.shuffle"),
        ("mbridge-config check run -cp DIR data.type=", "data.type=math data.type=reasoning_gym"),
        ("mbridge-config check run -cp DIR data.shuffle=t", "data.shuffle=true"),
        (
            "mbridge-config check run -cp DIR actor.optim.fp16=",
            "actor.optim.fp16=" + " actor.optim.fp16=".join(TERNARY),
        ),
        ("mbridge-config check run -cp DIR actor.seed=", ""),
        ("mbridge-config check run -cp DIR no.such.key=", ""),
        # the kind of run decides: data.max_pixels is a key of SFT
        ("mbridge-config check run -cp DIR data.max_p", "data.max_prompt_length="),
        ("mbridge-config check tune -cp DIR data.max_p", "data.max_pixels="),
        ("mbridge-config check built -cp DIR data.max_p", "data.max_pixels= data.max_prompt_length="),
        ("mbridge-config check broken -cp DIR data.max_p", "data.max_pixels= data.max_prompt_length="),
        ("mbridge-config check nowhere -cp DIR data.max_p", "data.max_pixels= data.max_prompt_length="),
        # keys without effect are not offered
        ("mbridge-config check run -cp DIR rollout.val", ""),
        ("app -cp DIR data.max_p", "data.max_prompt_length="),
        ("app -cp DIR --config-name ", "broken built run tune"),
        ("app -cp DIR --config-name tune data.max_p", "data.max_pixels="),
        ("app -cp DIR --", "--config-name --config-path --help"),
        ("app data.max_p", ""),
    ],
)
def test_offers(offered: Offered, line: str, expected: str) -> None:
    assert offered(line) == expected.split()


def test_installed_configs(offered: Offered) -> None:
    if "sft" not in installed_directories():
        pytest.skip("the SFT app is not installed")
    assert offered("mbridge-config check sft/quick") == ["sft/quickstart"]
    assert offered("mbridge-config check sft/quickstart data.max_b") == ["data.max_bad_rows="]


def test_the_cursor_and_the_shell(offered: Offered, capsys: pytest.CaptureFixture[str]) -> None:
    assert offered("mbridge-config sche and more", point=len("mbridge-config sche")) == ["schema"]
    assert offered("mbridge-config ", shell="fish") == sorted(COMMANDS)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_install_and_uninstall(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    for flag, action in zip(FLAGS, ("install", "uninstall"), strict=True):
        assert main([flag, f"{action}={shell}"]) == 0
        assert "hydra" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["-sc"], ["-sc", "install"], ["-sc", "install=csh"], ["-sc", "a", "b"]])
def test_wrong_requests(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert "error[usage]" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="is not known"):
        parse_arguments(words, program="app", package_config="no_package")


def test_in_bash(yaml: Path, tmp_path: Path) -> None:
    """The effect of `eval "$(mbridge-config -sc install=bash)"` on a real bash."""
    command = tmp_path / "bin" / "mbridge-config"
    command.parent.mkdir()
    command.write_text(f"#!{sys.executable}\nimport sys\nfrom mbridge_config.cli.main import main\nsys.exit(main())\n")
    command.chmod(0o755)
    script = f"""
eval "$(mbridge-config -sc install=bash)"
complete -p mbridge-config | grep -o 'hydra_bash_completion'
COMP_LINE="mbridge-config check run -cp {yaml} actor.optim.adam_b"
COMP_POINT=${{#COMP_LINE}} COMP_CWORD=5
hydra_bash_completion
echo "${{COMPREPLY[@]}}"
"""
    environment = os.environ | {"PATH": f"{command.parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "--norc", "-c", script], capture_output=True, text=True, timeout=60, env=environment, check=False
    )
    assert done.stdout.split() == ["hydra_bash_completion", "actor.optim.adam_beta1=", "actor.optim.adam_beta2="], done
