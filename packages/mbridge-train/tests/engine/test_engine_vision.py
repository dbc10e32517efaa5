"""Vision-language models in the engine: the steps of transformers under each layout, and checkpoints across layouts."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from mbridge_ckpt import reshard
from mbridge_model import Freeze, MropeSettings, Parallel, VisionInputs
from mbridge_train.engine.batch import Sample, aggregation_weights
from mbridge_train.errors import TrainError

from testing.gang import Gang
from testing.tiny_models import make_vision_model
from testing.training_runs import BETAS, OVERLAPPED, PLAIN, SHARDED, WEIGHT_DECAY, build, digests, leave
from testing.vision_forward import positions_of
from testing.vision_samples import LAYOUTS, SECONDS_PER_GRID, make_sample, transformers_inputs

STEPS = 3
FAMILIES = {"qwen2_5_vl": True, "qwen3_vl": False}  # tied embeddings or not


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("engine_vision")
    for family, tied in FAMILIES.items():
        make_vision_model(family, tied, root / family)
    return root


def samples(family: str, step: int, layouts: Iterable[str] = LAYOUTS) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(step)
    return [make_sample(LAYOUTS[layout], family.startswith("qwen3_vl"), generator) for layout in layouts]


def make_batch(directory: Path, step: int, layouts: Iterable[str] = LAYOUTS) -> list[Sample]:
    """Every token but the first is trained, also placeholders: more of the model shows."""
    settings = MropeSettings.from_directory(directory)
    raw = samples(directory.name, step, layouts)
    weights = aggregation_weights([torch.arange(len(sample["tokens"])) > 0 for sample in raw], "token-mean")
    return [
        Sample(
            tokens=sample["tokens"],
            weights=weight,
            position_ids=positions_of(sample, settings),
            vision=None
            if sample["grid_thw"] is None
            else VisionInputs(pixel_values=sample["pixel_values"], grid_thw=sample["grid_thw"]),
        )
        for sample, weight in zip(raw, weights, strict=True)
    ]


def train(
    engine: Any, directory: Path, first: int, last: int, layouts: Iterable[str] = LAYOUTS
) -> list[tuple[float, float]]:
    from mbridge_train.losses.sft import sft_loss

    record = []
    for step in range(first, last):
        loss = engine.forward_backward(make_batch(directory, step, layouts), sft_loss)["loss"]
        record.append((loss, engine.step().grad_norm))
    return record


def run(directory: Path, parallel: Parallel, batching: dict[str, Any], dtype: str = "float32") -> Any:
    try:
        engine = build(directory, parallel, SHARDED, batching=batching, dtype=dtype)
        return train(engine, directory, 0, STEPS), engine.logprobs(make_batch(directory, STEPS))
    finally:
        leave()


def reference_inputs(family: str, sample: dict[str, Any]) -> dict[str, Any]:
    """The sample as transformers' model takes it."""
    inputs = transformers_inputs(sample)
    if family == "qwen2_5_vl" and any(sample["is_video"]):
        inputs["second_per_grid_ts"] = torch.full((sum(sample["is_video"]),), SECONDS_PER_GRID)
    return inputs


def twin(directory: Path) -> tuple[list[tuple[float, float]], list[torch.Tensor]]:
    """The same of transformers and torch's AdamW in one process."""
    from mbridge_train.optim.schedule import Schedule
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32)
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=BETAS)
    schedule = Schedule(max_lr=3e-3, warmup_steps=4, decay_steps=8, min_lr=1e-4, decay_style="cosine")

    def logprobs(sample: dict[str, Any]) -> torch.Tensor:
        logits = model(**reference_inputs(directory.name, sample)).logits[0].log_softmax(-1)
        return logits[:-1].gather(1, sample["tokens"][1:, None])[:, 0]

    record = []
    for step in range(STEPS):
        optimizer.zero_grad()
        batch = samples(directory.name, step)
        count = sum(len(sample["tokens"]) - 1 for sample in batch)
        loss = -sum(logprobs(sample).sum() for sample in batch) / count
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate(step)
        optimizer.step()
        record.append((loss.item(), norm.item()))
    with torch.no_grad():
        return record, [torch.cat([torch.zeros(1), logprobs(s)]) for s in samples(directory.name, STEPS)]


@pytest.fixture(scope="module")
def expected(models: Path) -> dict[str, Any]:
    return {family: twin(models / family) for family in FAMILIES}


DENSE, PACKED, BUDGET = {"micro_batch_size": 2}, {"micro_batch_size": 3, "packed": True}, {"token_budget": 80}
CASES = [
    (2, "DP 2 dense", Parallel(), DENSE),
    (2, "TP 2 SP budget", Parallel(tensor=2, sequence=True), BUDGET),
    (2, "PP 2 packed", Parallel(pipeline=2), PACKED),
    (4, "TP 2 SP x PP 2 packed", Parallel(tensor=2, pipeline=2, sequence=True), PACKED),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[1])
@pytest.mark.parametrize("family", FAMILIES)
def test_steps_are_those_of_transformers(
    gang2: Gang, gang4: Gang, models: Path, expected: dict[str, Any], family: str, case: Any
) -> None:
    size, _, parallel, batching = case
    record, logprobs = expected[family]
    for ours, own_logprobs in (gang2 if size == 2 else gang4).run(run, models / family, parallel, batching):
        assert ours[0] == pytest.approx(record[0], rel=1e-5)
        # From the second step on, Adam has amplified the rounding of the first.
        assert [loss for loss, _ in ours] == pytest.approx([loss for loss, _ in record], abs=1e-4)
        assert [norm for _, norm in ours] == pytest.approx([norm for _, norm in record], rel=2e-3)
        for one, other in zip(own_logprobs, logprobs, strict=True):
            torch.testing.assert_close(one, other, atol=1e-3, rtol=0)


def save_and_go_on(directory: Path, output: Path, parallel: Parallel) -> Any:
    from mbridge_train.checkpoint.save import save_checkpoint

    try:
        engine = build(directory, parallel, SHARDED)
        train(engine, directory, 0, 2)
        save_checkpoint(engine, output, step=2, loop_state={}, export_hf=False)
        weights = {name: tensor.clone() for name, tensor in engine.export_weights()}
        return weights, train(engine, directory, 2, 4)
    finally:
        leave()


def resume(directory: Path, checkpoint: Path, parallel: Parallel) -> Any:
    from mbridge_train.checkpoint.load import load_checkpoint

    try:
        engine = build(directory, parallel, SHARDED, weights=False)
        load_checkpoint(engine, checkpoint)
        weights = {name: tensor.clone() for name, tensor in engine.export_weights()}
        return weights, train(engine, directory, 2, 4)
    finally:
        leave()


@pytest.mark.parametrize("family", FAMILIES)
def test_training_goes_on_under_another_layout(gang2: Gang, models: Path, tmp_path: Path, family: str) -> None:
    """The tower is on the first stage, whole or cut over tensor-parallel ranks, and that stage has more layers."""
    weights, record = gang2.run(save_and_go_on, models / family, tmp_path, Parallel(tensor=2))[0]
    saved = tmp_path / "global_step_2"
    for checkpoint in (saved, reshard(saved, tmp_path / "even", tensor=1, pipeline=2)):
        for loaded, ours in gang2.run(resume, models / family, checkpoint, Parallel(pipeline=2)):
            assert weights.keys() == loaded.keys()
            assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())
            assert [loss for loss, _ in ours] == pytest.approx([loss for loss, _ in record], abs=1e-5)


def stop_and_resume(directory: Path, output: Path, optimizer: dict[str, Any], dtype: str, freeze: Freeze) -> Any:
    """Return losses, digests of all state, and whether this stage trains anything: straight through, and resumed."""
    from mbridge_train.checkpoint.load import load_checkpoint
    from mbridge_train.checkpoint.placement import parameter_names
    from mbridge_train.checkpoint.save import save_checkpoint

    try:
        straight = build(directory, Parallel(pipeline=2), optimizer, dtype=dtype, freeze=freeze)
        train(straight, directory, 0, 1)
        path = save_checkpoint(straight, output, step=1, loop_state={}, export_hf=False)
        expected = train(straight, directory, 1, 2), digests(straight), bool(parameter_names(straight))
        resumed = build(directory, Parallel(pipeline=2), optimizer, dtype=dtype, freeze=freeze, seed=99)
        load_checkpoint(resumed, path)
        return expected, (train(resumed, directory, 1, 2), digests(resumed), bool(parameter_names(resumed)))
    finally:
        leave()


LANGUAGE, VISION = Freeze(language_model=True), Freeze(vision_model=True, vision_projection=True)
FROZEN_STAGES = [
    ("sharded", SHARDED, "float32", LANGUAGE),
    ("overlapped", OVERLAPPED, "float32", LANGUAGE),
    ("unsharded", PLAIN, "float32", LANGUAGE),
    ("sharded bf16", SHARDED, "bfloat16", LANGUAGE),
    ("unsharded bf16", PLAIN, "bfloat16", LANGUAGE),
    ("unsharded fp16", PLAIN | {"initial_loss_scale": 2.0**10}, "float16", LANGUAGE),
    ("tower sharded", SHARDED, "float32", VISION),
]


@pytest.mark.parametrize("case", FROZEN_STAGES, ids=lambda case: case[0])
def test_a_frozen_stage_is_saved_and_resumed(gang2: Gang, models: Path, tmp_path: Path, case: Any) -> None:
    """With a frozen language model, nothing is trained on the second stage, which holds only its layers."""
    _, optimizer, dtype, freeze = case
    results = gang2.run(stop_and_resume, models / "qwen3_vl", tmp_path, optimizer, dtype, freeze)
    assert [expected for expected, _ in results] == [resumed for _, resumed in results]
    assert [trains for (_, _, trains), _ in results] == [True, not freeze.language_model]


def build_all_frozen(directory: Path, optimizer: dict[str, Any]) -> str:
    freeze = Freeze(language_model=True, vision_model=True, vision_projection=True)
    try:
        with pytest.raises(TrainError) as error:
            build(directory, Parallel(pipeline=2), optimizer, freeze=freeze)
        return str(error.value)
    finally:
        leave()


@pytest.mark.parametrize("optimizer", [SHARDED, PLAIN])
def test_a_model_without_trained_parameters_is_refused(gang2: Gang, models: Path, optimizer: dict[str, Any]) -> None:
    """Megatron-Core makes an optimizer that is a stub, without groups or state that could be saved."""
    messages = gang2.run(build_all_frozen, models / "qwen3_vl", optimizer)
    assert all(message.startswith("every parameter of the model is frozen") for message in messages)


def overlapped(directory: Path, optimizer: dict[str, Any], layouts: tuple[str, ...]) -> Any:
    """One sample a micro-batch, so that one rank sees images while the other reads text, or nothing."""
    try:
        engine = build(directory, Parallel(), optimizer, batching={"micro_batch_size": 1})
        record = train(engine, directory, 0, STEPS, layouts)
        return record, [float(one.sum()) for one in engine.logprobs(make_batch(directory, STEPS, layouts))]
    finally:
        leave()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layouts", [("one image", "text"), ("one image", "one image", "one image")])
def test_ranks_with_and_without_images_reduce_and_gather_alike(
    gang2: Gang, models: Path, family: str, layouts: tuple[str, ...]
) -> None:
    """In buckets so small that the tower and the language model are in different ones."""
    (expected, logprobs), _ = gang2.run(overlapped, models / family, SHARDED, layouts)
    for optimizer in (OVERLAPPED, SHARDED | {"overlap_grad_reduce": True}):
        for record, found in gang2.run(overlapped, models / family, optimizer | {"bucket_size": 5000}, layouts):
            assert record == [pytest.approx(step, rel=1e-5) for step in expected]
            assert found == pytest.approx(logprobs, rel=1e-5)


def with_router_loss(directory: Path) -> str:
    try:
        with pytest.raises(TrainError) as error:
            build(directory, Parallel(), SHARDED, overrides={"moe_aux_loss_coeff": 1e-3})
        return str(error.value)
    finally:
        leave()


def cut_otherwise(directory: Path, batching: dict[str, Any]) -> Any:
    try:
        return train(build(directory, Parallel(), SHARDED, batching=batching), directory, 0, 1)
    finally:
        leave()


def test_routers_add_no_loss(gang2: Gang, tmp_path: Path) -> None:
    """Megatron-Bridge asks for one, which Megatron-Core multiplies by the tokens of a micro-batch."""
    directory = tmp_path / "qwen3_vl_moe"
    make_vision_model(directory.name, True, directory)
    assert gang2.run(with_router_loss, directory)[0] == (
        "the override moe_aux_loss_coeff=0.001 cannot be trained with: leave it out, or set it to 0"
    )
    one, all_together = (gang2.run(cut_otherwise, directory, {"micro_batch_size": size}) for size in (1, 6))
    assert one[0][0] == pytest.approx(all_together[0][0], rel=1e-5)
