"""Weights built from Megatron's files by a recipe, without Megatron, are those that Megatron-Bridge exports."""

from pathlib import Path
from typing import Any

import pytest
import torch
from mbridge_ckpt import RECIPE_FILE, HfRecipe, HfTensor, begin_save, export_hf, open_checkpoint
from mbridge_model import Parallel
from safetensors.torch import load_file

from testing.gang import Gang
from testing.tiny_models import GEOMETRY, VOCAB_SIZE, make_model


def save(directory: Path, output: Path, dtype: str) -> None:
    """A checkpoint of TP 2, its export included."""
    from mbridge_model import load
    from mbridge_train.checkpoint import save_checkpoint
    from mbridge_train.engine import Engine, MicroBatching
    from megatron.core import parallel_state

    try:
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        model, handle = load(
            directory, Parallel(tensor=2), {"calculate_per_token_loss": True}, dtype=getattr(torch, dtype), seed=1
        )
        engine = Engine(model, handle, micro_batching=MicroBatching(micro_batch_size=1, packed=True))
        save_checkpoint(engine, output, step=1, loop_state={})
    finally:
        parallel_state.destroy_model_parallel()


def recipe(family: str, source: Path) -> HfRecipe:
    """By hand, from the two layouts' descriptions."""
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
        add("lm_head.weight", "output_layer.weight")
    return HfRecipe(tensors=tuple(tensors), source=str(source))


@pytest.mark.parametrize(("family", "tied", "dtype"), [("qwen2", True, "bfloat16"), ("qwen3", False, "float32")])
def test_built_weights_are_the_exported_ones(gang2: Gang, tmp_path: Path, family: str, tied: bool, dtype: str) -> None:
    make_model(family, tied, tmp_path / "source")
    gang2.run(save, tmp_path / "source", tmp_path / "run", dtype)
    saved = open_checkpoint(tmp_path / "run")
    # The same checkpoint as it is with the export skipped.
    with begin_save(tmp_path / "without", step=1, layout=saved.layout) as writing:
        for record in saved.manifest.files:
            if record.path.endswith("model_optim_rng.pt"):
                writing.write_torch(record.path, saved.load_torch(record.path), placements=record.placements)
        writing.write_bytes(RECIPE_FILE, recipe(family, tmp_path / "source").to_bytes())
        without = writing.commit()
    built = export_hf(without, tmp_path / "built")
    copied = export_hf(saved.path, tmp_path / "copied")
    assert (built.weights_from, copied.weights_from) == ("recipe", "export")
    found, expected = (load_file(report.path / "model.safetensors") for report in (built, copied))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    names = {path.name for path in built.path.iterdir()}
    assert names == {path.name for path in copied.path.iterdir()} and "config.json" in names
