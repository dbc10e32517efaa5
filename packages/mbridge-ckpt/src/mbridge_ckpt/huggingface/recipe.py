"""The recipe by which HuggingFace tensors are made from Megatron's parameters.

It is a JSON file in the checkpoint, `actor/hf_recipe.json`, from which `export_hf` builds the HuggingFace weights later
and without Megatron:

    {"format": "mbridge-hf-recipe", "format_version": 1, "source": "/models/qwen", "tensors": [
      {"name": "lm_head.weight", "parameter": "output_layer.weight", "rows": 151936},
      {"name": "model.layers.0.self_attn.k_proj.weight", "part": "key", "heads": 28, "groups": 4, "head_dim": 128,
       "parameter": "decoder.layers.0.self_attention.linear_qkv.weight", "dtype": "bfloat16"}, …]}
"""

import json
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from mbridge_ckpt.errors import CorruptCheckpointError, LayoutError, naming
from mbridge_ckpt.files.json_text import parse_document, parse_fields, without_defaults
from mbridge_ckpt.formats.tensors import SAFETENSORS_CODES

if TYPE_CHECKING:
    from torch import Tensor

    from mbridge_ckpt.store.checkpoint import Checkpoint

RECIPE_FILE = "actor/hf_recipe.json"
FORMAT, FORMAT_VERSION = "mbridge-hf-recipe", 1
Part = Literal["whole", "query", "key", "value", "gate", "up"]
_ATTENTION = ("query", "key", "value")


@dataclass(frozen=True, kw_only=True, slots=True)
class HfTensor:
    """One HuggingFace tensor, as a part of a parameter of the whole model.

    Attributes:
        name: its HuggingFace name.
        parameter: the parameter's global name (see `ParameterPlacement`).
        part: "whole"; "query", "key" or "value": these rows of a fused weight or bias, which holds for each of `groups`
            query groups its heads / groups query heads, its key head and its value head, each of `head_dim` rows;
            "gate" or "up": the first or second half of the rows of a gated `linear_fc1`.
        heads, groups, head_dim: of the attention; given with its parts and with no other.
        rows: number of first rows of "whole" to keep, the real tokens of a padded vocabulary. None: all.
        dtype: converts the tensor, for example to "bfloat16". None: the dtype that is stored.
    """

    name: str
    parameter: str
    part: Part = "whole"
    heads: int | None = None
    groups: int | None = None
    head_dim: int | None = None
    rows: int | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        sizes = (self.heads, self.groups, self.head_dim)
        if self.part not in get_args(Part):
            raise LayoutError(f"{self.name}: part {self.part!r} is none of {', '.join(get_args(Part))}")
        if (self.part in _ATTENTION) != all(_is_positive(size) for size in sizes) or (
            self.part not in _ATTENTION and sizes != (None, None, None)
        ):
            raise LayoutError(
                f"{self.name}: heads, groups, head_dim are {sizes} with part {self.part!r}; give positive numbers with"
                " query, key and value, and none with others"
            )
        if self.heads is not None and self.groups is not None and self.heads % self.groups:
            raise LayoutError(f"{self.name}: {self.heads} heads cannot be divided into {self.groups} groups")
        if self.rows is not None and (self.part != "whole" or not _is_positive(self.rows)):
            raise LayoutError(
                f"{self.name}: rows {self.rows!r} with part {self.part!r}; a positive number with 'whole'"
            )
        if self.dtype is not None and self.dtype not in SAFETENSORS_CODES:
            raise LayoutError(f"{self.name}: dtype {self.dtype!r} is unknown to safetensors")

    def shape(self, parameter: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of this tensor, given that of the whole parameter; raises as `take`."""
        import torch

        return tuple(self.take(torch.empty(parameter, device="meta")).shape)

    def take(self, parameter: "Tensor") -> "Tensor":
        """Take this tensor out of the whole parameter; the result may be a view of it.

        Raises LayoutError if they do not fit.
        """
        import torch

        if not parameter.dim() and (self.part != "whole" or self.rows is not None):
            raise LayoutError(f"{self.name}: {self.parameter} is a scalar and has no part {self.part!r}")
        rows = parameter.shape[0] if parameter.dim() else 1
        if self.rows is not None:
            if rows < self.rows:
                raise LayoutError(f"{self.name}: {self.parameter} has {rows} rows, the recipe takes {self.rows}")
            parameter = parameter[: self.rows]
        elif self.part in ("gate", "up"):
            if rows % 2:
                raise LayoutError(f"{self.name}: {self.parameter} has {rows} rows, no gate and up projection")
            parameter = parameter.chunk(2)[0 if self.part == "gate" else 1]
        elif self.part != "whole":
            assert self.heads is not None and self.groups is not None and self.head_dim is not None
            queries, expected = self.heads // self.groups, (self.heads + 2 * self.groups) * self.head_dim
            if rows != expected:
                raise LayoutError(
                    f"{self.name}: {self.parameter} has {rows} rows; {self.heads} heads in {self.groups} groups of"
                    f" head_dim {self.head_dim} have {expected}"
                )
            grouped = parameter.unflatten(0, (self.groups, queries + 2, self.head_dim))
            begin, end = {"query": (0, queries), "key": (queries, queries + 1)}.get(self.part, (-1, None))
            parameter = grouped[:, begin:end].flatten(0, 2)
        return parameter if self.dtype is None else parameter.to(getattr(torch, self.dtype))


@dataclass(frozen=True, kw_only=True, slots=True)
class HfRecipe:
    """Every tensor of the export in its order, and the HuggingFace directory that the other files come from."""

    tensors: tuple[HfTensor, ...]
    source: str | None = None

    def __post_init__(self) -> None:
        names = Counter(tensor.name for tensor in self.tensors)
        if not names:
            raise LayoutError("recipe: it has no tensors")
        name, count = names.most_common(1)[0]
        if count > 1:
            raise LayoutError(f"recipe: {name} comes {count} times")

    def to_bytes(self) -> bytes:
        """Return JSON text for `RECIPE_FILE`; write it with `Save.write_bytes`."""
        tensors = [without_defaults(tensor) for tensor in self.tensors]
        value = {"format": FORMAT, "format_version": FORMAT_VERSION, "source": self.source, "tensors": tensors}
        return json.dumps(value, separators=(",", ":"), allow_nan=False).encode() + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes) -> "HfRecipe":
        """Parse and check untrusted text; raises CorruptCheckpointError naming the tensor and key, and CheckpointError
        for a format of a later version.
        """
        value = parse_document(data, FORMAT, FORMAT_VERSION)
        source, tensors = value.get("source"), value.get("tensors")
        if not isinstance(tensors, list) or not isinstance(source, (str, type(None))):
            raise CorruptCheckpointError("tensors is no list, or source no text")
        try:
            return cls(tensors=tuple(parse_fields(HfTensor, value, "tensor") for value in tensors), source=source)
        except LayoutError as error:
            raise CorruptCheckpointError(str(error)) from None


def read_recipe(checkpoint: "Checkpoint") -> HfRecipe:
    """Read the recipe of a checkpoint that has one; raises CheckpointError's classes, naming the file."""
    path = checkpoint.verified(RECIPE_FILE)
    with naming(path):
        return HfRecipe.from_bytes(path.read_bytes())


def _is_positive(value: object) -> bool:
    return type(value) is int and value > 0
