"""What one answer is worth: math-verify for mathematics, reasoning-gym's own scorer for its tasks.

Runs in the worker processes of `reward.RewardPool`: both libraries evaluate what a model wrote, which may take
for ever or run out of memory.
"""

import functools
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mbridge_reasoning.data.tasks import create_task

AnswerScorer = Callable[[str, Sequence[str], Mapping[str, Any] | None], float]
"""(text of the answer, right answers, reasoning-gym's record) → value, 1.0 for a right answer."""


def math_scorer() -> AnswerScorer:
    """Scores with math-verify: 1.0 where the final answer equals any of the solutions, 0.0 otherwise.

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

    def score(text: str, solutions: Sequence[str], entry: Mapping[str, Any] | None) -> float:
        found = parse(_without_currency(without_thoughts(text)), extraction, parsing_timeout=None)
        if not found:
            return 0.0
        right = any(verify(list(parsed_solution(s)), found, timeout_seconds=None) for s in solutions)
        return float(right)

    return score


def _mend_percentages() -> None:
    """latex2sympy2-extended asks its parser for a function that the one of ANTLR 4.9.3 lacks, wherever it meets a
    percentage: math-verify then reads none. ANTLR 4.9.3 is what hydra needs."""
    from latex2sympy2_extended.antlr_parser import PSParser

    if not hasattr(PSParser.AtomContext, "FUNC_GAMMA"):
        PSParser.AtomContext.FUNC_GAMMA = lambda context: None


def _without_currency(text: str) -> str:
    r"""Without `\$`, which is no delimiter of LaTeX, but is taken for one; `\\$` is a line break and one."""
    return re.sub(r"(?<!\\)\\\$", "", text)


def task_scorer(task: str, parameters: Mapping[str, Any]) -> AnswerScorer:
    """Scores with a reasoning-gym task, on what `final_answer` finds; the task may give a part of 1.0."""
    dataset = create_task(task, parameters)

    def score(text: str, solutions: Sequence[str], entry: Mapping[str, Any] | None) -> float:
        if entry is None:
            raise ValueError(f"a problem without a record of reasoning-gym cannot be scored by its task {task!r}")
        return float(dataset.score_answer(final_answer(text), dict(entry)))

    return score


def without_thoughts(text: str) -> str:
    """What follows the last </think>, or all of `text`."""
    return text.rpartition("</think>")[2]


def final_answer(text: str) -> str:
    """The content of the last <answer>…</answer>, else of the last \\boxed{…}, else all that follows the thoughts."""
    text = without_thoughts(text)
    tagged = re.findall(r"<answer>(.*?)</answer>", text, flags=re.DOTALL)
    if tagged:
        return str(tagged[-1]).strip()
    boxed = _last_boxed(text)
    return (text if boxed is None else boxed).strip()


def _last_boxed(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    depth = 1
    for position in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start:position]
    return None
