"""The engine against transformers and a plain PyTorch loop, and against itself under other layouts and packings."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from mbridge_model import Parallel
from mbridge_train.engine.batch import Sample

from testing.gang import Gang
from testing.tiny_models import make_model
from testing.training_runs import leave, policy_samples

STEPS = 5
LENGTHS = (1, 2, 17, 9, 30, 5, 5, 12)  # the first cannot be trained on, and the last is a prompt with an empty answer
LEARNING_RATE, WEIGHT_DECAY, CLIP = 3e-4, 0.1, 1.0
TEMPERATURE = 0.7
POLICY = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "kl_penalty": "k3", "kl_beta": 0.05, "entropy_bonus": 0.01}


def make_batch(step: int) -> list[Sample]:
    """A global batch of mixed lengths with everything a policy loss reads, a function of the step alone."""
    generator = torch.Generator().manual_seed(100 + step)
    masks = [torch.arange(length) >= max(1, length // 3) for length in LENGTHS]
    masks[-1][:] = False
    return policy_samples(masks, generator, spread=0.3)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("engine")
    for family, tied in (("qwen2", True), ("qwen3", False)):
        make_model(family, tied, root / f"{family}-{tied}")
    return root


def twin(directory: Path) -> dict[str, Any]:
    """The same training with transformers, autograd over one sequence at a time, and torch's AdamW."""
    from mbridge_train.losses.base import LossInputs
    from mbridge_train.losses.policy import policy_loss
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    losses, norms, logprobs = [], [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        total = 0.0
        for sample in make_batch(step):
            distribution = (model(sample.tokens[None]).logits[0, :-1] / TEMPERATURE).log_softmax(-1)
            chosen = distribution.gather(1, sample.tokens[1:, None])[:, 0]
            if step == 0:
                logprobs.append(torch.cat([torch.zeros(1), chosen.detach()]))
            inputs = LossInputs(
                weights=sample.weights[1:],
                outputs={"logprobs": chosen, "entropy": -(distribution.exp() * distribution).sum(-1)},
                fields={name: values[1:] for name, values in sample.fields.items()},
            )
            loss = policy_loss(inputs, **POLICY).loss
            loss.backward()
            total += loss.item()
        losses.append(total)
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        optimizer.step()
    return {"losses": losses, "norms": norms, "logprobs": logprobs, "weights": model.state_dict()}


@pytest.fixture(scope="module")
def expected(models: Path) -> dict[str, dict[str, Any]]:
    return {directory.name: twin(directory) for directory in sorted(models.iterdir())}


def build(
    directory: str, parallel: Parallel, micro_batching: dict[str, Any], optimizer: dict[str, Any], dtype: str
) -> Any:
    from mbridge_model import load
    from mbridge_train.engine.engine import Engine, MicroBatching
    from mbridge_train.optim.optimizer import OptimizerSettings
    from mbridge_train.optim.schedule import Schedule

    overrides = {"calculate_per_token_loss": True, "gradient_accumulation_fusion": True}
    model, handle = load(directory, parallel, overrides, dtype=getattr(torch, dtype))
    settings = OptimizerSettings(
        schedule=Schedule(max_lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY),
        betas=(0.9, 0.95),
        clip_grad=CLIP,
        **optimizer,
    )
    return Engine(model, handle, micro_batching=MicroBatching(**micro_batching), optimizer=settings)


def train(
    directory: str,
    parallel: Parallel,
    micro_batching: dict[str, Any],
    optimizer: dict[str, Any],
    dtype: str = "float32",
) -> dict[str, Any]:
    """Train for STEPS steps on each rank; return the same as the twin."""
    from mbridge_train.engine.output_heads import LogprobHead
    from mbridge_train.losses.policy import policy_loss
    from megatron.core import parallel_state

    engine = build(directory, parallel, micro_batching, optimizer, dtype)
    try:
        losses, norms = [], []
        logprobs = engine.logprobs(make_batch(0), temperature=TEMPERATURE)
        for step in range(STEPS):
            metrics = engine.forward_backward(
                make_batch(step),
                partial(policy_loss, **POLICY),
                head=LogprobHead(temperature=TEMPERATURE, with_entropy=True),
            )
            losses.append(metrics["loss"])
            norms.append(engine.step().grad_norm)
        weights = {name: tensor.float().clone() for name, tensor in engine.export_weights()}
        return {"losses": losses, "norms": norms, "logprobs": logprobs, "weights": weights}
    finally:
        parallel_state.destroy_model_parallel()


def check(results: list[dict[str, Any]], expected: dict[str, Any], tolerance: float = 1e-5) -> None:
    for result in results:
        assert result["losses"][0] == pytest.approx(expected["losses"][0], abs=tolerance)
        assert result["norms"][0] == pytest.approx(expected["norms"][0], rel=tolerance)
        # From the second step on, Adam has amplified the rounding of the first.
        assert result["losses"] == pytest.approx(expected["losses"], abs=5 * tolerance)
        assert result["norms"] == pytest.approx(expected["norms"], rel=10 * tolerance)
        for ours, theirs in zip(result["logprobs"], expected["logprobs"], strict=True):
            torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)
        for name, tensor in result["weights"].items():
            # Adam's first steps have the size of the learning rate whatever the gradient, so noise in a tiny gradient
            # shows in a weight: a few of them may differ by a fraction of a step.
            torch.testing.assert_close(tensor, expected["weights"][name], atol=5e-4, rtol=0)
            assert (tensor - expected["weights"][name]).abs().mean() < 2e-6, name


DENSE = {"micro_batch_size": 2}
PACKED = {"micro_batch_size": 3, "packed": True}
BUDGET = {"token_budget": 33}
PLAIN = {"use_distributed_optimizer": False}
SHARDED = {"use_distributed_optimizer": True}
OVERLAPPED = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}

CASES_2 = [
    ("DP 2", Parallel(), DENSE, PLAIN),
    ("DP 2 packed", Parallel(), PACKED, SHARDED),
    ("DP 2 budget overlap", Parallel(), BUDGET, OVERLAPPED),
    ("TP 2", Parallel(tensor=2), DENSE, SHARDED),
    ("TP 2 SP packed", Parallel(tensor=2, sequence=True), PACKED, PLAIN),
    ("TP 2 SP budget", Parallel(tensor=2, sequence=True), {"token_budget": 40}, SHARDED),
    ("PP 2", Parallel(pipeline=2), DENSE, PLAIN),
    ("PP 2 packed", Parallel(pipeline=2), PACKED, SHARDED),
    ("PP 2 budget", Parallel(pipeline=2), BUDGET, SHARDED),
]
CASES_4 = [
    ("TP 2 SP x PP 2 packed", Parallel(tensor=2, pipeline=2, sequence=True), PACKED, SHARDED),
    ("TP 2 x PP 2 dense", Parallel(tensor=2, pipeline=2), DENSE, PLAIN),
    ("DP 2 x TP 2 overlap", Parallel(tensor=2), BUDGET, OVERLAPPED),
    ("DP 2 x PP 2", Parallel(pipeline=2), {"token_budget": 31}, SHARDED),
]


@pytest.mark.parametrize("name", ["qwen2-True", "qwen3-False"])
@pytest.mark.parametrize("case", CASES_2, ids=lambda case: case[0])
def test_two_ranks(gang2: Gang, models: Path, expected: dict[str, Any], name: str, case: Any) -> None:
    check(gang2.run(train, str(models / name), *case[1:]), expected[name])


@pytest.mark.parametrize("name", ["qwen2-True", "qwen3-False"])
@pytest.mark.parametrize("case", CASES_4, ids=lambda case: case[0])
def test_four_ranks(gang4: Gang, models: Path, expected: dict[str, Any], name: str, case: Any) -> None:
    check(gang4.run(train, str(models / name), *case[1:]), expected[name])


def test_bf16_follows_fp32(gang2: Gang, models: Path, expected: dict[str, Any]) -> None:
    """bf16 weights and activations with fp32 master weights: the same curve within bf16's eight bits."""
    for result in gang2.run(
        train, str(models / "qwen3-False"), Parallel(tensor=2), PACKED, OVERLAPPED | {}, "bfloat16"
    ):
        want = expected["qwen3-False"]
        assert result["losses"] == pytest.approx(want["losses"], rel=0.05)
        assert result["norms"] == pytest.approx(want["norms"], rel=0.1)


def padding_by_backend(directory: str) -> list[float]:
    from dataclasses import replace

    engine = build(directory, Parallel(tensor=2, sequence=True), {"micro_batch_size": 1}, {}, "float32")
    try:
        batch = [make_batch(0)[3]]  # nine tokens
        shares = [engine.padding_share(batch)]
        engine.handle = replace(engine.handle, backend="te")
        shares.append(engine.padding_share(batch))
        return shares
    finally:
        leave()


def test_rows_for_transformer_engine_have_few_lengths(gang2: Gang, models: Path) -> None:
    """Its attention is planned anew for each length."""
    torch_share, te_share = gang2.run(padding_by_backend, str(models / "qwen2-True"))[0]
    assert torch_share == pytest.approx(1 - 9 / 10)
    assert te_share == pytest.approx(1 - 9 / 128)
