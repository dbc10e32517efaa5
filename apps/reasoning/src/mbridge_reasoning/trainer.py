"""One GRPO step: stream weights, sample, score, advantages, log probabilities, minibatch updates.

Sampling and training take turns on the GPU. What `actor.offload_weight`, `offload_grad` and `offload_optimizer` name
leaves it while the other one works; with `offload_weight` the sampler's weights leave it, too.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from mbridge_config import ReasoningConfig
from mbridge_config.schema.keys import filled
from mbridge_train.engine.batch import Sample
from mbridge_train.engine.engine import Engine
from mbridge_train.engine.heads import LogprobHead
from mbridge_train.engine.snapshot import Snapshot
from mbridge_train.engine.throughput import Throughput
from mbridge_train.losses.advantages import grpo_advantages
from mbridge_train.losses.policy import policy_loss
from mbridge_train.memory.offload import KeptPart, Part
from torch import Tensor, distributed
from torch.profiler import record_function
from transformers import PreTrainedTokenizerBase

from mbridge_reasoning.data.problems import Problem
from mbridge_reasoning.experience import Answer, answer_metrics, make_samples, mismatch_metrics
from mbridge_reasoning.rewards.pool import RewardPool
from mbridge_reasoning.rollout.transformers import RolloutEngine, SamplingParams

# Sets the random streams of validation apart from those of training steps, which count up from the seed.
_VALIDATION_STREAM = 2**40


class GRPOTrainer:
    """The policy, what samples from it and what scores its answers. Every method is collective over all ranks.

    Args:
        config: checked.
        engine: the policy in training.
        rollout: this rank's sampler.
        rewards: this rank's verifiers.
        tokenizer: turns answers into text for the verifiers.
        reference: weights of the reference policy; None where `algorithm.kl_beta` is 0.
        throughput: counts the operations of training.
        show: takes a line for the terminal; every rank calls it, for each answer where `rollout.print_outputs` is set.
    """

    def __init__(
        self,
        config: ReasoningConfig,
        *,
        engine: Engine,
        rollout: RolloutEngine,
        rewards: RewardPool,
        tokenizer: PreTrainedTokenizerBase,
        reference: Snapshot | None,
        throughput: Throughput,
        show: Callable[[str], None],
    ) -> None:
        self.config = config
        self.engine = engine
        self.rollout = rollout
        self.rewards = rewards
        self.tokenizer = tokenizer
        self.reference = reference
        self.throughput = throughput
        self.show = show
        actor = config.actor
        chosen: dict[Part, bool] = {
            "weights": actor.offload_weight,
            "gradients": actor.offload_grad,
            "optimizer": actor.offload_optimizer,
        }
        self.offloaded = frozenset(part for part, is_offloaded in chosen.items() if is_offloaded)
        sampling = config.algorithm.sampling_params
        self.sampling = SamplingParams(
            max_new_tokens=filled(sampling.max_new_tokens),
            min_new_tokens=sampling.min_new_tokens,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            greedy=sampling.use_greedy,
            repetition_penalty=sampling.repetition_penalty,
        )
        self.seconds: dict[str, float] = {}
        self._weights_streamed = False

    def step(self, number: int, problems: Sequence[Problem]) -> dict[str, float]:
        """Train on `algorithm.group_size` answers to each problem.

        Args:
            number: of the step; with the seed it decides every random choice, so that a resumed run makes the same.
            problems: the same on every rank.

        Returns:
            Metrics, the same on every rank.
        """
        self.seconds = {}
        started = time.perf_counter()
        algorithm = self.config.algorithm
        repeated = [problem for problem in problems for _ in range(algorithm.group_size)]
        answers = self._answer(repeated, seed=self.config.actor.seed + number, sampling=self.sampling)
        metrics = answer_metrics(answers, "train")

        rewards = torch.tensor([answer.score.value for answer in answers]) * self.config.reward.reward_scale
        advantages = grpo_advantages(
            rewards.view(-1, algorithm.group_size), divide_by_std=algorithm.normalize_advantages
        ).flatten()
        metrics["train/groups_without_signal"] = (
            (advantages.view(-1, algorithm.group_size) == 0).all(1).float().mean().item()
        )

        temperature = self.sampling.temperature
        prompts_and_answers = [
            Sample(tokens=torch.tensor(answer.tokens), weights=torch.zeros(len(answer.tokens))) for answer in answers
        ]
        self._make_room_for_training()
        with self._timed("logprobs"):
            trainer_logprobs = self.engine.logprobs(prompts_and_answers, temperature=temperature)
        metrics |= mismatch_metrics(answers, trainer_logprobs)
        old_logprobs = trainer_logprobs
        if not algorithm.recompute_logprobs:
            old_logprobs = [answer.rollout_logprobs for answer in answers]
        reference_logprobs = None
        if self.reference is not None:
            with self._timed("reference"), self.reference.swapped_in(self.engine):
                reference_logprobs = self.engine.logprobs(prompts_and_answers, temperature=temperature)

        self._onload("optimizer")
        with self._timed("train"):
            metrics |= self._update(number, answers, advantages, old_logprobs, reference_logprobs)
        metrics |= self.throughput.metrics(prompts_and_answers, self.seconds["train"])
        metrics["tokens"] = float(sum(len(answer.tokens) for answer in answers))
        return metrics | self._time_split(time.perf_counter() - started, metrics["tokens"])

    def validate(self, problems: Sequence[Problem]) -> dict[str, float]:
        """One answer to each problem, sampled as in training, from the same random streams each time."""
        seed = self.config.actor.seed + _VALIDATION_STREAM
        size = self.config.data.val_rollout_batch_size or len(problems)
        answers: list[Answer] = []
        for start in range(0, len(problems), size):
            answers += self._answer(problems[start : start + size], seed=seed + start, sampling=self.sampling)
        return answer_metrics(answers, "validation")

    def _answer(self, problems: Sequence[Problem], *, seed: int, sampling: SamplingParams) -> list[Answer]:
        """One scored answer a problem. Every rank takes an equal share, and all get all answers."""
        self._make_room_for_sampling()
        rank, world_size = distributed.get_rank(), distributed.get_world_size()
        first, last = (len(problems) * part // world_size for part in (rank, rank + 1))
        own = problems[first:last]
        with self._timed("generate"):
            completions = self.rollout.generate(
                [problem.prompt_tokens for problem in own], sampling, seed=seed, first_index=first
            )
        with self._timed("reward"):
            texts = self.tokenizer.batch_decode(
                [completion.tokens for completion in completions], skip_special_tokens=True
            )
            scores = self.rewards.score(list(zip(texts, own, strict=True)))
        shares: list[list[Answer]] = [[] for _ in range(world_size)]
        mine = [
            Answer(problem=problem, completion=completion, score=score)
            for problem, completion, score in zip(own, completions, scores, strict=True)
        ]
        with self._timed("generate"):  # waiting for the slowest rank
            distributed.all_gather_object(shares, mine)
        answers = [answer for share in shares for answer in share]
        if self.config.rollout.print_outputs:
            for answer in answers:
                self.show(f"[{answer.score.value:g}] {self.tokenizer.decode(answer.tokens, skip_special_tokens=True)}")
        return answers

    def _make_room_for_sampling(self) -> None:
        """Give the sampler the policy's weights, unless it has them, and take off the GPU what it does not need."""
        # Before the weights are streamed: then the sampler's find room, and the copies run meanwhile.
        self._offload(*self.offloaded - {"weights"})
        if not self._weights_streamed:
            with self._timed("stream"):
                self.rollout.update_weights(self.engine.export_weights())
            self._weights_streamed = True
        self._offload(*self.offloaded & {"weights"})

    def _make_room_for_training(self) -> None:
        """Forget the sampler's weights, which the update makes stale, and bring the policy's back."""
        self._weights_streamed = False
        if "weights" in self.offloaded:
            self.rollout.release_weights()
        self._onload("weights")

    def _offload(self, *parts: Part) -> None:
        if parts:
            with self._timed("offload"):
                self.engine.offload(*parts)

    def _onload(self, part: KeptPart) -> None:
        if part in self.offloaded:
            with self._timed("onload"):
                self.engine.onload(part)

    def _update(
        self,
        number: int,
        answers: list[Answer],
        advantages: Tensor,
        old_logprobs: list[Tensor],
        reference_logprobs: list[Tensor] | None,
    ) -> dict[str, float]:
        """`n_minibatches` optimizer steps; metrics are means over them."""
        algorithm = self.config.algorithm
        order = torch.arange(len(answers))
        if algorithm.shuffle_rollout:
            order = torch.randperm(
                len(answers), generator=torch.Generator().manual_seed(self.config.actor.seed + number)
            )
        loss = partial(
            policy_loss,
            clip_ratio_low=filled(algorithm.clip_ratio_low),
            clip_ratio_high=filled(algorithm.clip_ratio_high),
            dual_clip=algorithm.clip_ratio_c,
            kl_penalty=algorithm.kl_penalty_type if self.reference is not None else None,
            kl_beta=algorithm.kl_beta,
            entropy_bonus=algorithm.entropy_bonus,
        )
        collected: list[dict[str, float]] = []
        for chosen in order.chunk(algorithm.n_minibatches):
            indices = chosen.tolist()
            batch = make_samples(
                [answers[index] for index in indices],
                advantages[chosen],
                aggregation=algorithm.loss_agg_func,
                old_logprobs=[old_logprobs[index] for index in indices],
                reference_logprobs=None
                if reference_logprobs is None
                else [reference_logprobs[index] for index in indices],
            )
            metrics = self.engine.forward_backward(
                batch,
                loss,
                head=LogprobHead(
                    temperature=self.sampling.temperature,
                    with_entropy=algorithm.calculate_entropy or algorithm.entropy_bonus != 0,
                ),
            )
            limit = algorithm.early_stop_imp_ratio
            if limit is not None and metrics["ratio"] > limit:
                collected.append({f"policy/{name}": value for name, value in metrics.items()} | {"policy/skipped": 1.0})
                continue
            result = self.engine.step()
            collected.append(
                {f"policy/{name}": value for name, value in metrics.items()}
                | {
                    "policy/grad_norm": result.grad_norm,
                    "policy/learning_rate": result.learning_rate,
                    "policy/skipped": float(not result.applied),
                }
            )
        names = dict.fromkeys(name for metrics in collected for name in metrics)
        return {
            name: sum(values) / len(values)
            for name in names
            if (values := [metrics[name] for metrics in collected if name in metrics])
        }

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        with record_function(phase):
            yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - started

    def _time_split(self, total: float, tokens: float) -> dict[str, float]:
        # A validation before the step may have streamed its weights; without the phase the report could stack no times.
        seconds = {"stream": 0.0} | self.seconds
        split = {f"time/{phase}": spent for phase, spent in seconds.items()}
        other = total - sum(self.seconds.values())
        return split | {"time/other": other, "time/step": total, "tokens_per_second": tokens / total}
