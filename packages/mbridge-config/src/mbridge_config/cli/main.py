"""`mbridge-config`: the commands. `check NAME [key=value ...] [--world-size N] [--json]`: will this config run?"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from mbridge_config.cli.completion import Complete, answer, complete_config, how
from mbridge_config.load.arguments import Parser, memory_size
from mbridge_config.load.catalog import config_names, installed_directories
from mbridge_config.problems import ConfigError, ordered
from mbridge_config.run.kinds import SCHEMAS

EXIT_ERRORS = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, or 2 where there are errors."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if answer(words, _complete):
            return 0
        if words and words[0] in COMMANDS:
            return COMMANDS[words[0]][0](words[1:])
        commands = _commands()
        commands.parse_args(words)
        commands.error("the command must come first")
    except ConfigError as error:
        if "--json" in words:
            print(json.dumps({"ok": False, "problems": [problem.as_dict() for problem in error.problems]}, indent=2))
        else:
            print(error, file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # the reader has seen enough, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _commands() -> argparse.ArgumentParser:
    parser = Parser(
        prog="mbridge-config",
        description="Check configs of mbridge runs before a GPU is touched.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"{_listing()}\n\n{how('mbridge-config')}",
    )
    listing = "; ".join(f"{name}: {text}" for name, (_, text) in COMMANDS.items())
    parser.add_argument("command", choices=list(COMMANDS), help=listing)
    return parser


def _complete(before: Sequence[str], word: str) -> Iterable[str]:
    if not before:
        return COMMANDS
    return COMPLETIONS[before[0]](before[1:], word) if before[0] in COMPLETIONS else ()


def _explain(words: Sequence[str]) -> int:
    from mbridge_config.cli.explain import run

    return run(words)


def _ids(before: Sequence[str], _: str) -> Iterable[str]:
    from mbridge_config.rules.explanations import explanations

    return () if before else explanations()


def _schema(words: Sequence[str]) -> int:
    from mbridge_config.cli.json_schema import run

    return run(words)


def _check(words: Sequence[str]) -> int:
    parser = Parser(
        prog="mbridge-config check", formatter_class=argparse.RawDescriptionHelpFormatter, epilog=_listing()
    )
    parser.add_argument("name", metavar="NAME", help="name of a config, or a YAML file")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="set a key")
    parser.add_argument("--config-path", "-cp", metavar="DIR", type=Path, help="directory of configs")
    parser.add_argument("--world-size", metavar="N", type=int, help="ranks of the run, on all hosts")
    parser.add_argument("--memory", metavar="GIB", type=memory_size, help="memory of a GPU, which a rank must fit")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_intermixed_args(list(words))
    if arguments.world_size is not None and arguments.world_size < 1:
        parser.error(f"--world-size {arguments.world_size} is less than 1")

    # hydra takes half a second to import; --help does without it
    from mbridge_config.check import check
    from mbridge_config.load.compose import compose
    from mbridge_config.load.resolved import resolved, resolved_text
    from mbridge_config.plan.memory_check import memory_problems
    from mbridge_config.plan.text import plan_text

    config = compose(arguments.name, arguments.config_path, arguments.overrides, strict=False)
    report = check(config, arguments.world_size)
    if arguments.memory is not None:
        report.problems = ordered([*report.problems, *memory_problems(config, report, arguments.memory)])
    if arguments.json:
        found = _as_json(arguments.name, report) | {"memory_gib": arguments.memory, "resolved": resolved(config)}
        print(json.dumps(found, indent=2))
    else:
        if str(report):
            print(report, end="\n\n")
        if not report.errors:  # what could not be used has its default instead
            print(f"resolved config, without what is at its default:\n{resolved_text(config)}")
        if report.plan is not None:
            if report.world_size is None:
                print("smallest number of ranks (give --world-size for yours):")
            print(plan_text(report.plan, arguments.memory), end="")
        count = len(report.errors)
        print(f"{arguments.name}: {'ok' if not count else f'{count} error' + ('s' if count > 1 else '')}")
    return EXIT_ERRORS if report.errors else 0


def _as_json(name: str, report: Any) -> dict[str, Any]:
    plan = None if report.plan is None else report.plan.as_dict()
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


def _fit(words: Sequence[str]) -> int:
    from mbridge_config.cli.fit_command import run

    return run(words)


def _init(words: Sequence[str]) -> int:
    from mbridge_config.cli.init import run

    return run(words)


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "check": (_check, "print all problems of a config, and the parallel plan"),
    "fit": (_fit, "print layouts that fit the memory of GPUs, best first"),
    "init": (_init, "write a config for a model"),
    "explain": (_explain, "print cause and fix of a problem"),
    "schema": (_schema, "print a JSON schema, for editors that complete YAML"),
}
"""What runs each command, and its line in the help. A command imports what it needs when it runs."""

COMPLETIONS: dict[str, Complete] = {
    "check": complete_config("--world-size", "--memory", "--json"),
    "explain": _ids,
    "fit": complete_config("--gpus", "--memory", "--json"),
    "init": lambda before, _: () if before else SCHEMAS,
    "schema": lambda before, _: () if before else SCHEMAS,
}
"""What the shell completes behind each command."""


if __name__ == "__main__":
    sys.exit(main())
