"""Trees as Megatron-LM writes them, made by real Megatron-Core after steps of training, become our checkpoints."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from mbridge_ckpt import LayoutError, import_megatron, open_checkpoint, reshard, verify
from mbridge_ckpt.cli.diff import diff
from mbridge_model import Parallel
from mbridge_train.engine.batch import Sample, aggregation_weights

from testing.gang import Gang
from testing.tiny_models import VOCAB_SIZE, make_model

STOP, END = 2, 4
ITERATION = 1000


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("import_megatron")
    make_model("qwen2", True, root / "tied")
    make_model("qwen3", False, root / "untied", hidden_size=72)  # nothing is a multiple of Megatron's alignment of 64
    return root


def build(directory: Path, parallel: Parallel, optimizer: dict[str, Any], dtype: str, overrides: dict[str, Any]) -> Any:
    from mbridge_model import load
    from mbridge_train.engine.engine import Engine, MicroBatching
    from mbridge_train.optim.optimizer import OptimizerSettings
    from mbridge_train.optim.schedule import Schedule
    from mbridge_train.run.process_group import seed_all
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    seed_all(1)
    schedule = Schedule(max_lr=3e-3, warmup_steps=2, decay_steps=8, min_lr=1e-4, weight_decay=0.1)
    model, handle = load(
        directory,
        parallel,
        {"calculate_per_token_loss": True} | overrides,
        dtype=getattr(torch, dtype),
        seed=1,
    )
    settings = OptimizerSettings(schedule=schedule, **optimizer)
    return Engine(model, handle, micro_batching=MicroBatching(micro_batch_size=2, packed=True), optimizer=settings)


def train(engine: Any, first: int, last: int) -> list[tuple[float, float]]:
    """Return loss and gradient norm of steps `first` to `last` - 1."""
    from mbridge_train.losses.sft import sft_loss

    record = []
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        lengths = (17, 2, 9, 30)
        weights = aggregation_weights([torch.arange(length) > 0 for length in lengths], "token-mean")
        batch = [
            Sample(tokens=torch.randint(VOCAB_SIZE, (length,), generator=generator), weights=weight)
            for length, weight in zip(lengths, weights, strict=True)
        ]
        loss = engine.forward_backward(batch, sft_loss)["loss"]
        record.append((loss, engine.step().grad_norm))
    return record


def write_tree(engine: Any, root: Path, arguments: dict[str, Any]) -> None:
    """Write the files of Megatron-LM's `save_checkpoint` with `--ckpt-format torch`, on every rank."""
    from megatron.core import parallel_state as groups
    from megatron.core.enums import ModelType
    from megatron.core.transformer.enums import AttnBackend

    engine.synchronize_weights()
    optimizer = engine.optimizer.megatron
    tensor, pipeline = groups.get_tensor_model_parallel_rank(), groups.get_pipeline_model_parallel_rank()
    stages = groups.get_pipeline_model_parallel_world_size()
    name = f"mp_rank_{tensor:02d}" + (f"_{pipeline:03d}" if stages > 1 else "")
    directory = root / f"iter_{ITERATION:07d}" / name
    directory.mkdir(parents=True, exist_ok=True)
    sharded = engine.optimizer.settings.use_distributed_optimizer
    if sharded:
        optimizer.save_parameter_state(str(directory / "distrib_optim.pt"))
    if groups.get_data_parallel_rank() != 0:
        return
    module = engine.model[0]
    while hasattr(module, "module"):
        module = module.module
    sizes = {
        "tensor_model_parallel_size": groups.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": stages,
        "data_parallel_size": groups.get_data_parallel_world_size(),
        "num_layers": engine.config.num_layers,
    }
    random_state = {
        "random_rng_state": [3, (1, 2), None],
        "np_rng_state": numpy.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "rng_tracker_states": {"model-parallel-rng": torch.get_rng_state()},
    }
    others = {"params_dtype": torch.bfloat16, "attention_backend": AttnBackend.auto, "save": Path("somewhere")}
    state = {
        "args": Namespace(**sizes, **others, model_type=ModelType.encoder_or_decoder, **arguments),
        "checkpoint_version": 3.0,
        "iteration": ITERATION,
        "model": module.state_dict_for_save_checkpoint(),
        "optimizer": optimizer.state_dict(),
        "opt_param_scheduler": {"max_lr": 1e-3, "num_steps": 64},
        "rng_state": [random_state],
        "num_floating_point_operations_so_far": 1.5e18,
    }
    torch.save(state, directory / "model_optim_rng.pt")
    (root / "latest_checkpointed_iteration.txt").write_text(str(ITERATION))


def train_and_save(model: Path, output: Path, case: dict[str, Any], arguments: dict[str, Any]) -> Any:
    """Train, write a tree and a checkpoint of ours at the same step, train on, and return the record of that."""
    from mbridge_train.checkpoint.save import save_checkpoint
    from megatron.core import parallel_state

    try:
        engine = build(model, **case)
        train(engine, 0, STOP)
        write_tree(engine, output / "tree", arguments)
        if arguments:
            write_tree(engine, output / "tree_that_does_not_tell", {})
        save_checkpoint(engine, output / "own", step=ITERATION, loop_state={}, export_hf=False)
        return train(engine, STOP, END)
    finally:
        parallel_state.destroy_model_parallel()


def resume(model: Path, checkpoint: Path, case: dict[str, Any]) -> Any:
    from mbridge_train.checkpoint.load import load_checkpoint
    from mbridge_train.checkpoint.resume import restore
    from mbridge_train.errors import TrainError
    from megatron.core import parallel_state

    try:
        engine = build(model, **case)
        with pytest.raises(TrainError, match="cannot be resumed: its loop state lacks step, sampler, since"):
            restore(engine, open_checkpoint(checkpoint), ("step", "sampler"), print)
        assert load_checkpoint(engine, checkpoint) == {}
        assert engine.optimizer.steps == STOP
        return train(engine, STOP, END)
    finally:
        parallel_state.destroy_model_parallel()


PLAIN = {"use_distributed_optimizer": False}
SHARDED = {"use_distributed_optimizer": True}
# Buckets so small that each has a few parameters, with sizes no multiple of 64 between them.
BUCKETS = SHARDED | {"overlap_grad_reduce": True, "overlap_param_gather": True, "bucket_size": 5000}
UNEVEN = {"num_layers_in_first_pipeline_stage": 3, "num_layers_in_last_pipeline_stage": 1}
CASES = {
    "TP 2 fp32": ("untied", Parallel(tensor=2, sequence=True), PLAIN, "float32", {}),
    "TP 2 bf16 sharded": ("tied", Parallel(tensor=2), SHARDED, "bfloat16", {}),
    "PP 2 bf16 tied uneven": ("tied", Parallel(pipeline=2), PLAIN, "bfloat16", UNEVEN),
    "PP 2 fp32 tied sharded": ("tied", Parallel(pipeline=2), SHARDED, "float32", {}),
    "DP 2 bf16 buckets": ("untied", Parallel(), BUCKETS, "bfloat16", {}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_tree_becomes_the_checkpoint_that_was_saved_beside_it(
    gang2: Gang, models: Path, tmp_path: Path, name: str
) -> None:
    """Weights, master weights and both moments bit for bit, by name; placements; Adam's step; training goes on."""
    model, parallel, optimizer, dtype, overrides = CASES[name]
    case = {"parallel": parallel, "optimizer": optimizer, "dtype": dtype, "overrides": overrides}
    arguments = {"overlap_grad_reduce": True, "ddp_bucket_size": 5000} if optimizer is BUCKETS else {}
    straight = gang2.run(train_and_save, models / model, tmp_path, case, arguments)

    found = import_megatron(tmp_path / "tree", tmp_path / "imported", vocabulary_rows=VOCAB_SIZE)
    assert verify(found).ok
    own, imported = open_checkpoint(tmp_path / "own"), open_checkpoint(found)
    assert diff(own.path, found) == []
    assert imported.layout == own.layout and imported.step == ITERATION
    for record in own.manifest.files:
        if record.path.endswith("model_optim_rng.pt"):
            theirs = imported.manifest.file(record.path)
            assert sorted(map(str, theirs.placements)) == sorted(map(str, record.placements))
        if record.path.endswith("distrib_optim.pt"):
            assert imported.load_torch(record.path)["step"] == own.load_torch(record.path)["step"] == STOP
    if "TP 2 bf16" in name:
        assert gang2.run(resume, models / model, found, case) == straight
        assert diff(reshard(found, tmp_path / "cut", tensor=1, pipeline=2), own.path) == []
    if arguments:  # which weights can be had from all the same
        source = tmp_path / "tree_that_does_not_tell"
        with pytest.raises(LayoutError, match=r"distrib_optim.pt: buffer 0: .* import the weights alone"):
            import_megatron(source, tmp_path / "weights")
        found = import_megatron(source, tmp_path / "weights", optimizer=False, vocabulary_rows=VOCAB_SIZE)
        assert {difference.kind for difference in diff(found, own.path)} == {"fp32_param", "exp_avg", "exp_avg_sq"}
