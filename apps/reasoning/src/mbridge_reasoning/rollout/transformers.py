"""Answers sampled from the policy: the interface of a rollout engine, and the engine that runs transformers' model.

The sampling loop is this file's own, over the model and the key/value cache of transformers, because training needs
what `generate` does not give: the log-probability of every sampled token under the distribution that the trainer
recomputes, and a random stream for each sequence, so that a sequence does not depend on what it was batched with or
on the rank that sampled it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from mbridge_model.kernels.attention import no_cudnn_attention
from mbridge_train.memory.copying import copy_tensors
from mbridge_train.run.hf_files import from_directory
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GenerationConfig, PreTrainedTokenizerBase

from mbridge_reasoning.errors import RolloutError


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How the next token is drawn.

    `temperature` divides the logits. `top_k` (0 or -1: off) and then `top_p` (1.0: off) cut the distribution from which
    a token is drawn, but not the one its log-probability is taken from. `greedy` takes the likeliest token and leaves
    all three aside, except that log-probabilities stay those at `temperature`.
    """

    max_new_tokens: int
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    greedy: bool = False
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        problems = []
        if self.max_new_tokens < 1:
            problems.append(f"max_new_tokens is {self.max_new_tokens}: set it to 1 or more")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            problems.append(
                f"min_new_tokens is {self.min_new_tokens}: set it between 0 and max_new_tokens={self.max_new_tokens}"
            )
        if not self.temperature > 0:
            problems.append(
                f"temperature is {self.temperature}: set it above 0, and greedy=true for the likeliest token"
            )
        if self.top_k < -1:
            problems.append(f"top_k is {self.top_k}: set it to 1 or more, or to -1 (off)")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p is {self.top_p}: set it above 0 and at most 1.0 (off)")
        if self.repetition_penalty != 1.0:
            problems.append(
                f"repetition_penalty is {self.repetition_penalty}: set it to 1.0, because with a penalty the sampled "
                "tokens come from a distribution that the trainer cannot recompute"
            )
        if problems:
            raise RolloutError("cannot sample with these settings:\n" + "\n".join(f"  {line}" for line in problems))


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """One sampled answer.

    `tokens`: the new token ids, with the end token if it was drawn. `logprobs`: one for each token,
    log softmax(logits / temperature)[token] over the whole vocabulary in fp32, before top-k and top-p.
    `finished`: an end token was drawn; false where `max_new_tokens` cut the answer off.
    """

    tokens: list[int]
    logprobs: list[float]
    finished: bool


class RolloutEngine(Protocol):
    """What the training loop needs of an engine."""

    def update_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Copy all weights of the policy, given one by one under their HuggingFace names.

        The tensors may be views of the policy's own, which training changes and offloading frees.
        """

    def release_weights(self) -> None:
        """Give the weights' memory back. `generate` needs `update_weights` first."""

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, *, seed: int, first_index: int = 0
    ) -> list[Completion]:
        """Sample one completion a prompt, in the order of `prompts`.

        `prompts[i]` draws from the random stream of `(seed, first_index + i)`, wherever and with whatever it is
        batched: ranks that each sample a part of a list pass the part's position in it.
        """


def end_token_ids(model_directory: str | Path, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The ids that end an answer: those of `generation_config.json`, else of `config.json`, and the tokenizer's."""
    directory = Path(model_directory)
    if (directory / "generation_config.json").is_file():
        source = from_directory(GenerationConfig, directory, "generation_config.json").eos_token_id
    else:
        source = getattr(from_directory(AutoConfig, directory, "config.json"), "eos_token_id", None)
    ids = {source} if isinstance(source, int) else set(source or ())
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    if not ids:
        raise RolloutError(
            f"{directory} names no end-of-sequence token, so no answer would end: "
            "set eos_token_id in its generation_config.json"
        )
    return frozenset(ids)


class TransformersRollout:
    """The rollout engine on transformers' own model, with eager kernels, on CPU or one GPU.

    The model is built from `config.json` alone; its weights come through `update_weights`.

    `batch_size` is the largest number of sequences decoded at once. A batch loses rows as they finish, so that one
    long answer costs a batch of one.
    """

    def __init__(
        self,
        model_directory: str | Path,
        *,
        end_tokens: Iterable[int],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_size: int = 256,
        trust_remote_code: bool = False,
    ) -> None:
        if batch_size < 1:
            raise RolloutError(f"rollout batch size is {batch_size}: set it to 1 or more")
        config = from_directory(AutoConfig, Path(model_directory), "config.json", trust_remote_code=trust_remote_code)
        self.device = torch.device(device)
        self.batch_size = batch_size
        self.end_tokens = torch.tensor(sorted(end_tokens), dtype=torch.long, device=self.device)
        with torch.device("meta"):
            self.model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
        self.model.to_empty(device=self.device).eval().requires_grad_(False)
        self.model.tie_weights()
        for module in self.model.modules():
            # No weight stream carries these (rotary frequencies), so the model's own initialisation computes them.
            if module._non_persistent_buffers_set:
                self.model._init_weights(module)
        self._has_weights = False

    def update_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Copy a stream of (HuggingFace name, tensor) into the live model, holding some hundred MB of it at a time.

        Tensors are cast to the rollout's dtype. With tied embeddings the output matrix may be in the stream or not.
        A stream that does not fit raises `RolloutError` with the tensor's name; the weights are then incomplete, and
        `generate` refuses until a whole stream has arrived.
        """
        self._has_weights = False
        live = self.model.state_dict(keep_vars=True)
        for tensor in live.values():
            if not tensor.untyped_storage().nbytes():  # released
                tensor.untyped_storage().resize_(tensor.nbytes)
        # Tied tensors are one object under several names: any of the names fills it.
        missing = {id(tensor): name for name, tensor in reversed(live.items())}

        def pairs() -> Iterator[tuple[Tensor, Tensor]]:
            for name, tensor in weights:
                target = self._target(name, tensor, live)
                missing.pop(id(target), None)
                yield target, tensor

        copy_tensors(pairs())
        if missing:
            names = sorted(missing.values())
            raise RolloutError(
                f"{len(names)} weights of the rollout model were not in the stream: {', '.join(names[:5])}"
                f"{', …' if len(names) > 5 else ''}; stream every tensor of the checkpoint"
            )
        self._has_weights = True

    def _target(self, name: str, tensor: Tensor, live: Mapping[str, Tensor]) -> Tensor:
        """The live tensor that `tensor` is copied into, if it fits."""
        target = live.get(name)
        if target is None:
            raise RolloutError(
                f"weight {name!r} is not part of {type(self.model).__name__}: "
                "the stream must use the names of the model's own HuggingFace checkpoint"
            )
        if target.shape != tensor.shape:
            raise RolloutError(
                f"weight {name!r} has shape {tuple(tensor.shape)}, the rollout model expects "
                f"{tuple(target.shape)}: config.json and the trained model disagree"
            )
        if target.is_floating_point() != tensor.is_floating_point():
            raise RolloutError(
                f"weight {name!r} has dtype {tensor.dtype}, the rollout model expects {target.dtype}: "
                "stream the tensor in a floating-point dtype"
            )
        return target

    def release_weights(self) -> None:
        """See `RolloutEngine.release_weights`."""
        self._has_weights = False
        for tensor in self.model.state_dict(keep_vars=True).values():
            tensor.untyped_storage().resize_(0)

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, *, seed: int, first_index: int = 0
    ) -> list[Completion]:
        """See `RolloutEngine.generate`. Equal arguments and weights give equal results, up to the last bits of the
        model's own arithmetic, which may differ between batch shapes."""
        if not self._has_weights:
            raise RolloutError("the rollout model has no complete weights yet: call update_weights first")
        for position, prompt in enumerate(prompts):
            if not prompt:
                raise RolloutError(f"prompt {position} is empty: a prompt needs at least one token")
        # Neighbours of equal length need no padding.
        order = sorted(range(len(prompts)), key=lambda position: len(prompts[position]))
        completions: dict[int, Completion] = {}
        for start in range(0, len(order), self.batch_size):
            positions = order[start : start + self.batch_size]
            uniforms = np.stack([_uniforms(seed, first_index + p, sampling.max_new_tokens) for p in positions])
            batch = self._generate_batch([prompts[p] for p in positions], torch.from_numpy(uniforms), sampling)
            completions.update(zip(positions, batch, strict=True))
        return [completions[position] for position in range(len(prompts))]

    @torch.inference_mode()
    @no_cudnn_attention()  # each token is another length
    def _generate_batch(
        self, prompts: list[Sequence[int]], uniforms: Tensor, sampling: SamplingParams
    ) -> list[Completion]:
        """`uniforms`: float64 [len(prompts), max_new_tokens] in [0, 1), one for each token to draw."""
        rows, width = len(prompts), max(map(len, prompts))
        input_ids = torch.zeros(rows, width, dtype=torch.long)
        attention_mask = torch.zeros(rows, width, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            input_ids[row, width - len(prompt) :] = torch.as_tensor(prompt)
            attention_mask[row, width - len(prompt) :] = 1
        input_ids, attention_mask = input_ids.to(self.device), attention_mask.to(self.device)
        position_ids = (attention_mask.cumsum(-1) - 1).clamp_(min=0)
        padded = len({len(prompt) for prompt in prompts}) > 1
        uniforms = uniforms.to(self.device)

        tokens = torch.zeros(rows, sampling.max_new_tokens, dtype=torch.long, device=self.device)
        logprobs = torch.zeros(rows, sampling.max_new_tokens, device=self.device)
        lengths = torch.full((rows,), sampling.max_new_tokens, device=self.device)
        finished = torch.zeros(rows, dtype=torch.bool, device=self.device)
        alive = torch.arange(rows, device=self.device)
        cache = DynamicCache(config=self.model.config)
        for step in range(sampling.max_new_tokens):
            logits = self.model(
                input_ids=input_ids,
                # Without padding no mask is needed, and attention takes its faster path.
                attention_mask=attention_mask if padded else None,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            blocked = self.end_tokens if step < sampling.min_new_tokens else None
            chosen, chosen_logprobs = draw(logits, uniforms[alive, step], sampling, blocked)
            tokens[alive, step] = chosen
            logprobs[alive, step] = chosen_logprobs
            ended = torch.isin(chosen, self.end_tokens)
            if ended.any():
                lengths[alive[ended]] = step + 1
                finished[alive[ended]] = True
                keep = (~ended).nonzero().squeeze(-1)
                if len(keep) == 0:
                    break
                cache.batch_select_indices(keep)
                alive, chosen = alive[keep], chosen[keep]
                attention_mask, position_ids = attention_mask[keep], position_ids[keep]
            input_ids = chosen.unsqueeze(-1)
            position_ids = position_ids[:, -1:] + 1
            attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(chosen), 1)], dim=-1)
        return [
            Completion(tokens=row_tokens[:length], logprobs=row_logprobs[:length], finished=row_finished)
            for row_tokens, row_logprobs, length, row_finished in zip(
                tokens.tolist(), logprobs.tolist(), lengths.tolist(), finished.tolist(), strict=True
            )
        ]


def draw(
    logits: Tensor, uniforms: Tensor, sampling: SamplingParams, blocked: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Draw one token a row by inverting the cumulative distribution at the row's uniform number.

    `logits` [rows, vocabulary] in any float dtype, `uniforms` float64 [rows] in [0, 1), `blocked` int64 ids that must
    not be drawn. Returns tokens int64 [rows] and logprobs float32 [rows]; logprobs are those of the
    temperature-scaled distribution before `blocked`, top-k and top-p.
    """
    scaled = logits.float() / sampling.temperature
    all_logprobs = torch.log_softmax(scaled, dim=-1)
    candidates = scaled if blocked is None else scaled.index_fill(-1, blocked, float("-inf"))
    if sampling.greedy:
        chosen = candidates.argmax(dim=-1)
        return chosen, all_logprobs.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
    if 0 < sampling.top_k < candidates.shape[-1]:
        threshold = candidates.topk(sampling.top_k, dim=-1).values[:, -1:]
        candidates = candidates.masked_fill(candidates < threshold, float("-inf"))
    if sampling.top_p < 1.0:
        ordered, token_of = torch.sort(candidates, dim=-1, descending=True)
        probabilities = torch.softmax(ordered, dim=-1)
        # A token stays while the ones before it hold less than top_p, so the likeliest always stays.
        outside = probabilities.cumsum(-1) - probabilities >= sampling.top_p
        candidates = candidates.masked_fill(outside.gather(-1, token_of.argsort(-1)), float("-inf"))
    # float64: over a vocabulary of 150 000, an fp32 sum is too coarse for its rare tokens.
    cumulative = torch.softmax(candidates.double(), dim=-1).cumsum(-1)
    targets = uniforms.unsqueeze(-1) * cumulative[:, -1:]
    # right=True: strictly above the target, so a token of probability 0 is never drawn.
    chosen = torch.searchsorted(cumulative, targets, right=True).clamp_(max=logits.shape[-1] - 1)
    return chosen.squeeze(-1), all_logprobs.gather(-1, chosen).squeeze(-1)


def _uniforms(seed: int, index: int, count: int) -> np.ndarray:
    """`count` float64 numbers in [0, 1) that depend on `(seed, index)` alone (Philox, a counter-based generator)."""
    key = np.array([seed % 2**64, index % 2**64], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).random(count)
