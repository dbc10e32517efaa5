"""The plain optimizer's state in `model_optim_rng.pt`: moments by index, counted through the parameter groups.

Within a group, parameters have the order of the model. The float32 master weights of bfloat16 and float16 models are
stored by group; those of a float32 model are its weights.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from mbridge_ckpt.errors import LayoutError
from mbridge_ckpt.formats.torch_pickle import StoredTensor
from mbridge_ckpt.formats.torch_reader import TorchFileReader
from mbridge_ckpt.formats.torch_zip import LazyTensor
from mbridge_ckpt.megatron_lm.optimizer_entries import FIX, MASTER, MOMENTS, Entry, State, first_unlike
from mbridge_ckpt.megatron_lm.tree import MegatronTree, Rank

if TYPE_CHECKING:
    from torch import Tensor


def from_groups(tree: MegatronTree, rank: Rank, entries: list[Entry], part: dict[str, Any]) -> State:
    """Return the state of `entries`, all parameters of one optimizer; raises LayoutError if it does not fit them.

    With half-precision models the master weights prove the mapping; with others it rests on counts, order and shapes.
    """
    reader = tree.reader(tree.path(rank))
    inner = part["optimizer"] if isinstance(part.get("optimizer"), dict) else part
    groups, moments = inner.get("param_groups"), inner.get("state")
    masters = part.get("fp32_from_fp16_params", part.get("fp32_from_fp16"))
    if not isinstance(groups, list) or not isinstance(moments, dict):
        raise LayoutError(f"{reader.path}: the optimizer has no param_groups and state; {FIX}")
    indices = [_indices(group) for group in groups]
    by_group = masters if isinstance(masters, list) and len(masters) == len(groups) else [[]] * len(groups)
    for rule in (_is_vector, _is_vector_but_query_key_norm):
        members = _members(groups, indices, entries, rule)
        found: State = {}
        for numbers, names, halves in zip(indices, members, by_group, strict=True):
            found |= _of_group(reader, numbers, names, moments, list(halves) if isinstance(halves, list) else [])
        if len(found) == len(entries) and first_unlike(tree, rank, entries, found) is None:
            return found
    raise LayoutError(
        f"{reader.path}: the optimizer's groups of {[len(numbers) for numbers in indices]} parameters do not fit the"
        f" model's {len(entries)}, in its order and shapes; {FIX}"
    )


def _of_group(
    reader: TorchFileReader, indices: list[int], names: list[Entry], moments: dict[Any, Any], masters: list[Any]
) -> State:
    """Return the state of a group's parameters, without those whose tensors are missing or of another shape."""
    found: State = {}
    halves = iter(masters)
    for index, entry in zip(indices, names, strict=False):
        own = moments.get(index)
        is_half = entry.weight.dtype in ("bfloat16", "float16")
        stored = {MASTER: next(halves, None) if is_half else entry.weight}
        stored |= {kind: own.get(kind) if isinstance(own, dict) else None for kind in MOMENTS}
        tensors = {kind: tensor for kind, tensor in stored.items() if isinstance(tensor, StoredTensor)}
        if len(tensors) == len(stored) and all(tensor.shape == entry.weight.shape for tensor in tensors.values()):
            found[entry.stage.key, entry.name] = {
                kind: LazyTensor(entry.weight.shape, "float32", partial(_read_float, reader, tensor))
                for kind, tensor in tensors.items()
            }
    return found


def _is_vector(entry: Entry) -> bool:
    """Megatron-Core applies no weight decay to vectors and biases, and so puts them into a separate group."""
    return len(entry.weight.shape) == 1 or entry.name.endswith(".bias")


def _is_vector_but_query_key_norm(entry: Entry) -> bool:
    """The same rule under its option apply_wd_to_qk_layernorm."""
    return _is_vector(entry) and "q_layernorm." not in entry.name and "k_layernorm." not in entry.name


def _indices(group: Any) -> list[int]:
    """Return the numbers of a group's parameters in the optimizer's state."""
    numbers = group.get("params") if isinstance(group, dict) else None
    return [number for number in numbers if isinstance(number, int)] if isinstance(numbers, list) else []


def _members(
    groups: list[Any], indices: list[list[int]], entries: list[Entry], rule: Callable[[Entry], bool]
) -> list[list[Entry]]:
    """Return the parameters of each group, in order; none for a group that has another number of them."""
    alone = sum(bool(numbers) for numbers in indices) == 1
    members = []
    for group, numbers in zip(groups, indices, strict=True):
        undecayed = isinstance(group, dict) and group.get("wd_mult") == 0.0
        kept = [entry for entry in entries if alone or rule(entry) is undecayed]
        members.append(kept if len(kept) == len(numbers) else [])
    return members


def _read_float(reader: TorchFileReader, stored: StoredTensor) -> "Tensor":
    return reader.read(stored).float()
