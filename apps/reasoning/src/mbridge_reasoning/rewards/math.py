"""Scores answers by math-verify: the final answer is compared with the solutions as mathematics, not as text."""

import functools
import logging
import re
from typing import Any

from mbridge_reasoning.rewards.answer_forms import same_form, split_choice, statement
from mbridge_reasoning.rewards.base import Answer, Scorer, one_by_one
from mbridge_reasoning.rewards.extraction import boxes, tagged_answer, without_thoughts
from mbridge_reasoning.rewards.math_notation import normalize, normalize_expression, without_chinese

EXACT = 1e-15
"""The largest relative difference at which two exact numbers, evaluated to 30 digits, count as equal."""

ROUNDED = 2e-6
"""The same where one of them is a decimal: 0.333333 is 1/3."""


def math_scorer() -> Scorer:
    """Make a scorer: 1.0 where the final answer equals any of the solutions, 0.0 otherwise.

    The last <answer>…</answer> is the answer if there is one, else the last \\boxed{…}, else other LaTeX, else a plain
    expression. Boxes shortly before the last one belong to the same answer, so that two guesses do not make a right
    one. An empty or unfinished tag or box is no answer, whatever precedes it, and neither are thoughts.
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    _mend_percentages()
    _compare_small_numbers()
    # It would warn that its time limits are off; the worker's limits replace them.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    extraction = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]

    @functools.lru_cache(maxsize=4096)
    def parsed(text: str) -> list[Any]:
        return list(parse(text, extraction, parsing_timeout=None))

    def score(answer: Answer) -> float:
        text = _answer(answer.text)
        return float(any(right(text, _solution(solution)) for solution in answer.prompt.solutions))

    def right(text: str, solution: str) -> bool:
        given, wanted = _content(text), _content(solution)
        if given == wanted and len(boxes(text)) == 1:
            return True
        label, value = split_choice(given if boxes(text) else text)
        wanted_label, wanted_value = split_choice(wanted)
        if label and wanted_label:
            return label == wanted_label
        if label and value:  # `(B) 5` names its value as well
            text, given = _box(value), value
        if wanted_label and wanted_value:
            solution, wanted = _box(wanted_value), wanted_value
        equal = same_form(given, wanted)
        if equal is not None:
            return equal
        found = parsed(text)
        return bool(found) and bool(verify(parsed(solution), found, allow_set_relation_comp=True, timeout_seconds=None))

    return one_by_one(score)


def _answer(text: str) -> str:
    """Return the part of `text` that is the final answer, as math-verify finds it; "" if there is none."""
    text = normalize(without_thoughts(text))
    tagged = tagged_answer(text)
    if tagged is not None:
        is_sentence = re.search(r"(?i)\b(?:answer|is|are|equals?)\b", tagged)
        text = tagged if boxes(tagged) or is_sentence else f"\\boxed{{{tagged.strip('$')}}}"
    found = boxes(text)
    if found and not (found[-1][2] or "").strip():
        return ""
    return _normalize_boxes(text)


def _solution(solution: str) -> str:
    """Return `solution` in a box, unless it has boxes or dollars: math-verify reads LaTeX only inside of these."""
    text = normalize(solution)
    return _normalize_boxes(text if boxes(text) or "$" in text else f"\\boxed{{{text}}}")


def _normalize_boxes(text: str) -> str:
    parts, end = [], 0
    for start, stop, content in boxes(text):
        parts += [without_chinese(text[end:start]), f"\\boxed{{{normalize_expression(content or '')}}}"]
        end = stop
    return "".join(parts) + without_chinese(text[end:])


def _content(text: str) -> str:
    """Return the content of the last box, else what `text` states."""
    found = boxes(text)
    return (found[-1][2] or "") if found else statement(text)


def _box(content: str) -> str:
    return f"\\boxed{{{normalize_expression(content)}}}"


def _compare_small_numbers() -> None:
    """Make math-verify compare numbers relatively as well.

    It rounds to 6 decimals, and drops differences below 1e-15, so that 2^-98 equals 2^-99.
    """
    from math_verify import grader

    rounded = grader.sympy_numeric_eq
    if rounded.__module__ != grader.__name__:
        return

    @functools.wraps(rounded)
    def compared(a: Any, b: Any, float_rounding: int, numeric_precision: int) -> bool:
        return bool(rounded(a, b, float_rounding, numeric_precision)) and not _differ(a, b)

    compared.__module__ = __name__
    grader.sympy_numeric_eq = compared


def _differ(a: Any, b: Any) -> bool:
    """Return whether two numbers differ by more than their kind allows, relatively; False for anything else."""
    from math_verify.grader import get_pct_val
    from sympy import Float

    if get_pct_val(a) is not None or get_pct_val(b) is not None:  # 9% may be written as 9
        return False
    if not (getattr(a, "is_number", False) and getattr(b, "is_number", False)):
        return False
    tolerance = ROUNDED if a.has(Float) or b.has(Float) else EXACT
    a, b = a.doit(), b.doit()
    return bool(abs((a - b).evalf(30)) > tolerance * max(abs(a.evalf(30)), abs(b.evalf(30))))


def _mend_percentages() -> None:
    """Give ANTLR's parser the function that latex2sympy2-extended calls for each percentage.

    The parser of ANTLR 4.9.3, which hydra needs, lacks it, so that math-verify would read no percentages.
    """
    from latex2sympy2_extended.antlr_parser import PSParser

    if not hasattr(PSParser.AtomContext, "FUNC_GAMMA"):
        PSParser.AtomContext.FUNC_GAMMA = lambda context: None
