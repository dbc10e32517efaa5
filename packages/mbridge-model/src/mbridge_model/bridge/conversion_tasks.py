"""Megatron-Bridge's conversion tasks: each maps one Megatron parameter to its HuggingFace tensors, as views of it."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from mbridge_model.patches import Patch, PatchTable

# Megatron pads these to a multiple of the tensor-parallel size.
_VOCABULARY_PARAMETERS = ("embedding.word_embeddings.weight", "output_layer.weight")


def has_vocabulary(task: Any) -> bool:
    """Return whether the parameter has a row per token of the vocabulary."""
    return task is not None and task.global_param_name.endswith(_VOCABULARY_PARAMETERS)


def load_only(model_bridge: Any, tasks: list[Any]) -> PatchTable:
    """Return patches of `model_bridge` to load the parameters of `tasks` alone, with a padded vocabulary."""
    rows = {
        hf_names(task)[0]: task.param_weight.shape[0] * task.mapping.tp_size
        for task in tasks
        if has_vocabulary(task) and task.param_weight is not None
    }

    def padding(read: Callable[[Any, Any], Tensor]) -> Callable[[Any, Any], Tensor]:
        def read_padded(hf_param: Any, hf_state_dict: Any) -> Tensor:
            weight = read(hf_param, hf_state_dict)
            missing = rows.get(hf_param, 0) - len(weight) if isinstance(hf_param, str) else 0
            return torch.nn.functional.pad(weight, (0, 0, 0, missing)) if missing > 0 else weight

        return read_padded

    return PatchTable(
        "load the rest of the weights",
        Patch(
            target="maybe_modify_loaded_hf_weight",
            reason="it pads the vocabulary of text models only",
            wrapper=padding,
        ),
        Patch(
            target="build_conversion_tasks",
            reason="it makes a task of every parameter, those that are filled included",
            replacement=lambda *_: tasks,
        ),
        owner=model_bridge,
    )


def hf_names(task: Any) -> list[str]:
    """Return the names of the HuggingFace tensors that one parameter holds: one, or several such as q, k and v."""
    names = task.mapping.hf_param
    return [names] if isinstance(names, str) else list(names.values())


# Megatron-Bridge's mappings of one HuggingFace tensor that only gather its tensor-parallel shards.
_PLAIN_MAPPINGS = ("AutoMapping", "ColumnParallelMapping", "DirectMapping", "ReplicatedMapping", "RowParallelMapping")
_FUSED_MAPPINGS = {
    "QKVMapping": {"q": "query", "k": "key", "v": "value"},
    "GatedMLPMapping": {"gate": "gate", "up": "up"},
}


def task_parts(task: Any) -> dict[str, str] | None:
    """Return the HuggingFace name of each part of a parameter; None if the mapping is more than its parts."""
    kind, names = type(task.mapping).__name__, task.mapping.hf_param
    if isinstance(names, str):
        is_plain = kind in _PLAIN_MAPPINGS and getattr(task.mapping, "permute_dims", None) is None
        return {"whole": names} if is_plain else None
    parts = _FUSED_MAPPINGS.get(kind)
    return {parts[key]: name for key, name in names.items()} if parts and names.keys() == parts.keys() else None


def part_views(parameter: Tensor, parts: Iterable[str], *, queries: int, groups: int) -> dict[str, Tensor]:
    """Return views of the parts of a parameter, or of a tensor-parallel rank's shard of it.

    Args:
        parameter: the whole parameter or a shard.
        parts: as `export_recipe` names them: "whole" alone; "query", "key" and "value"; or "gate" and "up".
        queries: query heads in a group of a fused attention.
        groups: number of such groups in `parameter`.

    Returns:
        A view for each part: rows as in the HuggingFace tensor; for an attention [groups, rows of a group, ...].
    """
    names = set(parts)
    if names == {"whole"}:
        return {"whole": parameter}
    if names == {"gate", "up"}:
        gate, up = parameter.chunk(2)
        return {"gate": gate, "up": up}
    # Megatron-Core keeps the queries of a group, its key and its value next to each other.
    grouped = parameter.unflatten(0, (groups, queries + 2, -1))
    return {"query": grouped[:, :queries].flatten(1, 2), "key": grouped[:, queries], "value": grouped[:, queries + 1]}
