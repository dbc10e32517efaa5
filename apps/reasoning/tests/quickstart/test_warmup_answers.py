"""The warm-up's answers are right, and mixed as asked for."""

import pytest
from mbridge_reasoning.data.prompts import Prompt
from mbridge_reasoning.quickstart.prepare import warmup_answers, worked_answer
from mbridge_train.data.errors import DataError


def problem(expression: str, answer: str) -> Prompt:
    row = {"metadata": {"expression": expression}}
    return Prompt(content=expression, solutions=(answer,), source="item 3", row=row)


def test_sums_are_worked_from_left_to_right():
    assert worked_answer(problem("3 + 4 + 10", "17")) == "3+4=7 +10=17 <answer>17</answer>"
    assert worked_answer(problem("3 - 4 + 10 - 2", "7")) == "3-4=-1 +10=9 -2=7 <answer>7</answer>"


@pytest.mark.parametrize("expression", ["3 * 4", "( 3 + 4 )", "3 +", "5", "", "-3 + 4"])
def test_other_expressions_are_refused(expression):
    with pytest.raises(DataError, match="item 3: the warm-up can work out sums"):
        worked_answer(problem(expression, "1"))


def test_short_answers_come_last_and_in_their_share():
    problems = [problem("3 + 4", "7")] * 1000

    def short(step, **changes):
        settings = {"steps": 10, "short_steps": 3, "short_share": 0.7, "seed": 1, **changes}
        return [answer == "<answer>7</answer>" for answer in warmup_answers(problems, step=step, **settings)]

    assert [any(short(step)) for step in (1, 7, 8, 10)] == [False, False, True, True]
    assert sum(short(8)) == pytest.approx(700, abs=60)
    assert short(8) == short(8) != short(9)
    assert short(8) != short(8, seed=2)
    assert not any(short(10, short_steps=0))
    assert all(short(10, short_share=1.0))
