"""Scores of answers, and the worker processes that survive hostile ones."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mbridge_reasoning.data.gym import make_prompts
from mbridge_reasoning.data.prompts import Prompt
from mbridge_reasoning.errors import RewardError
from mbridge_reasoning.rewards.base import Answer, Score
from mbridge_reasoning.rewards.extraction import final_answer
from mbridge_reasoning.rewards.pool import RewardPool
from mbridge_train.data.errors import DataError


def problem(*solutions: str) -> Prompt:
    return Prompt(content="?", solutions=solutions, source="test")


def score(pool: RewardPool, answers: list[tuple[str, Prompt]]) -> list[Score]:
    return pool.score([Answer(text=text, prompt=prompt) for text, prompt in answers])


@pytest.fixture(scope="module")
def math_pool():
    with RewardPool(timeout=30.0, workers=2) as pool:
        yield pool


def pids(pool: RewardPool) -> list[int]:
    return [worker._process.pid for worker in pool._workers]


def test_mathematics_is_compared_not_text(math_pool):
    cases = [
        ("The answer is \\boxed{\\frac{1}{2}}", ("0.5",), 1.0),
        ("so $x = 4$, no: \\boxed{5}", ("4",), 0.0),
        ("<think>it is \\boxed{7}</think> It is \\boxed{8}", ("\\boxed{8}",), 1.0),
        ("<think>it is \\boxed{7}</think> Hm.", ("7",), 0.0),
        ("\\boxed{x^2+2x+1}", ("(x+1)^2",), 1.0),
        ("\\boxed{3}", ("2", "3"), 1.0),
        ("1,000", ("1000",), 1.0),
        ("\\boxed{50}", ("50\\%",), 1.0),
        ("\\boxed{50\\%}", ("0.5",), 1.0),
        ("The answer is 50%", ("50\\%",), 1.0),
        ("\\boxed{51\\%}", ("50%",), 0.0),
        ("\\boxed{18}", ("\\$18",), 1.0),
        ("\\boxed{\\$18.90}", ("\\$18.90",), 1.0),
        ("\\boxed{32348}", ("\\$32,\\!348",), 1.0),
        ("It costs \\$18.", ("18",), 1.0),
        ("\\boxed{17}", ("\\$18",), 0.0),
        ("\\boxed{72}", ("72.",), 1.0),
        ("\\boxed{2}. No, \\boxed{3}", ("3",), 0.0),
        ("", ("1",), 0.0),
        ("no number", ("1",), 0.0),
    ]
    scores = score(math_pool, [(text, problem(*solutions)) for text, solutions, _ in cases])
    assert [score.value for score in scores] == [expected for *_, expected in cases]
    assert {score.status for score in scores} == {"scored"}


def test_order_and_reuse_of_processes(math_pool):
    before = pids(math_pool)
    answers = [(f"\\boxed{{{number}}}", problem(str(number // 2 * 2))) for number in range(61)]
    scores = score(math_pool, answers)
    assert [score.right for score in scores] == [number % 2 == 0 for number in range(61)]
    assert score(math_pool, []) == []
    assert pids(math_pool) == before


@pytest.mark.timeout(120)
def test_hostile_answers_score_0_and_the_rest_goes_on():
    hostile = [
        "\\boxed{9**9**9**9}",
        "\\boxed{9^{9^{9^{9}}}}",
        "\\boxed{(10^{10^{10}})!}",
        "\\boxed{" + "(" * 5000 + "1" + ")" * 5000 + "}",
        "\\boxed{" + "{" * 20_000 + "1" + "}" * 20_000 + "}",
        "\\boxed{" + "\\sqrt{" * 400 + "2" + "}" * 400 + "}",
        "\\boxed{" + "+".join(f"x_{{{n}}}^{{{n}}}" for n in range(400)) + "}",
    ]
    with RewardPool(timeout=1.0, workers=2) as pool:
        score(pool, [("1", problem("1"))] * 4)
        started = time.monotonic()
        scores = score(pool, [*((text, problem("1")) for text in hostile), ("\\boxed{1}", problem("1"))])
    assert time.monotonic() - started < 100
    assert [score.value for score in scores] == [0.0] * len(hostile) + [1.0]
    assert "timeout" in {score.status for score in scores}


@pytest.fixture
def odd_worker(tmp_path, monkeypatch):
    """A verifier that hangs or dies on request, in place of math-verify."""
    code = (
        "import os, time\n"
        "def parse(text, *a, **k):\n"
        "    if 'sleep' in text: time.sleep(3600)\n"
        "    if 'compute' in text: 3 ** (10 ** 10)\n"  # one C call: no Python handler runs in it
        "    if 'die' in text: os._exit(1)\n"
        "    if 'memory' in text:\n"
        "        import resource; return [resource.getrlimit(resource.RLIMIT_AS)[0] == 8 * 2 ** 30]\n"
        "    if 'torch' in text:\n"
        "        import sys; return ['torch' in sys.modules or 'transformers' in sys.modules]\n"
        "    if 'print' in text: print('{\"value\": 1.0}')\n"
        "    return [text]\n"
        "def verify(gold, found, **k): return found[0] is True or gold[0] == found[0]\n"
        "class ExprExtractionConfig: pass\n"
        "class LatexExtractionConfig:\n    def __init__(self, **k): pass\n"
    )
    package = tmp_path / "math_verify"
    package.mkdir()
    (package / "__init__.py").write_text(code)
    (package / "grader.py").write_text("def sympy_numeric_eq(*arguments): return False\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


@pytest.mark.timeout(60)
def test_hanging_and_dying_workers_are_replaced(odd_worker):
    with RewardPool(timeout=0.5, workers=2) as pool:
        score(pool, [("$1$", problem("$1$"))] * 2)
        before = pids(pool)
        texts = ["$1$", "sleep", "compute", "die", "memory", "print", "torch", "$1$"]
        scores = score(pool, [(text, problem("$1$")) for text in texts])
        assert scores == [
            Score(1.0),
            Score(0.0, "timeout"),
            Score(0.0, "timeout"),
            Score(0.0, "failed"),
            Score(1.0),
            Score(0.0),
            Score(0.0),
            Score(1.0),
        ]
        after = pids(pool)
        assert after != before
        os.kill(after[0], 9)  # from outside: restarted, and no answer pays for it
        assert score(pool, [("$1$", problem("$1$"))] * 3) == [Score(1.0)] * 3
    for pid in pids(pool):
        assert not Path(f"/proc/{pid}").exists()


def test_worker_killed_while_it_starts_is_replaced(odd_worker):
    with RewardPool(timeout=30.0, workers=1) as pool:
        os.kill(pids(pool)[0], 9)
        assert score(pool, [("$1$", problem("$1$"))] * 2) == [Score(1.0)] * 2


@pytest.mark.timeout(60)
def test_workers_end_with_a_killed_parent(odd_worker):
    script = (
        "import sys, threading, time\n"
        "from mbridge_reasoning.data.prompts import Prompt\n"
        "from mbridge_reasoning.rewards.base import Answer\n"
        "from mbridge_reasoning.rewards.pool import RewardPool\n"
        "pool = RewardPool(timeout=3600.0, workers=2)\n"
        "problem = Prompt(content='', solutions=('$1$',), source='')\n"
        "pool.score([Answer(text='$1$', prompt=problem)] * 2)\n"
        "print(*[worker._process.pid for worker in pool._workers], flush=True)\n"
        "pool.score([Answer(text='compute', prompt=problem)])\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(workers) == 2
    time.sleep(0.3)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while any(_alive(pid) for pid in workers):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def test_a_worker_that_cannot_start_says_why(tmp_path, monkeypatch):
    (tmp_path / "math_verify.py").write_text("raise ImportError('antlr is broken')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with RewardPool(timeout=1.0) as pool, pytest.raises(RewardError, match="ImportError: antlr is broken"):
        score(pool, [("1", problem("1"))])


def test_reasoning_gym_scores_its_own_tasks():
    parameters = {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1}
    train, _ = make_prompts("chain_sum", train_size=5, validation_size=2, seed=3, parameters=parameters)
    with RewardPool(timeout=5.0, task="chain_sum", parameters=parameters) as pool:
        right = [(f"<think>9</think>1+1\n<answer>+{p.solutions[0]}.0</answer>".replace("+-", "-"), p) for p in train]
        wrong = [(f"<answer>{int(p.solutions[0]) + 100}</answer>", p) for p in train]
        solution = train[0].solutions[0]
        unfinished = [f"<think><answer>{solution}</answer>", f"\\boxed{{{solution}", f"<answer>{solution}", ""]
        scores = score(pool, [*right, *wrong, *[(text, train[0]) for text in unfinished]])
    assert [score.right for score in scores] == [True] * 5 + [False] * 9
    assert [score.value for score in scores[10:]] == [0.0] * 4
    assert {score.status for score in scores} == {"scored"}


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer>1</answer> or <answer> 2\n</answer>", "2"),
        ("\\boxed{3} then \\boxed{\\frac{1}{2}} end", "\\frac{1}{2}"),
        ("<think><answer>1</answer></think> 5 ", "5"),
        ("\\boxed{unclosed", ""),
        ("\\boxed{3} then \\boxed{4", ""),
        ("<answer>1</answer> or <answer>2", ""),
        ("\\boxed{3} so <answer>", ""),
        ("<answer>1</answer><think>or <answer>2</answer>", ""),
        ("<think>1</think> <think><answer>2</answer>", ""),
        ("\\boxed{3} <answer>4</answer>", "4"),
        ("", ""),
    ],
)
def test_final_answer(text, answer):
    assert final_answer(text) == answer


def test_made_problems_are_distinct_held_out_and_stable():
    settings = {"parameters": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}, "seed": 7}
    train, validation = make_prompts("chain_sum", train_size=60, validation_size=40, **settings)
    questions = [problem.content for problem in [*train, *validation]]
    assert (len(train), len(validation), len(set(questions))) == (60, 40, 100)
    more, same = make_prompts("chain_sum", train_size=90, validation_size=40, **settings)
    assert (more[:60], same) == (train, validation)
    other, _ = make_prompts("chain_sum", train_size=60, validation_size=40, **{**settings, "seed": 8})
    assert [p.content for p in other] != [p.content for p in train]


def test_made_problems_are_the_same_in_every_process():
    """This task chooses from a set of texts."""
    code = (
        "from mbridge_reasoning.data.gym import make_prompts\n"
        "for problems in make_prompts('ransom_note', train_size=20, validation_size=10, seed=3):\n"
        "    print([(problem.content, problem.solutions) for problem in problems])\n"
    )
    made = {
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            stdout=subprocess.PIPE,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert len(made) == 1


def test_tasks_that_cannot_be_made():
    one_digit = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    with pytest.raises(DataError, match=r"only about 200 different questions.*1000 are wanted"):
        make_prompts("chain_sum", train_size=900, validation_size=100, seed=0, parameters=one_digit)
    with pytest.raises(DataError, match="'chain_sums' is not a reasoning-gym task: did you mean 'chain_sum'"):
        make_prompts("chain_sums", train_size=1, validation_size=1, seed=0)
    with pytest.raises(DataError, match="refuses .*max_term.*unexpected keyword"):
        make_prompts("chain_sum", train_size=1, validation_size=1, seed=0, parameters={"max_term": 2})
    with pytest.raises(DataError, match="refuses .*min_digits must be positive"):
        make_prompts("chain_sum", train_size=1, validation_size=1, seed=0, parameters={"min_digits": 0})
