"""Rewards of mathematical answers: every line is an answer, a solution and the right score."""

import pytest
from mbridge_reasoning.data.prompts import Prompt
from mbridge_reasoning.rewards.base import Answer, Scorer
from mbridge_reasoning.rewards.math import math_scorer

CASES = {
    "numbers that differ by little, or are small": [
        (r"\boxed{9.1\times10^{-31}}", r"1.6\times 10^{-19}", 0),
        (r"\boxed{0.0000002}", "0.0000001", 0),
        (r"\boxed{2^{-98}}", "2^{-99}", 0),
        (r"\boxed{0.333333}", r"\frac13", 1),
        (r"\boxed{0.333}", r"\frac13", 0),
        (r"\boxed{100000.1}", "100000", 0),
        (r"\boxed{6.02\times 10^{23}}", r"6.63\times 10^{-34}", 0),
        (r"\boxed{6.63\times 10^{-34}}", r"6.63 \times 10^{-34}", 1),
        (r"\boxed{2^{-99}}", "2^{-99}", 1),
        (r"\boxed{10^{-7}}", "10^{-8}", 0),
        (r"\boxed{\frac{1}{10^{20}}}", "0", 0),
        (r"\boxed{1000001}", "1000000", 0),
    ],
    "answer tags": [
        ("<think>2+3=5</think>\n<answer>5</answer>", "5", 1),
        ("<answer>1/2</answer>", r"\frac12", 1),
        ("<answer> 5 </answer>", "5", 1),
        ("3 + 9 = 12 <answer>12</answer>", "9", 0),
        ("<answer>-5</answer>", "-5", 1),
        ("<answer>-5</answer>", "5", 0),
        ("It is 5. <answer>6</answer>", "5", 0),
        (r"\boxed{4} <answer>5</answer>", "5", 1),
        (r"\boxed{5} <answer>4</answer>", "5", 0),
        ("5 <answer></answer>", "5", 0),
        ("<answer>5</answer> wait <answer>6", "5", 0),
        (r"<answer>\boxed{5}</answer>", "5", 1),
        ("<answer>$5$</answer>", "5", 1),
        (r"<answer>$\frac{1}{2}$</answer>", "0.5", 1),
        ("<answer>1</answer> <answer>2</answer>", "2", 1),
        ("<answer>x = 5</answer>", "5", 1),
        ("<answer>The answer is 5</answer>", "5", 1),
        ("<think> <answer>5</answer>", "5", 0),
        ("<answer>42元</answer>", "42", 1),
        ("<answer>The answer is 6</answer>", "5", 0),
        ("<answer>John is 5 years old</answer>", "5", 1),
    ],
    "punctuation in the box": [
        (r"\boxed{5.}", "5", 1),
        (r"\boxed{5,}", "5", 1),
        (r"\boxed{5 .}", "5", 1),
        (r"\boxed{-5;}", "-5", 1),
        (r"\boxed{3.50.}", "3.5", 1),
        (r"\boxed{.5.}", "5", 0),
    ],
    "Chinese text, full-width characters": [
        ("所以答案是42。", "42", 1),
        (r"\boxed{42元}", "42", 1),
        ("答案：42", "42", 1),
        (r"答案是 $\frac{1}{2}$。", "1/2", 1),
        (r"\boxed{42。}", "42", 1),
        (r"\boxed{42个}", "42", 1),
        (r"\boxed{共42人}", "42", 1),
        (r"\boxed{42万}", "42", 0),
        (r"\boxed{负5}", "5", 0),
        ("答案是42万。", "42", 0),
        ("答案是43。", "42", 0),
        (r"\boxed{1，234}", "1234", 1),
        (r"\boxed{（1，2）}", "(1,2)", 1),
        (r"\boxed{１２}", "12", 1),
        (r"\boxed{3，5}", "3,5", 1),
        ("答案是42万。", "420000", 1),
        (r"\boxed{3.5万}", "35000", 1),
        (r"\boxed{负5}", "-5", 1),
        (r"\boxed{三分之一}", "三分之一", 1),
        (r"\boxed{3分之1}", "1/3", 1),
        (r"\boxed{5米}", "5", 1),
        (r"\boxed{5千米}", "5", 0),
        ("一共42个。", "42", 1),
        (r"\boxed{x=2 或 x=3}", "x=2, x=3", 1),
        (r"\boxed{\text{是}}", "是", 1),
        (r"\boxed{是}", "是", 1),
        (r"\boxed{否}", "是", 0),
    ],
    "groups of digits": [
        (r"\boxed{12\,345}", "12345", 1),
        (r"\boxed{1\,234\,567}", "1234567", 1),
        (r"\boxed{12{,}345}", "12345", 1),
        (r"\boxed{12\;345}", "12345", 1),
        (r"\boxed{12\,346}", "12345", 0),
    ],
    "inequalities and intervals": [
        (r"\boxed{x>1}", r"(1,\infty)", 1),
        (r"\boxed{x \ge 1}", r"[1,\infty)", 1),
        (r"\boxed{x \ge 1}", r"(1,\infty)", 0),
        (r"\boxed{1 < x < 2}", "(1,2)", 1),
        (r"\boxed{1 \le x < 2}", "[1,2)", 1),
        (r"\boxed{x<1}", r"(1,\infty)", 0),
        (r"\boxed{x<-1}", r"(-\infty,-1)", 1),
        (r"\boxed{1,2,3}", "1,2,3", 1),
    ],
    "constants, functions and sets in other spellings": [
        (r"\boxed{pi/2}", r"\frac{\pi}{2}", 1),
        (r"\boxed{-2*pi}", r"-2\pi", 1),
        (r"\boxed{2*pi/3}", r"\frac{2\pi}{3}", 1),
        (r"\boxed{pi/3}", r"\frac{\pi}{2}", 0),
        (r"\boxed{3*sqrt(2)}", r"3\sqrt{2}", 1),
        (r"\boxed{x**2}", "x^2", 1),
        (r"\boxed{2*x+1}", "2x+1", 1),
        (r"\boxed{π/2}", r"\frac{\pi}{2}", 1),
        (r"\boxed{\varnothing}", r"\emptyset", 1),
        (r"\boxed{\emptyset}", r"\varnothing", 1),
        (r"\boxed{\varnothing}", "0", 0),
        (r"\boxed{0}", r"\varnothing", 0),
        (r"\boxed{∅}", r"\emptyset", 1),
        (r"\boxed{infinity}", r"\infty", 1),
        (r"\boxed{2\pi}", "2*pi", 1),
    ],
    "boxes: framed, empty, unfinished": [
        (r"\fbox{5}", "5", 1),
        (r"The answer 5 \boxed{}", "5", 0),
        (r"first \boxed{5} then \boxed{6", "5", 0),
        (r"$\fbox{\frac12}$", "0.5", 1),
        (r"\fbox{6}", "5", 0),
        (r"\fbox{} 5", "5", 0),
        (r"\boxed{5} \boxed{ }", "5", 0),
        (r"\boxed{5} and \fbox{6", "5", 0),
    ],
    "numbers in a base": [
        (r"\boxed{101_3}", "101_2", 0),
        (r"\boxed{204_8}", "204_8", 1),
        (r"\boxed{101_2}", "101_3", 0),
        (r"\boxed{101_{2}}", "101_2", 1),
        (r"\boxed{0101_2}", "101_2", 1),
        (r"\boxed{110_2}", "101_2", 0),
        (r"\boxed{1A_{16}}", "1A_{16}", 1),
        (r"\boxed{204_9}", "204_8", 0),
        (r"\boxed{204}", "204_8", 1),
    ],
    "what else must stay right": [
        (r"\boxed{\frac{1}{2^{99}}}", "2^{-99}", 1),
        (r"The answer is \boxed{x_1}", "x_1", 1),
        (r"\boxed{a_{10}}", "a_{10}", 1),
        (r"\boxed{\{1,2\}}", r"\{2,1\}", 1),
        (r"\boxed{5\%}", r"5\%", 1),
        (r"\boxed{10\text{ cm}}", "10", 1),
        (r"\boxed{10\ \text{cm}}", "10", 1),
        (r"\boxed{x=5}", "5", 1),
        (r"\boxed{\text{(A)}}", r"\text{(A)}", 1),
        (r"\boxed{\text{(B)}}", r"\text{(A)}", 0),
        (r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}", r"\begin{pmatrix}1\\2\end{pmatrix}", 1),
        (r"\boxed{5!}", "120", 1),
        (r"\boxed{Evelyn}", r"\text{Evelyn}", 1),
        (r"\boxed{\text{Tuesday}}", "Tuesday", 1),
        (r"\boxed{-\infty}", r"-\infty", 1),
    ],
    "repeating decimals": [
        (r"\boxed{0.\overline{3}}", r"\frac{1}{3}", 1),
        (r"\boxed{0.1\overline{6}}", r"\frac16", 1),
        (r"\boxed{2.\overline{45}}", r"\frac{27}{11}", 1),
        (r"\boxed{0.\overline{3}}", r"0.\overline{3}", 1),
        (r"\boxed{0.\overline{3}}", "0.3", 0),
        (r"\boxed{0.3}", r"0.\overline{3}", 0),
    ],
    "thoughts that end, or never do": [
        (r"<think> so \boxed{5}", "5", 0),
        (r"<think> a </think> b <think> \boxed{5}", "5", 0),
        (r"<think> \boxed{4} </think> \boxed{5}", "5", 1),
    ],
}


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return math_scorer()


@pytest.mark.parametrize("kind", CASES)
def test_scores(scorer: Scorer, kind: str) -> None:
    answers = [
        Answer(text=text, prompt=Prompt(content="?", solutions=(solution,), source="test"))
        for text, solution, _ in CASES[kind]
    ]
    scores = [scorer.score([answer])[0] for answer in answers]
    wrong = [case for case, score in zip(CASES[kind], scores, strict=True) if score != case[2]]
    assert wrong == []
