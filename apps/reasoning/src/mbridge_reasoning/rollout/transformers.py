"""The rollout engine that runs transformers' model, for tiny models and machines without a serving engine.

The sampling loop is this file's own, over the model and the key/value cache of transformers, because training needs
what `generate` does not give: the log probability of every sampled token under the distribution that the trainer
recomputes, and a random stream for each sequence, so that a sequence does not depend on what it was batched with or
on the rank that sampled it.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from mbridge_model.kernels.attention import no_cudnn_attention
from mbridge_train.data.hf_files import from_directory
from mbridge_train.memory.copying import copy_tensors
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GenerationConfig, PreTrainedTokenizerBase

from mbridge_reasoning.errors import RolloutError
from mbridge_reasoning.rollout.base import Completion, Request, SamplingParams


def end_token_ids(model_directory: str | Path, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the ids that end an answer: of `generation_config.json`, else `config.json`, and of the tokenizer.

    Raises:
        RolloutError: none of them names one, or the model has no embedding for one.
    """
    directory = Path(model_directory)
    config = from_directory(AutoConfig, directory, "config.json")
    if (directory / "generation_config.json").is_file():
        source = from_directory(GenerationConfig, directory, "generation_config.json").eos_token_id
    else:
        source = getattr(config, "eos_token_id", None)
    ids = {source} if isinstance(source, int) else set(source or ())
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    if not ids:
        raise RolloutError(
            f"{directory} names no end-of-sequence token, so no answer would end: "
            "set eos_token_id in its generation_config.json"
        )
    if max(ids) >= (size := config.get_text_config().vocab_size):
        raise RolloutError(
            f"the end token of {directory}'s tokenizer has the id {max(ids)}, and the model embeddings for {size} "
            "tokens (vocab_size in config.json), so it would never be sampled; use the "
            "tokenizer that belongs to the model"
        )
    return frozenset(ids)


class TransformersRollout:
    """The rollout engine on transformers' own model, with eager kernels, on CPU or one GPU.

    The model is built from `config.json` in `model_directory`; its weights come through `update_weights`.

    Args:
        end_tokens: ids that end an answer.
        batch_size: the largest number of sequences decoded at once. A batch loses rows as they finish, so one
            long answer is decoded in a batch of one.
        rank, world_size: of the trainer; each rank decodes its share of the requests.
    """

    def __init__(
        self,
        model_directory: str | Path,
        *,
        end_tokens: Iterable[int],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_size: int = 256,
        rank: int = 0,
        world_size: int = 1,
        trust_remote_code: bool = False,
    ) -> None:
        config = from_directory(AutoConfig, Path(model_directory), "config.json", trust_remote_code=trust_remote_code)
        self.device = torch.device(device)
        self.batch_size = batch_size
        self.rank, self.world_size = rank, world_size
        self.end_tokens = torch.tensor(sorted(end_tokens), dtype=torch.long, device=self.device)
        with torch.device("meta"):
            self.model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
        self.model.to_empty(device=self.device).eval().requires_grad_(False)
        self.model.tie_weights()
        for module in self.model.modules():
            # Weight streams do not carry these (rotary frequencies), so the model's initialization computes them.
            if module._non_persistent_buffers_set:
                self.model._init_weights(module)
        self.weights_version = 0
        self._has_weights = False

    def update_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Copy a stream of (HuggingFace name, tensor) into the live model, holding some hundred MB of it at a time.

        Tensors are cast to the rollout's dtype. With tied embeddings the output matrix may be in the stream or not.

        Raises:
            RolloutError: the stream does not fit, with the tensor's name. The weights are then incomplete, and
                `generate` refuses until a whole stream has arrived.
        """
        self._has_weights = False
        self.wake()
        live = self.model.state_dict(keep_vars=True)
        # Tied tensors are one object under several names: any of the names fills it.
        missing = {id(tensor): name for name, tensor in reversed(live.items())}

        def pairs() -> Iterator[tuple[Tensor, Tensor]]:
            for name, tensor in weights:
                if name not in live:
                    raise RolloutError(
                        f"weight {name!r} is not part of {type(self.model).__name__}: "
                        "the stream must use the names of the model's own HuggingFace checkpoint"
                    )
                target = live[name]
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
        self.weights_version += 1

    def sleep(self) -> None:
        """See `RolloutEngine.sleep`."""
        self._has_weights = False
        for tensor in self.model.state_dict(keep_vars=True).values():
            tensor.untyped_storage().resize_(0)

    def wake(self) -> None:
        """See `RolloutEngine.wake`."""
        for tensor in self.model.state_dict(keep_vars=True).values():
            if not tensor.untyped_storage().nbytes():
                tensor.untyped_storage().resize_(tensor.nbytes)

    def generate(self, requests: Sequence[Request]) -> Iterator[Completion]:
        """See `RolloutEngine.generate`. Each rank decodes an equal share, contiguous in `requests`.

        Equal requests and weights give equal completions, up to the last bits of the model's own arithmetic, which may
        differ between batch shapes.

        Raises:
            RolloutError: no complete weights have come yet, or a prompt is empty.
        """
        if not self._has_weights:
            raise RolloutError("the rollout model has no complete weights yet: call update_weights first")
        for position, request in enumerate(requests):
            if not request.tokens:
                raise RolloutError(f"prompt {position} is empty: a prompt needs at least one token")
        return self._generate(requests)

    def _generate(self, requests: Sequence[Request]) -> Iterator[Completion]:
        first, last = (len(requests) * part // self.world_size for part in (self.rank, self.rank + 1))
        by_sampling: dict[SamplingParams, list[int]] = {}
        for position in range(first, last):
            by_sampling.setdefault(requests[position].sampling, []).append(position)
        for positions in by_sampling.values():
            # Neighbors of equal length need no padding.
            positions.sort(key=lambda position: len(requests[position].tokens))
            for start in range(0, len(positions), self.batch_size):
                chosen = positions[start : start + self.batch_size]
                batch = _Batch(self, chosen, [requests[position] for position in chosen])
                while batch.alive:
                    yield from batch.step()


class _Batch:
    """Requests with the same sampling settings that are decoded together. A row leaves when its answer ends."""

    @torch.inference_mode()
    def __init__(self, engine: TransformersRollout, positions: list[int], requests: list[Request]) -> None:
        self.engine = engine
        self.alive = positions  # of the requests that are still being answered, one per row
        self.sampling = requests[0].sampling
        rows, width = len(requests), max(len(request.tokens) for request in requests)
        input_ids = torch.zeros(rows, width, dtype=torch.long)
        attention_mask = torch.zeros(rows, width, dtype=torch.long)
        for row, request in enumerate(requests):
            input_ids[row, width - len(request.tokens) :] = torch.as_tensor(request.tokens)
            attention_mask[row, width - len(request.tokens) :] = 1
        uniforms = np.stack([_uniforms(r.seed, r.index, self.sampling.max_new_tokens) for r in requests])
        device = engine.device
        self.padded = len({len(request.tokens) for request in requests}) > 1
        self.input_ids, self.attention_mask = input_ids.to(device), attention_mask.to(device)
        self.position_ids = (self.attention_mask.cumsum(-1) - 1).clamp_(min=0)
        self.uniforms = torch.from_numpy(uniforms).to(device)
        self.tokens = torch.zeros(rows, self.sampling.max_new_tokens, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(rows, self.sampling.max_new_tokens, device=device)
        self.cache = DynamicCache(config=engine.model.config)
        self.rows = torch.arange(rows, device=device)  # of `uniforms`, `tokens` and `logprobs` that are alive
        self.length = 0

    @torch.inference_mode()
    @no_cudnn_attention()  # each token is another length
    def step(self) -> list[Completion]:
        """Draw one token for each row; return the completions that end with it."""
        logits = self.engine.model(
            input_ids=self.input_ids,
            # Without padding no mask is needed, and attention takes its faster path.
            attention_mask=self.attention_mask if self.padded else None,
            position_ids=self.position_ids,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        end_tokens = self.engine.end_tokens
        blocked = end_tokens if self.length < self.sampling.min_new_tokens else None
        chosen, logprobs = draw(logits, self.uniforms[self.rows, self.length], self.sampling, blocked)
        self.tokens[self.rows, self.length] = chosen
        self.logprobs[self.rows, self.length] = logprobs
        self.length += 1
        ended = torch.isin(chosen, end_tokens)
        leaving = torch.ones_like(ended) if self.length == self.sampling.max_new_tokens else ended
        completions = []
        if leaving.any():
            completions = self._completions(leaving, ended)
            staying = (~leaving).nonzero().squeeze(-1)
            self.alive = [self.alive[row] for row in staying.tolist()]
            if not self.alive:
                return completions
            self.cache.batch_select_indices(staying)
            self.rows, chosen = self.rows[staying], chosen[staying]
            self.attention_mask, self.position_ids = self.attention_mask[staying], self.position_ids[staying]
        self.input_ids = chosen.unsqueeze(-1)
        self.position_ids = self.position_ids[:, -1:] + 1
        self.attention_mask = torch.cat([self.attention_mask, self.attention_mask.new_ones(len(chosen), 1)], dim=-1)
        return completions

    def _completions(self, rows: Tensor, ended: Tensor) -> list[Completion]:
        """Return those of the rows that the bool tensor `rows` selects; `ended` tells which drew an end token."""
        selected = rows.nonzero().squeeze(-1)
        return [
            Completion(
                request=self.alive[row],
                tokens=tokens,
                logprobs=logprobs,
                end="end_token" if has_ended else "length",
                weights_version=self.engine.weights_version,
            )
            for row, tokens, logprobs, has_ended in zip(
                selected.tolist(),
                self.tokens[self.rows[selected], : self.length].tolist(),
                self.logprobs[self.rows[selected], : self.length].tolist(),
                ended[selected].tolist(),
                strict=True,
            )
        ]


def draw(
    logits: Tensor, uniforms: Tensor, sampling: SamplingParams, blocked: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Draw one token per row by inverting the cumulative distribution at the row's uniform number.

    Args:
        logits: [rows, vocabulary] in any float dtype.
        uniforms: float64 [rows] in [0, 1).
        blocked: int64 ids that must not be drawn.

    Returns:
        Tokens, int64 [rows], and their log probabilities, float32 [rows], under the temperature-scaled distribution
        before `blocked`, top-k and top-p.
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
        # A token stays while those before it hold less than top_p, so the most likely one always stays.
        outside = probabilities.cumsum(-1) - probabilities >= sampling.top_p
        candidates = candidates.masked_fill(outside.gather(-1, token_of.argsort(-1)), float("-inf"))
    # float64: over a vocabulary of 150 000, an fp32 sum is too coarse for its rare tokens.
    cumulative = torch.softmax(candidates.double(), dim=-1).cumsum(-1)
    targets = uniforms.unsqueeze(-1) * cumulative[:, -1:]
    # right=True: strictly above the target, so a token of probability 0 is never drawn.
    chosen = torch.searchsorted(cumulative, targets, right=True).clamp_(max=logits.shape[-1] - 1)
    return chosen.squeeze(-1), all_logprobs.gather(-1, chosen).squeeze(-1)


def _uniforms(seed: int, index: int, count: int) -> np.ndarray:
    """Draw `count` float64 numbers in [0, 1) that depend on `(seed, index)` alone (Philox, a counter-based one)."""
    key = np.array([seed % 2**64, index % 2**64], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).random(count)
