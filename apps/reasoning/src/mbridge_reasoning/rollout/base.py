"""The interface of a rollout engine: requests in, completions out as they finish.

Nothing here imports torch at run time, so that reward workers can say why an answer ended.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from mbridge_reasoning.errors import RolloutError

if TYPE_CHECKING:
    from torch import Tensor

EndReason = Literal["end_token", "stop_string", "length"]
"""Why an answer ended: the policy drew an end token or wrote a stop string, or `max_new_tokens` cut it off."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """Settings by which the next token is drawn.

    `temperature` divides the logits. `top_k` (0 or -1: off) and then `top_p` (1.0: off) restrict the distribution from
    which a token is drawn, but not the one its log probability is taken from. `greedy` takes the most likely token and
    ignores all three, except that log probabilities stay those at `temperature`.

    Raises:
        RolloutError: a value is out of range, or a repetition penalty is set.
    """

    max_new_tokens: int
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    greedy: bool = False
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        longest = self.max_new_tokens
        valid_and_fix = {
            "max_new_tokens": (longest >= 1, "set it to 1 or more"),
            "min_new_tokens": (0 <= self.min_new_tokens <= longest, f"set it between 0 and max_new_tokens={longest}"),
            "temperature": (self.temperature > 0, "set it above 0, and greedy=true for the most likely token"),
            "top_k": (self.top_k >= -1, "set it to 1 or more, or to -1 (off)"),
            "top_p": (0 < self.top_p <= 1, "set it above 0 and at most 1.0 (off)"),
            "repetition_penalty": (
                self.repetition_penalty == 1.0,
                "set it to 1.0, because with a penalty the sampled tokens come from a distribution that the trainer "
                "cannot recompute",
            ),
        }
        problems = [f"{key} is {getattr(self, key)}: {fix}" for key, (valid, fix) in valid_and_fix.items() if not valid]
        if problems:
            raise RolloutError("cannot sample with these settings:\n" + "\n".join(f"  {line}" for line in problems))


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One answer to sample.

    Attributes:
        tokens: token ids of the prompt, at least one. Images of a prompt will travel beside them.
        sampling: how the answer is drawn.
        seed, index: name the random stream of the answer, which depends on nothing else: not on the rank that samples
            it, nor on what it is batched with.
    """

    tokens: Sequence[int]
    sampling: SamplingParams
    seed: int
    index: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """One sampled answer.

    Attributes:
        request: position of its request in the list that `generate` was given.
        tokens: the new token ids, including the end token if one was drawn.
        logprobs: natural log probability of each of them, log softmax(logits / temperature)[token] over the whole
            vocabulary in fp32, before top-k and top-p.
        end: why it ended.
        weights_version: `RolloutEngine.weights_version` when it was sampled.
    """

    request: int
    tokens: list[int]
    logprobs: list[float]
    end: EndReason
    weights_version: int


class RolloutEngine(Protocol):
    """Samples from the policy. All ranks of the trainer call every method, in the same order.

    Which rank runs which request is the engine's business: each rank may decode a share, a group of ranks may decode
    together, or rank 0 may ask a server.

    Attributes:
        weights_version: 0 before the first `update_weights`; each complete update adds 1.
    """

    weights_version: int

    def update_weights(self, weights: Iterable[tuple[str, "Tensor"]]) -> None:
        """Replace all weights by those of the stream, named as in the policy's HuggingFace checkpoint.

        The tensors may be views of the policy's own, which training changes and offloading frees: copy them.
        """

    def generate(self, requests: Sequence[Request]) -> Iterator[Completion]:
        """Yield completions as they finish, in any order.

        Every rank passes the same requests. Over all ranks each request is completed once; which rank receives its
        completion is the engine's choice. Every rank must exhaust its iterator, even where nothing comes out.
        """

    def sleep(self) -> None:
        """Release the memory. The weights are lost: `generate` needs `wake` and `update_weights` first."""

    def wake(self) -> None:
        """Allocate the memory for the weights again; a no-op when awake."""
