"""`mbridge-config`: the commands. `check NAME [key=value ...] [--world-size N] [--json]`: will this config run?"""

import argparse
import importlib
import json
import os
import sys
from collections.abc import Iterable, Sequence

from mbridge_config.cli.arguments import Parser, config_listing
from mbridge_config.cli.completion import Complete, answer, complete_config, how
from mbridge_config.problems import ConfigError
from mbridge_config.schema.run_kinds import SCHEMAS


def _ids(before: Sequence[str], _: str) -> Iterable[str]:
    from mbridge_config.rules.explanations import explanations

    return () if before else explanations()


def _kinds(before: Sequence[str], _: str) -> Iterable[str]:
    return () if before else SCHEMAS


_CHECK = complete_config("--world-size", "--memory", "--json")
_FIT = complete_config("--gpus", "--memory", "--json")
COMMANDS: dict[str, tuple[str, str, Complete]] = {
    "check": ("commands:run_check", "print all problems of a config, and the parallel plan", _CHECK),
    "fit": ("commands:run_fit", "print layouts that fit the memory of GPUs, best first", _FIT),
    "init": ("init:run", "write a config for a model", _kinds),
    "explain": ("commands:run_explain", "print cause and fix of a problem", _ids),
    "schema": ("json_schema:run", "print a JSON schema, for editors that complete YAML", _kinds),
}
"""For each command the function of this room that runs it, imported when it runs, its line in the help, and what the
shell completes after it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, or 2 if there are errors."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if answer(words, _complete):
            return 0
        if words and words[0] in COMMANDS:
            module, function = COMMANDS[words[0]][0].split(":")
            code: int = getattr(importlib.import_module(f"mbridge_config.cli.{module}"), function)(words[1:])
            return code
        parser = _parser()
        parser.parse_args(words)
        parser.error("the command must come first")
    except ConfigError as error:
        if "--json" in words:
            print(json.dumps({"ok": False, "problems": [problem.as_dict() for problem in error.problems]}, indent=2))
        else:
            print(error, file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # the reader has seen enough, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="mbridge-config",
        description="Check configs of mbridge runs before a GPU is touched.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"{config_listing()}\n\n{how('mbridge-config')}",
    )
    listing = "; ".join(f"{name}: {text}" for name, (_, text, _) in COMMANDS.items())
    parser.add_argument("command", choices=list(COMMANDS), help=listing)
    return parser


def _complete(before: Sequence[str], word: str) -> Iterable[str]:
    if not before:
        return COMMANDS
    return COMMANDS[before[0]][2](before[1:], word) if before[0] in COMMANDS else ()


if __name__ == "__main__":
    sys.exit(main())
