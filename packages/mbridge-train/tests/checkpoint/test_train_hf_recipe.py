"""Weights built from Megatron's files by a recipe, without Megatron, are those that Megatron-Bridge exports."""

from pathlib import Path
from typing import Any

import pytest
import torch
from mbridge_ckpt import RECIPE_FILE, HfRecipe, HfTensor, export_hf, open_checkpoint
from mbridge_model import Parallel
from safetensors.torch import load_file

from testing.gang import Gang
from testing.tiny_models import GEOMETRY, VOCAB_SIZE, make_model
from testing.training_runs import SHARDED, build, leave


def save(directory: Path, output: Path, parallel: Parallel, dtype: str) -> None:
    """Save the same weights twice: step 1 with the export, step 2 with the recipe alone."""
    from mbridge_train.checkpoint.save import save_checkpoint

    try:
        engine = build(directory, parallel, SHARDED, dtype=dtype)
        save_checkpoint(engine, output, step=1, loop_state={})
        save_checkpoint(engine, output, step=2, loop_state={}, export_hf=False)
    finally:
        leave()


def recipe(family: str, source: Path) -> HfRecipe:
    """Write the recipe by hand from the descriptions of the two layouts."""
    tensors = []

    def add(name: str, parameter: str, **fields: Any) -> None:
        tensors.append(HfTensor(name=name, parameter=parameter, **fields))

    head_dim = 32 if family == "qwen3" else 16
    attention = {"heads": GEOMETRY["num_attention_heads"], "groups": GEOMETRY["num_key_value_heads"]}
    add("model.embed_tokens.weight", "embedding.word_embeddings.weight", rows=VOCAB_SIZE)
    for layer in range(GEOMETRY["num_hidden_layers"]):
        ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        for kind in ("weight", "bias") if family == "qwen2" else ("weight",):
            for letter, part in (("q", "query"), ("k", "key"), ("v", "value")):
                fused = f"{ours}self_attention.linear_qkv.{kind}"
                add(f"{theirs}self_attn.{letter}_proj.{kind}", fused, part=part, **attention, head_dim=head_dim)
        if family == "qwen3":
            for letter in "qk":
                add(f"{theirs}self_attn.{letter}_norm.weight", f"{ours}self_attention.{letter}_layernorm.weight")
        add(f"{theirs}self_attn.o_proj.weight", f"{ours}self_attention.linear_proj.weight")
        add(f"{theirs}input_layernorm.weight", f"{ours}self_attention.linear_qkv.layer_norm_weight")
        for part in ("gate", "up"):
            add(f"{theirs}mlp.{part}_proj.weight", f"{ours}mlp.linear_fc1.weight", part=part)
        add(f"{theirs}mlp.down_proj.weight", f"{ours}mlp.linear_fc2.weight")
        add(f"{theirs}post_attention_layernorm.weight", f"{ours}mlp.linear_fc1.layer_norm_weight")
    add("model.norm.weight", "decoder.final_layernorm.weight")
    if family == "qwen3":
        add("lm_head.weight", "output_layer.weight", rows=VOCAB_SIZE)
    return HfRecipe(tensors=tuple(tensors), source=str(source))


@pytest.mark.parametrize(
    ("family", "tied", "dtype", "parallel"),
    [("qwen2", True, "bfloat16", Parallel(tensor=2)), ("qwen3", False, "float32", Parallel(pipeline=2))],
    ids=["qwen2", "qwen3"],
)
def test_built_weights_are_the_exported_ones(
    gang2: Gang, tmp_path: Path, family: str, tied: bool, dtype: str, parallel: Parallel
) -> None:
    source = tmp_path / "source"
    make_model(family, tied, source)
    gang2.run(save, source, tmp_path / "run", parallel, dtype)
    saved, without = (open_checkpoint(tmp_path / "run" / f"global_step_{step}") for step in (1, 2))
    assert not (without.path / "actor" / "hf_model").exists()
    written, by_hand = HfRecipe.from_bytes((without.path / RECIPE_FILE).read_bytes()), recipe(family, source)
    assert (set(written.tensors), written.source) == (set(by_hand.tensors), by_hand.source)

    built = export_hf(without.path, tmp_path / "built")
    copied = export_hf(saved.path, tmp_path / "copied")
    assert (built.weights_from, copied.weights_from) == ("recipe", "export")
    found, expected = (load_file(report.path / "model.safetensors") for report in (built, copied))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    names = {path.name for path in built.path.iterdir()}
    assert names == {path.name for path in copied.path.iterdir()} and "config.json" in names
