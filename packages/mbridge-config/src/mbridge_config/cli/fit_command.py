"""The command line of `mbridge-config fit`."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from mbridge_config.load.arguments import Parser, memory_size


def run(words: Sequence[str]) -> int:
    """Print layouts that fit; returns 0, or 2 where there are none or the config has errors that no layout mends."""
    parser = Parser(
        prog="mbridge-config fit",
        description="Layouts of a config that fit the memory of GPUs, best first, and why.",
    )
    parser.add_argument("name", metavar="NAME", help="name of a config, or a YAML file")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="set a key")
    parser.add_argument("--config-path", "-cp", metavar="DIR", type=Path, help="directory of configs")
    parser.add_argument("--gpus", metavar="N", type=_count, required=True, help="GPUs of the run, on all hosts")
    parser.add_argument("--memory", metavar="GIB", type=memory_size, required=True, help="memory of one GPU")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_intermixed_args(list(words))

    from mbridge_config.check import check
    from mbridge_config.load.compose import compose
    from mbridge_config.plan.fit import fit
    from mbridge_config.plan.layouts import other_errors
    from mbridge_config.problems import render

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
    return 0 if ok else 2


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number of GPUs")
    return int(text)
