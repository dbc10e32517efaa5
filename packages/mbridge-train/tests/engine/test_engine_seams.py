"""Training with a loss that reads fields of its own, and with a head of its own, without changing any package."""

from pathlib import Path
from typing import Any

import pytest
import torch
from mbridge_model import Parallel
from mbridge_train.engine.batch import Sample, aggregation_weights
from torch import Tensor, nn

from testing.gang import Gang
from testing.tiny_models import VOCAB_SIZE, make_model
from testing.training_runs import leave

STEPS = 3
LEARNING_RATE, CLIP = 1e-3, 1.0
LENGTHS = (17, 1, 9, 30, 5)
PACKED, BUDGET, DENSE = {"micro_batch_size": 2, "packed": True}, {"token_budget": 40}, {"micro_batch_size": 2}


def make_batch(step: int) -> list[Sample]:
    """A global batch with the fields `moon` and `tide`, a function of the step alone."""
    generator = torch.Generator().manual_seed(step)
    weights = aggregation_weights([torch.arange(length) > 1 for length in LENGTHS], "token-mean")
    return [
        Sample(
            tokens=torch.randint(VOCAB_SIZE, (length,), generator=generator),
            weights=weight,
            fields={name: torch.randn(length, generator=generator) for name in ("moon", "tide")},
        )
        for length, weight in zip(LENGTHS, weights, strict=True)
    ]


def tidal_loss(inputs: Any) -> Any:
    """Likelihoods weighted by one field, pulled towards the other one."""
    from mbridge_train.losses.base import LossOutputs

    logprobs, tide = inputs.output("logprobs"), inputs.field("tide")
    token_loss = -inputs.field("moon") * logprobs + 0.01 * (logprobs - tide).square()
    return LossOutputs(loss=(inputs.weights * token_loss).sum(), metrics={"tide": (inputs.weights * tide).sum()})


def value_loss(inputs: Any) -> Any:
    """Squared error of a value at each position."""
    from mbridge_train.losses.base import LossOutputs

    error = inputs.output("values") - inputs.field("moon")
    return LossOutputs(loss=(inputs.weights * error.square()).sum(), metrics={})


class ValueHead:
    """A linear map of the hidden states, whose parameters are part of the last stage's chunk."""

    def __init__(self, linear: nn.Linear | None) -> None:
        self.linear = linear

    def __call__(self, inputs: Any) -> dict[str, Tensor]:
        assert self.linear is not None, "called on the last stage alone"
        return {"values": self.linear(inputs.hidden_states()).squeeze(-1)}


def make_linear(hidden: int) -> nn.Linear:
    linear = nn.Linear(hidden, 1)
    with torch.no_grad():
        linear.weight.copy_(torch.linspace(-0.3, 0.3, hidden)[None])
        linear.bias.fill_(0.1)
    return linear


def build(directory: Path, parallel: Parallel, batching: dict[str, Any], *, values: bool) -> tuple[Any, Any]:
    """An engine and the head to train it with."""
    from mbridge_model import load
    from mbridge_train.engine.engine import Engine, MicroBatching
    from mbridge_train.engine.output_heads import LogprobHead
    from mbridge_train.optim.optimizer import OptimizerSettings
    from mbridge_train.optim.schedule import Schedule
    from megatron.core import parallel_state

    overrides = {"calculate_per_token_loss": True, "gradient_accumulation_fusion": True}
    model, handle = load(directory, parallel, overrides)
    linear = None
    if values and parallel_state.is_pipeline_last_stage():
        linear = make_linear(handle.config.hidden_size)
        model[-1].add_module("value_head", linear)
    settings = OptimizerSettings(schedule=Schedule(max_lr=LEARNING_RATE), clip_grad=CLIP)
    engine = Engine(model, handle, micro_batching=MicroBatching(**batching), optimizer=settings)
    return engine, ValueHead(linear) if values else LogprobHead()


def train(directory: Path, parallel: Parallel, batching: dict[str, Any], *, values: bool) -> dict[str, Any]:
    """Losses, norms and what the head gives before the first step, on each rank."""
    engine, head = build(directory, parallel, batching, values=values)
    try:
        given = engine.forward(make_batch(0), head)
        losses, norms, tides = [], [], []
        for step in range(STEPS):
            metrics = engine.forward_backward(make_batch(step), value_loss if values else tidal_loss, head=head)
            norms.append(engine.step().grad_norm)
            losses.append(metrics["loss"])
            tides.append(metrics.get("tide"))
        names = [name for chunk in engine.chunks for name, _ in chunk.named_parameters()]
        return {
            "losses": losses,
            "norms": norms,
            "tides": tides,
            "given": given,
            "has_head": "value_head.weight" in names,
            "is_last": engine.layout.is_last_stage,
        }
    finally:
        leave()


def twin(directory: Path, *, values: bool) -> dict[str, Any]:
    """The same with transformers, autograd over one sequence at a time, and torch's AdamW."""
    from mbridge_train.losses.base import LossInputs
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    linear = make_linear(model.config.hidden_size)
    parameters = [*model.parameters(), *linear.parameters()] if values else list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    losses, norms, tides, given = [], [], [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        total, tide = 0.0, 0.0
        for sample in make_batch(step):
            if values:
                hidden = model.model(sample.tokens[None]).last_hidden_state[0, :-1]
                outputs = {"values": linear(hidden).squeeze(-1)}
            else:
                distribution = model(sample.tokens[None]).logits[0, :-1].log_softmax(-1)
                outputs = {"logprobs": distribution.gather(1, sample.tokens[1:, None])[:, 0]}
            if step == 0:
                given.append(torch.cat([torch.zeros(1), next(iter(outputs.values())).detach()]))
            fields = {name: value[1:] for name, value in sample.fields.items()}
            inputs = LossInputs(weights=sample.weights[1:], outputs=outputs, fields=fields)
            result = (value_loss if values else tidal_loss)(inputs)
            result.loss.backward()
            total += result.loss.item()
            tide += (sample.weights * sample.fields["tide"]).sum().item()
        losses.append(total)
        tides.append(tide)
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, CLIP).item())
        optimizer.step()
    return {"losses": losses, "norms": norms, "tides": tides, "given": given}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("seams") / "model"
    make_model("qwen3", False, root)
    return root


def check(result: dict[str, Any], expected: dict[str, Any], name: str) -> None:
    assert result["losses"][0] == pytest.approx(expected["losses"][0], abs=1e-5)
    assert result["norms"][0] == pytest.approx(expected["norms"][0], rel=1e-5)
    # From the second step on, Adam has amplified the rounding of the first.
    assert result["losses"] == pytest.approx(expected["losses"], abs=5e-5)
    assert result["norms"] == pytest.approx(expected["norms"], rel=1e-4)
    assert list(result["given"]) == [name]
    for ours, theirs in zip(result["given"][name], expected["given"], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


LAYOUTS = [
    pytest.param(Parallel(), DENSE, id="DP 2 dense"),
    pytest.param(Parallel(tensor=2, sequence=True), PACKED, id="TP 2 SP packed"),
    pytest.param(Parallel(tensor=2), BUDGET, id="TP 2 budget"),
    pytest.param(Parallel(pipeline=2), BUDGET, id="PP 2 budget"),
]


@pytest.mark.parametrize(("parallel", "batching"), LAYOUTS)
def test_a_loss_with_fields_of_its_own(gang2: Gang, model: Path, parallel: Parallel, batching: dict[str, Any]) -> None:
    expected = twin(model, values=False)
    for result in gang2.run(train, model, parallel, batching, values=False):
        check(result, expected, "logprobs")
        assert result["tides"] == pytest.approx(expected["tides"], abs=1e-5)


@pytest.mark.parametrize(("parallel", "batching"), LAYOUTS)
def test_a_head_of_its_own(gang2: Gang, model: Path, parallel: Parallel, batching: dict[str, Any]) -> None:
    expected = twin(model, values=True)
    for result in gang2.run(train, model, parallel, batching, values=True):
        check(result, expected, "values")
        assert result["has_head"] == result["is_last"]


def resume(directory: Path, checkpoints: Path, parallel: Parallel) -> tuple[Any, Any]:
    """Losses of two steps without a break, and with a checkpoint and another engine between them."""
    from mbridge_train.checkpoint.load import load_checkpoint
    from mbridge_train.checkpoint.save import save_checkpoint

    def step(engine: Any, head: Any, number: int) -> tuple[float, float]:
        loss = engine.forward_backward(make_batch(number), value_loss, head=head)["loss"]
        return loss, engine.step().grad_norm

    try:
        engine, head = build(directory, parallel, PACKED, values=True)
        step(engine, head, 0)
        path = save_checkpoint(engine, checkpoints, step=1, loop_state={})
        unbroken = step(engine, head, 1)
        leave()
        engine, head = build(directory, parallel, PACKED, values=True)
        load_checkpoint(engine, path)
        return unbroken, step(engine, head, 1)
    finally:
        leave()


@pytest.mark.parametrize("parallel", [Parallel(), Parallel(pipeline=2)], ids=["DP 2", "PP 2"])
def test_a_head_of_its_own_is_in_checkpoints(gang2: Gang, model: Path, tmp_path: Path, parallel: Parallel) -> None:
    for unbroken, resumed in gang2.run(resume, model, tmp_path, parallel):
        assert resumed == unbroken
