"""The same global batch gives the same loss and gradient norm however it is cut, and at the edges of what a batch is.

`test_engine` has the layouts and packings; here are recomputation, other aggregations and clipping, ranks without work
and batches without anything to train, all through `from_config`, as the apps build their engines.
"""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from mbridge_train.engine.batch import Sample

from testing.gang import Gang
from testing.tiny_models import make_model
from testing.training_runs import policy_samples

DUAL = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.3, "dual_clip": 1.5, "kl_penalty": "k2", "kl_beta": 0.1}
PLAIN = {"clip_ratio_low": 0.1, "clip_ratio_high": 0.1}
MIXED = (17, 1, 9, 30, 5, 12, 3)
THREE = (11, 4, 7)

RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
BLOCK = {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1}


def make_batch(lengths: tuple[int, ...], aggregation: Any = "token-mean", *, trained: bool = True) -> list[Sample]:
    generator = torch.Generator().manual_seed(sum(lengths))
    masks = [(torch.arange(length) > length // 4) & trained for length in lengths]
    return policy_samples(masks, generator, aggregation)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("invariance")
    make_model("qwen2", True, root / "qwen2")
    make_model("qwen3", False, root / "qwen3")
    return root


def twin(directory: Path, batch: list[Sample], options: dict[str, Any]) -> tuple[float, float]:
    """Loss and gradient norm with transformers and autograd, one sequence at a time."""
    from mbridge_train.losses.base import LossInputs
    from mbridge_train.losses.policy import policy_loss
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    total = 0.0
    for sample in batch:
        logprobs = model(sample.tokens[None]).logits[0, :-1].log_softmax(-1).gather(1, sample.tokens[1:, None])[:, 0]
        inputs = LossInputs(
            weights=sample.weights[1:],
            outputs={"logprobs": logprobs},
            fields={name: values[1:] for name, values in sample.fields.items()},
        )
        loss = policy_loss(inputs, **options).loss
        loss.backward()
        total += loss.item()
    norms = [parameter.grad.norm() for parameter in model.parameters() if parameter.grad is not None]
    return total, torch.stack(norms).norm().item()


def build(directory: Path, model: dict[str, Any], runner: dict[str, Any], micro_batch_size: int) -> Any:
    from mbridge_config.schema.actor import ActorConfig, LrScheduleConfig, ModelConfig, OptimizerConfig
    from mbridge_config.schema.runner import RunnerConfig
    from mbridge_train.build import build_engine

    actor = ActorConfig(
        micro_batch_size=micro_batch_size,
        model=ModelConfig(precision="fp32", **model),
        optim=OptimizerConfig(clip_grad=1.0),
        lr_sched=LrScheduleConfig(max_lr=1e-3, min_lr=0.0, start_weight_decay=0.0),
    )
    return build_engine(actor, RunnerConfig(seq_length=64, **runner), directory, optimizer_steps=10)


def measure(
    directory: Path,
    model: dict[str, Any],
    runner: dict[str, Any],
    micro_batch_size: int,
    batch: list[Sample],
    options: dict[str, Any],
) -> dict[str, Any]:
    """Return the results of one forward and backward pass, and how the model was built."""
    from mbridge_train.losses.policy import policy_loss
    from megatron.core import parallel_state

    loss = partial(policy_loss, **options)
    engine = build(directory, model, runner, micro_batch_size)
    try:
        metrics = engine.forward_backward(batch, loss)
        again = engine.forward_backward(batch, loss)  # nothing is left over from the first time
        return {
            "metrics": metrics,
            "again": again,
            "norm": engine.step().grad_norm,
            "recompute": (engine.config.recompute_granularity, engine.config.recompute_method),
            "layers": len(engine.model[0].module.decoder.layers),
            "micro_batches": [
                len(samples) for samples in engine._plan([sample.length for sample in batch])[engine.layout.data.rank]
            ],
        }
    finally:
        parallel_state.destroy_model_parallel()


def layout(tensor: int = 1, pipeline: int = 1, *, sequence: bool = False) -> dict[str, Any]:
    return {
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": pipeline,
        "sequence_parallel": sequence,
    }


def budget(tokens: int) -> dict[str, Any]:
    return {"enable_dynamic_batch_size": True, "max_tokens_per_mbs": tokens}


TOKENS, SEQUENCES, SUMS = "token-mean", "seq-mean-token-mean", "seq-mean-token-sum"
CASES_2 = [
    ("PP 2 recompute", layout(pipeline=2) | RECOMPUTE, {}, 2, MIXED, TOKENS, PLAIN),
    ("TP 2 SP recompute budget", layout(2, sequence=True) | BLOCK, budget(33), 1, MIXED, TOKENS, DUAL),
    ("DP 2 dual clip by sequence", layout(), {}, 2, MIXED, SEQUENCES, DUAL),
    ("PP 2 first 3", layout(pipeline=2) | {"num_layers_in_first_pipeline_stage": 3}, {}, 2, MIXED, TOKENS, PLAIN),
    ("PP 2 last 3", layout(pipeline=2) | {"num_layers_in_last_pipeline_stage": 3}, budget(40), 1, MIXED, SUMS, DUAL),
    ("DP 2 budget by sums", layout(), budget(30), 1, MIXED, SUMS, DUAL),
    ("DP 2 three samples", layout(), {}, 1, THREE, TOKENS, PLAIN),
    ("DP 2 one sample", layout(), budget(64), 1, (9,), SEQUENCES, PLAIN),
]
SPLITS = {"PP 2 first 3": [3, 1], "PP 2 last 3": [1, 3]}  # layers of each stage
CASES_4 = [
    ("DP 2 x PP 2 three samples", layout(pipeline=2), {}, 1, THREE, TOKENS, PLAIN),
    ("DP 2 x PP 2 one sample", layout(pipeline=2), budget(64), 1, (9,), TOKENS, DUAL),
    ("DP 2 x TP 2 SP three samples", layout(2, sequence=True), {}, 1, THREE, SEQUENCES, DUAL),
    ("TP 2 SP x PP 2 recompute", layout(2, 2, sequence=True) | RECOMPUTE, {}, 3, MIXED, SUMS, PLAIN),
]


def check(results: list[dict[str, Any]], directory: Path, case: Any) -> None:
    name, model, _, _, lengths, aggregation, options = case
    loss, norm = twin(directory, make_batch(lengths, aggregation), options)
    for result in results:
        assert result["metrics"]["loss"] == pytest.approx(loss, abs=1e-5)
        assert result["norm"] == pytest.approx(norm, rel=1e-5)
        assert result["again"] == result["metrics"]
        assert result["recompute"] == (model.get("recompute_granularity"), model.get("recompute_method"))
    assert name not in SPLITS or [result["layers"] for result in results] == SPLITS[name]
    counts = [result["micro_batches"] for result in results]
    assert len({len(sizes) for sizes in counts}) == 1  # else a rank would wait for another for ever
    if "three samples" in name or "one sample" in name:
        assert any(0 in sizes for sizes in counts)


@pytest.mark.parametrize("model", ["qwen2", "qwen3"])
@pytest.mark.parametrize("case", CASES_2[:3], ids=lambda case: case[0])
def test_two_ranks(gang2: Gang, models: Path, model: str, case: Any) -> None:
    batch = make_batch(case[4], case[5])
    check(gang2.run(measure, models / model, *case[1:4], batch, case[6]), models / model, case)


@pytest.mark.parametrize("case", CASES_2[3:], ids=lambda case: case[0])
def test_uneven_two_ranks(gang2: Gang, models: Path, case: Any) -> None:
    batch = make_batch(case[4], case[5])
    check(gang2.run(measure, models / "qwen2", *case[1:4], batch, case[6]), models / "qwen2", case)


@pytest.mark.parametrize("case", CASES_4, ids=lambda case: case[0])
def test_four_ranks(gang4: Gang, models: Path, case: Any) -> None:
    batch = make_batch(case[4], case[5])
    check(gang4.run(measure, models / "qwen2", *case[1:4], batch, case[6]), models / "qwen2", case)


def edges(directory: Path, model: dict[str, Any]) -> dict[str, Any]:
    """A step on a batch with nothing to train, and log probabilities of samples with nothing to predict."""
    from mbridge_train.errors import TrainError
    from mbridge_train.losses.policy import policy_loss
    from megatron.core import parallel_state

    engine = build(directory, model, {}, 2)
    try:
        before = {name: tensor.clone() for name, tensor in engine.export_weights()}
        metrics = engine.forward_backward(make_batch(THREE, trained=False), partial(policy_loss, **DUAL))
        result = engine.step()
        changed = [name for name, tensor in engine.export_weights() if not torch.equal(tensor, before[name])]
        try:
            engine.logprobs([])
            message = ""
        except TrainError as error:
            message = str(error)
        return {
            "metrics": metrics,
            "norm": result.grad_norm,
            "changed": changed,
            "logprobs": engine.logprobs(make_batch((1, 1, 1))),
            "message": message,
        }
    finally:
        parallel_state.destroy_model_parallel()


@pytest.mark.parametrize("model", [layout(), layout(2, sequence=True), layout(pipeline=2)], ids=["DP", "TP SP", "PP"])
def test_batches_with_nothing_in_them(gang2: Gang, models: Path, model: dict[str, Any]) -> None:
    for result in gang2.run(edges, models / "qwen2", model):
        assert set(result["metrics"].values()) == {0.0}
        assert result["norm"] == 0.0 and result["changed"] == []
        assert [row.tolist() for row in result["logprobs"]] == [[0.0]] * 3
        assert "no samples" in result["message"]


def without_a_gradient(directory: Path, model: dict[str, Any]) -> tuple[str, list[str]]:
    """The error of a step whose loss is not a number on the rank that has the first sample, and what it changed."""
    from mbridge_train.errors import TrainError
    from mbridge_train.losses.base import LossInputs, LossOutputs
    from mbridge_train.losses.sft import sft_loss
    from megatron.core import parallel_state

    def broken(inputs: LossInputs) -> LossOutputs:
        outputs = sft_loss(inputs)
        bad = float("nan") if parallel_state.get_data_parallel_rank() == 0 else 1.0
        return LossOutputs(loss=outputs.loss * bad, metrics=outputs.metrics)

    engine = build(directory, model, {}, 2)
    try:
        before = {name: tensor.clone() for name, tensor in engine.export_weights()}
        engine.forward_backward(make_batch(THREE), broken)
        with pytest.raises(TrainError) as error:
            engine.step()
        after = dict(engine.export_weights())
        return str(error.value), [name for name in before if not torch.equal(before[name], after[name])]
    finally:
        parallel_state.destroy_model_parallel()


@pytest.mark.parametrize("model", [layout(), layout(2, sequence=True), layout(pipeline=2)], ids=["DP", "TP SP", "PP"])
def test_gradients_that_are_not_finite_are_not_applied(gang2: Gang, models: Path, model: dict[str, Any]) -> None:
    for message, changed in gang2.run(without_a_gradient, models / "qwen2", model):
        assert message.startswith("the gradients are not finite (norm nan), so the weights stay as they are")
        assert changed == []


def forgotten(directory: Path, close: bool) -> bool:
    """Whether the model of an engine that was used is gone with the last reference to the engine."""
    import gc
    import weakref

    from mbridge_train.losses.sft import sft_loss
    from megatron.core import parallel_state

    engine = build(directory, layout(), {}, 2)
    try:
        engine.forward_backward(make_batch((5, 9)), sft_loss)
        model = weakref.ref(engine.model[0])
        if close:
            engine.close()
        del engine
        gc.collect()
        return model() is None
    finally:
        parallel_state.destroy_model_parallel()


def test_closed_engine_is_freed(gang2: Gang, models: Path) -> None:
    assert gang2.run(forgotten, models / "qwen2", True) == [True, True]
    # If this fails, Megatron-Core no longer holds its models, and `Engine.close` can go.
    assert gang2.run(forgotten, models / "qwen2", False) == [False, False]
