"""Let Hydra merge a YAML file, its defaults list and the arguments into one tree, and find where keys were set."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mbridge_config.load.interpolations import register
from mbridge_config.paths import is_directory, is_file
from mbridge_config.problems import ConfigError, Where, refusal, shown


def hydra_tree(file: Path, directory: Path, overrides: Sequence[str]) -> tuple[dict[Any, Any], dict[str, Where]]:
    """Return the tree of `file` in the config directory `directory`, and the place where each of its keys was set.

    Interpolations are left as they are. Defaults are looked up beside `file`, then in `directory`. Raises
    `ConfigError`.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from hydra.types import RunMode
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    register()
    folders = [file.parent] if file.parent == directory else [file.parent, directory]
    own_places = places_of(file)
    arguments = [_argument(override, folders) for override in overrides]
    # asking Hydra again for the files it used costs as much as composing: only where there may be others
    has_defaults = "defaults" in own_places or any(not argument.startswith("++") for argument in arguments)
    if len(folders) > 1 and "hydra.searchpath" not in own_places:
        arguments.append(f"hydra.searchpath=[{_quoted(f'file://{directory}')}]")
    name = file.name.removesuffix(".yaml")
    # An OSError where Hydra looks for a file named like an argument, whose name is too long.
    failures = (HydraException, OmegaConfBaseException, yaml.YAMLError, OSError, ValueError, TypeError, AttributeError)
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(file.parent)):
            tree = OmegaConf.to_container(compose(name, overrides=arguments), resolve=False)
            defaults: list[Any] = []
            if has_defaults:
                loader = GlobalHydra.instance().config_loader()
                defaults = loader.compute_defaults_list(name, arguments, RunMode.RUN).defaults
    except yaml.MarkedYAMLError as error:
        raise yaml_error(error, shown(file)) from error
    except failures as error:
        raise _failed(error, own_places.get("defaults", Where(file=shown(file))), overrides) from error
    assert isinstance(tree, dict)
    places: dict[str, Where] = {} if defaults else own_places
    for default in defaults:
        files = [folder / f"{default.config_path}.yaml" for folder in folders]
        if part := next((part for part in files if is_file(part)), None):
            places |= own_places if part == file else places_of(part, default.package or "")
    for override in overrides:
        if not override.startswith("~"):
            key, place = override.partition("=")[0].lstrip("+"), Where(argument=override)
            places[key] = place
            while key := key.rpartition(".")[0]:
                places.setdefault(key, place)  # a section that no file has
    return tree, dict(_placed(tree, places, Where(file=shown(file)), ""))


def _argument(override: str, folders: Sequence[Path]) -> str:
    """Return `override` in the form that sets a key whether or not a file has it; the schema knows which keys exist."""
    key = override.partition("=")[0].lstrip("+")
    is_group = "@" in key or "/" in key or any(is_directory(folder / key) for folder in folders if key)
    if override.startswith("~") or is_group or key.startswith("hydra."):
        return override
    if "=" not in override:
        reason, fix = "is not a key=value argument", "write key=value; the config is named with --config-name"
        place = Where(argument=override)
        raise refusal("override-syntax", f"{override!r} {reason}", fix, value=override, where=place)
    return f"++{override.lstrip('+')}"


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _placed(
    tree: Mapping[Any, Any], places: Mapping[str, Where], around: Where, prefix: str
) -> Iterator[tuple[str, Where]]:
    """Iterate over the keys of `tree` and their places; one without a place has that of the section around it.

    A key that an argument deleted or replaced is not in the tree, and so is no longer set.
    """
    for name, value in tree.items():
        path = f"{prefix}{name}"
        place = places.get(path, around)
        yield path, place
        if isinstance(value, Mapping):
            yield from _placed(value, places, place, f"{path}.")


def _failed(error: Exception, where: Where, overrides: Sequence[str]) -> ConfigError:
    """Return Hydra's error as a problem, with the argument that caused it if there is one, else with `where`."""
    from hydra.errors import OverrideParseException

    text = str(error).partition("Config search path:")[0]  # the directories are known
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
    argument = next((override for override in overrides if override.lstrip("+") in str(error)), None)
    if isinstance(error, OverrideParseException) or argument is not None:
        shown_argument = argument or difflib.get_close_matches(str(error), overrides, n=1, cutoff=0.0)[0]
        reason, where = f"the argument cannot be used: {lines[0]}", Where(argument=shown_argument)
        fix = "write key=value, and put quotes around a value with commas, brackets or blanks: key='\"a, b\"'"
        return refusal("override-syntax", reason, fix, value=shown_argument, where=where)
    reason = f"the config cannot be put together: {' '.join(lines[:3])}"
    return refusal("compose-failed", reason, "mend the file or its defaults list", where=where)


# the C loader where there is one: three times faster on a config of 300 lines
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def places_of(file: Path, prefix: str = "") -> dict[str, Where]:
    """Return the place of each key and section of the YAML `file`, by full name under `prefix`.

    Raises `ConfigError` for a file that cannot be read, is not YAML, or holds no keys.
    """
    name = shown(file)
    try:
        root = yaml.compose(file.read_text(encoding="utf-8"), Loader=_LOADER)
    except yaml.MarkedYAMLError as error:
        raise yaml_error(error, name) from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise _unreadable(name, None, f"the file cannot be read: {error}", "write it as YAML in UTF-8") from error
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise _unreadable(name, root.start_mark.line + 1, "the file holds no keys", "write `key: value` lines")
    places: dict[str, Where] = {}
    stack: list[tuple[yaml.Node, str]] = [(root, prefix)]
    seen: set[int] = set()
    while stack:
        node, path = stack.pop()
        if id(node) in seen or not isinstance(node, yaml.MappingNode):
            continue  # an anchor may point back to a node around it
        seen.add(id(node))
        for key_node, value_node in node.value:
            key = f"{path}.{key_node.value}" if path else str(key_node.value)
            places[key] = Where(file=name, line=key_node.start_mark.line + 1)
            stack.append((value_node, key))
    return places


def yaml_error(error: yaml.MarkedYAMLError, name: str) -> ConfigError:
    """Return a YAML error as a `ConfigError` with its line."""
    mark = error.problem_mark or error.context_mark
    line = None if mark is None else mark.line + 1
    reason = f"not valid YAML: {error.problem or error.context}"
    if error.problem and error.context_mark is not None and error.context_mark.line + 1 != line:
        reason += f", {error.context} that starts in line {error.context_mark.line + 1}"
    return _unreadable(name, line, reason, "mend the line")


def _unreadable(name: str, line: int | None, reason: str, fix: str) -> ConfigError:
    return refusal("yaml-syntax", reason, fix, where=Where(file=name, line=line))
