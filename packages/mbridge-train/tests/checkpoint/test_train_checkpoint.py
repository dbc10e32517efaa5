"""Checkpoints of the engine: a run that was stopped and resumed is the run that was not, bit for bit."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from mbridge_model import Parallel
from torch import Tensor

from testing.gang import Gang
from testing.tiny_models import make_model
from testing.training_runs import (
    BETAS,
    LEARNING_RATE,
    OVERLAPPED,
    PLAIN,
    SHARDED,
    WEIGHT_DECAY,
    build,
    digests,
    leave,
    make_batch,
    train,
)

STOP, END = 3, 6
DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
# Overflows at first, later grows: the state of the scaler changes at every step or two.
DYNAMIC_SCALE = {"initial_loss_scale": 2.0**19, "loss_scale_window": 2}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("train_checkpoint")
    make_model("qwen2", True, root / "tied")
    make_model("qwen3", False, root / "untied")
    make_model("qwen2", True, root / "shallow", num_hidden_layers=2)
    return root


def stop_and_resume(
    directory: Path, output: Path, parallel: Parallel, optimizer: dict[str, Any], **options: Any
) -> Any:
    """(record and digests of a run that was not stopped, the same of one that was), from the checkpoint on."""
    from mbridge_train.checkpoint.load import load_checkpoint
    from mbridge_train.checkpoint.save import save_checkpoint

    try:
        engine = build(directory, parallel, optimizer, **options)
        before = train(engine, 0, STOP)
        path = save_checkpoint(engine, output, step=STOP, loop_state={"step": STOP}, export_hf=False)
        straight = before, train(engine, STOP, END), digests(engine)
        # Another seed, and use of the random streams: only what was saved can bring them back.
        engine = build(directory, parallel, optimizer, **options, seed=99)
        train(engine, 0, 1)
        state = load_checkpoint(engine, path)
        resumed = before, train(engine, state["step"], END), digests(engine)
        return straight, resumed
    finally:
        leave()


def check_same(results: list[Any]) -> None:
    for straight, resumed in results:
        assert straight[1] == resumed[1]
        assert straight[2] == resumed[2]


CASES_2 = [
    ("DP 2", "tied", Parallel(), PLAIN, {}),
    ("DP 2 sharded", "untied", Parallel(), SHARDED, {}),
    ("DP 2 overlap dropout", "tied", Parallel(), OVERLAPPED, {"overrides": DROPOUT}),
    ("TP 2 SP dropout", "untied", Parallel(tensor=2, sequence=True), SHARDED, {"overrides": DROPOUT}),
    ("PP 2 tied", "tied", Parallel(pipeline=2), SHARDED, {}),
    # Nothing is trained on the last stage.
    ("PP 2 frozen stage", "untied", Parallel(pipeline=2), SHARDED, {"frozen": "layer"}),
    ("PP 2 frozen stage unsharded", "untied", Parallel(pipeline=2), PLAIN, {"frozen": "layer"}),
    ("DP 2 bf16 overlap", "tied", Parallel(), OVERLAPPED, {"dtype": "bfloat16"}),
    ("TP 2 bf16", "tied", Parallel(tensor=2), PLAIN, {"dtype": "bfloat16"}),
    ("DP 2 fp16", "tied", Parallel(), SHARDED | DYNAMIC_SCALE, {"dtype": "float16"}),
    ("TP 2 fp16", "untied", Parallel(tensor=2), PLAIN | DYNAMIC_SCALE, {"dtype": "float16"}),
]


@pytest.mark.parametrize("case", CASES_2, ids=lambda case: case[0])
def test_resume_is_exact_on_two_ranks(gang2: Gang, models: Path, tmp_path: Path, case: Any) -> None:
    name, model, parallel, optimizer, options = case
    results = gang2.run(stop_and_resume, models / model, tmp_path, parallel, optimizer, **options)
    check_same(results)
    record = [*results[0][0][0], *results[0][0][1]]
    rates = [rate for _, _, rate, applied in record if applied]
    warm_up = [LEARNING_RATE * step / 4 for step in range(5)]
    assert rates[:5] == pytest.approx(warm_up[: len(rates)])
    if "fp16" in name:
        assert {applied for *_, applied in record} == {True, False}
        scales = {result[0][2]["grad_scaler/scale"] for result in results if "grad_scaler/scale" in result[0][2]}
        assert len(scales) == 1


def test_resume_is_exact_on_four_ranks(gang4: Gang, models: Path, tmp_path: Path) -> None:
    parallel = Parallel(tensor=2, pipeline=2, sequence=True)
    check_same(gang4.run(stop_and_resume, models / "tied", tmp_path, parallel, SHARDED, overrides=DROPOUT))


def save_trained(directory: Path, output: Path, parallel: Parallel, optimizer: dict[str, Any], *, step: int) -> Any:
    """Save a trained engine; return its weights under their HuggingFace names, on rank 0."""
    from mbridge_train.checkpoint.save import save_checkpoint

    try:
        engine = build(directory, parallel, optimizer)
        train(engine, 0, STOP)
        save_checkpoint(engine, output, step=step, loop_state={"step": step})
        weights = {name: tensor.clone() for name, tensor in engine.export_weights()}
        return weights if torch.distributed.get_rank() == 0 else None
    finally:
        leave()


def resume(directory: Path, checkpoint: Path, parallel: Parallel, optimizer: dict[str, Any]) -> Any:
    """Return the weights after loading, or the message of the error."""
    from mbridge_train.checkpoint.load import load_checkpoint
    from mbridge_train.errors import TrainError

    try:
        engine = build(directory, parallel, optimizer)
        load_checkpoint(engine, checkpoint)
        return {name: tensor.clone() for name, tensor in engine.export_weights()}
    except TrainError as error:
        return str(error)
    finally:
        leave()


def test_files_and_what_does_not_fit(gang2: Gang, models: Path, tmp_path: Path) -> None:
    """Files under TP 2: the HuggingFace copy equals the live model and is not needed to resume."""
    from transformers import AutoModelForCausalLM

    tensor_2 = Parallel(tensor=2)
    weights = gang2.run(save_trained, models / "tied", tmp_path, tensor_2, SHARDED, step=10)[0]
    root = tmp_path / "global_step_10"
    actor = root / "actor"
    for rank in range(2):
        directory = actor / "iter_0000010" / f"mp_rank_{rank:02d}"
        assert sorted(file.name for file in directory.iterdir()) == ["distrib_optim.pt", "model_optim_rng.pt"]
    assert (actor / "latest_checkpointed_iteration.txt").read_text() == "10"
    exported = AutoModelForCausalLM.from_pretrained(actor / "hf_model", dtype=torch.float32).state_dict()
    assert weights.items() and all(torch.equal(exported[name], tensor) for name, tensor in weights.items())

    shutil.rmtree(actor / "hf_model")
    for loaded in gang2.run(resume, models / "tied", root, tensor_2, SHARDED):
        assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())
    for name in ("shallow", "untied"):
        for parallel in (tensor_2, Parallel(pipeline=2)):
            for message in gang2.run(resume, models / name, root, parallel, SHARDED):
                assert "does not fit this model" in message


def test_files_of_pipeline_stages(gang2: Gang, models: Path, tmp_path: Path) -> None:
    gang2.run(save_trained, models / "tied", tmp_path, Parallel(pipeline=2), SHARDED, step=2)
    iteration = tmp_path / "global_step_2" / "actor" / "iter_0000002"
    assert sorted(path.name for path in iteration.iterdir()) == ["mp_rank_00_000", "mp_rank_00_001"]


def states_by_name(directory: Path) -> Any:
    """Return the optimizer's state of DP 2, distributed or not, after three steps, on rank 0."""
    from mbridge_train.checkpoint import optimizer_state
    from mbridge_train.checkpoint.placement import parameter_names

    try:
        states = []
        for optimizer in (PLAIN, SHARDED | {"bucket_size": 5000}):
            engine = build(directory, Parallel(), optimizer | {"clip_grad": 0.0})
            train(engine, 0, STOP)
            states.append(optimizer_state.collect(engine.optimizer, parameter_names(engine), engine.layout))
        return states
    finally:
        leave()


def adamw_twin(directory: Path) -> dict[str, dict[str, Tensor]]:
    """Return fp32 weights and moments of transformers' model after the same steps of torch's AdamW in one process."""
    from mbridge_train.optim.schedule import Schedule
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    named = dict(model.named_parameters())
    matrices = [parameter for parameter in named.values() if parameter.dim() > 1]
    vectors = [parameter for parameter in named.values() if parameter.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}], betas=BETAS
    )
    schedule = Schedule(max_lr=LEARNING_RATE, warmup_steps=4, decay_steps=8, min_lr=1e-4, decay_style="cosine")
    for step in range(STOP):
        optimizer.zero_grad()
        for sample in make_batch(step):
            logprobs = model(sample.tokens[None]).logits[0, :-1].log_softmax(-1).gather(1, sample.tokens[1:, None])
            (-(logprobs[:, 0] * sample.weights[1:]).sum()).backward()
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate(step)
        optimizer.step()
    moments = {
        key: {name: optimizer.state[parameter][key] for name, parameter in named.items()}
        for key in ("exp_avg", "exp_avg_sq")
    }
    return {"fp32_param": {name: parameter.detach() for name, parameter in named.items()}} | moments


# Parameters of Megatron-Core that hold exactly one of HuggingFace, in the same shape.
SAME_SHAPE = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight": "model.layers.1.input_layernorm.weight",
    "decoder.layers.2.self_attention.linear_proj.weight": "model.layers.2.self_attn.o_proj.weight",
    "decoder.layers.0.mlp.linear_fc2.weight": "model.layers.0.mlp.down_proj.weight",
    "decoder.layers.3.mlp.linear_fc1.layer_norm_weight": "model.layers.3.post_attention_layernorm.weight",
}


def test_optimizer_state_is_that_of_one_process(gang2: Gang, models: Path) -> None:
    """Compare each parameter's master weight and moments, by name and in its shape, with torch's AdamW."""
    plain, sharded = gang2.run(states_by_name, models / "tied")[0]
    twin = adamw_twin(models / "tied")
    assert plain["step"] == sharded["step"] == plain["schedule_step"] == sharded["schedule_step"] == STOP
    for key in ("fp32_param", "exp_avg", "exp_avg_sq"):
        assert plain[key].keys() == sharded[key].keys()
        for name, value in plain[key].items():
            torch.testing.assert_close(sharded[key][name], value, atol=1e-6, rtol=1e-6)
        for ours, theirs in SAME_SHAPE.items():
            torch.testing.assert_close(
                sharded[key][ours][: len(twin[key][theirs])], twin[key][theirs], atol=1e-6, rtol=0
            )
        # linear_fc1 holds the gate, then the up projection.
        for half, theirs in enumerate(("gate_proj", "up_proj")):
            ours = sharded[key]["decoder.layers.1.mlp.linear_fc1.weight"].chunk(2)[half]
            torch.testing.assert_close(ours, twin[key][f"model.layers.1.mlp.{theirs}.weight"], atol=1e-6, rtol=0)


def start_from_megatron(directory: Path, checkpoint: Path, optimizer: dict[str, Any], dtype: str) -> Any:
    """Take one step from random weights into which only the model of a checkpoint was loaded."""
    from mbridge_ckpt import open_checkpoint
    from mbridge_train.checkpoint.load import load_model

    try:
        engine = build(directory, Parallel(), optimizer, dtype=dtype, weights=False)
        load_model(engine, open_checkpoint(checkpoint))
        record = train(engine, 0, 2)
        return record, {name: tensor.clone() for name, tensor in engine.export_weights()}
    finally:
        leave()


def save_untrained(directory: Path, output: Path, dtype: str) -> Any:
    """Save the HuggingFace weights unchanged, and take two steps from them."""
    from mbridge_train.checkpoint.save import save_checkpoint

    try:
        engine = build(directory, Parallel(), SHARDED, dtype=dtype)
        save_checkpoint(engine, output, step=0, loop_state={}, export_hf=False)
        record = train(engine, 0, 2)
        return record, {name: tensor.clone() for name, tensor in engine.export_weights()}
    finally:
        leave()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_start_from_megatron_checkpoint(gang2: Gang, models: Path, tmp_path: Path, dtype: str) -> None:
    """With `use_hf_ckpt: false` the optimizer's master weights are the loaded ones, not the random ones."""
    want = gang2.run(save_untrained, models / "tied", tmp_path, dtype)
    for optimizer in (PLAIN, OVERLAPPED):
        got = gang2.run(start_from_megatron, models / "tied", tmp_path / "global_step_0", optimizer, dtype)
        for (record, weights), (expected_record, expected) in zip(got, want, strict=True):
            assert record[0][0] == expected_record[0][0]
            assert record == [pytest.approx(row, rel=1e-5) for row in expected_record]
            for name, tensor in weights.items():
                torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=0)


def reference_of_trained(directory: Path, optimizer: dict[str, Any]) -> Any:
    """Return reference log probabilities before and after training, and own ones and digests around a swap."""
    from mbridge_train.engine.weight_snapshot import Snapshot

    try:
        engine = build(directory, Parallel(), optimizer)
        batch = make_batch(0)
        original = engine.logprobs(batch)
        snapshot = Snapshot(engine)
        train(engine, 0, STOP)
        before, own = digests(engine), engine.logprobs(batch)
        with snapshot.swapped_in(engine):
            reference = engine.logprobs(batch)
        return original, reference, own, engine.logprobs(batch), before == digests(engine), train(engine, STOP, END)
    finally:
        leave()


def train_and_look(directory: Path, optimizer: dict[str, Any]) -> Any:
    """Return log probabilities right after a step, and the rest of the run, without a reference."""
    try:
        engine = build(directory, Parallel(), optimizer)
        train(engine, 0, STOP)
        return engine.logprobs(make_batch(0)), train(engine, STOP, END)
    finally:
        leave()


def test_reference_swap_is_exact(gang2: Gang, models: Path) -> None:
    """The snapshot keeps the original's log probabilities after training, and swapping does not change the training."""
    untouched = gang2.run(train_and_look, models / "tied", PLAIN)
    for optimizer in (PLAIN, OVERLAPPED):
        results = gang2.run(reference_of_trained, models / "tied", optimizer)
        straight = gang2.run(train_and_look, models / "tied", optimizer)
        for (original, reference, own, after, same, rest), (looked, straight_rest), (plain_looked, _) in zip(
            results, straight, untouched, strict=True
        ):
            assert same and rest == straight_rest
            assert all(map(torch.equal, original, reference))
            assert all(map(torch.equal, own, after))
            assert all(map(torch.equal, own, looked))
            for ours, theirs in zip(looked, plain_looked, strict=True):
                torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
            assert not any(map(torch.equal, own, original))
