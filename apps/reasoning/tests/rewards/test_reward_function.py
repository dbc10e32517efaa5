"""Custom reward functions, loaded and run as in the workers."""

import textwrap
from pathlib import Path

import pytest
from mbridge_reasoning.data.prompts import Prompt
from mbridge_reasoning.errors import RewardError
from mbridge_reasoning.rewards.base import Answer, Score
from mbridge_reasoning.rewards.pool import RewardPool

ANSWERS = [
    Answer(text=text, prompt=Prompt(content="?", solutions=(), source=f"train.jsonl:{line}", row=row), end=end)
    for line, (text, row, end) in enumerate(
        [("four", {"length": 4}, "end_token"), ("sixsix", {"length": 6}, "length"), ("a", {"length": 2}, "end_token")],
        start=1,
    )
]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`file(code)` writes rewards.py into the working directory."""
    monkeypatch.chdir(tmp_path)

    def write(code: str) -> Path:
        path = tmp_path / "rewards.py"
        path.write_text(textwrap.dedent(code))
        return path

    return write


@pytest.mark.parametrize("spec", ["rewards.py:right_length", "rewards:right_length", "{directory}/rewards.py:batch"])
def test_function_sees_text_row_and_end(file, spec):
    path = file("""
        import helper  # beside the file

        def right_length(text, row, end):
            return helper.HALF if end == "length" else len(text) == row["length"]

        def batch(texts, rows, ends):
            return [right_length(*arguments) for arguments in zip(texts, rows, ends, strict=True)]

        batch.batched = True
    """)
    (path.parent / "helper.py").write_text("HALF = 0.5")
    with RewardPool(timeout=30.0, workers=2, function=spec.format(directory=path.parent)) as pool:
        pool.wait_until_ready()
        assert pool.score(ANSWERS) == [Score(1.0), Score(0.5), Score(0.0)]


def test_batched_function_gets_what_is_waiting(file):
    """One worker, one call at a time: while the first one runs, the others gather."""
    file("""
        import time

        def size(texts, rows, ends):
            if texts[0] == "four":
                time.sleep(1.0)
            return [len(texts)] * len(texts)

        size.batched = True
    """)
    with RewardPool(timeout=30.0, function="rewards.py:size") as pool:
        pool.wait_until_ready()
        values = [score.value for score in pool.score([*ANSWERS, *ANSWERS[1:]])]
    assert values[-1] > 1 and sum(1 / value for value in values) < 5


def test_one_answer_that_hangs_or_eats_memory_costs_the_batch_nothing(file):
    file("""
        def greedy(texts, rows, ends):
            if "sixsix" in texts:
                while True:
                    pass
            if "four" in texts:
                bytearray(3 * 2**30)
            return [1.0] * len(texts)

        greedy.batched = True
    """)
    with RewardPool(timeout=1.0, memory_limit=2 * 2**30, function="rewards.py:greedy") as pool:
        assert pool.score(ANSWERS) == [Score(0.0, "failed"), Score(0.0, "timeout"), Score(1.0)]


RAISES = """
    def outer(text, row, end):
        return inner(row)

    def inner(row):
        return row["missing"]
"""
RAISED = """\
reward.function=rewards.py:outer raised on the answer to train.jsonl:1:
Traceback (most recent call last):
  File "{file}", line 3, in outer
    return inner(row)
  File "{file}", line 6, in inner
    return row["missing"]
KeyError: 'missing'"""
IMPORT_RAISED = """\
reward.function=rewards.py:f cannot be imported:
Traceback (most recent call last):
  File "{file}", line 1, in <module>
    import nowhere
ModuleNotFoundError: No module named 'nowhere'"""
IMPORT_EXITED = """\
reward.function=rewards.py:f cannot be imported:
Traceback (most recent call last):
  File "{file}", line 1, in <module>
    raise SystemExit(3)
SystemExit: 3"""
NO_PYTHON = """\
reward.function=rewards.py:f cannot be imported:
  File "{file}", line 1
    def f(:
SyntaxError: invalid syntax"""
NO_MODULE = """\
reward.function=rewardz:f cannot be imported:
ModuleNotFoundError: No module named 'rewardz'"""
OTHER_NAME = "reward.function=rewards.py:f: rewards.py holds no function 'f'; its functions are g, h"
NO_FUNCTION = "reward.function=rewards.py:f: rewards.py has 'f', which is no function; its functions are none"
RETURNED = "reward.function=rewards.py:f returned {value} for the answer to train.jsonl:1: return a finite number"
BATCH_RETURNED = """\
reward.function=rewards.py:f is batched and returned 1.0 for 1 answers: return a list with a number for each"""


def returns(value: str) -> str:
    return f"def f(text, row, end): return {value}"


@pytest.mark.parametrize(
    ("code", "spec", "message"),
    [
        (RAISES, "rewards.py:outer", RAISED),
        ("import nowhere", "rewards.py:f", IMPORT_RAISED),
        ("raise SystemExit(3)", "rewards.py:f", IMPORT_EXITED),
        ("def f(:", "rewards.py:f", NO_PYTHON),
        ("", "rewardz:f", NO_MODULE),
        ("def g(): pass\ndef h(): pass", "rewards.py:f", OTHER_NAME),
        ("f = 3", "rewards.py:f", NO_FUNCTION),
        (returns("None"), "rewards.py:f", RETURNED.format(value="None (NoneType)")),
        (returns("'1.0'"), "rewards.py:f", RETURNED.format(value="'1.0' (str)")),
        (returns("float('nan')"), "rewards.py:f", RETURNED.format(value="nan (float)")),
        (returns("10**400"), "rewards.py:f", RETURNED.format(value=f"1{'0' * 59} (int)")),
        ("def f(texts, rows, ends): return 1.0\nf.batched = True", "rewards.py:f", BATCH_RETURNED),
    ],
)
def test_broken_function_is_one_message_with_its_own_traceback(file, code, spec, message):
    path = file(code)
    with RewardPool(timeout=30.0, function=spec) as pool, pytest.raises(RewardError) as raised:
        pool.score(ANSWERS[:1])
    assert raised.value.exit_code == 2
    # Without the lines in which Python marks a part of the line above.
    said = [line for line in str(raised.value).splitlines() if set(line) - set(" ~^")]
    assert "\n".join(said) == message.format(file=path)
