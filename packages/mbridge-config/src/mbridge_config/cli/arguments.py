"""Parse the command line that all apps share: `--config-name`, `--config-path`, `key=value`."""

import argparse
import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from mbridge_config.cli.completion import answer, complete_app, how
from mbridge_config.load.catalog import config_directory, config_names, installed_directories
from mbridge_config.problems import ConfigError, refusal


@dataclasses.dataclass(kw_only=True, slots=True, frozen=True)
class Arguments:
    """The arguments of `compose`: `compose(**dataclasses.asdict(arguments), package_config=...)`."""

    config_name: str
    config_path: Path | None
    overrides: tuple[str, ...]


class Parser(argparse.ArgumentParser):
    """A parser whose errors are `ConfigError`."""

    def error(self, message: str) -> NoReturn:
        """Raise the error."""
        raise refusal("usage", message, f"see `{self.prog} --help`")


def parse_arguments(
    argv: Sequence[str] | None = None, *, program: str, package_config: str, default_config: str | None = None
) -> Arguments:
    """Return the arguments of an app; `argv` is `sys.argv[1:]` if None.

    `package_config` is the import name of the app, whose configs `--help` lists; `default_config` is the name
    used without `--config-name`. `--help`, and `-sc` for shell completion, print and exit with 0. Raises `ConfigError`
    for wrong arguments.
    """
    epilog = f"configs of {program}:\n{_listing(package_config)}\n\n{how(program)}"
    parser = Parser(prog=program, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="set a key; ~key puts its default back")
    place = "directory of configs, in place of the app's own"
    parser.add_argument("--config-path", "-cp", type=Path, metavar="DIR", help=place)
    name = "name of the config" + (f"; without it, {default_config}" if default_config else "")
    parser.add_argument("--config-name", "-cn", default=default_config, metavar="NAME", help=name)
    words = list(sys.argv[1:] if argv is None else argv)
    if answer(words, complete_app(package_config, default_config)):
        raise SystemExit(0)
    found = parser.parse_intermixed_args(words)
    if found.config_name is None:
        raise refusal("usage", "no config is named", f"add --config-name NAME; `{program} --help` lists the names")
    return Arguments(config_name=found.config_name, config_path=found.config_path, overrides=tuple(found.overrides))


def _listing(package: str) -> str:
    try:
        return "\n".join(f"  {name}" for name in config_names(config_directory(package)))
    except ConfigError:
        return "  none found"


def config_listing() -> str:
    """Return the configs of all installed apps as lines of a command's help."""
    names = [f"{app}/{name}" for app, directory in installed_directories().items() for name in config_names(directory)]
    return "configs of installed apps:\n" + ("\n".join(f"  {name}" for name in names) or "  none")


def memory_size(text: str) -> float:
    """Return a `--memory` in GiB; raise `argparse.ArgumentTypeError`."""
    try:
        size = float(text)
    except ValueError:
        size = 0.0
    if not 0 < size < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no size of a GPU's memory in GiB, such as 80")
    return size
