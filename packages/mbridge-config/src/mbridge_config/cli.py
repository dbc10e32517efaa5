"""`mbridge-config check NAME [key=value ...] [--world-size N] [--json]`: will this config run?"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from mbridge_config.catalog import config_names, installed_directories
from mbridge_config.problems import ConfigError, Problem

EXIT_ERRORS = 2


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(Problem(id="usage", key=None, value=None, reason=message, fix=f"see `{self.prog} --help`"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, or 2 where there are errors."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if words[:1] == ["check"]:
            return _check(words[1:])
        commands = _commands()
        commands.parse_args(words)
        commands.error("the command must come first")
    except ConfigError as error:
        if "--json" in words:
            print(json.dumps({"ok": False, "problems": [problem.as_dict() for problem in error.problems]}, indent=2))
        else:
            print(error, file=sys.stderr)
        return error.exit_code


def _commands() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="mbridge-config",
        description="Check configs of mbridge runs before a GPU is touched.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_listing(),
    )
    parser.add_argument("command", choices=["check"], help="check NAME: print all problems, and the parallel plan")
    return parser


def _check(words: Sequence[str]) -> int:
    parser = _Parser(
        prog="mbridge-config check", formatter_class=argparse.RawDescriptionHelpFormatter, epilog=_listing()
    )
    parser.add_argument("name", metavar="NAME", help="name of a config, or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="set a key")
    parser.add_argument("--config-path", "-cp", metavar="DIR", type=Path, help="directory of configs")
    parser.add_argument("--world-size", metavar="N", type=int, help="ranks of the run, on all hosts")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_intermixed_args(list(words))
    if arguments.world_size is not None and arguments.world_size < 1:
        parser.error(f"--world-size {arguments.world_size} is less than 1")

    # hydra takes half a second to import; --help does without it
    from mbridge_config.check import check
    from mbridge_config.compose import compose

    config = compose(arguments.name, arguments.config_path, arguments.overrides, strict=False)
    report = check(config, arguments.world_size)
    if arguments.json:
        print(json.dumps(_as_json(arguments.name, report), indent=2))
    else:
        if str(report):
            print(report, end="\n\n")
        if report.plan is not None:
            if report.world_size is None:
                print("smallest number of ranks (give --world-size for yours):")
            print(report.plan)
        count = len(report.errors)
        print(f"{arguments.name}: {'ok' if not count else f'{count} error' + ('s' if count > 1 else '')}")
    return EXIT_ERRORS if report.errors else 0


def _as_json(name: str, report: Any) -> dict[str, Any]:
    import dataclasses

    plan = None if report.plan is None else dataclasses.asdict(report.plan)
    return {
        "config": name,
        "ok": not report.errors,
        "world_size": report.world_size,
        "plan": plan,
        "problems": [problem.as_dict() for problem in report.problems],
    }


def _listing() -> str:
    names = [f"{app}/{name}" for app, directory in installed_directories().items() for name in config_names(directory)]
    return "configs of installed apps:\n" + ("\n".join(f"  {name}" for name in names) or "  none")


if __name__ == "__main__":
    sys.exit(main())
