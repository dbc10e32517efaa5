"""One GRPO step: stream weights, sample and score answers, compute log probabilities, update in minibatches.

Generation and training take turns on the GPU. With `actor.offload_weight`, `offload_grad` and `offload_optimizer`, this
state leaves the GPU during generation; with `offload_weight`, the rollout engine also sleeps during training.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from mbridge_config import ReasoningConfig
from mbridge_config.schema.keys import filled
from mbridge_train.engine.batch import Sample
from mbridge_train.engine.engine import Engine
from mbridge_train.engine.output_heads import LogprobHead
from mbridge_train.engine.throughput import Throughput
from mbridge_train.engine.weight_snapshot import Snapshot
from mbridge_train.losses.advantages import grpo_advantages
from mbridge_train.losses.policy import policy_loss
from mbridge_train.memory.offload import KeptPart, Part
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mbridge_reasoning.data.prompts import Prompt
from mbridge_reasoning.environment import SingleTurn
from mbridge_reasoning.episodes import Episode, make_samples
from mbridge_reasoning.metrics import Phases, episode_metrics, minibatch_metrics, mismatch_metrics
from mbridge_reasoning.rewards.pool import RewardPool
from mbridge_reasoning.rollout.base import RolloutEngine, SamplingParams

# Sets the random streams of validation apart from those of training steps, which count up from the seed.
_VALIDATION_STREAM = 2**40


@dataclass(kw_only=True)
class GRPOTrainer:
    """The policy, the engine that samples from it, and its rewards. Every method is collective over all ranks.

    Attributes:
        reference: weights of the reference policy; None if `algorithm.kl_beta` is 0.
        throughput: counts the operations of training.
        show: prints a line on the terminal; every rank calls it, for each answer if `rollout.print_outputs` is set.
    """

    config: ReasoningConfig
    engine: Engine
    rollout: RolloutEngine
    rewards: RewardPool
    tokenizer: PreTrainedTokenizerBase
    reference: Snapshot | None
    throughput: Throughput
    show: Callable[[str], None]

    def __post_init__(self) -> None:
        self.phases = Phases()
        actor = self.config.actor
        chosen: dict[Part, bool] = {
            "weights": actor.offload_weight,
            "gradients": actor.offload_grad,
            "optimizer": actor.offload_optimizer,
        }
        self.offloaded = frozenset(part for part, is_offloaded in chosen.items() if is_offloaded)
        sampling = self.config.algorithm.sampling_params
        self.sampling = SamplingParams(
            max_new_tokens=filled(sampling.max_new_tokens),
            min_new_tokens=sampling.min_new_tokens,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            greedy=sampling.use_greedy,
            repetition_penalty=sampling.repetition_penalty,
        )
        self.environment = SingleTurn(
            rollout=self.rollout,
            rewards=self.rewards,
            tokenizer=self.tokenizer,
            sampling=self.sampling,
            timed=self.phases.timed,
        )
        self._weights_streamed = False

    def step(self, number: int, prompts: Sequence[Prompt]) -> dict[str, float]:
        """Train on `algorithm.group_size` answers to each prompt.

        Args:
            number: of the step; with the seed it determines every random choice, so a resumed run repeats them.
            prompts: the same on every rank.

        Returns:
            Metrics, the same on every rank.
        """
        self.phases.begin()
        algorithm = self.config.algorithm
        repeated = [prompt for prompt in prompts for _ in range(algorithm.group_size)]
        episodes = self._sample(repeated, seed=self.config.actor.seed + number)
        metrics = episode_metrics(episodes, "train")

        rewards = torch.tensor([episode.score.value for episode in episodes]) * self.config.reward.reward_scale
        advantages = grpo_advantages(
            rewards.view(-1, algorithm.group_size), divide_by_std=algorithm.normalize_advantages
        ).flatten()
        metrics["train/groups_without_signal"] = (
            (advantages.view(-1, algorithm.group_size) == 0).all(1).float().mean().item()
        )

        temperature = self.sampling.temperature
        unweighted = [Sample(tokens=episode.tokens, weights=torch.zeros(len(episode.tokens))) for episode in episodes]
        self._make_room_for_training()
        with self.phases.timed("logprobs"):
            trainer_logprobs = self.engine.logprobs(unweighted, temperature=temperature)
        metrics |= mismatch_metrics(episodes, trainer_logprobs)
        old_logprobs = trainer_logprobs
        if not algorithm.recompute_logprobs:
            old_logprobs = [episode.rollout_logprobs for episode in episodes]
        reference_logprobs = None
        if self.reference is not None:
            with self.phases.timed("reference"), self.reference.swapped_in(self.engine):
                reference_logprobs = self.engine.logprobs(unweighted, temperature=temperature)

        self._onload("optimizer")
        with self.phases.timed("train"):
            metrics |= self._update(number, episodes, advantages, old_logprobs, reference_logprobs)
        metrics |= self.throughput.metrics(unweighted, self.phases.seconds["train"])
        metrics["tokens"] = float(sum(len(episode.tokens) for episode in episodes))
        return metrics | self.phases.metrics(metrics["tokens"])

    def validate(self, prompts: Sequence[Prompt]) -> dict[str, float]:
        """Return metrics of one answer per prompt, sampled as in training, from the same random streams each time."""
        seed = self.config.actor.seed + _VALIDATION_STREAM
        size = self.config.data.val_rollout_batch_size or len(prompts)
        episodes: list[Episode] = []
        for start in range(0, len(prompts), size):
            episodes += self._sample(prompts[start : start + size], seed=seed + start)
        return episode_metrics(episodes, "validation")

    def _sample(self, prompts: Sequence[Prompt], *, seed: int) -> list[Episode]:
        """Return one scored episode per prompt."""
        self._make_room_for_generation()
        episodes = self.environment.episodes(prompts, seed=seed)
        if self.config.rollout.print_outputs:
            for episode in episodes:
                self.show(
                    f"[{episode.score.value:g}] {self.tokenizer.decode(episode.tokens, skip_special_tokens=True)}"
                )
        return episodes

    def _make_room_for_generation(self) -> None:
        """Give the rollout engine the policy's weights, unless it has them, and offload what it does not need."""
        # First, since this makes room for the rollout engine's weights, and the copies overlap with streaming them.
        self._offload(*self.offloaded - {"weights"})
        if not self._weights_streamed:
            with self.phases.timed("stream"):
                self.rollout.wake()
                self.rollout.update_weights(self.engine.export_weights())
            self._weights_streamed = True
        self._offload(*self.offloaded & {"weights"})

    def _make_room_for_training(self) -> None:
        """Let the rollout engine, whose weights go stale, sleep, and bring the policy's offloaded weights back."""
        self._weights_streamed = False
        if "weights" in self.offloaded:
            self.rollout.sleep()
        self._onload("weights")

    def _offload(self, *parts: Part) -> None:
        if parts:
            with self.phases.timed("offload"):
                self.engine.offload(*parts)

    def _onload(self, part: KeptPart) -> None:
        if part in self.offloaded:
            with self.phases.timed("onload"):
                self.engine.onload(part)

    def _update(
        self,
        number: int,
        episodes: list[Episode],
        advantages: Tensor,
        old_logprobs: list[Tensor],
        reference_logprobs: list[Tensor] | None,
    ) -> dict[str, float]:
        """Take `n_minibatches` optimizer steps; return their `minibatch_metrics`."""
        algorithm = self.config.algorithm
        order = torch.arange(len(episodes))
        if algorithm.shuffle_rollout:
            order = torch.randperm(
                len(episodes), generator=torch.Generator().manual_seed(self.config.actor.seed + number)
            )
        loss = partial(
            policy_loss,
            clip_ratio_low=filled(algorithm.clip_ratio_low),
            clip_ratio_high=filled(algorithm.clip_ratio_high),
            dual_clip=algorithm.clip_ratio_c,
            clip_log_ratio_min=algorithm.clip_log_ratio_min,
            clip_log_ratio_max=algorithm.clip_log_ratio_max,
            kl_penalty=algorithm.kl_penalty_type if self.reference is not None else None,
            kl_beta=algorithm.kl_beta,
            entropy_bonus=algorithm.entropy_bonus,
        )
        head = LogprobHead(
            temperature=self.sampling.temperature,
            with_entropy=algorithm.calculate_entropy or algorithm.entropy_bonus != 0,
        )
        collected: list[dict[str, float]] = []
        for chosen in order.chunk(algorithm.n_minibatches):
            batch = make_samples(
                [episodes[index] for index in chosen],
                advantages[chosen],
                aggregation=algorithm.loss_agg_func,
                old_logprobs=[old_logprobs[index] for index in chosen],
                reference_logprobs=reference_logprobs and [reference_logprobs[index] for index in chosen],
            )
            metrics = self.engine.forward_backward(batch, loss, head=head)
            limit = algorithm.early_stop_imp_ratio
            outcome = {"skipped": 1.0}
            if limit is None or not metrics["ratio"] > limit:
                result = self.engine.step()
                outcome = {
                    "grad_norm": result.grad_norm,
                    "learning_rate": result.learning_rate,
                    "skipped": float(not result.applied),
                }
            collected.append({f"policy/{name}": value for name, value in {**metrics, **outcome}.items()})
        return minibatch_metrics(collected)
