"""An environment makes episodes from prompts. In the simplest one, the policy answers once, and a reward follows."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import distributed
from transformers import PreTrainedTokenizerBase

from mbridge_reasoning.data.prompts import Prompt
from mbridge_reasoning.episodes import Episode, single_turn
from mbridge_reasoning.rewards.base import Answer, Score
from mbridge_reasoning.rewards.pool import RewardPool
from mbridge_reasoning.rollout.base import Completion, Request, RolloutEngine, SamplingParams


@dataclass(kw_only=True)
class SingleTurn:
    """One answer to each prompt, scored while others are still generated."""

    rollout: RolloutEngine
    rewards: RewardPool
    tokenizer: PreTrainedTokenizerBase
    sampling: SamplingParams
    timed: Callable[[str], AbstractContextManager[None]]
    """Opens a context that adds its duration to the phase it is given, "generate" or "reward"."""

    def episodes(self, prompts: Sequence[Prompt], *, seed: int) -> list[Episode]:
        """Return one episode per prompt, in order. Collective over all ranks; every rank gets all of them.

        Args:
            seed: together with the position of a prompt, it names the random stream of the answer.

        Raises:
            RewardError: a worker cannot start, or the user's reward function is broken.
        """
        requests = [
            Request(tokens=prompt.tokens, sampling=self.sampling, seed=seed, index=index)
            for index, prompt in enumerate(prompts)
        ]
        scored: list[tuple[Completion, Future[Score]]] = []
        with self.timed("generate"):
            for completion in self.rollout.generate(requests):
                (text,) = self.tokenizer.batch_decode([completion.tokens], skip_special_tokens=True)
                answer = Answer(text=text, prompt=prompts[completion.request], end=completion.end)
                scored.append((completion, self.rewards.submit(answer)))
        with self.timed("reward"):  # the part that generation did not hide
            mine = {
                completion.request: single_turn(prompts[completion.request], completion, score.result())
                for completion, score in scored
            }
        shares: list[dict[int, Episode]] = [{}] * distributed.get_world_size()
        with self.timed("generate"):  # waiting for the slowest rank
            distributed.all_gather_object(shares, mine)
        gathered = {position: episode for share in shares for position, episode in share.items()}
        return [gathered[position] for position in range(len(prompts))]
