"""`save_hf`: transformers opens the result, and the files that remain after a failed write."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from mbridge_model import Parallel

from testing.gang import Gang
from testing.tiny_models import make_model

EXTRA_FILES = {"tokenizer.json": "{}", "chat_template.jinja": "{{ messages }}", "LICENSE": "terms"}


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("save") / "llama"
    make_model("llama", request.param, directory)
    for name, text in EXTRA_FILES.items():
        (directory / name).write_text(text)
    (directory / "pytorch_model.bin").write_text("old weights, not to be carried over")
    return directory


def save(source: Path, target: Path, parallel: Parallel, max_shard_bytes: int) -> str:
    """Runs in a worker. The message of the error, if there is one."""
    from mbridge_model import ModelError, load, save_hf
    from megatron.core import parallel_state

    model, handle = load(source, parallel)
    try:
        save_hf(model, handle, target, max_shard_bytes=max_shard_bytes)
    except ModelError as error:
        return str(error)
    finally:
        parallel_state.destroy_model_parallel()
    return ""


@pytest.mark.parametrize("parallel", [Parallel(), Parallel(tensor=2), Parallel(pipeline=2)], ids=["DP", "TP", "PP"])
def test_transformers_opens_it(gang2: Gang, source: Path, tmp_path: Path, parallel: Parallel) -> None:
    from transformers import AutoModelForCausalLM

    target = tmp_path / "new" / "saved"
    assert gang2.run(save, source, target, parallel, 40_000) == ["", ""]
    index = json.loads((target / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 3
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert sorted(file.name for file in target.iterdir()) == sorted(
        [*shards, "model.safetensors.index.json", "config.json", "generation_config.json", *EXTRA_FILES]
    )
    assert {name: (target / name).read_text() for name in EXTRA_FILES} == EXTRA_FILES
    expected = AutoModelForCausalLM.from_pretrained(source).state_dict()
    found = AutoModelForCausalLM.from_pretrained(target).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    tensors = [tensor for name, tensor in expected.items() if name in index["weight_map"]]
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors)
    assert list(target.parent.iterdir()) == [target]


def test_config_says_what_the_tensors_are(gang2: Gang, tmp_path: Path) -> None:
    """A bfloat16 checkpoint that carries the settings of an fp8 one, trained in fp32."""
    source, target = tmp_path / "source", tmp_path / "saved"
    make_model("llama", False, source)
    config = json.loads((source / "config.json").read_text())
    left_over = {"dtype": "bfloat16", "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    (source / "config.json").write_text(json.dumps(config | left_over))
    assert gang2.run(save, source, target, Parallel(tensor=2), 10**9) == ["", ""]
    assert json.loads((target / "config.json").read_text()) == config | {"dtype": "float32"}


def test_one_file_and_an_empty_target(gang2: Gang, source: Path, tmp_path: Path) -> None:
    target = tmp_path / "saved"
    target.mkdir()
    assert gang2.run(save, source, target, Parallel(tensor=2), 10**9) == ["", ""]
    assert [file.name for file in target.glob("*.safetensors*")] == ["model.safetensors"]


def test_nothing_is_written_over(gang2: Gang, source: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("kept")
    messages = gang2.run(save, source, tmp_path, Parallel(tensor=2), 10**9)
    assert messages == [f"{tmp_path} exists and is not an empty directory; give another one or remove it"] * 2
    assert [file.name for file in tmp_path.iterdir()] == ["precious"]


def save_on_full_disk(source: Path, target: Path, parallel: Parallel) -> str:
    """Runs in a worker, with a limit on the size of the files that this process may write."""
    import resource
    import signal

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        return save(source, target, parallel, 40_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)


@pytest.mark.parametrize("parallel", [Parallel(tensor=2), Parallel(pipeline=2)], ids=["TP", "PP"])
def test_no_space(gang2: Gang, tmp_path: Path, parallel: Parallel) -> None:
    """Rank 0 fails at a tensor in the middle of the export; the other rank must not wait for it forever."""
    source, target = tmp_path / "source", tmp_path / "out" / "saved"
    make_model("llama", False, source, vocab_size=1024)
    messages = gang2.run(save_on_full_disk, source, target, parallel, timeout=60)
    for message in messages:
        assert message.startswith(f"{target} cannot be written: "), message
    assert list(target.parent.iterdir()) == []


def test_a_file_that_cannot_be_copied(gang2: Gang, source: Path, tmp_path: Path) -> None:
    directory, target = tmp_path / "source", tmp_path / "out" / "saved"
    shutil.copytree(source, directory)
    messages = gang2.run(remove_then_save, directory, target, timeout=60)
    assert all(message.startswith(f"{target} cannot be written: ") for message in messages)
    assert list(target.parent.iterdir()) == []


def remove_then_save(source: Path, target: Path) -> str:
    """Runs in a worker. The source directory has gone when its other files are to be copied."""
    from mbridge_model import ModelError, load, save_hf
    from megatron.core import parallel_state

    model, handle = load(source, Parallel(tensor=2))
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        source.rename(source.with_name("moved"))
    torch.distributed.barrier()
    try:
        save_hf(model, handle, target)
    except ModelError as error:
        return str(error)
    finally:
        parallel_state.destroy_model_parallel()
    return ""
