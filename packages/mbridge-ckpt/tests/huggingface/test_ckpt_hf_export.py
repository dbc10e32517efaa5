"""The HuggingFace export opens with transformers, equals the model, and has the source's other files."""

import json
from pathlib import Path

import pytest
import torch
from mbridge_ckpt import CheckpointError, Layout, SaveError, begin_save, open_checkpoint, prune, verify, write_hf
from mbridge_ckpt.huggingface.write import parse_size
from mbridge_ckpt.store.retention import Retention
from safetensors.torch import load_file


def source_directory(path: Path) -> Path:
    texts = [
        "config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "generation_config.json",
        "preprocessor_config.json",
    ]
    texts += ["modeling_custom.py", "code/more.py", "additional_chat_templates/tool.jinja"]
    for name in (*texts, "model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", ".git/config"):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(f'{{"from": "{name}"}}')
    return path


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    names = [f"layer.{number}.weight" for number in range(7)]
    tensors = {name: torch.randn(number + 1, 16, generator=generator) for number, name in enumerate(names)}
    tensors["half"] = torch.randn(5, 3, generator=generator).bfloat16()
    tensors["transposed"] = torch.randn(4, 6, generator=generator).t()
    return tensors | {"mask": torch.tensor([True, False]), "scalar": torch.tensor(2.5), "empty": torch.empty(0, 3)}


def export(tmp_path: Path, tensors, max_shard_size: int | str, step: int = 1) -> Path:
    source = source_directory(tmp_path / "source")
    with begin_save(tmp_path / "run", step=step, layout=Layout()) as save:
        write_hf(save, tensors, source, max_shard_size=max_shard_size)
        return save.commit() / "actor/hf_model"


@pytest.mark.parametrize(("max_shard_size", "count"), [("5GB", 1), (700, 4), (1, 12)])
def test_weights_and_index(tmp_path, max_shard_size, count):
    path = export(tmp_path, weights().items(), max_shard_size)
    shards = sorted(path.glob("*.safetensors"))
    expected = (
        [f"model-{n + 1:05d}-of-{count:05d}.safetensors" for n in range(count)] if count > 1 else ["model.safetensors"]
    )
    assert [shard.name for shard in shards] == expected
    found = {}
    for shard in shards:
        found |= (part := load_file(shard))
        assert max_shard_size in (1, "5GB") or sum(tensor.nbytes for tensor in part.values()) <= max_shard_size
        if count > 1:
            weight_map = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
            assert {name for name, file in weight_map.items() if file == shard.name} == set(part)
    assert set(found) == set(weights())
    for name, tensor in weights().items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    assert (path / "model.safetensors.index.json").exists() == (count > 1)
    for contents in (True, False):
        report = verify(path.parents[1], contents=contents)
        assert report.ok and report.notes == ()


def test_config_says_what_the_tensors_are(tmp_path):
    """A bfloat16 checkpoint that carries the settings of an fp8 one, trained in fp32."""
    source = source_directory(tmp_path / "source")
    config = {"torch_dtype": "bfloat16", "quantization_config": {"quant_method": "fp8"}, "vocab_size": 7}
    parts = {"text_config": {"dtype": "bfloat16", "size": 3}, "vision_config": {"quantization_config": {}}}
    (source / "config.json").write_text(json.dumps(config | parts))
    with begin_save(tmp_path / "run", step=1, layout=Layout()) as save:
        write_hf(save, weights().items(), source)
        path = save.commit() / "actor/hf_model"
    assert json.loads((path / "config.json").read_text()) == {
        "torch_dtype": "float32",
        "vocab_size": 7,
        "text_config": {"dtype": "float32", "size": 3},
        "vision_config": {},
    }
    assert verify(path.parents[1]).ok


def test_other_files_are_carried_over_and_weights_are_not(tmp_path):
    path = export(tmp_path, weights().items(), "5GB")
    assert sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()) == [
        "additional_chat_templates/tool.jinja", "chat_template.jinja", "code/more.py", "config.json",
        "generation_config.json", "model.safetensors", "modeling_custom.py", "preprocessor_config.json",
        "tokenizer.json",
    ]  # fmt: skip
    assert (path / "code/more.py").read_text() == '{"from": "code/more.py"}'


def test_a_download_cache_is_carried_over_as_files(tmp_path):
    """Make a snapshot of the HuggingFace cache: links to blobs of a multimodal model with custom code."""
    names = ["config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json"]
    names += ["video_preprocessor_config.json", "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json"]
    names += ["special_tokens_map.json", "chat_template.jinja", "chat_template.json", "modeling_own.py"]
    cache = tmp_path / "models--org--name"
    snapshot = cache / "snapshots" / "0a1b"
    (cache / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, name in enumerate([*names, "model-00001-of-00002.safetensors", "pytorch_model.bin.index.json"]):
        (cache / "blobs" / str(number)).write_text(f"content of {name}")
        (snapshot / name).symlink_to(f"../../blobs/{number}")
    with begin_save(tmp_path / "run", step=1, layout=Layout()) as save:
        write_hf(save, weights().items(), snapshot)
        path = save.commit() / "actor/hf_model"
    assert sorted(file.name for file in path.iterdir()) == sorted([*names, "model.safetensors"])
    assert not any(file.is_symlink() for file in path.iterdir())
    assert all((path / name).read_text() == f"content of {name}" for name in names)

    (cache / "blobs" / str(names.index("chat_template.jinja"))).unlink()
    (cache / "blobs" / str(len(names))).unlink()  # weights are not needed
    with (
        pytest.raises(CheckpointError, match=r"chat_template.jinja is a link to .*blobs/10, which is not there"),
        begin_save(tmp_path / "run", step=2, layout=Layout()) as save,
    ):
        write_hf(save, weights().items(), snapshot)


def test_memory_is_one_shard_and_one_tensor(tmp_path, monkeypatch):
    """No shard is kept in memory while the next one fills."""
    import weakref

    from mbridge_ckpt.huggingface import write as hf_write

    held: list[weakref.ref] = []
    most = 0
    shards = hf_write._shards

    def watched(sink, tensors, limit):
        nonlocal most
        for shard in shards(sink, tensors, limit):
            most = max(most, sum(reference() is not None for reference in held) + len(shard))
            held.extend(weakref.ref(tensor) for tensor in shard.values())
            yield shard
            del shard

    monkeypatch.setattr(hf_write, "_shards", watched)
    path = export(tmp_path, ((f"w{number}", torch.ones(256)) for number in range(40)), 4 * 1024)
    assert most == 4 and len(list(path.glob("*.safetensors"))) == 10


def test_no_more_than_a_shard_is_held(tmp_path):
    import weakref

    alive: list[weakref.ref] = []
    most = 0

    def stream():
        nonlocal most
        for number in range(40):
            tensor = torch.full((256,), float(number))
            alive.append(weakref.ref(tensor))
            yield f"w{number}", tensor
            del tensor
            most = max(most, sum(reference() is not None for reference in alive))

    path = export(tmp_path, stream(), 4 * 1024)
    assert most <= 2  # what streams by is copied; the copies of one shard are the other memory
    assert len(list(path.glob("*.safetensors"))) == 10


def test_it_opens_with_transformers_and_equals_the_model(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen2Config(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=64,
    )
    model = transformers.Qwen2ForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "source")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)  # what is exported is the live model, not the source
    with begin_save(tmp_path / "run", step=1, layout=Layout()) as save:
        write_hf(save, model.state_dict().items(), tmp_path / "source", max_shard_size="20KB")
        path = save.commit() / "actor/hf_model"
    assert len(list(path.glob("model-*.safetensors"))) > 1
    again = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokens = torch.tensor([[1, 5, 9]])
    assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_a_file_that_nobody_announced_is_part_of_the_checkpoint(tmp_path):
    with begin_save(tmp_path, step=1, layout=Layout()) as save:
        (save.path / "actor/hf_model").mkdir(parents=True)
        (save.path / "actor/hf_model/model.bin").write_text("x")
        save.write_json("a.json", 1)
        path = save.commit()
    assert [record.path for record in open_checkpoint(path).manifest.files] == ["a.json", "actor/hf_model/model.bin"]
    assert verify(path).notes == ()
    assert [(verdict.path, verdict.action) for verdict in prune(tmp_path, Retention(last=1)).verdicts] == [
        (path, "keep")
    ]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([("a", torch.ones(1)), ("a", torch.ones(1))], "a: the export gives this tensor twice"),
        ([("c", torch.ones(1, dtype=torch.complex64))], "c: safetensors has no dtype complex64"),
    ],
)
def test_exports_that_cannot_be(tmp_path, tensors, message):
    with pytest.raises(CheckpointError, match=message):
        export(tmp_path, tensors, 1)
    assert list((tmp_path / "run").iterdir()) == []


def test_a_full_disk_does_not_stop_the_stream(tmp_path, monkeypatch):
    """Other ranks wait in the iterator's collectives, so it must be run to its end."""
    taken = []

    def stream():
        for name, tensor in weights().items():
            taken.append(name)
            yield name, tensor

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mbridge_ckpt.files.hashing.HashingFile.write", full)
    with pytest.raises(SaveError, match="part-00000: No space left"):
        export(tmp_path, stream(), 1)
    assert taken == list(weights())


def test_sizes():
    with pytest.raises(CheckpointError, match="is no size"):
        parse_size("9" * 400 + "GB")
    assert [parse_size(size) for size in (5, "5B", "5kB", "1.5MB", "5GB", "2GiB")] == [
        5,
        5,
        5000,
        1500000,
        5 * 10**9,
        2**31,
    ]
    for size in ("five", "5", "-5GB", 0, "0GB"):
        with pytest.raises(CheckpointError, match="max_shard_size"):
            parse_size(size)
