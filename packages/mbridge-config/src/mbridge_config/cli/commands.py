"""The commands `check`, `fit` and `explain` of `mbridge-config`.

Each takes its words of the command line and returns the exit code. What takes long to import (Hydra, YAML) is imported
when a command runs, so that `--help` and completion answer at once.
"""

import argparse
import difflib
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mbridge_config.cli.arguments import Parser, config_listing, memory_size
from mbridge_config.problems import Problem, Severity, ordered, refusal, render
from mbridge_config.rules.explanations import Explanation, explanations

EXIT_ERRORS = 2


def run_check(words: Sequence[str]) -> int:
    """Print all problems of a config and its parallel plan; return 0, or 2 if there are errors."""
    parser = _config_parser("check", epilog=config_listing())
    parser.add_argument("--world-size", metavar="N", type=int, help="number of ranks, over all hosts")
    parser.add_argument("--memory", metavar="GIB", type=memory_size, help="memory of a GPU, which each rank must fit")
    arguments = parser.parse_intermixed_args(list(words))
    if arguments.world_size is not None and arguments.world_size < 1:
        parser.error(f"--world-size {arguments.world_size} is less than 1")

    from mbridge_config.check import check
    from mbridge_config.fit.fit import memory_problems
    from mbridge_config.load.compose import compose
    from mbridge_config.load.values import values_in_use, values_in_use_text
    from mbridge_config.plan.plan import plan_text

    config = compose(arguments.name, arguments.config_path, arguments.overrides, strict=False)
    report = check(config, arguments.world_size)
    too_large = [] if arguments.memory is None else memory_problems(config, report, arguments.memory)
    report.problems = ordered([*report.problems, *_environment_problems(), *too_large])
    if arguments.json:
        found = {
            "config": arguments.name,
            "ok": not report.errors,
            "world_size": report.world_size,
            "plan": None if report.plan is None else report.plan.as_dict(),
            "problems": [problem.as_dict() for problem in report.problems],
            "memory_gib": arguments.memory,
            "resolved": values_in_use(config),
        }
        print(json.dumps(found, indent=2))
    else:
        if str(report):
            print(report, end="\n\n")
        if not report.errors:  # a value that cannot be used has been replaced by its default
            print(f"resolved config, without what is at its default:\n{values_in_use_text(config)}")
        if report.plan is not None:
            if report.world_size is None:
                print("smallest number of ranks (give --world-size for yours):")
            print(plan_text(report.plan, arguments.memory), end="")
        count = len(report.errors)
        print(f"{arguments.name}: {'ok' if not count else f'{count} error' + ('s' if count > 1 else '')}")
    return EXIT_ERRORS if report.errors else 0


def _environment_problems() -> list[Problem]:
    """Return warnings of installed packages about this environment, which need not be the one of the run.

    An entry point of the group `mbridge.environment` names a function that returns reason and fix, or None.
    """
    import importlib.metadata

    return [
        Problem(id="incomplete-environment", reason=found[0], fix=found[1], severity=Severity.WARNING)
        for entry in importlib.metadata.entry_points(group="mbridge.environment")
        if (found := entry.load()()) is not None
    ]


def run_fit(words: Sequence[str]) -> int:
    """Print layouts that fit; return 0, or 2 if there are none or the config has errors that no layout fixes."""
    parser = _config_parser("fit", description="Layouts of a config that fit the memory of GPUs, best first, and why.")
    parser.add_argument("--gpus", metavar="N", type=_gpu_count, required=True, help="GPUs of the run, on all hosts")
    parser.add_argument("--memory", metavar="GIB", type=memory_size, required=True, help="memory of one GPU")
    arguments = parser.parse_intermixed_args(list(words))

    from mbridge_config.check import check
    from mbridge_config.fit.fit import fit
    from mbridge_config.fit.layouts import other_errors
    from mbridge_config.load.compose import compose

    config = compose(arguments.name, arguments.config_path, arguments.overrides, strict=False)
    report = check(config, arguments.gpus)
    found = fit(config, report, arguments.gpus, arguments.memory)
    errors = other_errors(config, report)
    ok = bool(found.fitting) and not errors
    if arguments.json:
        problems = [error.as_dict() for error in errors]
        print(json.dumps({"config": arguments.name, "ok": ok, **found.as_dict(), "problems": problems}, indent=2))
    else:
        if errors:
            print(f"{render(errors)}\n\nNo layout mends that. Layouts:\n")
        print(found, end="")
    return 0 if ok else EXIT_ERRORS


def _config_parser(command: str, **settings: Any) -> Parser:
    """Return a parser of `NAME [key=value ...] [--config-path DIR] [--json]`."""
    parser = Parser(prog=f"mbridge-config {command}", formatter_class=argparse.RawDescriptionHelpFormatter, **settings)
    parser.add_argument("name", metavar="NAME", help="name of a config, or a YAML file")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="set a key")
    parser.add_argument("--config-path", "-cp", metavar="DIR", type=Path, help="directory of configs")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _gpu_count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number of GPUs")
    return int(text)


def run_explain(words: Sequence[str]) -> int:
    """Print cause and fix of a problem, or all ids; raise `ConfigError` for an unknown id."""
    parser = Parser(prog="mbridge-config explain", description="Cause and fix of a problem.")
    parser.add_argument("id", metavar="ID", nargs="?", help="the word in brackets after error, warning or note")
    identity = parser.parse_args(list(words)).id
    known = explanations()
    if identity is None:
        width = max(map(len, known))
        for name, meanings in known.items():
            print(f"{name:{width}}  {textwrap.shorten(meanings[0].cause, 100)}")
        return 0
    if identity not in known:
        close = difflib.get_close_matches(identity, known, n=3)
        fix = f"did you mean {' or '.join(close)}?" if close else "`mbridge-config explain` lists all ids"
        raise refusal("no-such-problem", "no problem has this id", fix, key="ID", value=identity)
    print("\n\n".join(_explanation_text(meaning) for meaning in known[identity]))
    return 0


def _explanation_text(explanation: Explanation) -> str:
    runs = f" ({explanation.runs} runs)" if explanation.runs else ""
    lines = [f"{explanation.id}{runs}"]
    for label, text in (("cause", explanation.cause), ("fix", explanation.fix)):
        lines.append(textwrap.fill(text, 100, initial_indent=f"  {label + ':':7}", subsequent_indent=" " * 9))
    return "\n".join(lines)
