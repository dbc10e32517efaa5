"""Complete config names, keys and values in a shell, by Hydra's protocol.

`eval "$(mbridge-config -sc install=bash)"`, and the same for each app, after which the shell asks
`mbridge-config -sc query=bash` with the line so far in COMP_LINE. Hydra's plugins install the completion in a shell.
The answers come from the schema, without Hydra, which would take most of a second each time.
"""

import os
import typing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from mbridge_config.compat.keys import known_keys
from mbridge_config.load.catalog import config_directory, config_names, given_directory, installed_directories, locate
from mbridge_config.problems import ConfigError, refusal
from mbridge_config.schema.keys import Status, describe_type, known_sections, union_parts
from mbridge_config.schema.run_kinds import SCHEMAS, schema_of

FLAGS = ("-sc", "--shell-completion")
_NAME_FLAGS = ("--config-name", "-cn")
_PATH_FLAGS = ("--config-path", "-cp")
_VALUED_FLAGS = (*_NAME_FLAGS, *_PATH_FLAGS, "--world-size", "--memory", "--gpus")
Complete = Callable[[Sequence[str], str], Iterable[str]]


def answer(words: Sequence[str], complete: Complete) -> bool:
    """Whether `words` ask for shell completion, which is then answered on standard output.

    `complete(before, word)` gives what the last word `word` may become after the words `before`. Raises `ConfigError`
    for a request that is none.
    """
    if not words or words[0] not in FLAGS:
        return False
    action, _, shell = words[1].partition("=") if len(words) == 2 else ("", "", "")
    if action == "query":
        line = os.environ.get("COMP_LINE", "")
        point = os.environ.get("COMP_POINT", "")
        line = line[: int(point)] if point.isdecimal() else line
        *before, word = [*line.split(), *([""] if line[-1:] in ("", " ") else [])]
        fitting = sorted({text for text in complete(before[1:], word) if text.startswith(word)})
        print(("\n" if shell == "fish" else " ").join(fitting))
        return True
    if action in ("install", "uninstall"):
        from hydra.core.plugins import Plugins
        from hydra.plugins.completion_plugin import CompletionPlugin

        for plugin in Plugins.instance().discover(CompletionPlugin):
            if plugin.provides() == shell:  # type: ignore[attr-defined]
                getattr(plugin(None), action)()  # type: ignore[call-arg]
                return True
    request, fix = " ".join(words), "write -sc install=SHELL or -sc uninstall=SHELL, with bash, zsh or fish"
    raise refusal("usage", f"{request!r} is not known", fix, value=request)


def how(program: str) -> str:
    """Return how to switch on completion for `program`."""
    return f'shell completion:\n  eval "$({program} -sc install=bash)"'


def complete_app(package: str, default_config: str | None) -> Complete:
    """Return the completion of the command line of the app with the import name `package`."""

    def complete(before: Sequence[str], word: str) -> Iterable[str]:
        path = _after(before, _PATH_FLAGS)
        try:
            directory = given_directory(path) if path else config_directory(package)
        except ConfigError:
            return
        if before and before[-1] in _NAME_FLAGS:
            yield from config_names(directory)
        elif word.startswith("-"):
            yield from ("--config-name", "--config-path", "--help")
        else:
            name = _after(before, _NAME_FLAGS) or default_config or ""
            yield from _overrides(_schemas(name, path, package), word)

    return complete


def complete_config(*flags: str) -> Complete:
    """Return the completion of a command that takes the name of a config, overrides and these flags."""

    def complete(before: Sequence[str], word: str) -> Iterable[str]:
        path = _after(before, _PATH_FLAGS)
        values = {place + 1 for place, text in enumerate(before) if text in _VALUED_FLAGS}
        given = [text for place, text in enumerate(before) if place not in values and not text.startswith("-")]
        name = next((text for text in given if "=" not in text), None)
        if word.startswith("-"):
            yield from (*flags, "--config-path", "--help")
        elif name is not None:
            yield from _overrides(_schemas(name, path, None), word)
        elif path:
            yield from config_names(Path(path))
        else:
            for app, directory in installed_directories().items():
                yield from (f"{app}/{known}" for known in config_names(directory))

    return complete


def _after(words: Sequence[str], flags: Sequence[str]) -> str | None:
    return next((words[place + 1] for place, text in enumerate(words[:-1]) if text in flags), None)


def _schemas(name: str, config_path: str | None, package: str | None) -> list[type]:
    """Return the schema of the file that `name` means, or all schemas if that cannot be told."""
    import yaml

    try:
        tree = yaml.safe_load(locate(name, config_path, package)[0].read_text(encoding="utf-8"))
    except (ConfigError, OSError, ValueError, yaml.YAMLError):
        tree = None
    if not isinstance(tree, dict):
        return list(SCHEMAS.values())
    runner = tree.get("runner")
    if "defaults" in tree and not (isinstance(runner, dict) and "task_type" in runner):
        return list(SCHEMAS.values())  # a file of the list may say it
    return [schema_of(tree)]


def _overrides(schemas: Sequence[type], word: str) -> Iterable[str]:
    """Complete keys one level at a time, `actor.` before `actor.optim.`; after `key=`, the values of the key."""
    sign = word[: len(word) - len(word.lstrip("+~"))]
    key, equals, _ = word[len(sign) :].partition("=")
    for schema in schemas:
        keys = known_keys(schema)
        if equals:
            yield from (f"{sign}{key}={value}" for value in (_values(keys[key].type) if key in keys else ()))
            continue
        level = key.count(".")
        for name in known_sections(schema):
            if name.count(".") == level:
                yield f"{sign}{name}."
        for name, info in keys.items():
            if name.count(".") == level and info.spec.status is not Status.NO_EFFECT:
                yield f"{sign}{name}" if sign == "~" else f"{sign}{name}="


def _values(hint: Any) -> list[str]:
    parts = union_parts(hint)
    listed = [part for part in parts if part in (bool, type(None)) or typing.get_origin(part) is typing.Literal]
    return [word for part in listed for word in describe_type(part).split(" | ")]
