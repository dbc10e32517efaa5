"""`export-hf` from a checkpoint with an export, and from one without by its recipe; complete or not at all."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from mbridge_ckpt import (
    RECIPE_FILE,
    CheckpointError,
    CorruptCheckpointError,
    HfRecipe,
    HfTensor,
    IncompleteCheckpointError,
    Layout,
    LayoutError,
    ParameterPlacement,
    begin_save,
    export_hf,
    model_file,
    write_hf,
)
from mbridge_ckpt.cli.main import main
from safetensors.torch import load_file
from torch import Tensor

HEADS, GROUPS, HEAD_DIM, HIDDEN, FEED_FORWARD, VOCABULARY, PADDED = 6, 2, 3, 10, 8, 21, 24
PREFIX = "decoder.layers.0."


def hf_weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "embed": (VOCABULARY, HIDDEN),
        "q": (HEADS * HEAD_DIM, HIDDEN),
        "k": (GROUPS * HEAD_DIM, HIDDEN),
        "v": (GROUPS * HEAD_DIM, HIDDEN),
        "q_bias": (HEADS * HEAD_DIM,),
        "k_bias": (GROUPS * HEAD_DIM,),
        "v_bias": (GROUPS * HEAD_DIM,),
        "gate": (FEED_FORWARD, HIDDEN),
        "up": (FEED_FORWARD, HIDDEN),
        "norm": (HIDDEN,),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def interleaved(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Fuse in Megatron's order: for each group its query heads, its key head and its value head."""
    rows = []
    for group in range(GROUPS):
        heads = range(group * HEADS // GROUPS, (group + 1) * HEADS // GROUPS)
        rows += [query[head * HEAD_DIM : (head + 1) * HEAD_DIM] for head in heads]
        rows += [part[group * HEAD_DIM : (group + 1) * HEAD_DIM] for part in (key, value)]
    return torch.cat(rows)


def recipe(**changes: Any) -> HfRecipe:
    attention = {"heads": HEADS, "groups": GROUPS, "head_dim": HEAD_DIM}
    fused, first = PREFIX + "self_attention.linear_qkv.", PREFIX + "mlp.linear_fc1.weight"
    tensors = [HfTensor(name="embed", parameter="embedding.word_embeddings.weight")]
    for name, part in (("q", "query"), ("k", "key"), ("v", "value")):
        tensors.append(HfTensor(name=name, parameter=fused + "weight", part=part, **attention))  # type: ignore[arg-type]
        tensors.append(HfTensor(name=name + "_bias", parameter=fused + "bias", part=part, **attention))  # type: ignore[arg-type]
    tensors += [HfTensor(name=part, parameter=first, part=part) for part in ("gate", "up")]  # type: ignore[arg-type]
    tensors.append(HfTensor(name="norm", parameter="decoder.final_layernorm.weight", dtype="bfloat16"))
    return HfRecipe(tensors=tuple(tensors), **changes)


def save(directory: Path, hf_recipe: bytes | None, files: dict[str, str] | None = None) -> Path:
    """Save a checkpoint of two tensor ranks with the parameters of `hf_weights`, without exported weights."""
    hf = hf_weights()
    embedding = torch.cat([hf["embed"], torch.full((PADDED - VOCABULARY, HIDDEN), torch.nan)])
    whole = {
        "embedding.word_embeddings.weight": embedding,
        PREFIX + "self_attention.linear_qkv.weight": interleaved(hf["q"], hf["k"], hf["v"]),
        PREFIX + "self_attention.linear_qkv.bias": interleaved(hf["q_bias"], hf["k_bias"], hf["v_bias"]),
        PREFIX + "mlp.linear_fc1.weight": torch.cat([hf["gate"], hf["up"]]),
        "decoder.final_layernorm.weight": hf["norm"],
    }
    layout = Layout(tensor=2)
    with begin_save(directory, step=3, layout=layout) as writing:
        for rank in range(2):
            model, placements = {}, []
            for name, tensor in whole.items():
                cut = "norm" not in name
                model[name] = tensor.chunk(2)[rank] if cut else tensor
                if "fc1" in name:
                    model[name] = torch.cat([half.chunk(2)[rank] for half in tensor.chunk(2)])
                placements.append(
                    ParameterPlacement(
                        name=name,
                        global_name=name,
                        stage="layer" if "layers" in name else "first" if "embedding" in name else "last",
                        layer=0 if "layers" in name else None,
                        partition_dim=0 if cut else -1,
                        partition_stride=2 if "fc1" in name else 1,
                        vocabulary_rows=VOCABULARY if "embedding" in name else None,
                    )
                )
            writing.write_torch(model_file(3, layout, tensor_rank=rank), {"model": model}, placements=placements)
        if hf_recipe is not None:
            writing.write_bytes(RECIPE_FILE, hf_recipe)
        for name, text in (files or {}).items():
            writing.write_bytes(f"actor/hf_model/{name}", text.encode())
        return writing.commit()


def source_directory(path: Path) -> Path:
    path.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (path / name).write_text(name)
    return path


def exported(path: Path) -> dict[str, Tensor]:
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_exported(path: Path) -> None:
    found, expected = exported(path), hf_weights()
    expected["norm"] = expected["norm"].bfloat16()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_weights_are_built_by_the_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Padding rows are dropped, fused heads split, other files copied from the source; several shards have an index."""
    source = source_directory(tmp_path / "source")
    checkpoint = save(tmp_path / "run", recipe(source=str(source)).to_bytes())
    report = export_hf(checkpoint, tmp_path / "one")
    assert_exported(tmp_path / "one")
    assert sorted(file.name for file in report.path.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert (report.tensors, report.weights_from) == (10, "recipe")
    command = ["export-hf", str(checkpoint), str(tmp_path / "two"), "--max-shard-size", "700B", "--json"]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["tensors"] == 10
    assert_exported(tmp_path / "two")
    weight_map = json.loads((tmp_path / "two/model.safetensors.index.json").read_text())["weight_map"]
    assert weight_map.keys() == hf_weights().keys() and len(set(weight_map.values())) > 2
    assert main(command) == 2 and "two exists; nothing is overwritten" in capsys.readouterr().err
    assert not list(tmp_path.glob(".*"))


def test_an_export_is_copied_or_cut_anew(tmp_path: Path) -> None:
    source = source_directory(tmp_path / "source")
    with begin_save(tmp_path / "run", step=1, layout=Layout()) as writing:
        write_hf(writing, hf_weights().items(), source, max_shard_size=700)
        checkpoint = writing.commit()
    copied = export_hf(checkpoint, tmp_path / "copied")
    theirs = {file.name: file.read_bytes() for file in (checkpoint / "actor/hf_model").iterdir()}
    assert {file.name: file.read_bytes() for file in copied.path.iterdir()} == theirs and len(theirs) > 4
    again = export_hf(checkpoint, tmp_path / "again", max_shard_size="1GB")
    assert sorted(file.name for file in again.path.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert all(torch.equal(exported(again.path)[name], tensor) for name, tensor in hf_weights().items())
    assert (again.tensors, again.weights_from) == (copied.tensors, copied.weights_from) == (10, "export")
    with pytest.raises(CheckpointError, match="leave hf_files out"):
        export_hf(checkpoint, tmp_path / "x", hf_files=source)

    shard = next((checkpoint / "actor/hf_model").glob("model-00002*"))
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(data)
    for size in (None, "1GB"):
        with pytest.raises(CorruptCheckpointError, match="model-00002"):
            export_hf(checkpoint, tmp_path / "x", max_shard_size=size)
    for file in (checkpoint / "actor/hf_model").iterdir():
        file.unlink()
    with pytest.raises(IncompleteCheckpointError, match="neither actor/hf_model nor actor/hf_recipe.json"):
        export_hf(checkpoint, tmp_path / "x")
    assert not (tmp_path / "x").exists() and not list(tmp_path.glob(".*"))


def test_where_the_small_files_come_from(tmp_path: Path) -> None:
    """Small files come from the checkpoint, else from the option, else from the recipe's source."""
    own = save(tmp_path / "own", recipe().to_bytes(), {"config.json": "of the checkpoint"})
    assert export_hf(own, tmp_path / "a").path.joinpath("config.json").read_text() == "of the checkpoint"
    bare = save(tmp_path / "bare", recipe(source=str(tmp_path / "gone")).to_bytes())
    with pytest.raises(IncompleteCheckpointError, match=r"came from .*gone, which is not there; .* --hf-files"):
        export_hf(bare, tmp_path / "b")
    source = source_directory(tmp_path / "source")
    assert export_hf(bare, tmp_path / "b", hf_files=source).path.joinpath("tokenizer.json").is_file()
    (source / "config.json").unlink()
    with pytest.raises(IncompleteCheckpointError, match="has no config.json"):
        export_hf(bare, tmp_path / "c", hf_files=source)


def test_a_recipe_that_does_not_fit_writes_nothing(tmp_path: Path) -> None:
    def fails(message: str, **fields: Any) -> None:
        name = fields.pop("name", "x")
        text = HfRecipe(tensors=(HfTensor(name=name, **fields),)).to_bytes()
        checkpoint = save(tmp_path / "run", text, {"config.json": ""})
        with pytest.raises(LayoutError, match=message):
            export_hf(checkpoint, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    fails("x is made of lm_head, which the checkpoint lacks", parameter="lm_head")
    fused = PREFIX + "self_attention.linear_qkv.weight"
    fails(
        "linear_qkv.weight has 30 rows; 8 heads in 2 groups of head_dim 3 have 36",
        parameter=fused,
        part="key",
        heads=8,
        groups=2,
        head_dim=3,
    )
    fails("has 10 rows, the recipe takes 11", parameter="decoder.final_layernorm.weight", rows=11)
    fails("21 rows, no gate and up projection", parameter="embedding.word_embeddings.weight", part="up")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", 'no "format"'),
        ({"tensors": {}}, "tensors is no list"),
        ({"tensors": []}, "it has no tensors"),
        ({"tensors": [1]}, "expected objects, found int"),
        ({"tensors": [{"name": "a"}]}, r"tensor 'a': .* \['parameter'\]"),
        ({"tensors": [{"name": "a", "parameter": "b", "rows": True}]}, r"tensor 'a': .* \['rows'\]"),
        ({"tensors": [{"name": "a", "parameter": "b", "rows": -1}]}, "a: rows -1"),
        ({"tensors": [{"name": "a", "parameter": "b", "code": "x"}]}, r"tensor 'a': .* \['code'\]"),
        ({"tensors": [{"name": "a", "parameter": "b", "part": "half"}]}, "part 'half' is none of"),
        ({"tensors": [{"name": "a", "parameter": "b", "part": "key"}]}, "give positive numbers"),
        ({"tensors": [{"name": "a", "parameter": "b", "heads": 2}]}, "and none with others"),
        ({"tensors": [{"name": "a", "parameter": "b", "dtype": "str"}]}, "dtype 'str' is unknown"),
        ({"tensors": [{"name": "a", "parameter": "b"}] * 2}, "a comes 2 times"),
    ],
    ids=str,
)
def test_untrusted_recipes(tmp_path: Path, text: Any, message: str) -> None:
    if isinstance(text, dict):
        text = json.dumps({"format": "mbridge-hf-recipe", "format_version": 1} | text)
    checkpoint = save(tmp_path / "run", text.encode())
    with pytest.raises(CorruptCheckpointError, match=message) as caught:
        export_hf(checkpoint, tmp_path / "out")
    assert "hf_recipe.json: " in str(caught.value)


def test_a_recipe_is_read_as_it_was_written() -> None:
    assert HfRecipe.from_bytes(recipe(source="somewhere").to_bytes()) == recipe(source="somewhere")
    later = json.dumps({"format": "mbridge-hf-recipe", "format_version": 2})
    with pytest.raises(CheckpointError, match="format version 2, .* install a later mbridge-ckpt"):
        HfRecipe.from_bytes(later.encode())


def test_memory_is_one_shard(tmp_path: Path) -> None:
    """Export six tensors of 36 MiB in shards of two, by recipe and from an export, without Megatron or transformers."""
    megabytes, count = 36, 6  # larger than what the C library keeps for itself when it is freed
    tensors = {f"decoder.layers.{n}.w": torch.full((1024, megabytes * 256), float(n)) for n in range(count)}
    made = HfRecipe(tensors=tuple(HfTensor(name=name, parameter=name) for name in tensors))
    places = [ParameterPlacement(name=name, global_name=name, stage="layer", layer=n) for n, name in enumerate(tensors)]
    with begin_save(tmp_path / "run", step=1, layout=Layout()) as writing:
        writing.write_torch(model_file(1, Layout(), tensor_rank=0), {"model": tensors}, placements=places)
        writing.write_bytes(RECIPE_FILE, made.to_bytes())
        writing.write_bytes("actor/hf_model/config.json", b"{}")
        by_recipe = writing.commit()
    with begin_save(tmp_path / "run", step=2, layout=Layout()) as writing:
        write_hf(writing, tensors.items(), None)
        with_export = writing.commit()
    code = """
import json, re, sys, torch
from mbridge_ckpt.cli.main import main
def peak(): return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
before = peak()
codes = [main(["export-hf", source, f"{source}_hf", "--max-shard-size", sys.argv[1]]) for source in sys.argv[2:]]
modules = [name for name in sys.modules if name.startswith(("megatron", "transformers"))]
print(json.dumps([codes, peak() - before, modules]))
"""
    arguments = [f"{2 * megabytes}MiB", str(by_recipe), str(with_export)]
    done = subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True)
    codes, kibibytes, modules = json.loads(done.stdout.splitlines()[-1])
    assert codes == [0, 0] and modules == []
    # A shard, and the tensor that comes next; all of it would be 216 MiB.
    assert kibibytes < 1024 * (3 * megabytes + 24), f"{kibibytes / 1024:.0f} MiB over the start"
    for source in (by_recipe, with_export):
        assert len(list(Path(f"{source}_hf").glob("*.safetensors"))) == count // 2
