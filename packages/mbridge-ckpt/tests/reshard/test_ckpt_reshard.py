"""A checkpoint that is cut for another layout equals the one that this layout would have written."""

import json
import subprocess
import sys
from math import ceil
from pathlib import Path

import pytest
import torch
from mbridge_ckpt import (
    RECIPE_FILE,
    CheckpointError,
    CorruptCheckpointError,
    HfRecipe,
    HfTensor,
    Layout,
    LayoutError,
    SaveError,
    WholeModel,
    begin_save,
    model_file,
    open_checkpoint,
    optimizer_file,
    place_parameter,
    verify,
)
from mbridge_ckpt.cli.main import main
from mbridge_ckpt.huggingface.export import NewDirectory
from mbridge_ckpt.reshard.reshard import reshard

LAYERS, HIDDEN, FEED_FORWARD, VOCABULARY = 4, 8, 12, 21
KINDS = ("fp32_param", "exp_avg", "exp_avg_sq")


def whole_model(tied: bool, seed: int) -> dict[str, torch.Tensor]:
    """Return a model in one piece, with gate above up in linear_fc1 and only the rows of real tokens."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    model = {"embedding.word_embeddings.weight": random(VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"decoder.layers.{layer}."
        model |= {
            prefix + "self_attention.linear_qkv.weight": random(3 * HIDDEN, HIDDEN),
            prefix + "self_attention.linear_qkv.layer_norm_weight": random(HIDDEN),
            prefix + "self_attention.linear_proj.weight": random(HIDDEN, HIDDEN),
            prefix + "mlp.linear_fc1.weight": random(2 * FEED_FORWARD, HIDDEN),
            prefix + "mlp.linear_fc2.weight": random(HIDDEN, FEED_FORWARD),
        }
    model["decoder.final_layernorm.weight"] = random(HIDDEN)
    if not tied:
        model["output_layer.weight"] = random(VOCABULARY, HIDDEN)
    return model


def piece(name: str, tensor: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """Return the piece of tensor rank `rank` of `size`, cut as in Megatron's code and not as in the package."""
    if "embedding" in name or "output_layer" in name:
        padded = torch.zeros(ceil(VOCABULARY / size) * size, HIDDEN)
        padded[:VOCABULARY] = tensor
        return padded.chunk(size)[rank].clone()
    if "fc1" in name:
        gate, up = tensor.chunk(2)
        return torch.cat([gate.chunk(size)[rank], up.chunk(size)[rank]])
    if "linear_qkv.weight" in name:
        return tensor.chunk(size)[rank].clone()
    if "proj" in name or "fc2" in name:
        return tensor.chunk(size, dim=1)[rank].contiguous()
    return tensor.clone()


def rank_part(model: dict, tied: bool, layout: Layout, rank: int, stage: int) -> dict[str, torch.Tensor]:
    each, part = LAYERS // layout.pipeline, {}
    for name, tensor in model.items():
        local = name
        if name.startswith("decoder.layers."):
            layer, rest = int(name.split(".")[2]), name.split(".", 3)[3]
            if layer // each != stage:
                continue
            local = f"decoder.layers.{layer - stage * each}.{rest}"
        elif stage != (0 if name.startswith("embedding") else layout.pipeline - 1):
            continue
        part[local] = piece(name, tensor, rank, layout.tensor)
    if tied and stage == layout.pipeline - 1 != 0:
        embedding = "embedding.word_embeddings.weight"
        part["output_layer.weight"] = piece(embedding, model[embedding], rank, layout.tensor)
    return part


def placement(name: str, tensor: torch.Tensor, offset: int, tied: bool):
    tensor.tensor_model_parallel = "norm" not in name
    tensor.partition_dim = 1 if "proj" in name or "fc2" in name else 0
    is_vocabulary = name in ("embedding.word_embeddings.weight", "output_layer.weight")
    return place_parameter(
        name,
        tensor,
        stage="first" if name.startswith("embedding") else "last",
        layer_offset=offset,
        partition_stride=2 if "fc1" in name else None,
        vocabulary_rows=VOCABULARY if is_vocabulary else None,
        last_stage_copy="output_layer.weight" if tied and name.startswith("embedding") else None,
    )


def save(directory: Path, layout: Layout, tied: bool, recipe: HfRecipe | None = None) -> Path:
    models = {kind: whole_model(tied, seed) for seed, kind in enumerate(("model", *KINDS))}
    with begin_save(directory, step=7, layout=layout) as writing:
        for rank in range(layout.tensor):
            for stage in range(layout.pipeline):
                ranks = {"tensor_rank": rank, "pipeline_rank": stage}
                parts = {kind: rank_part(model, tied, layout, rank, stage) for kind, model in models.items()}
                offset = stage * LAYERS // layout.pipeline
                placements = [placement(name, tensor, offset, tied) for name, tensor in parts["model"].items()]
                value = {"model": parts.pop("model"), "iteration": 7, "layout": layout.to_json()}
                writing.write_torch(model_file(7, layout, **ranks), value, placements=placements)
                facts = {"step": 70, "schedule": {"numbers": torch.arange(3)}, "grad_scaler": None}
                writing.write_torch(optimizer_file(7, layout, **ranks), parts | facts)
        if recipe is not None:
            writing.write_bytes(RECIPE_FILE, recipe.to_bytes())
        writing.write_rank_state({"position": 5})
        writing.write_json("actor/hf_model/config.json", {})
        return writing.commit({"metrics": {"reward": 0.5}})


def assert_same_checkpoint(found: Path, expected: Path) -> None:
    one, other = open_checkpoint(found), open_checkpoint(expected)
    assert one.layout == other.layout and one.step == other.step
    assert [record.path for record in one.manifest.files] == [record.path for record in other.manifest.files]
    for ours, theirs in zip(one.manifest.files, other.manifest.files, strict=True):
        assert sorted(map(str, ours.placements)) == sorted(map(str, theirs.placements))
        assert ours.tensors == theirs.tensors, ours.path
        if ours.path.endswith(".pt"):
            torch.testing.assert_close(plain(one, ours.path), plain(other, ours.path), rtol=0, atol=0)


def plain(checkpoint, path: str) -> dict:
    """Return the content of a file as a flat dict in the order of the file, text and None included."""
    flat = {}

    def walk(value, name: str) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                walk(item, f"{name}/{key}")
        else:
            flat[name] = value if isinstance(value, (torch.Tensor, int)) else hash(value)

    walk(checkpoint.load_torch(path), "")
    return flat


LAYOUTS = [(1, 1), (2, 1), (1, 2), (4, 1), (2, 2), (4, 4), (1, 4)]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("old", [(1, 1), (2, 2), (4, 1), (2, 4)])
def test_every_layout_from_every_other(tmp_path, tied, old):
    source = save(tmp_path / "source", Layout(tensor=old[0], pipeline=old[1]), tied)
    for tensor, pipeline in LAYOUTS:
        name = f"{tensor}_{pipeline}"
        expected = save(tmp_path / f"expected_{name}", Layout(tensor=tensor, pipeline=pipeline), tied)
        found = reshard(source, tmp_path / name, tensor=tensor, pipeline=pipeline, vocabulary_multiple=1)
        assert verify(found).ok
        assert_same_checkpoint(found, expected)
        assert open_checkpoint(found).metadata["metrics"] == {"reward": 0.5}
        assert open_checkpoint(found).load_rank_state(0) == {"position": 5}


def test_diff_across_layouts(tmp_path, capsys):
    one = save(tmp_path / "one", Layout(tensor=2, pipeline=2), True)
    other = save(tmp_path / "other", Layout(tensor=4), True)
    assert main(["diff", str(one), str(other)]) == 0 and "equal" in capsys.readouterr().out
    with begin_save(tmp_path / "changed", step=7, layout=Layout(tensor=4)) as writing:
        for record in open_checkpoint(other).manifest.files:
            if not record.path.endswith(".pt"):
                continue
            value = open_checkpoint(other).load_torch(record.path)
            if "mp_rank_03/distrib_optim" in record.path:
                value["exp_avg"]["decoder.layers.2.mlp.linear_fc1.weight"][1, 2] += 0.5
                del value["fp32_param"]["decoder.final_layernorm.weight"]
            if "mp_rank_00/distrib_optim" in record.path:
                del value["fp32_param"]["decoder.final_layernorm.weight"]
            writing.write_torch(record.path, value, placements=record.placements)
        changed = writing.commit()
    assert main(["diff", str(one), str(changed), "--json"]) == 1
    differences = json.loads(capsys.readouterr().out)["differences"]
    assert [(item["kind"], item["name"]) for item in differences] == [
        ("exp_avg", "decoder.layers.2.mlp.linear_fc1.weight"),
        ("fp32_param", "decoder.final_layernorm.weight"),
    ]
    assert differences[0]["largest"] == pytest.approx(0.5) and differences[1]["reason"] == "only in the first"


def test_the_multiple_of_the_vocabulary_is_found_out(tmp_path):
    source = save(tmp_path / "source", Layout(tensor=2), False)  # 21 rows, padded to 22: a multiple of 1 x 2
    found = open_checkpoint(reshard(source, tmp_path / "a", tensor=4, pipeline=1))
    shapes = {t.name: t.shape for t in found.manifest.file(model_file(7, found.layout, tensor_rank=3)).tensors}
    assert shapes["model/output_layer.weight"] == (6, HIDDEN)
    found = open_checkpoint(reshard(source, tmp_path / "b", tensor=4, pipeline=1, vocabulary_multiple=128))
    last = found.load_torch(model_file(7, found.layout, tensor_rank=3))["model"]["output_layer.weight"]
    assert last.shape == (128, HIDDEN) and not last.any()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tensor": 1, "pipeline": 3}, "4 layers cannot be divided over 3 pipeline stages"),
        ({"tensor": 5, "pipeline": 1}, "cannot be cut into 5 equal pieces"),
        ({"tensor": 1, "pipeline": 1, "vocabulary_multiple": 0}, "vocabulary multiple is 0; it must be at least 1"),
        ({"tensor": 1, "pipeline": 1, "vocabulary_multiple": -2}, "vocabulary multiple is -2"),
    ],
)
def test_sizes_that_do_not_fit(tmp_path, sizes, message):
    source = save(tmp_path / "source", Layout(tensor=2), False)
    with pytest.raises(LayoutError, match=message):
        reshard(source, tmp_path / "a", **sizes)
    assert not (tmp_path / "a").exists() or list((tmp_path / "a").iterdir()) == []


@pytest.mark.parametrize(
    ("heads", "groups", "sizes"),
    [(6, 3, {2: "1, 3", 4: "1, 3"}), (8, 2, {2: None, 4: None}), (4, 4, {2: None, 4: None})],
)
def test_heads_that_no_run_could_share(tmp_path, heads, groups, sizes):
    """The recipe gives the heads; the 24 rows of the fused weight alone could be cut by all these sizes."""
    attention = {"heads": heads, "groups": groups, "head_dim": 24 // (heads + 2 * groups)}
    name = "decoder.layers.0.self_attention.linear_qkv.weight"
    recipe = HfRecipe(tensors=(HfTensor(name="q", parameter=name, part="query", **attention),))
    source = save(tmp_path / "source", Layout(), False, recipe)
    for tensor, fitting in sizes.items():
        out = tmp_path / str(tensor)
        if fitting is None:
            assert reshard(source, out, tensor=tensor, pipeline=1).is_dir()
            continue
        message = rf"{heads} heads in {groups} groups cannot be shared by {tensor} .*: use one of {fitting}, {heads}$"
        with pytest.raises(LayoutError, match=message):
            reshard(source, out, tensor=tensor, pipeline=1)
        assert not out.exists()
        assert main(["reshard", str(source), str(out), "--tp", str(tensor)]) == 2


def test_a_damaged_source_and_one_without_placements_are_refused(tmp_path):
    source = save(tmp_path / "source", Layout(tensor=2), False)
    file = source / "actor/iter_0000007/mp_rank_01/distrib_optim.pt"
    data = bytearray(file.read_bytes())
    data[-3000] ^= 4
    file.write_bytes(data)
    with pytest.raises(CorruptCheckpointError, match="mp_rank_01/distrib_optim.pt"):
        reshard(source, tmp_path / "a", tensor=1, pipeline=1)
    with begin_save(tmp_path / "bare", step=1, layout=Layout()) as writing:
        writing.write_torch(model_file(1, Layout(), tensor_rank=0), {"model": {"w": torch.ones(2)}})
        bare = writing.commit()
    with pytest.raises(LayoutError, match="no placement is recorded for 'w'"):
        reshard(bare, tmp_path / "a", tensor=1, pipeline=1)


def test_differences_are_not_damage(tmp_path, capsys):
    one = save(tmp_path / "one", Layout(tensor=2), False)
    other = save(tmp_path / "other", Layout(), False)
    file = other / "actor/iter_0000007/mp_rank_00/model_optim_rng.pt"
    data = bytearray(file.read_bytes())
    data[data.index(whole_model(False, 0)["decoder.final_layernorm.weight"].numpy().tobytes())] ^= 1
    file.write_bytes(data)
    assert main(["diff", str(one), str(other)]) == 2
    assert f"{file}: its content changed since it was written" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["", "inner", "actor/hf_model/x"])
def test_nothing_new_is_made_inside_a_checkpoint(tmp_path, capsys, place):
    source = save(tmp_path / "source", Layout(), False)
    (tmp_path / "linked").symlink_to(source)
    for root in (source, tmp_path / "linked"):
        assert main(["reshard", str(source), str(root / place)]) == 2
        assert f"lies inside the checkpoint {source}" in capsys.readouterr().err
        with pytest.raises(CheckpointError, match="lies inside the checkpoint"):
            NewDirectory(root / place / "new")
        with pytest.raises(SaveError, match="lies inside the checkpoint"):
            begin_save(root / place, step=9, layout=Layout())
    assert verify(source).notes == ()


def test_ctrl_c_leaves_nothing_and_no_traceback(tmp_path, capsys, monkeypatch):
    source = save(tmp_path / "source", Layout(tensor=2), False)
    read, count = WholeModel.read, iter(range(100))

    def interrupted(*arguments, **options):
        if next(count) == 5:
            raise KeyboardInterrupt
        return read(*arguments, **options)

    monkeypatch.setattr(WholeModel, "read", interrupted)
    assert main(["reshard", str(source), str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err == "mbridge-ckpt: interrupted\n"
    assert list((tmp_path / "out").iterdir()) == []


def test_memory_is_two_tensors_and_megatron_is_not_needed(tmp_path):
    # The pieces, too, are larger than the 32 MiB from which on the C library gives back what is freed.
    megabytes, tensors = 80, 4
    name = "decoder.layers.{}.self_attention.linear_proj.weight"
    parameters = {name.format(n): torch.full((1024, megabytes * 256), float(n)) for n in range(tensors)}
    with begin_save(tmp_path / "source", step=1, layout=Layout()) as writing:
        placements = [placement(name, tensor, 0, False) for name, tensor in parameters.items()]
        writing.write_torch(model_file(1, Layout(), tensor_rank=0), {"model": parameters}, placements=placements)
        source = writing.commit()
    code = """
import json, re, sys, torch
from mbridge_ckpt.cli.main import main
def peak(): return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
before = peak()
code = main(["reshard", *sys.argv[1:], "--json"])
modules = [name for name in sys.modules if name.startswith(("megatron", "transformers"))]
print(json.dumps([code, peak() - before, modules]))
"""
    arguments = [str(source), str(tmp_path / "out"), "--tp", "2", "--pp", "2"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True)
    code, kibibytes, modules = json.loads(done.stdout.splitlines()[-1])
    assert code == 0 and modules == []
    assert kibibytes < 1024 * (2 * megabytes + 40), f"{kibibytes / 1024:.0f} MiB over the start"
    assert open_checkpoint(tmp_path / "out").layout == Layout(tensor=2, pipeline=2)
