"""Scores answers by math-verify: the final answer is compared with the solutions as mathematics, not as text."""

import functools
import logging
import re
from typing import Any

from mbridge_reasoning.rewards.base import Answer, Scorer, one_by_one
from mbridge_reasoning.rewards.extraction import without_thoughts


def math_scorer() -> Scorer:
    """Make a scorer: 1.0 where the final answer equals any of the solutions, 0.0 otherwise.

    The last \\boxed{…} counts first, and boxes close before it count as one answer with it, so that two guesses are not
    a right one; then other LaTeX, then plain expressions. What comes before a closing </think> does not count, nor does
    an escaped dollar sign.
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    _mend_percentages()
    # It would say that its time limits are off; the worker's own limits replace them.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    extraction = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]

    @functools.lru_cache(maxsize=4096)
    def parsed_solution(solution: str) -> tuple[Any, ...]:
        # LaTeX is found only inside an environment. With its full stop, a number would be text.
        plain = _without_currency(solution).rstrip(". ")
        delimited = plain if "\\boxed" in plain or "$" in plain else f"\\boxed{{{plain}}}"
        return tuple(parse(delimited, extraction, parsing_timeout=None))

    def score(answer: Answer) -> float:
        found = parse(_without_currency(without_thoughts(answer.text)), extraction, parsing_timeout=None)
        if not found:
            return 0.0
        solutions = answer.prompt.solutions
        return float(any(verify(list(parsed_solution(s)), found, timeout_seconds=None) for s in solutions))

    return one_by_one(score)


def _mend_percentages() -> None:
    """Give ANTLR's parser a function that latex2sympy2-extended asks for wherever it meets a percentage.

    The parser of ANTLR 4.9.3, which hydra needs, lacks it, and math-verify then reads no percentages.
    """
    from latex2sympy2_extended.antlr_parser import PSParser

    if not hasattr(PSParser.AtomContext, "FUNC_GAMMA"):
        PSParser.AtomContext.FUNC_GAMMA = lambda context: None


def _without_currency(text: str) -> str:
    r"""Remove `\$`, which delimits no LaTeX but is taken for a delimiter; `\\$` is a line break and a delimiter."""
    return re.sub(r"(?<!\\)\\\$", "", text)
