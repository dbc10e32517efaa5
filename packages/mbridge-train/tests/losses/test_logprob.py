"""Against torch.log_softmax over the whole vocabulary in double precision, autograd included."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from mbridge_train.losses import logprob
from mbridge_train.losses.logprob import vocab_parallel_logprob_and_entropy
from torch import Tensor


def reference(
    logits: Tensor, targets: Tensor, vocab_size: int, temperature: float, gradients: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Log probabilities, entropies and the gradient of the logits, in double precision."""
    leaf = logits.double().requires_grad_()
    log_p = torch.log_softmax(leaf[:, :vocab_size] / temperature, dim=-1)
    logprobs = log_p.gather(1, targets[:, None]).squeeze(1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    (logprobs @ gradients[0].double() + entropy @ gradients[1].double()).backward()
    assert leaf.grad is not None
    return logprobs.detach(), entropy.detach(), leaf.grad


def make_case(tokens: int, padded_vocab: int, vocab_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Any]:
    generator = torch.Generator().manual_seed(tokens * 1000 + vocab_size)
    logits = (5 * torch.randn(tokens, padded_vocab, generator=generator)).to(dtype)
    targets = torch.randint(0, vocab_size, (tokens,), generator=generator)
    targets[-1] = vocab_size - 1
    gradients = (torch.randn(tokens, generator=generator), torch.randn(tokens, generator=generator))
    return logits, targets, gradients


def run_slice(case: tuple[Tensor, Tensor, Any], vocab_size: int, temperature: float, with_entropy: bool) -> Any:
    """Return the results of this rank for its slice of the vocabulary; runs in the workers of a gang."""
    logits, targets, gradients = case
    width = logits.shape[1] // dist.get_world_size()
    start = dist.get_rank() * width
    local = logits[:, start : start + width].clone().requires_grad_()
    logprobs, entropy = vocab_parallel_logprob_and_entropy(
        local,
        targets,
        group=dist.group.WORLD,
        vocab_start=start,
        vocab_size=vocab_size,
        temperature=temperature,
        with_entropy=with_entropy,
    )
    loss = logprobs @ gradients[0]
    if entropy is not None:
        loss = loss + entropy @ gradients[1]
    loss.backward()
    return logprobs.detach(), None if entropy is None else entropy.detach(), local.grad


def check(ranks: list[Any], case: tuple[Tensor, Tensor, Any], vocab_size: int, temperature: float) -> None:
    logits, targets, gradients = case
    logprobs, entropy, grad = reference(logits, targets, vocab_size, temperature, gradients)
    for rank_logprobs, rank_entropy, _ in ranks:
        assert rank_logprobs.dtype == torch.float32
        torch.testing.assert_close(rank_logprobs.double(), logprobs, rtol=1e-6, atol=5e-6)
        torch.testing.assert_close(rank_entropy.double(), entropy, rtol=1e-6, atol=5e-6)
    whole = torch.cat([rank_grad for _, _, rank_grad in ranks], dim=1)
    assert whole.dtype == logits.dtype
    tolerance = 5e-6 if logits.dtype == torch.float32 else 1e-2
    torch.testing.assert_close(whole.double(), grad, rtol=tolerance, atol=tolerance)
    assert not whole[:, vocab_size:].any()


# (tokens, padded vocabulary, true vocabulary): the last ones leave one rank, or three of four, with padding only.
SIZES = [(7, 16, 16), (5, 24, 17), (3, 32, 9), (1, 8, 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "padded", "vocab_size"), SIZES)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_two_ranks(
    gang2: Any, tokens: int, padded: int, vocab_size: int, dtype: torch.dtype, temperature: float
) -> None:
    case = make_case(tokens, padded, vocab_size, dtype)
    check(gang2.run(run_slice, case, vocab_size, temperature, True), case, vocab_size, temperature)


@pytest.mark.parametrize(("tokens", "padded", "vocab_size"), SIZES)
def test_four_ranks(gang4: Any, tokens: int, padded: int, vocab_size: int) -> None:
    case = make_case(tokens, padded, vocab_size, torch.float32)
    check(gang4.run(run_slice, case, vocab_size, 1.3, True), case, vocab_size, 1.3)


def test_logprobs_do_not_depend_on_entropy_being_computed(gang2: Any) -> None:
    case = make_case(6, 24, 21, torch.float32)
    without = gang2.run(run_slice, case, 21, 0.8, False)
    logits, targets, gradients = case
    logprobs, _, grad = reference(logits, targets, 21, 0.8, (gradients[0], torch.zeros(6)))
    for rank_logprobs, entropy, _ in without:
        assert entropy is None
        torch.testing.assert_close(rank_logprobs.double(), logprobs, rtol=1e-6, atol=5e-6)
    torch.testing.assert_close(torch.cat([g for _, _, g in without], dim=1).double(), grad, rtol=1e-5, atol=5e-6)


def alone(logits: Tensor, targets: Tensor, vocab_size: int, **options: Any) -> tuple[Tensor, Tensor | None]:
    return vocab_parallel_logprob_and_entropy(
        logits, targets, group=None, vocab_start=0, vocab_size=vocab_size, **options
    )


def test_by_hand() -> None:
    # exp of the logits are 1, 2, 5; the fourth column is padding.
    logits = torch.tensor([[1.0, 2.0, 5.0, 1e6]]).log()
    logprobs, entropy = alone(logits, torch.tensor([1]), 3, with_entropy=True)
    assert entropy is not None
    assert logprobs.item() == pytest.approx(-1.386294, abs=1e-6)  # ln 2/8
    assert entropy.item() == pytest.approx(0.900256, abs=1e-6)  # ln 8 - (2 ln 2 + 5 ln 5)/8
    halved, _ = alone(logits, torch.tensor([2]), 3, temperature=0.5)
    assert halved.item() == pytest.approx(-0.182322, abs=1e-6)  # ln 25/30


@pytest.mark.parametrize("chunk", [1, 22, 1 << 24])
def test_gradcheck_and_chunks(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setitem(logprob.CHUNK_ELEMENTS, "cpu", chunk)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 13, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 10, 3, 3, 7])
    for pick in (slice(0, 1), slice(1, 2), slice(0, 2)):  # log probability alone, entropy alone, both
        assert torch.autograd.gradcheck(
            lambda x, pick=pick: alone(x, targets, 11, temperature=0.7, with_entropy=True)[pick], logits
        )


def test_extreme_logits_stay_finite() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [-torch.inf, 3.0, 3.0]], requires_grad=True)
    logprobs, entropy = alone(logits, torch.tensor([1, 2]), 3, with_entropy=True)
    assert entropy is not None
    assert logprobs.tolist() == pytest.approx([-2e4, -0.693147], abs=1e-5)
    assert entropy.tolist() == pytest.approx([0, 0.693147], abs=1e-5)
    (logprobs.sum() + entropy.sum()).backward()
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())


def test_slices_far_apart_stay_finite(gang2: Any) -> None:
    inf = torch.inf
    logits = torch.tensor([[-inf, -inf, 3.0, 3.0], [1e4, 1e4, -1e4, 0.0], [3.0, -inf, -inf, -inf]])
    targets = torch.tensor([2, 1, 0])
    for logprobs, entropy, grad in gang2.run(
        run_slice, (logits, targets, (torch.ones(3), torch.ones(3))), 4, 1.0, True
    ):
        assert logprobs.tolist() == pytest.approx([-0.693147, -0.693147, 0], abs=1e-5)
        assert entropy.tolist() == pytest.approx([0.693147, 0.693147, 0], abs=1e-5)
        assert bool(grad.isfinite().all())


def test_target_outside_the_vocabulary_is_nan() -> None:
    logprobs, _ = alone(torch.zeros(3, 8), torch.tensor([-1, 6, 5]), 6)
    assert logprobs.isnan().tolist() == [True, True, False]


def test_no_gradient_and_no_tokens() -> None:
    with torch.no_grad():
        logprobs, entropy = alone(torch.zeros(0, 8), torch.zeros(0, dtype=torch.int64), 8, with_entropy=True)
    assert entropy is not None
    assert logprobs.shape == entropy.shape == (0,)


def test_logits_are_left_alone() -> None:
    logits = torch.randn(3, 8, dtype=torch.float64)
    before = logits.clone()
    alone(logits, torch.tensor([1, 2, 3]), 8, temperature=0.5, with_entropy=True)
    assert torch.equal(logits, before)


def test_rejects_bad_input() -> None:
    with pytest.raises(ValueError, match="int64 targets"):
        alone(torch.zeros(3, 8), torch.zeros(2, dtype=torch.int64), 8)
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        alone(torch.zeros(3, 8), torch.zeros(3, dtype=torch.int64), 8, temperature=0)
