"""Trees of Megatron-LM's torch format made by hand: layouts that need many ranks, faults, and hostile files."""

import os
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from signal import Signals
from typing import Any

import numpy
import pytest
import torch
from mbridge_ckpt import (
    CheckpointError,
    CorruptCheckpointError,
    IncompleteCheckpointError,
    Layout,
    LayoutError,
    UnsafeCheckpointError,
    WholeModel,
    import_megatron,
    open_checkpoint,
    reshard,
    verify,
)
from mbridge_ckpt.cli.main import main
from torch import Tensor

LAYERS, HIDDEN, FEED_FORWARD, VOCABULARY, EXPERTS = 4, 10, 12, 22, 4
EMBEDDING = "embedding.word_embeddings.weight"
Sizes = dict[str, int]


def whole_model(experts: int = 0, seed: int = 0) -> dict[str, Tensor]:
    """Return a tied model in one piece, in Megatron-Core's order, with gate above up in linear_fc1."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"decoder.layers.{layer}."
        shapes |= {
            prefix + "self_attention.linear_proj.weight": (HIDDEN, 16),
            prefix + "self_attention.linear_qkv.layer_norm_weight": (HIDDEN,),
            prefix + "self_attention.linear_qkv.weight": (24, HIDDEN),
        }
        if experts:
            shapes[prefix + "mlp.router.weight"] = (experts, HIDDEN)
            for number in range(experts):
                shapes[prefix + f"mlp.experts.linear_fc1.weight{number}"] = (2 * FEED_FORWARD, HIDDEN)
                shapes[prefix + f"mlp.experts.linear_fc2.weight{number}"] = (HIDDEN, FEED_FORWARD)
        else:
            shapes[prefix + "mlp.linear_fc1.weight"] = (2 * FEED_FORWARD, HIDDEN)
            shapes[prefix + "mlp.linear_fc2.weight"] = (HIDDEN, FEED_FORWARD)
    shapes["decoder.final_layernorm.weight"] = (HIDDEN,)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def cut(name: str, tensor: Tensor, rank: int, size: int) -> Tensor:
    """Return a tensor rank's piece as Megatron cuts it."""
    if "linear_fc1" in name:
        return torch.cat([half.chunk(size)[rank] for half in tensor.chunk(2)])
    if "linear_fc2" in name or "linear_proj" in name:
        return tensor.chunk(size, dim=1)[rank].contiguous()
    return tensor.clone() if "norm" in name or "router" in name else tensor.chunk(size)[rank].clone()


def rank_models(model: dict[str, Tensor], sizes: Sizes, tensor: int, pipeline: int, expert: int) -> dict[str, Any]:
    """{"model": …} or {"model0": …, "model1": …} of one rank, with the numbers that Megatron gives them there."""
    chunks, stages = sizes["virtual"], sizes["pipeline"]
    each, experts = LAYERS // (stages * chunks), EXPERTS // sizes["expert"]
    found: dict[str, Any] = {}
    for chunk in range(chunks):
        position = chunk * stages + pipeline
        part: dict[str, Any] = {}
        for name, value in model.items():
            local = name
            if name.startswith("decoder.layers."):
                layer = int(name.split(".")[2])
                if layer // each != position:
                    continue
                local = name.replace(f"layers.{layer}.", f"layers.{layer - position * each}.")
            elif position != (0 if name == EMBEDDING else stages * chunks - 1):
                continue
            if ".experts." in name:
                number = int(name.rpartition("weight")[2])
                if number // experts != expert:
                    continue
                local = f"{local.rpartition('weight')[0]}weight{number - expert * experts}"
            part[local] = cut(name, value, tensor, sizes["tensor"])
        if position == stages * chunks - 1 != 0:
            part["output_layer.weight"] = cut(EMBEDDING, model[EMBEDDING], tensor, sizes["tensor"])
        part["decoder._extra_state"] = None
        found["model" if chunks == 1 else f"model{chunk}"] = part
    return found


def flat_state(parts: list[dict[str, dict[str, Tensor]]], old: bool) -> dict[Any, Any]:
    """Return `distrib_optim.pt` of {kind: {name: tensor}} parts: reversed, at multiples of 64; old: unaligned lists."""
    state: dict[Any, Any] = {} if old else {"buckets_coalesced": True}
    for number, kinds in enumerate(parts):
        flat: dict[str, Any] = {}
        for kind, tensors in kinds.items():
            pieces = []
            for name, tensor in reversed(tensors.items()):
                apart = name in ("output_layer.weight",)  # a shared embedding is a bucket of its own
                piece = tensor.flatten()
                padding = 0 if old or apart or name == next(iter(tensors)) else -piece.numel() % 64
                pieces.append(torch.cat([piece, torch.zeros(padding)]))
            flat[kind] = pieces if old else torch.cat(pieces)
        key = torch.float32 if old else (torch.float32, torch.float32)
        state[number] = {key: flat if old else flat | {"numel_unpadded": flat["param"].numel()}}
    return state


def write_tree(root: Path, sizes: Sizes, *, experts: int = 0, release: bool = False, flat: str | None = None) -> Path:
    """Write the tree of a whole model; `flat` is the form of a distributed optimizer's state: "new", "old" or None."""
    sizes = {"tensor": 1, "pipeline": 1, "virtual": 1, "expert": 1} | sizes
    models = {kind: whole_model(experts, seed) for seed, kind in enumerate(("param", "exp_avg", "exp_avg_sq"))}
    for tensor in range(sizes["tensor"]):
        for pipeline in range(sizes["pipeline"]):
            for expert in range(sizes["expert"]):
                name = f"mp_rank_{tensor:02d}" + f"_{pipeline:03d}" * (sizes["pipeline"] > 1)
                name += f"_{expert:03d}" * (sizes["expert"] > 1)
                path = root / ("release" if release else "iter_0000012") / name
                path.mkdir(parents=True)
                own = {kind: rank_models(model, sizes, tensor, pipeline, expert) for kind, model in models.items()}
                content = {"args": arguments(sizes), "checkpoint_version": 3.0, **own["param"]}
                if not release:
                    content["iteration"] = 12
                if flat:
                    for parts in own.values():
                        for part in parts.values():
                            del part["decoder._extra_state"]
                    parts = [{kind: own[kind][key] for kind in own} for key in own["param"]]
                    torch.save(flat_state(parts, flat == "old"), path / "distrib_optim.pt")
                    content["optimizer"] = {"optimizer": {"param_groups": [{"step": 7, "wd_mult": 1.0}]}}
                torch.save(content, path / "model_optim_rng.pt")
    (root / "latest_checkpointed_iteration.txt").write_text("release" if release else "12\n")
    return root


def arguments(sizes: Sizes) -> Namespace:
    """Has the types of values that Megatron-LM's arguments hold."""
    names = {"tensor": "tensor_model_parallel_size", "pipeline": "pipeline_model_parallel_size"}
    names["expert"] = "expert_model_parallel_size"
    return Namespace(
        **{names[key]: size for key, size in sizes.items() if key in names},
        exit_signal=Signals.SIGTERM,
        save=Path("somewhere"),
        params_dtype=torch.float32,
        numbers=numpy.arange(3),
        padded_vocab_size=VOCABULARY,
    )


def assert_whole(path: Path, experts: int = 0, kinds: tuple[str, ...] = ("model",)) -> None:
    names = {"model": 0, "fp32_param": 0, "exp_avg": 1, "exp_avg_sq": 2}
    assert verify(path).ok
    with WholeModel(open_checkpoint(path)) as whole:
        for kind in kinds:
            expected = whole_model(experts, names[kind])
            assert set(whole.parameters) - {"output_layer.weight"} == set(expected)
            for name, tensor in expected.items():
                assert torch.equal(whole.read(kind, name), tensor), name


@pytest.mark.parametrize(
    ("sizes", "stages"),
    [
        ({}, 1),
        ({"tensor": 2, "pipeline": 2}, 2),
        ({"tensor": 2, "pipeline": 2, "virtual": 2}, 4),
        ({"tensor": 2, "pipeline": 2, "expert": 2}, 2),
        ({"expert": 4}, 1),
    ],
    ids=str,
)
def test_every_kind_of_tree(tmp_path: Path, sizes: Sizes, stages: int) -> None:
    """Experts are merged, and chunks become stages; mp_rank_TT_EEE is told from mp_rank_TT_PPP."""
    experts = EXPERTS if "expert" in sizes else 0
    source = write_tree(tmp_path / "tree", sizes, experts=experts)
    found = import_megatron(source, tmp_path / "imported", optimizer=False)
    assert open_checkpoint(found).layout == Layout(tensor=sizes.get("tensor", 1), pipeline=stages)
    assert found.name == "global_step_12"
    assert_whole(found, experts)
    assert_whole(reshard(found, tmp_path / "cut", tensor=2, pipeline=2), experts)
    if experts:
        placements = [p for record in open_checkpoint(found).manifest.files for p in record.placements]
        assert {placement.expert for placement in placements} == {None, *range(EXPERTS)}


@pytest.mark.parametrize("flat", ["new", "old"])
@pytest.mark.parametrize("sizes", [{"tensor": 2}, {"pipeline": 2, "virtual": 2}], ids=str)
def test_flat_optimizer_state(tmp_path: Path, sizes: Sizes, flat: str) -> None:
    """Covers several chunks, a tied embedding, and Megatron-Core before February 2024."""
    found = import_megatron(write_tree(tmp_path / "tree", sizes, flat=flat), tmp_path / "imported")
    assert_whole(found, kinds=("model", "fp32_param", "exp_avg", "exp_avg_sq"))
    first = next(r.path for r in open_checkpoint(found).manifest.files if r.path.endswith("distrib_optim.pt"))
    state = open_checkpoint(found).load_torch(first)
    assert state["step"] == state["schedule_step"] == 7 and state["grad_scaler"] is None


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_tree(tmp_path / "tree", {"tensor": 2}, release=True)
    command = ["import-megatron", str(source), str(tmp_path / "out")]
    assert main(command) == 2 and "holds no optimizer state; import the weights alone" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    command += ["--no-optimizer", "--vocab-size", "21"]
    assert main(command) == 0 and "global_step_0: TP 2" in capsys.readouterr().out
    assert main(command) == 2 and "exists" in capsys.readouterr().err
    manifest = open_checkpoint(tmp_path / "out").manifest
    assert [p.vocabulary_rows for r in manifest.files for p in r.placements if p.name == EMBEDDING] == [21, 21]
    assert manifest.metadata["imported_from"]["optimizer"] is False
    assert main(["import-megatron", str(source), str(tmp_path / "b"), "--no-optimizer", "--vocab-size", "23"]) == 2
    assert "vocabulary size 23" in capsys.readouterr().err


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    value = torch.load(path, weights_only=False)
    change(value)
    torch.save(value, path)


class Calls:
    def __reduce__(self) -> Any:
        return os.mkdir, ("made_by_a_pickle",)


NORM = "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight"
FC1 = "decoder.layers.1.mlp.linear_fc1.weight"
CHANGES: dict[str, tuple[Callable[[dict[str, Any]], Any], type[CheckpointError], str]] = {
    "unknown": (lambda v: v["model"].update(x=torch.ones(1)), LayoutError, "x is None, on|x is .* on the first rank"),
    "diverged": (
        lambda v: v["model"][NORM].add_(1),
        CorruptCheckpointError,
        f"mp_rank_01/model_optim_rng.pt: {NORM} differs from that of tensor rank 0",
    ),
    "shape": (lambda v: v["model"].update({FC1: torch.ones(3, 3)}), LayoutError, f"mp_rank_01.*: {FC1} is "),
    "missing": (lambda v: v["model"].pop(FC1), LayoutError, f"{FC1} is None"),
    "legacy": (lambda v: v["model"].update(language_model={}), LayoutError, "only models of Megatron-Core"),
    "list": (lambda v: v.update(model=[]), CorruptCheckpointError, "'model' is missing"),
    "code": (lambda v: v.update(rng_state=Calls()), UnsafeCheckpointError, "its pickle calls posix.mkdir"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_ranks_that_do_not_fit_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    source = write_tree(tmp_path / "tree", {"tensor": 2})
    change, error, message = CHANGES[name]
    edit(source / "iter_0000012/mp_rank_01/model_optim_rng.pt", change)
    with pytest.raises(error, match=message) as caught:
        import_megatron(source, tmp_path / "out", optimizer=False)
    assert "mp_rank_01" in str(caught.value)
    assert not (tmp_path / "out").exists() and not (tmp_path / "made_by_a_pickle").exists()


def test_names_that_the_table_does_not_have_and_layers_that_are_no_unit(tmp_path: Path) -> None:
    source = write_tree(tmp_path / "tree", {})
    file = source / "iter_0000012/mp_rank_00/model_optim_rng.pt"
    edit(file, lambda v: v["model"].update({FC1: torch.ones(5, HIDDEN)}))
    with pytest.raises(LayoutError, match=f"{FC1} has 5 rows and .*linear_fc2.weight {FEED_FORWARD} columns"):
        import_megatron(source, tmp_path / "out", optimizer=False)
    edit(file, lambda v: v["model"].update({"vision_model.weight": torch.ones(3)}))
    with pytest.raises(LayoutError, match=r"mp_rank_00.*: vision_model.weight is no known parameter"):
        import_megatron(source, tmp_path / "out", optimizer=False)


def test_directories_that_are_not_whole(tmp_path: Path) -> None:
    source = write_tree(tmp_path / "tree", {"tensor": 2, "pipeline": 2})
    iteration = source / "iter_0000012"
    (iteration / "mp_rank_00_000/model_optim_rng.pt").rename(tmp_path / "aside")
    with pytest.raises(IncompleteCheckpointError, match=r"mp_rank_00_000/model_optim_rng.pt: the file is missing"):
        import_megatron(source, tmp_path / "out")
    os.mkfifo(iteration / "mp_rank_00_000/model_optim_rng.pt")
    with pytest.raises(CorruptCheckpointError, match=r"mp_rank_00_000/model_optim_rng.pt: is no regular file"):
        import_megatron(source, tmp_path / "out")
    (tmp_path / "aside").rename(iteration / "mp_rank_00_000/model_optim_rng.pt")
    shutil.rmtree(iteration / "mp_rank_01_001")
    with pytest.raises(IncompleteCheckpointError, match="no directory of tensor rank 1, pipeline rank 1"):
        import_megatron(iteration, tmp_path / "out")
    shutil.rmtree(iteration / "mp_rank_01_000")
    with pytest.raises(IncompleteCheckpointError, match="tensor_model_parallel_size=2, the tree holds 1"):
        import_megatron(source, tmp_path / "out")
    (source / "latest_checkpointed_iteration.txt").write_text("../../etc")
    with pytest.raises(CorruptCheckpointError, match="neither a number nor 'release'"):
        import_megatron(source, tmp_path / "out")
    with pytest.raises(IncompleteCheckpointError, match="no mp_rank_TT directories"):
        import_megatron(tmp_path, tmp_path / "out")


def test_flat_state_that_is_another_models_is_refused(tmp_path: Path) -> None:
    source = write_tree(tmp_path / "tree", {}, flat="new")
    file = source / "iter_0000012/mp_rank_00/distrib_optim.pt"
    key = (torch.float32, torch.float32)
    edit(file, lambda v: v[0][key]["param"][-1].add_(1))
    with pytest.raises(LayoutError, match=r"distrib_optim.pt: buffer 0: \d+ elements .* --no-optimizer"):
        import_megatron(source, tmp_path / "out")
    edit(file, lambda v: v[0][key].pop("exp_avg_sq"))
    with pytest.raises(LayoutError, match="exp_avg_sq is no flat tensor"):
        import_megatron(source, tmp_path / "out")
    edit(file, lambda v: v.update({1: v[0]}))
    with pytest.raises(LayoutError, match="2 buffers, the parameters make 1"):
        import_megatron(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert_whole(import_megatron(source, tmp_path / "out", optimizer=False))
