"""Find configs: the directories of installed apps, the names in them, and the file that a name means."""

import difflib
import functools
import importlib.util
from pathlib import Path

from mbridge_config.paths import is_directory, is_file, is_there
from mbridge_config.problems import ConfigError, refusal

ENTRY_POINTS = "mbridge.configs"
SUFFIX = ".yaml"


def config_directory(package: str) -> Path:
    """Return the directory of the configs of the app whose import name is `package`.

    An installed app has them inside its package; an app that runs from its source tree has them beside `src`.
    The package is located, not imported. Raises `ConfigError` if neither directory exists.
    """
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    if spec is not None and spec.origin is not None:
        inside = Path(spec.origin).parent
        for place in (inside / "config", inside.parent.parent / "config"):
            if place.is_dir():
                return place
    reason, fix = "has no directory of configs", f"install {package}, or name a directory with --config-path"
    raise refusal("no-packaged-configs", f"the package {package} {reason}", fix, value=package)


@functools.cache
def installed_directories() -> dict[str, Path]:
    """Return the config directories of all installed apps by name (entry point group `mbridge.configs`)."""
    import importlib.metadata  # slow to import, and only this function needs it

    found: dict[str, Path] = {}
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        try:
            found[entry.name] = config_directory(entry.module)
        except ConfigError:
            continue  # an app that was removed leaves its entry behind
    return found


def config_names(directory: Path) -> list[str]:
    """Return the names of all configs in `directory` and below, such as `math/qwen2.5-1.5b-grpo-megatron`."""
    files = (path.relative_to(directory) for path in directory.rglob(f"*{SUFFIX}"))
    return sorted(file.as_posix().removesuffix(SUFFIX) for file in files)


def locate(name: str, config_path: str | Path | None, package: str | None) -> tuple[Path, Path]:
    """Return the file that `name` means, and the config directory that contains it.

    That is `config_path`; without it, that of the app with the import name `package`; without both, those of all
    installed apps, where `sft/quickstart` is the config of the app sft. `name` is a path below the directory without
    its suffix, or the last part of one, or the path of a YAML file. Raises `ConfigError` for an unknown or ambiguous
    name.
    """
    if config_path is not None:
        return _find_in(name, given_directory(config_path))
    if package is not None:
        return _find_in(name, config_directory(package))
    apps = installed_directories()
    app, _, rest = name.partition("/")
    if rest and app in apps:
        return _find_in(rest, apps[app])
    holders = [app for app, directory in apps.items() if _matches(name.removesuffix(SUFFIX), directory)]
    if len(holders) > 1 and not is_file(name):
        fix = f"use one of {', '.join(f'{app}/{name}' for app in holders)}"
        raise _wrong_name(name, "more than one app has a config of this name", fix)
    labels = [(known, f"{app}/{known}") for app, directory in apps.items() for known in config_names(directory)]
    return _find(name, list(apps.values()), labels)


def _find_in(name: str, directory: Path) -> tuple[Path, Path]:
    return _find(name, [directory], [(known, known) for known in config_names(directory)])


def _find(name: str, directories: list[Path], available: list[tuple[str, str]]) -> tuple[Path, Path]:
    """`available` has each config's name, and the name under which a message lists it."""
    if name.endswith(SUFFIX) and is_file(name):
        file = Path(name).resolve()
        return file, file.parent
    wanted = name.removesuffix(SUFFIX)
    for directory in directories:
        matches = _matches(wanted, directory)
        if len(matches) == 1:
            return directory / f"{matches[0]}{SUFFIX}", directory
        if matches:
            raise _wrong_name(name, "more than one config has this name", f"use one of {', '.join(matches)}")
    if is_directory(name):
        raise _wrong_name(name, "it is a directory", f"name a YAML file in it, or `--config-path {name}` and a config")
    if is_file(name):
        raise _wrong_name(name, f"the file's name does not end in {SUFFIX}, as Hydra needs it", "rename it")
    if not available:
        places = ", ".join(map(str, directories)) or "no directory"
        raise _wrong_name(name, f"there are no configs in {places}", "name a directory with --config-path")
    # nearest first: by the last part, then the others in their order
    leaves: dict[str, list[str]] = {}
    for known, label in available:
        leaves.setdefault(known.rpartition("/")[2], []).append(label)
    near = difflib.get_close_matches(wanted.rpartition("/")[2], leaves, n=5, cutoff=0.3)
    listing = dict.fromkeys([*(label for leaf in near for label in leaves[leaf]), *(label for _, label in available)])
    raise _wrong_name(name, "there is no such config", f"available, nearest first: {', '.join(listing)}")


def _matches(wanted: str, directory: Path) -> list[str]:
    """Return the names in `directory` that `wanted` may mean: itself, or all that end with it."""
    names = config_names(directory)
    return [wanted] if wanted in names else [known for known in names if known.rpartition("/")[2] == wanted]


def _wrong_name(name: str, reason: str, fix: str) -> ConfigError:
    return refusal("no-such-config", reason, fix, key="--config-name", value=name)


def given_directory(path: str | Path) -> Path:
    """Return `--config-path` as an absolute directory; raise `ConfigError` if it is not one."""
    if is_directory(path):
        return Path(path).resolve()
    reason = "it is a file, not a directory" if is_there(path) else "there is no such directory"
    fix = "give the directory that the YAML file is in"
    raise refusal("no-such-directory", reason, fix, key="--config-path", value=str(path))
