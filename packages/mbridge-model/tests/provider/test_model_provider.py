"""What `load` changes on the provider, what it logs, and which settings it refuses."""

import dataclasses
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from mbridge_model import Parallel

from testing.gang import Gang, WorkerPool
from testing.tiny_models import make_model


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("provider") / "qwen2"
    make_model("qwen2", True, directory)
    return directory


def changed_fields(directory: Path, overrides: dict[str, Any]) -> tuple[dict[str, tuple[str, str]], list[str]]:
    """Runs in a worker. Fields that differ from Megatron-Bridge's own finalized provider, and what was logged."""
    from mbridge_model import load
    from mbridge_model.bridge.bridge import Bridge
    from megatron.core import parallel_state

    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("mbridge_model")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        _, handle = load(directory, overrides=overrides)
        untouched = Bridge(handle.directory).provider()
        untouched.finalize()
        names = [field.name for field in dataclasses.fields(untouched)]
        pairs = {name: (getattr(untouched, name), getattr(handle.provider, name)) for name in names}
        return {
            name: (repr(old), repr(new))
            for name, (old, new) in pairs.items()
            if not (callable(old) and callable(new) and name != "transformer_layer_spec") and repr(old) != repr(new)
        }, lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
        parallel_state.destroy_model_parallel()


def test_only_what_was_logged_has_changed(worker_pool: WorkerPool, qwen2: Path) -> None:
    overrides = {"attention_dropout": 0.25, "rotary_percent": 1.0}
    ((changed, lines),) = Gang(1, worker_pool).run(changed_fields, qwen2, overrides)
    # Weights are loaded, so none is initialized; `_pg_collection` is the provider's own note of the process groups.
    unlogged = {"perform_initialization", "_pg_collection", "vocab_size"}
    logged = {match[1] for line in lines if (match := re.match(r"provider\.(\w+): .+ -> .+ \(.+\)$", line))}
    assert set(changed) - unlogged <= logged
    assert "provider.attention_dropout: 0.0 -> 0.25 (set by the user)" in lines
    assert any(line.startswith("provider.should_pad_vocab: False -> True (rows") for line in lines)
    # Set to what it was already: no change, no line.
    assert not any("rotary_percent" in line for line in lines)
    for geometry in ("num_layers", "hidden_size", "num_query_groups", "rotary_base", "layernorm_epsilon"):
        assert geometry not in changed


def error_of(directory: Path, arguments: dict[str, Any], existing: tuple[int, int] | None = None) -> str:
    """Runs in a worker: the message of the ModelError that `load` raises."""
    from mbridge_model import ModelError, load
    from megatron.core import parallel_state

    if existing:
        parallel_state.initialize_model_parallel(*existing)
    try:
        load(directory, **arguments)
    except ModelError as error:
        return str(error)
    finally:
        parallel_state.destroy_model_parallel()
    return "loaded"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"overrides": {"atention_dropout": 0.1}},
            r"override 'atention_dropout' is no field of \w+; did you mean 'attention_dropout'\?",
        ),
        (
            {"overrides": {"tensor_model_parallel_size": 2}},
            r"override tensor_model_parallel_size=2 contradicts the process groups, which have 1 rank\(s\)",
        ),
        (
            {"overrides": {"expert_model_parallel_size": 2}},
            r"override expert_model_parallel_size=2 contradicts the process groups, which have 1 rank\(s\)",
        ),
        (
            {"overrides": {"add_qkv_bias": False}},
            r"override add_qkv_bias=False cannot be: Qwen2 checkpoints hold .* biases, .*; leave it out",
        ),
        (
            {"overrides": {"qk_layernorm": True}},
            r"8 parameter\(s\) of the Megatron model get no weight .*k_layernorm\.weight'; an override",
        ),
        ({"overrides": {"num_layers": 3}}, r"\d+ tensor\(s\) .* have no place .*model\.layers\.3\."),
        ({"overrides": {"num_layers": 5}}, r"the checkpoint lacks \d+ tensor\(s\) .*model\.layers\.4\."),
        (
            {"overrides": {"num_query_groups": 3}},
            r"the weights of .* do not fit the model: .*; leave out overrides of sizes",
        ),
        ({"backend": "cuda"}, r"backend 'cuda' is unknown; use 'auto', 'te' or 'torch'"),
        ({"dtype": torch.float64}, r"dtype torch\.float64 cannot be trained in; use float32, bfloat16 or float16"),
        (
            {"parallel": Parallel(tensor=3)},
            r"world size 1 is not a multiple of tensor x pipeline = 3 x 1 = 3; start a multiple of 3 processes",
        ),
    ],
)
def test_refused(worker_pool: WorkerPool, qwen2: Path, arguments: dict[str, Any], message: str) -> None:
    (found,) = Gang(1, worker_pool).run(error_of, qwen2, arguments)
    assert re.search(message, found), found


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_transformer_engine_needs_a_gpu(worker_pool: WorkerPool, qwen2: Path) -> None:
    (found,) = Gang(1, worker_pool).run(error_of, qwen2, {"backend": "te"})
    assert found == "backend 'te' needs a GPU, and torch sees none; use backend 'auto' or 'torch'"


def test_groups_of_other_sizes(gang2: Gang, qwen2: Path) -> None:
    for message in gang2.run(error_of, qwen2, {"parallel": Parallel(pipeline=2)}, (2, 1)):
        assert message.startswith(
            "process groups exist for tensor x pipeline = 2 x 1, but 1 x 2 was asked for; destroy"
        )


def test_sizes_are_positive() -> None:
    from mbridge_model import ModelError

    with pytest.raises(ModelError, match=r"Parallel\.tensor is 0; it must be at least 1"):
        Parallel(tensor=0)


def half_loaded(directory: Path, name: str) -> str:
    """Runs in a worker: `load` of a copy that lacks a tensor, or has one more."""
    import shutil
    import tempfile

    from safetensors.torch import load_file, save_file

    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / "copy"
        shutil.copytree(directory, copy)
        weights = load_file(copy / "model.safetensors")
        if name in weights:
            del weights[name]
        else:
            weights[name] = torch.zeros(64)
        save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
        return error_of(copy, {})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "model.layers.2.self_attn.k_proj.bias",
            r"lacks 1 tensor\(s\) that the model needs, first '{}'; its files are complete",
        ),
        ("model.layers.2.self_attn.o_proj.bias", r"1 tensor\(s\) of the checkpoint have no place .*, first '{}'"),
    ],
)
def test_every_tensor_has_a_place(worker_pool: WorkerPool, qwen2: Path, name: str, message: str) -> None:
    (found,) = Gang(1, worker_pool).run(half_loaded, qwen2, name)
    assert re.search(message.replace("{}", re.escape(name)), found), found
