"""Offloading between phases frees memory and does not change training, bit for bit."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from mbridge_model import Parallel

from testing.gang import Gang
from testing.tiny_models import make_model
from testing.training_runs import OVERLAPPED, PLAIN, SHARDED, build, digests, leave, make_batch, train

STEPS = 2


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("train_offload")
    make_model("qwen2", True, root / "tied")
    make_model("qwen3", False, root / "untied")
    return root


def live_storages() -> dict[int, int]:
    """Bytes of all storages that tensors known to Python have, but for the host memory that offloading keeps."""
    from mbridge_train.memory.host_copy import _CHUNK_BYTES

    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu":
            found[thing.untyped_storage()._cdata] = thing.untyped_storage().nbytes()
    return {storage: size for storage, size in found.items() if size != _CHUNK_BYTES}


def run(directory: Path, parallel: Parallel, optimizer: dict[str, Any], *, offloads: bool, **options: Any) -> Any:
    """Record and digests of a run in phases: streaming, sampling, log probabilities, training."""
    try:
        engine = build(directory, parallel, optimizer, **options)
        record: list[Any] = []
        for step in range(STEPS):
            before = live_storages()
            if offloads:
                engine.offload("gradients", "optimizer")
            exported = sum(tensor.double().sum().item() for _, tensor in engine.export_weights())
            if offloads:
                engine.offload("weights")
                assert engine.memory.away == {"weights", "gradients", "optimizer"}
                after = live_storages()
                freed = sum(size - after.get(storage, 0) for storage, size in before.items())
                expected = expected_bytes(engine, optimizer, has_moments=step > 0)
                assert expected <= freed <= 1.1 * expected, (step, freed, expected, sorted(before.values()))
                engine.onload("weights")
            logprobs = torch.cat(engine.logprobs(make_batch(step))).tolist()
            if offloads:
                engine.onload("optimizer")
            record.append((exported, logprobs, *train(engine, step, step + 1)))
        return record, digests(engine)
    finally:
        leave()


def expected_bytes(engine: Any, optimizer: dict[str, Any], *, has_moments: bool) -> int:
    """Counted by hand: weights, fp32 gradients, master weights of half precision, two moments."""
    parameters = [parameter for chunk in engine.model for parameter in chunk.parameters()]
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    number_bytes = parameters[0].element_size()
    state = (4 if number_bytes == 2 else 0) + (8 if has_moments else 0)
    shares = engine.layout.data.size if optimizer["use_distributed_optimizer"] else 1
    # A rank's share of the flat buffer is of equal length, but the last one has less of it filled.
    own_state = 0.9 * state * trained / shares if shares > 1 else state * trained
    return int(number_bytes * sum(parameter.numel() for parameter in parameters) + 4 * trained + own_state)


CASES = [
    ("DP 2", "tied", Parallel(), PLAIN, {}),
    ("DP 2 sharded frozen", "untied", Parallel(), SHARDED, {"frozen": "embedding"}),
    ("DP 2 sharded overlap bf16", "tied", Parallel(), OVERLAPPED, {"dtype": "bfloat16"}),
    ("TP 2 SP sharded bf16", "untied", Parallel(tensor=2, sequence=True), SHARDED, {"dtype": "bfloat16"}),
    ("PP 2 bf16 frozen", "tied", Parallel(pipeline=2), PLAIN, {"dtype": "bfloat16", "frozen": "layers.0"}),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_offloading_changes_nothing(gang2: Gang, models: Path, case: Any) -> None:
    _, model, parallel, optimizer, options = case
    plain, offloading = (
        gang2.run(run, models / model, parallel, optimizer, offloads=offloads, **options) for offloads in (False, True)
    )
    assert offloading == plain


def while_offloaded(directory: Path, output: Path) -> Any:
    """Errors of what cannot be done while offloaded, and digests of an engine resumed from what was saved then."""
    from mbridge_model import ModelError, export
    from mbridge_train.checkpoint.load import load_checkpoint
    from mbridge_train.checkpoint.save import save_checkpoint
    from mbridge_train.errors import TrainError
    from mbridge_train.losses.sft import sft_loss

    messages = {}

    def refused(name: str, action: Any) -> None:
        with pytest.raises((TrainError, ModelError)) as error:
            action()
        messages[name] = str(error.value)

    try:
        engine = build(directory, Parallel(), SHARDED, dtype="bfloat16")
        train(engine, 0, 2)
        live = digests(engine)
        engine.offload("weights", "gradients", "optimizer")
        refused("logprobs", lambda: engine.logprobs(make_batch(0)))
        refused("train", lambda: engine.forward_backward(make_batch(0), sft_loss))
        refused("export_weights", lambda: list(engine.export_weights()))
        refused("export", lambda: list(export(engine.model, engine.handle)))
        path = save_checkpoint(engine, output, step=2, loop_state={})
        assert engine.memory.away == {"weights", "gradients", "optimizer"}
        engine.onload("weights")
        engine.offload("gradients")
        refused("no optimizer", engine.step)
        engine.onload("optimizer")
        engine.offload("gradients")
        refused("no gradients", engine.step)
        afterwards = digests(engine)
        other = build(directory, Parallel(), SHARDED, dtype="bfloat16", seed=7, weights=False)
        other.offload("weights", "optimizer")
        load_checkpoint(other, path)
        assert other.memory.away == {"weights", "optimizer"}
        other.onload()
        return messages, live, afterwards, digests(other)
    finally:
        leave()


def test_while_offloaded(gang2: Gang, models: Path, tmp_path: Path) -> None:
    messages, live, afterwards, resumed = gang2.run(while_offloaded, models / "tied", tmp_path)[0]
    assert live == afterwards == resumed
    for name in ("logprobs", "train", "export_weights"):
        assert "weights of this engine are offloaded: call Engine.onload('weights')" in messages[name]
    assert "has been freed" in messages["export"]
    assert "Engine.onload('optimizer')" in messages["no optimizer"]
    assert "Engine.forward_backward" in messages["no gradients"]
