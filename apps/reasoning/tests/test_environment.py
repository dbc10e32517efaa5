"""The simplest environment, with an engine of a test's own: answers are scored while others are generated."""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from mbridge_reasoning.data.prompts import Prompt
from mbridge_reasoning.environment import SingleTurn
from mbridge_reasoning.quickstart.model import build_tokenizer
from mbridge_reasoning.rewards.pool import RewardPool
from mbridge_reasoning.rollout.base import Completion, Request, SamplingParams
from torch import distributed

REWARD = """
import pathlib

def record(text, row, end):
    pathlib.Path(row["scored"]).write_text(f"{text}|{end}")
    return len(text)
"""


class ServingEngine:
    """Finishes the last request first, and the others only once that one has been scored."""

    weights_version = 0

    def __init__(self, scored: Path, answer: list[int]) -> None:
        self.scored = scored
        self.answer = answer

    def update_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.weights_version += len(list(weights)) > 0

    def generate(self, requests: Sequence[Request]) -> Iterator[Completion]:
        for position in reversed(range(len(requests))):
            tokens = self.answer[: position + 1]
            yield Completion(
                request=position,
                tokens=tokens,
                logprobs=[-1.0] * len(tokens),
                end="stop_string",
                weights_version=self.weights_version,
            )
            deadline = time.monotonic() + 120
            while not self.scored.exists():
                assert time.monotonic() < deadline, "the first answer is not scored while others are generated"
                time.sleep(0.01)

    def sleep(self) -> None: ...

    def wake(self) -> None: ...


@pytest.fixture
def one_rank() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_answers_are_scored_while_others_are_generated(tmp_path: Path) -> None:
    (tmp_path / "reward.py").write_text(REWARD)
    tokenizer = build_tokenizer(["1 2 3"], 300)
    answer = tokenizer("1 2 3")["input_ids"]
    prompts = [
        Prompt(content="?", solutions=(), source=str(i), row={"scored": str(tmp_path / f"{i}.txt")}, tokens=(i + 7,))
        for i in range(3)
    ]
    with RewardPool(timeout=60.0, function=f"{tmp_path}/reward.py:record") as rewards:
        environment = SingleTurn(
            rollout=ServingEngine(tmp_path / "2.txt", answer),
            rewards=rewards,
            tokenizer=tokenizer,
            sampling=SamplingParams(max_new_tokens=4),
            timed=lambda phase: nullcontext(),
        )
        episodes = environment.episodes(prompts, seed=1)
    texts = [tokenizer.decode(answer[: i + 1]) for i in range(3)]
    assert [(tmp_path / f"{i}.txt").read_text() for i in range(3)] == [f"{text}|stop_string" for text in texts]
    assert [episode.tokens.tolist() for episode in episodes] == [[i + 7, *answer[: i + 1]] for i in range(3)]
    assert [episode.policy_mask.sum().item() for episode in episodes] == [1, 2, 3]
    assert [episode.score.value for episode in episodes] == [len(text) for text in texts]
    assert {episode.end for episode in episodes} == {"stop_string"}
