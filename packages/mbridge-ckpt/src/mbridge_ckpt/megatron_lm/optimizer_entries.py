"""A rank's parameters as an optimizer of Megatron-LM numbers them, and the check of the mapping to them."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from mbridge_ckpt.formats.torch_pickle import StoredTensor
from mbridge_ckpt.formats.torch_zip import LazyTensor
from mbridge_ckpt.megatron_lm.tree import MegatronTree, ModelStage, Rank

MASTER, MOMENTS = "fp32_param", ("exp_avg", "exp_avg_sq")
FIX = "import the weights alone with --no-optimizer"


@dataclass(frozen=True, slots=True)
class Entry:
    """A parameter of the rank: where its weight lies, and whether it belongs to an expert."""

    stage: ModelStage
    name: str
    weight: StoredTensor
    is_expert: bool
    is_shared_embedding: bool

    @property
    def elements(self) -> int:
        return prod(self.weight.shape)


State = dict[tuple[str, str], dict[str, LazyTensor]]
"""By (key of the stage, name in the file): master weight and moments in float32 and in the parameter's shape."""


def first_unlike(tree: MegatronTree, rank: Rank, entries: Sequence[Entry], state: State) -> str | None:
    """Return the first parameter whose master weight, rounded to the model's dtype, is not its weight."""
    import torch

    for entry in entries:
        weight = tree.read(entry.stage, entry.name, rank[0], rank[2])
        master = state[entry.stage.key, entry.name][MASTER].read()
        if not torch.equal(master.to(weight.dtype), weight):
            return entry.name
    return None
