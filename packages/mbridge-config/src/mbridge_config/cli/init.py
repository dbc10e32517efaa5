"""`mbridge-config init reasoning|sft --model DIR [--data FILE ...] [--output FILE]`: a first config for a model."""

import dataclasses
import json
import os
import tomllib
from collections.abc import Sequence
from pathlib import Path

from mbridge_config.cli.arguments import Parser
from mbridge_config.facts.model import HFFacts
from mbridge_config.load.catalog import SUFFIX
from mbridge_config.paths import is_file, user_path
from mbridge_config.plan.parameters import count_parameters
from mbridge_config.problems import ConfigError, refusal, shown

_LONGEST = {"reasoning": 1024, "sft": 4096}
_APPS = {"reasoning": "mbridge-reasoning", "sft": "mbridge-sft"}


def run(words: Sequence[str]) -> int:
    """Write a config and check it; return 0, or 2 if the check finds errors. Raises `ConfigError`."""
    parser = Parser(prog="mbridge-config init", description="Write a config for a model, and check it.")
    parser.add_argument("task", choices=list(_LONGEST), help="what to train")
    parser.add_argument("--model", metavar="DIR", required=True, help="HuggingFace directory: config.json, weights")
    parser.add_argument(
        "--data", metavar="FILE", nargs="+", help="what to train on; without it, generated problems or digits"
    )
    parser.add_argument("--output", metavar="FILE", help="the config to write; without it, reasoning.yaml or sft.yaml")
    arguments = parser.parse_args(list(words))
    try:
        text = config_text(arguments.task, arguments.model, arguments.data or ())
    except ConfigError as error:
        raise ConfigError([dataclasses.replace(problem, key="--model") for problem in error.problems]) from error
    file = user_path(arguments.output or f"{arguments.task}.yaml")
    _write(file, text)
    print(f"wrote {shown(file)}")

    from mbridge_config.check import check
    from mbridge_config.load.compose import compose

    report = check(compose(str(file), strict=False))
    if report.problems:
        print(report)
    print(
        f"  mbridge-config check {shown(file)}\n"
        f"  mbridge-config fit {shown(file)} --gpus 8 --memory 80\n"
        f"  {_APPS[arguments.task]} --config-name {shown(file)}"
    )
    return 2 if report.errors else 0


def config_text(task: str, model: str | Path, data: Sequence[str] = ()) -> str:
    """Return a commented YAML for `task` with the model in the directory `model`.

    Without `data`, a reasoning run solves arithmetic of reasoning-gym, and one of a vision-language model reads
    handwritten digits. Raises `ConfigError` if the model is missing, or cannot be trained this way.
    """
    facts = HFFacts.load(model)
    directory = facts.directory.resolve()
    if task == "reasoning" and facts.has_vision:
        raise _refused(model, "it is a vision-language model, and reasoning runs train on text", "use `init sft`")
    if task == "sft" and not facts.has_vision and not data:
        raise _refused(model, "it reads no images, and the data that can be created is images", "add --data FILE.jsonl")
    longest = min(_LONGEST[task], facts.max_position_embeddings or _LONGEST[task])
    count = count_parameters(facts)
    size = f"{facts.num_layers} layers" + (f", {count:,} parameters" if count else "")
    paths = json.dumps([_text(os.path.abspath(user_path(path))) for path in data])
    template = tomllib.loads(Path(__file__).with_name("init_templates.toml").read_text(encoding="utf-8"))[task]
    text: str = template["config"].format(
        model=json.dumps(_text(directory)),
        name=json.dumps(_text(f"{directory.name}-{task}")),
        title=f"{facts.architectures[0]}, {size}",
        longest=longest,
        prompt=longest // 4,
        tokens=max(8192, longest),
        template=str(_has_chat_template(directory)).lower(),
        data=template["data"].format(paths=paths) if data else template["made"],
        reward="math" if data else "reasoning_gym",
        quickstart="" if data or task == "reasoning" else "\nquickstart:\n  enabled: true  # creates the digits\n",
    )
    return text


def _has_chat_template(directory: Path) -> bool:
    """Return whether the tokenizer has a chat template."""
    if any(is_file(directory / name) for name in ("chat_template.jinja", "chat_template.json")):
        return True
    settings = directory / "tokenizer_config.json"
    return is_file(settings) and '"chat_template"' in settings.read_text(encoding="utf-8", errors="replace")


def _text(value: object) -> str:
    """Return `value` escaped, so that OmegaConf does not take it for an interpolation."""
    return str(value).replace("${", "\\${")


def _write(file: Path, text: str) -> None:
    if file.suffix != SUFFIX:
        raise _refused(file, "a config ends in .yaml", f"use {file}.yaml", key="--output")
    try:
        with file.open("x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError:
        raise _refused(file, "the file is there already", "name another with --output", key="--output") from None
    except OSError as error:
        raise _refused(file, f"it cannot be written: {error.strerror}", "name another place", key="--output") from error


def _refused(value: object, reason: str, fix: str, key: str = "--model") -> ConfigError:
    return refusal("init-refused", reason, fix, key=key, value=str(value))
