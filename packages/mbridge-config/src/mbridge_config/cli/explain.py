"""`mbridge-config explain [ID]`: cause and fix of a problem; without an id, all ids."""

import difflib
import textwrap
from collections.abc import Sequence

from mbridge_config.load.arguments import Parser
from mbridge_config.problems import ConfigError, Problem
from mbridge_config.rules.explanations import Explanation, explanations


def run(words: Sequence[str]) -> int:
    """Print the explanation of `words[0]`, or all ids; raises `ConfigError` for an unknown id."""
    parser = Parser(prog="mbridge-config explain", description="Cause and fix of a problem.")
    parser.add_argument("id", metavar="ID", nargs="?", help="what stands in brackets behind error, warning or note")
    identity = parser.parse_args(list(words)).id
    known = explanations()
    if identity is None:
        width = max(map(len, known))
        for name, meanings in known.items():
            print(f"{name:{width}}  {textwrap.shorten(meanings[0].cause, 100)}")
        return 0
    if identity not in known:
        raise _unknown(identity, list(known))
    print("\n\n".join(_text(meaning) for meaning in known[identity]))
    return 0


def _text(explanation: Explanation) -> str:
    runs = f" ({explanation.runs} runs)" if explanation.runs else ""
    lines = [f"{explanation.id}{runs}"]
    for label, text in (("cause", explanation.cause), ("fix", explanation.fix)):
        lines.append(textwrap.fill(text, 100, initial_indent=f"  {label + ':':7}", subsequent_indent=" " * 9))
    return "\n".join(lines)


def _unknown(identity: str, known: Sequence[str]) -> ConfigError:
    close = difflib.get_close_matches(identity, known, n=3)
    fix = f"did you mean {' or '.join(close)}?" if close else "`mbridge-config explain` lists all ids"
    return ConfigError(
        Problem(id="no-such-problem", key="ID", value=identity, reason="no problem has this id", fix=fix)
    )
